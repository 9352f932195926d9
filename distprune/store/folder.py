"""Where everything of a run lies."""

import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distprune.core.config import read_yaml
from distprune.errors import UserError


@dataclass(frozen=True)
class RunFolder:
    """A run folder; nothing in it is written or read under a path that is not named here."""

    path: Path

    @classmethod
    def existing(cls, path: str | Path) -> "RunFolder":
        """The run folder at `path`. Raises UserError if there is none."""
        folder = cls(Path(path))
        if not folder.search_yaml.is_file():
            others = sorted(other.parent for other in folder.path.parent.glob("*/search.yaml")) if folder.path.parent.is_dir() else []
            known = f" There are: {', '.join(map(str, others[:8]))}." if others else " Start one with: distprune search configs/digits.yaml"
            raise UserError(f"{path} is not a run folder: it has no search.yaml.{known}")
        return folder

    def simulated(self) -> dict[str, Any] | None:
        """What a simulated search says of itself; None for a real one."""
        facts = read_yaml(self.search_yaml)
        return facts.get("simulated")

    def check_real(self, done: str) -> None:
        """Raise UserError for a simulated search: it holds no networks, so it cannot be e.g. exported."""
        if simulated := self.simulated():
            raise UserError(
                f"{self.path} is a simulated search, whose trials were looked up in {simulated['run']}: it cannot be {done}. "
                "Run the search itself, or simulate it again under another name."
            )

    def check_new(self) -> None:
        """Raise UserError if something is there already."""
        if self.path.exists() and any(self.path.iterdir()):
            if not self.search_yaml.is_file():  # nothing to resume: another folder, or a search killed before it began
                raise UserError(f"{self.path} exists already and holds no search. Remove it, or choose another name: --name NAME.")
            raise UserError(
                f"{self.path} exists already. Go on with it: distprune resume {self.path}; or choose another name: --name NAME."
            )

    def create(self) -> "RunFolder":
        """Make the folder."""
        self.check_new()
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        return self

    @property
    def search_yaml(self) -> Path:
        """The resolved search, versions and commit."""
        return self.path / "search.yaml"

    @property
    def journal(self) -> Path:
        """Optuna's journal: the truth about trials."""
        return self.path / "study.journal"

    @property
    def learned(self) -> Path:
        """Trials of earlier searches that the sampler learns from."""
        return self.path / "learned.json"

    @property
    def reports(self) -> Path:
        """All reports, as an append-only Arrow stream."""
        return self.path / "reports.arrows"

    @property
    def reports_parquet(self) -> Path:
        """The same, once the search has ended."""
        return self.path / "reports.parquet"

    @property
    def trials(self) -> Path:
        """A row a trial."""
        return self.path / "trials.parquet"

    @property
    def full(self) -> Path:
        """Its time of change is when somebody who had to write found the disk, or the user's share of it, full."""
        return self.path / ".full"

    def say_full(self, path: Path, failed: int) -> None:
        """Leave that sign, which needs no space where the file is there; for `files.telling`."""
        if failed:
            with suppress(OSError):
                os.utime(self.full)

    @property
    def masks(self) -> Path:
        """Masks of the trials on the front."""
        return self.path / "masks"

    @property
    def checkpoints(self) -> Path:
        """States of running trials and of those on the front."""
        return self.path / "checkpoints"

    def masks_file(self, trial: int) -> Path:
        """The masks of one trial."""
        return self.masks / f"{int(trial)}.safetensors"

    def dropped(self, trial: int) -> Path:
        """Says that a trial of the front has lost its weights for want of space."""
        return self.checkpoints / str(int(trial)) / "dropped"

    def checkpoint(self, trial: int, attempt: str, index: int) -> Path:
        """The folder of a checkpoint. Raises ValueError for an attempt that is not a plain name."""
        if not attempt.isalnum():
            raise ValueError(f"an attempt must be letters and digits, got {attempt!r}")
        return self.checkpoints / str(int(trial)) / attempt / str(int(index))
