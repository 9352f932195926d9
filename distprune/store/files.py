"""The few ways in which a run folder is written. Every write passes through here, so that tests can kill a process at any of them.

Where the disk is full, whoever writes waits until there is space: nothing is lost, and no part of a record stays behind.
"""

import errno
import fcntl
import os
import platform
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from distprune.errors import UserError

T = TypeVar("T")
Told = Callable[[Path, int], None]  # (what is written, how often that has failed in a row: 0 when it is done at last)

_write = os.write  # tests put a write in its place that is cut short
_sync = os.fsync
_sleep = time.sleep
_told: list[Told] = []

_TRY_AGAIN_S = 2.0
_ASKED_S, _ASK_AGAIN_S = 2.0, 0.02  # a lock that is only being asked after is free again by then


def append(path: str | Path, data: bytes, *, sync: bool = False) -> None:
    """Add bytes at the end of a file, creating it."""
    patiently(path, lambda: _append(path, data, sync))


def _append(path: str | Path, data: bytes, sync: bool) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        size = os.fstat(descriptor).st_size
        try:
            _write_all(descriptor, data)
            if sync:
                _sync(descriptor)
        except OSError:
            os.ftruncate(descriptor, size)
            raise
    finally:
        os.close(descriptor)


def publish(path: str | Path, data: bytes, *, wait: bool = True) -> None:
    """Replace a file at once: readers see the old content or the new one, never a part. Without `wait`, a full disk is an OSError."""
    if wait:
        patiently(path, lambda: _publish(Path(path), data))
    else:
        _publish(Path(path), data)


def _publish(path: Path, data: bytes) -> None:
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    descriptor = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        try:
            _write_all(descriptor, data)
            _sync(descriptor)
        finally:
            os.close(descriptor)
        os.replace(aside, path)
    except OSError:
        aside.unlink(missing_ok=True)
        raise


def publish_folder(target: Path, fill: Callable[[Path], None]) -> None:
    """Make the folder `target` with what `fill` writes into it: readers see nothing or all of it."""
    patiently(target, lambda: _publish_folder(target, fill))


def _publish_folder(target: Path, fill: Callable[[Path], None]) -> None:
    aside = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}")
    try:
        aside.mkdir(parents=True)
        fill(aside)
        aside.rename(target)
    except Exception:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def is_full(error: BaseException) -> bool:
    """Whether an exception says that the disk, or this user's share of it, is full."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    text = str(error)  # safetensors wraps what the system said
    return any(f"os error {number}" in text for number in (errno.ENOSPC, errno.EDQUOT))


def patiently(path: str | Path, work: Callable[[], T]) -> T:
    """Do `work`, which leaves nothing behind where it fails, again and again while the disk is full."""
    failed = 0
    while True:
        try:
            done = work()
        except Exception as error:
            if not is_full(error):
                raise
        else:
            break
        failed += 1
        for told in _told:
            told(Path(path), failed)
        _sleep(_TRY_AGAIN_S)
    if failed:
        for told in _told:
            told(Path(path), 0)
    return done


@contextmanager
def telling(told: Told) -> Iterator[None]:
    """Tell each time that a write of this process finds no space on the disk, and when it goes on."""
    _told.append(told)
    try:
        yield
    finally:
        _told.remove(told)


def free_bytes(folder: str | Path) -> int:
    """What is free there. A user's share of it may be used up before."""
    return shutil.disk_usage(folder).free


def cut(path: str | Path, size: int) -> None:
    """Shorten a file to `size` bytes."""
    os.truncate(path, size)


@contextmanager
def lock(folder: Path, *, wait: bool = False) -> Iterator[None]:
    """Hold a run folder for one driver; the operating system gives it back when the process dies.

    Raises UserError if it is taken, unless that is waited for.
    """
    with open(folder / ".lock", "a+") as file:
        until = time.monotonic() + _ASKED_S
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
                break
            except OSError as error:
                if time.monotonic() < until:
                    _sleep(_ASK_AGAIN_S)
                    continue
                file.seek(0)
                holder = file.read().strip() or "unknown"
                raise UserError(f"{folder} is in use by process {holder}. Wait for it, or end it and try again.") from error
        file.seek(0)
        file.truncate()
        file.write(f"{os.getpid()} on {platform.node()}")
        file.flush()
        yield


def is_locked(folder: Path) -> bool | None:
    """Whether a process of this machine holds a run folder; None where that cannot be told, as the last to hold it was on another one."""
    try:
        with open(folder / ".lock") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return False if file.read().endswith(f" on {platform.node()}") else None
    except BlockingIOError:
        return True
    except (OSError, ValueError):  # there is no lock, or the file system knows none
        return None


def _write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[_write(descriptor, view) :]
