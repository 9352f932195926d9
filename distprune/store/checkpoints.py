"""States of running trials and of those on the front: in a run folder, or straight at its URL, as workers write them from anywhere.

checkpoints/<trial>/<attempt>/<report>/state.safetensors
checkpoints/<trial>/dropped                                 the trial is on the front and has lost its weights for want of space
"""

import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

from distprune.store import files
from distprune.store.folder import RunFolder
from distprune.store.place import Objects, insist, is_url

T = TypeVar("T")

FOLDER, STATE, DROPPED = "checkpoints", "state.safetensors", "dropped"
_STATE = re.compile(rf"{FOLDER}/(\d+)/([0-9A-Za-z]+)/(\d+)/{re.escape(STATE)}")
_MARK = re.compile(rf"{FOLDER}/(\d+)/{DROPPED}")
_REASON = b"deleted to keep to limits.disk\n"


class Checkpoint(NamedTuple):
    """Which checkpoint of a trial: of two, the greater has come farther."""

    report: int  # that it was written with
    attempt: str


@dataclass
class Held:
    """What lies there of one trial."""

    sizes: dict[Checkpoint, int] = field(default_factory=dict)  # bytes
    dropped: bool = False  # it is marked as having lost its weights

    def farthest_first(self) -> list[Checkpoint]:
        """All of them; of two attempts that have come equally far, always the same goes first."""
        return sorted(self.sizes, key=lambda at: (-at.report, at.attempt))


class Checkpoints(Protocol):
    """The checkpoints of a search."""

    def write(self, trial: int, at: Checkpoint, fill: Callable[[Path], None]) -> int:
        """Keep what `fill` writes to the path that it is given, at once; returns its bytes."""

    def reading(self, trial: int, at: Checkpoint) -> AbstractContextManager[Path]:
        """A path to read a checkpoint at."""

    def held(self, trial: int) -> Held:
        """What there is of a trial."""

    def all(self) -> Mapping[int, Held]:
        """The same of every trial that has something."""

    def tidy(self, trial: int) -> None:
        """Delete what was begun and never finished."""

    def remove(self, trial: int, at: Checkpoint | None = None) -> None:
        """Delete one checkpoint of a trial, or all that there is of it."""

    def drop(self, trial: int) -> None:
        """Delete all checkpoints of a trial and leave the mark that says so."""


def checkpoints_at(place: str, *, patient: bool = False) -> Checkpoints:
    """Those of the run folder or URL `place`; who is `patient` waits for a store that does not answer, else it raises OSError."""
    return AtUrl(Objects.open(place), insist if patient else _once) if is_url(place) else InFolder(RunFolder(Path(place)))


def _once(work: Callable[[], T]) -> T:
    return work()


class InFolder:
    """Checkpoints in a run folder: each is a folder of its own, which is renamed when it is complete. A full disk is waited for."""

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder

    def write(self, trial: int, at: Checkpoint, fill: Callable[[Path], None]) -> int:
        target = self._folder.checkpoint(trial, at.attempt, at.report)
        with files.telling(self._folder.say_full):
            files.publish_folder(target, lambda aside: fill(aside / STATE))
        return (target / STATE).stat().st_size

    @contextmanager
    def reading(self, trial: int, at: Checkpoint) -> Iterator[Path]:
        yield self._folder.checkpoint(trial, at.attempt, at.report) / STATE

    def held(self, trial: int) -> Held:
        found = [path for path in self._of(trial).glob("*/*") if path.name.isdigit() and path.parent.name.isalnum()]
        sizes = {Checkpoint(int(path.name), path.parent.name): sum(file.stat().st_size for file in path.glob("*")) for path in found}
        return Held(sizes, self._folder.dropped(trial).exists())

    def all(self) -> Mapping[int, Held]:
        return {int(path.name): self.held(int(path.name)) for path in self._folder.checkpoints.glob("*") if path.name.isdigit()}

    def tidy(self, trial: int) -> None:
        for unfinished in self._of(trial).glob("*/.*"):
            shutil.rmtree(unfinished, ignore_errors=True)

    def remove(self, trial: int, at: Checkpoint | None = None) -> None:
        shutil.rmtree(self._of(trial) if at is None else self._folder.checkpoint(trial, at.attempt, at.report), ignore_errors=True)

    def drop(self, trial: int) -> None:
        files.publish(self._folder.dropped(trial), _REASON)
        for attempt in self._of(trial).iterdir():
            if attempt.is_dir():
                shutil.rmtree(attempt, ignore_errors=True)

    def _of(self, trial: int) -> Path:
        return self._folder.checkpoints / str(int(trial))


class AtUrl:
    """Checkpoints at a URL: each is one object. `ask` has the store do something, and says what becomes of it where it does not answer."""

    def __init__(self, objects: Objects, ask: Callable[[Callable[[], Any]], Any] = _once) -> None:
        self._objects, self._ask = objects, ask

    def write(self, trial: int, at: Checkpoint, fill: Callable[[Path], None]) -> int:
        with tempfile.TemporaryDirectory(prefix="distprune-checkpoint-") as folder:
            path = Path(folder) / STATE
            files.patiently(path, lambda: fill(path))
            self._ask(lambda: self._objects.send(path, _name(trial, at)))
            return path.stat().st_size

    @contextmanager
    def reading(self, trial: int, at: Checkpoint) -> Iterator[Path]:
        with tempfile.TemporaryDirectory(prefix="distprune-checkpoint-") as folder:
            path = Path(folder) / STATE
            files.patiently(path, lambda: self._ask(lambda: self._objects.bring(_name(trial, at), path)))
            yield path

    def held(self, trial: int) -> Held:
        return self._found(f"{FOLDER}/{int(trial)}").get(trial, Held())

    def all(self) -> Mapping[int, Held]:
        return self._found(FOLDER)

    def tidy(self, trial: int) -> None:
        """An upload that was not finished is no object."""

    def _found(self, under: str) -> dict[int, Held]:
        found: dict[int, Held] = {}
        for name, size, _ in self._ask(lambda: self._objects.list(under)):
            if match := _STATE.fullmatch(name):
                found.setdefault(int(match[1]), Held()).sizes[Checkpoint(int(match[3]), match[2])] = size
            elif match := _MARK.fullmatch(name):
                found.setdefault(int(match[1]), Held()).dropped = True
        return found

    def remove(self, trial: int, at: Checkpoint | None = None) -> None:
        if at is None:
            self._ask(lambda: self._objects.remove_all(f"{FOLDER}/{int(trial)}"))
        else:
            self._ask(lambda: self._objects.remove(_name(trial, at)))

    def drop(self, trial: int) -> None:
        self._ask(lambda: self._objects.put(f"{FOLDER}/{int(trial)}/{DROPPED}", _REASON))
        for at in self.held(trial).sizes:
            self.remove(trial, at)


def _name(trial: int, at: Checkpoint) -> str:
    """Of a checkpoint's object. Raises ValueError for an attempt that is not a plain name."""
    name = f"{FOLDER}/{int(trial)}/{at.attempt}/{int(at.report)}/{STATE}"
    if not _STATE.fullmatch(name):
        raise ValueError(f"an attempt must be letters and digits, got {at.attempt!r}")
    return name
