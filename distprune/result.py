"""The result of a search, read from its run folder; the search may still be running."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distprune.core.config import read_yaml
from distprune.core.masks import Masks
from distprune.errors import UserError, command
from distprune.store.folder import RunFolder
from distprune.store.trials import read_trials

if TYPE_CHECKING:
    import pyarrow as pa


@dataclass(frozen=True)
class TrialResult:
    """One trial: a row of `trials.parquet`."""

    folder: RunFolder
    row: Mapping[str, Any]

    @property
    def number(self) -> int:
        """Its number."""
        return int(self.row["number"])

    @property
    def recipe(self) -> dict[str, Any]:
        """Its recipe, as YAML writes it: `distprune run` runs it again."""
        return dict(json.loads(self.row["recipe"]))

    @property
    def masks(self) -> Masks:
        """Its masks. Raises UserError if the trial is not on the front."""
        return Masks.load(self.folder.masks_file(self.number))

    def export(self, to: str | Path) -> Path:
        """Write masks, pruned weights, a stand-alone model and a manifest to the new folder `to`; UserError if no weights are left."""
        from distprune.export.network import export
        from distprune.search.finale import load_trial

        run = load_trial(self.folder, self.number, self.recipe)
        environment = read_yaml(self.folder.search_yaml)["environment"]
        return export(run, to, {"trial": self.number, "key": self.row["recipe_key"], "run": self.folder.path.name, "versions": environment})


class Result:
    """What a search found."""

    def __init__(self, path: str | Path) -> None:
        """Raises UserError if `path` is not a run folder."""
        self.folder = RunFolder.existing(path)

    @property
    def trials(self) -> "pa.Table":
        """A row a trial; while the search runs, some seconds old. Raises UserError if no trial has begun yet."""
        if not self.folder.trials.exists():
            raise UserError(f"{self.folder.path} has no trials yet. Wait, or go on with: {command(f'resume {self.folder.path}')}")
        return read_trials(self.folder.trials)

    def rows(self) -> list[TrialResult]:
        """All trials in order."""
        return [TrialResult(self.folder, row) for row in self.trials.to_pylist()]

    def pareto(self) -> list[TrialResult]:
        """The front on validation, the most accurate first."""
        return sorted(
            (trial for trial in self.rows() if trial.row["pareto"]), key=lambda trial: (-trial.row["objective"], trial.row["kept"])
        )

    def best(self, *, trial: int | None = None, max_density: float | None = None) -> TrialResult:
        """The most accurate trial of the front on validation, among those that keep at most a share `max_density` of the weights;
        or the trial of that number. Raises UserError if there is none."""
        front = self.pareto()
        if trial is not None:
            chosen = [row for row in self.rows() if row.number == trial]
            what = f"trial {trial}"
        else:
            chosen = [row for row in front if max_density is None or 1 - row.row["sparsity"] <= max_density]
            what = "a finished trial" if max_density is None else f"a trial that keeps at most {max_density:.1%} of the weights"
        if not chosen:
            numbers = ", ".join(f"{row.number} ({1 - row.row['sparsity']:.1%})" for row in front)
            raise UserError(f"{self.folder.path} has no {what.removeprefix('a ')}. Its front (kept weights): {numbers or 'empty'}.")
        return chosen[0]
