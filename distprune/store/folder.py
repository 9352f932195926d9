"""Where everything of a run lies."""

import os
import shlex
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distprune.core.config import read_yaml
from distprune.errors import UserError
from distprune.store import copies, files
from distprune.store.place import Objects, answering, check_url, is_url, split


@dataclass(frozen=True)
class RunFolder:
    """A run folder; nothing in it is written or read under a path that is not named here.

    Of a run at a URL it is the folder of this machine from which that is written (`mirror.py`), or a copy that is read (`copies.py`).
    """

    path: Path
    url: str | None = None

    def __str__(self) -> str:
        """Where the run lies, as its user names it."""
        return self.url or str(self.path)

    @property
    def quoted(self) -> str:
        """The same as a command takes it."""
        return shlex.quote(str(self))

    @property
    def storage(self) -> str:
        """What it lies in: a folder or a URL."""
        return split(self.url)[0] if self.url else str(self.path.parent)

    @property
    def place(self) -> str:
        """Where workers find its checkpoints: a folder or a URL."""
        return self.url or str(self.path.absolute())

    @classmethod
    def existing(cls, path: str | Path) -> "RunFolder":
        """The run folder at `path`, for reading. Raises UserError if there is none."""
        if is_url(path):
            return cls(copies.copy_of(str(path)), str(path))
        folder = cls(Path(path))
        if not folder.search_yaml.is_file():
            others = sorted(other.parent for other in folder.path.parent.glob("*/search.yaml")) if folder.path.parent.is_dir() else []
            known = f" There are: {', '.join(map(str, others[:8]))}." if others else " Start one with: distprune search configs/digits.yaml"
            raise UserError(f"{path} is not a run folder: it has no search.yaml.{known}")
        return folder

    @classmethod
    @contextmanager
    def driven(cls, path: str | Path) -> Iterator["RunFolder"]:
        """The run folder at `path`, held for one driver. Raises UserError if there is none, or another process of this machine holds it."""
        if is_url(path):
            check_url(url := str(path), "The run")
            folder = cls(copies.here(url, "runs"), url)
            folder.checkpoints.mkdir(parents=True, exist_ok=True)
        else:
            folder = cls.existing(path)
        with files.lock(folder.path):
            if folder.url:
                copies.bring(folder.url, folder.path)
            yield folder

    def simulated(self) -> dict[str, Any] | None:
        """What a simulated search says of itself; None for a real one."""
        facts = read_yaml(self.search_yaml)
        return facts.get("simulated")

    def check_real(self, done: str) -> None:
        """Raise UserError for a simulated search: it holds no networks, so it cannot be e.g. exported."""
        if simulated := self.simulated():
            raise UserError(
                f"{self} is a simulated search, whose trials were looked up in {simulated['run']}: it cannot be {done}. "
                "Run the search itself, or simulate it again under another name."
            )

    def check_new(self) -> None:
        """Raise UserError if something is there already."""
        there = self._there()
        if there and copies.SEARCH not in there:  # nothing to resume: another folder, or a search killed before it began
            raise UserError(f"{self} exists already and holds no search. Remove it, or choose another name: --name NAME.")
        if there:
            raise UserError(f"{self} exists already. Go on with it: distprune resume {self.quoted}; or choose another name: --name NAME.")

    @property
    def is_there(self) -> bool:
        """Whether something lies there."""
        return bool(self._there())

    def _there(self) -> list[str]:
        """The names of what lies there."""
        if self.url is None:
            return os.listdir(self.path) if self.path.exists() else []
        with answering(self.url):
            return [name for name, _, _ in Objects.open(self.url).list()]

    def create(self) -> "RunFolder":
        """Make the folder."""
        self.check_new()
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        if self.url:
            with files.lock(self.path):
                copies.clear(self.path)  # what goes up from here is this run
            self.checkpoints.mkdir()
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
    def report_html(self) -> Path:
        """The page about the search."""
        return self.path / "report.html"

    @property
    def is_driven(self) -> bool | None:
        """Whether a driver is at work on the search; None where it cannot be asked: of a copy, or on another machine."""
        return None if self.url else files.is_locked(self.path)

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
