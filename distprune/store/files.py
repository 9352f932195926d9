"""The few ways in which a run folder is written. Every write passes through here, so that tests can kill a process at any of them."""

import fcntl
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from distprune.errors import UserError

_write = os.write  # tests put a write in its place that is cut short


def append(path: str | Path, data: bytes, *, sync: bool = False) -> None:
    """Add bytes at the end of a file, creating it."""
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        _write_all(descriptor, data)
        if sync:
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def publish(path: str | Path, data: bytes) -> None:
    """Replace a file at once: readers see the old content or the new one, never a part."""
    path = Path(path)
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    descriptor = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        _write_all(descriptor, data)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    os.replace(aside, path)


def cut(path: str | Path, size: int) -> None:
    """Shorten a file to `size` bytes."""
    os.truncate(path, size)


@contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Hold a run folder for one driver; the operating system gives it back when the process dies. Raises UserError if it is taken."""
    with open(folder / ".lock", "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.seek(0)
            holder = file.read().strip() or "unknown"
            raise UserError(f"{folder} is in use by process {holder}. Wait for it, or end it and try again.") from error
        file.seek(0)
        file.truncate()
        file.write(str(os.getpid()))
        file.flush()
        yield


def _write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[_write(descriptor, view) :]
