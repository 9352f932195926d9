"""The result of a search, read from its run folder; the search may still be running."""

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distprune.core.config import read_yaml
from distprune.core.masks import Masks
from distprune.environment import environment
from distprune.errors import UserError, command
from distprune.store.folder import RunFolder
from distprune.store.place import is_url
from distprune.store.trials import read_trials

if TYPE_CHECKING:
    import pyarrow as pa

    from distprune.report.sanity import Sanity
    from distprune.search.replay import Replay

Listener = Callable[[str, dict[str, Any]], None]


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

    def sanity(self, *, seeds: int = 3, device: str = "cpu") -> "Sanity":
        """Check what its mask knows besides its layer budgets. Raises UserError if it has none."""
        from distprune.api import sanity

        return sanity(str(self.folder), trial=self.number, seeds=seeds, device=device)

    def replay(self, *, device: str | None = None) -> "Replay":
        """Run it again from nothing and compare it with its record. Raises UserError if it cannot be replayed."""
        from distprune.api import replay

        return replay(str(self.folder), self.number, device=device)

    def export(self, to: str | Path, *, formats: Iterable[str] | None = None, listen: Listener = lambda event, facts: None) -> Path:
        """Write masks, pruned weights, a stand-alone model, the other `formats` and a manifest to the new folder `to`.

        `formats` are names of `distprune list format`, by default those that need no further package. A trial that has kept no weights is
        run again first, as far as it came, and `listen` hears of it. Raises UserError for an unknown format, a folder that is not empty
        and a trial that failed; nothing is written then.
        """
        from distprune.export.writing import check_target, chosen, export
        from distprune.search.finale import keeps_weights, load_trial
        from distprune.search.replay import rebuilt

        formats = formats if formats is None or isinstance(formats, str) else list(formats)
        chosen(formats)  # what is wrong is said before anything is trained
        check_target(to)
        self.folder.check_real("exported")
        versions = read_yaml(self.folder.search_yaml)["environment"]
        facts = {"trial": self.number, "key": self.row["recipe_key"], "run": self.folder.path.name, "ended": self.row["ended"]}
        if self.row["ended"] == "finished" and keeps_weights(self.folder, self.number):
            run = load_trial(self.folder, self.number, self.recipe)
        else:
            listen("replaying", {"trial": self.number, "ended": self.row["ended"], "cost": self.row["cost"]})
            run, replayed = rebuilt(str(self.folder), self.number, listen=listen)
            facts["replayed"], versions = replayed.lines(), environment()
            listen("rebuilt", {"lines": replayed.lines()})
        return export(run, to, {**facts, "versions": versions}, formats=formats)


class Result:
    """What a search found."""

    def __init__(self, path: str | Path | RunFolder) -> None:
        """Raises UserError if `path` is not a run folder or the URL of a run, of which a copy is read as it is now."""
        self.folder = path if isinstance(path, RunFolder) else RunFolder.existing(path)

    @property
    def trials(self) -> "pa.Table":
        """A row a trial; while the search runs, some seconds old. Raises UserError if no trial has begun yet."""
        if not self.folder.trials.exists():
            raise UserError(f"{self.folder} has no trials yet. Wait, or go on with: {command(f'resume {self.folder.quoted}')}")
        return read_trials(self.folder.trials)

    def report(self, *, to: str | Path | None = None) -> Path:
        """Write `report.html`, a page about the search in one file, into its folder, and return where it is.

        With `to`, a new or empty folder, each figure goes there as PNG and its numbers as CSV. Raises UserError where something cannot be
        written.
        """
        from distprune.report import images, page
        from distprune.report.data import Data

        if to is not None:
            images.check_target(to)
        data = Data.read(self.folder)
        drawn = page.draw(data)
        if to is not None:
            images.write(drawn, to)
        return page.write(data, drawn)

    def rows(self) -> list[TrialResult]:
        """All trials in order."""
        return [TrialResult(self.folder, row) for row in self.trials.to_pylist()]

    def trial(self, number: int) -> TrialResult:
        """The trial of that number. Raises UserError if there is none."""
        rows = self.rows()
        if not 0 <= number < len(rows):
            raise UserError(f"{self.folder} has no trial {number}. Its trials are 0 to {len(rows) - 1}.")
        return rows[number]

    def pareto(self) -> list[TrialResult]:
        """The front on validation, the most accurate first."""
        return sorted(
            (trial for trial in self.rows() if trial.row["pareto"]), key=lambda trial: (-trial.row["objective"], trial.row["kept"])
        )

    def hypervolume(self) -> float:
        """Of the front, over the objective and the tenfold reductions of prunable weights, both from 0: one at 1 % with 0.9 is 1.8."""
        from distprune.search.volume import hypervolume

        points = [(float(trial.row["objective"]), -math.log10(1 - trial.row["sparsity"])) for trial in self.pareto()]
        return hypervolume(points, (0.0, 0.0))

    def best(self, *, trial: int | None = None, max_density: float | None = None) -> TrialResult:
        """The most accurate trial of the front on validation, among those that keep at most a share `max_density` of the weights;
        or the trial of that number. Raises UserError if there is none."""
        if max_density is not None and (trial is not None or not 0 < max_density <= 1):
            got = f"{max_density:g}" if trial is None else f"{max_density:g} and trial {trial}"
            raise UserError(f"max_density must be a share in (0, 1], without a trial, got {got}. For 5 % write 0.05.")
        front = self.pareto()
        if trial is not None:
            chosen = [row for row in self.rows() if row.number == trial]
            what = f"trial {trial}"
        else:
            chosen = [row for row in front if max_density is None or 1 - row.row["sparsity"] <= max_density]
            what = "a finished trial" if max_density is None else f"a trial that keeps at most {max_density:.1%} of the weights"
        if not chosen:
            numbers = ", ".join(f"{row.number} ({1 - row.row['sparsity']:.1%})" for row in front)
            raise UserError(f"{self.folder} has no {what.removeprefix('a ')}. Its front (kept weights): {numbers or 'empty'}.")
        return chosen[0]


@dataclass(frozen=True)
class FoundMasks:
    """Masks with the recipe that made them, from a run folder or an export."""

    name: str
    recipe: Mapping[str, Any]
    masks: Masks
    value: float  # the objective on validation, as it was recorded
    threads: int | None = None  # that the trial had; None where it is not recorded

    @property
    def notes(self) -> tuple[str, ...]:
        """What the masks are, in one line."""
        return (f"{self.name}: {self.masks.kept:,} of {self.masks.total:,} weights kept, {self.value:.4f} on validation as recorded.",)


def found_masks(path: str | Path, trial: int | None = None) -> FoundMasks:
    """The masks of a trial in a run folder, by default the most accurate pruned one of the front, or those of an export folder.

    Raises UserError if there are none.
    """
    if is_url(path):
        return _of_trial(Result(path), trial)
    path = Path(path)
    if (path / "manifest.json").is_file():
        if trial is not None:
            raise UserError(f"{path} is the export of one trial, so there is none to choose, got --trial {trial}. Leave it out.")
        return _exported(path)
    if not RunFolder(path).search_yaml.is_file():
        raise UserError(f"{path} is neither a run folder, which has a search.yaml, nor an export, which has a manifest.json.")
    return _of_trial(Result(path), trial)


def _exported(path: Path) -> FoundMasks:
    from distprune.export.reading import open_export

    export = open_export(path)
    masks, manifest = export.masks, export.manifest
    try:
        value = next(iter(manifest["metrics"]["validation"].values()))
        name = f"{path} (trial {manifest['trial']} of {manifest['run']})" if "trial" in manifest else str(path)
        return FoundMasks(name, dict(manifest["recipe"]), masks, float(value))
    except (ValueError, KeyError, TypeError, AttributeError, StopIteration) as error:
        raise UserError(
            f"{path / 'manifest.json'} is not the manifest of an export ({type(error).__name__}: {error}). Export again."
        ) from error


def _of_trial(result: Result, trial: int | None) -> FoundMasks:
    front = ", ".join(f"{row.number} ({1 - row.row['sparsity']:.1%})" for row in result.pareto()) or "empty"
    if trial is None:
        pruned = [row for row in result.pareto() if row.row["sparsity"]]
        if not pruned:
            raise UserError(f"{result.folder} has no pruned trial on its front (kept weights): {front}. There is no mask to check.")
        trial = pruned[0].number
    chosen = result.best(trial=trial)
    if chosen.row["sparsity"] == 0:
        raise UserError(f"Trial {trial} is dense: there is no mask to check. Choose a pruned one with --trial. The front: {front}.")
    if not result.folder.masks_file(trial).is_file():
        raise UserError(f"Trial {trial} has no masks: only trials on the front keep them, once the search has ended. The front: {front}.")
    threads = read_yaml(result.folder.search_yaml).get("search", {}).get("workers", {}).get("cpus")
    name = f"trial {trial} of {result.folder}"
    return FoundMasks(name, chosen.recipe, chosen.masks, float(chosen.row["objective"]), threads)
