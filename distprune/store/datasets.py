"""Data sets that the workers of a node read once: the first decodes, all map what it has written.

They lie in a folder of this user on this machine. What is under a key is what its sources held when they were read. Nothing here is needed:
wherever it cannot be had, a process reads its data by itself.
"""

import fcntl
import os
import stat
import tempfile
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from distprune.core.data import dataset as code
from distprune.core.data.dataset import Dataset
from distprune.core.keys import digest
from distprune.core.registry import Choice
from distprune.store.mapped import NotShared, open_dataset, remove_unused, write_dataset

FOLDER = "DISTPRUNE_NODE_CACHE"  # names another place than the system's folder for temporary files, or 'off'
WAIT_S = 900.0  # for another process to read the data, before it is read a second time
_LOCKS = 64  # several data sets may share one
_MARK_BYTES = 64  # of what the lock's file says
_LOOK_EVERY_S = 0.05
_LIBRARIES = ("distprune", "torch", "torchvision", "numpy", "pillow", "pyarrow", "scikit-learn")

_sleep = time.sleep
_in_use: list[int] = []  # the open file of the data set that this process has mapped


class SharedData:
    """How the processes of a search on one node come by a data set.

    `driver` is who began the search: what a user's function reads only that function knows, so it is shared for as long as a driver lives.
    """

    def __init__(self, driver: str = "") -> None:
        self._driver = driver

    def __call__(self, choice: Choice, make: Callable[[], Dataset]) -> Dataset:
        """The data set of a choice, which `make` reads. What that raises is raised."""
        try:
            found = self._wait(choice)
        except OSError:  # no folder, no locks
            found = None
        if not isinstance(found, _Turn):
            return found or make()
        with found as turn:
            dataset = make()
            return self._publish(turn, choice, dataset) or dataset

    def _wait(self, choice: Choice) -> "Dataset | _Turn | None":
        """The data set where it has been read already, this process's turn to do so, or None where it is to read it for itself."""
        folder = node_folder()
        while folder is not None and (key := self._key(choice)) is not None:
            if (found := _opened(folder / key)) is not None:
                return found
            turn = _Turn.take(folder, key)
            if turn is None:
                return None
            if self._key(choice) == key:
                if (found := _opened(folder / key)) is None:
                    return turn
                turn.release()
                return found
            turn.release()  # the sources have changed, or were downloaded by another
        return None

    def _publish(self, turn: "_Turn", choice: Choice, dataset: Dataset) -> Dataset | None:
        try:
            if self._key(choice) == turn.key:  # else it may be part old and part new
                remove_unused(turn.folder, turn.key)
                write_dataset(turn.folder / turn.key, dataset, {"own": bool(self._own(choice))})
                return _opened(turn.folder / turn.key)
        except (OSError, NotShared):
            pass
        turn.fail()
        return None

    def _own(self, choice: Choice) -> str:
        """The driver, for data of which nobody else may be sure that it is still the same."""
        return self._driver if choice.entry.facts["files"] is None else ""

    def _key(self, choice: Choice) -> str | None:
        """What a data set depends on; None where that is not known."""
        files = choice.entry.facts["files"]
        if files is None and not self._driver:
            return None
        sources = sorted({*Path(code.__file__).parent.glob("*.py"), *(map(Path, files(choice)) if files else ())})
        where = os.getcwd() if files is None else ""
        return digest(choice, [_facts(path) for path in sources], _versions(), self._own(choice), where)[:32]


def node_folder() -> Path | None:
    """This user's own folder on this machine, which is made; None if there is none that nobody else can write to."""
    place = os.environ.get(FOLDER) or tempfile.gettempdir()
    if place == "off":
        return None
    folder = Path(place).expanduser() / f"distprune-{os.getuid()}"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = os.lstat(folder)
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or stat.S_IMODE(found.st_mode) & 0o077:
        return None
    (folder / "locks").mkdir(mode=0o700, exist_ok=True)
    return folder


class _Turn:
    """The right to read a data set for all; the system takes it back from a process that dies."""

    def __init__(self, folder: Path, key: str, lock: int) -> None:
        self.folder, self.key, self._lock = folder, key, lock

    @classmethod
    def take(cls, folder: Path, key: str) -> "_Turn | None":
        """Wait for it. None if that took too long, or if who had it in the meantime could not share what it has read."""
        lock = os.open(folder / "locks" / f"{int(key, 16) % _LOCKS:02}", os.O_RDWR | os.O_CREAT, 0o600)
        before, until = os.pread(lock, _MARK_BYTES, 0), time.monotonic() + WAIT_S
        try:
            while True:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > until:
                        os.close(lock)
                        return None
                    _sleep(_LOOK_EVERY_S)
            if (mark := os.pread(lock, _MARK_BYTES, 0)) != before and mark.startswith(_failed(key)):
                os.close(lock)
                return None
            os.pwrite(lock, bytes(_MARK_BYTES), 0)  # has the space that `fail` needs, as the disk may be full then
        except BaseException:
            os.close(lock)
            raise
        return cls(folder, key, lock)

    def fail(self) -> None:
        """Have those that wait read for themselves, all at once."""
        with suppress(OSError):
            os.pwrite(self._lock, _failed(self.key) + uuid.uuid4().bytes, 0)  # no two marks are the same

    def release(self) -> None:
        """Let the next one have it, though a process that was forked meanwhile may have the lock's file open."""
        fcntl.flock(self._lock, fcntl.LOCK_UN)
        os.close(self._lock)

    def __enter__(self) -> "_Turn":
        return self

    def __exit__(self, *error: Any) -> None:
        self.release()


def _failed(key: str) -> bytes:
    return f"alone {key} ".encode()


def _opened(entry: Path) -> Dataset | None:
    found = open_dataset(entry)
    if found is None:
        return None
    for other in _in_use:
        os.close(other)
    _in_use[:] = [found[1]]
    return found[0]


def _facts(path: Path) -> list[Any]:
    """What tells whether a file is still the same, without reading it."""
    try:
        found = path.stat()
    except OSError:
        return [str(path.absolute())]
    return [str(path.absolute()), found.st_size, found.st_mtime_ns, found.st_ctime_ns]


def _versions() -> list[str]:
    """Of all that takes part in decoding."""
    found = []
    for name in _LIBRARIES:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return found
