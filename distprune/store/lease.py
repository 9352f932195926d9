"""One producer at a time for one thing, on a folder that all producers see.

A lease is advice and never correctness: what is produced under one key is the same, and published at once. So nothing here waits for a
clock of another machine, and everything here may fail into two producers at work.

A lease is taken by `link`, which one of many wins on NFS too, where the count of links is believed and not the answer. Its holder changes
its content now and then. Whoever watches it sees by its own clock for how long nothing has changed; then the lease is stolen by a rename,
which again one of many wins. On the holder's own machine its death is seen at once.
"""

import functools
import hashlib
import json
import os
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

BEAT_EVERY_S = 5.0
STALE_S = 30.0  # without a change, after which a holder is taken for dead
_PROCESS = f"{os.getpid()}-{uuid.uuid4().hex[:12]}"


def _process() -> str:
    """A name of this process; a fork has its own."""
    global _PROCESS
    if not _PROCESS.startswith(f"{os.getpid()}-"):
        _PROCESS = f"{os.getpid()}-{uuid.uuid4().hex[:12]}"
    return _PROCESS


@functools.cache
def _machine() -> str:
    """A name of this machine since it was started, and of the processes that see each other there; empty where that is not known."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text()
        return hashlib.sha256(f"{boot}{os.stat('/proc/self/ns/pid').st_ino}".encode()).hexdigest()[:12]
    except OSError:
        return ""


def _birth(pid: int) -> int | None:
    """When a process of this machine began, in ticks since that was started; None if it has ended."""
    try:
        facts = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if facts[0] in "ZX" else int(facts[19])


def _has_died(content: dict[str, Any]) -> bool:
    """Whether the holder was a process of this machine that is no more."""
    if not _machine() or content.get("machine") != _machine():
        return False
    pid, born = str(content.get("process", "")).partition("-")[0], content.get("born")
    return pid.isdigit() and _birth(int(pid)) != born


class Lease:
    """A lease that is held; `take` makes one. Its content is JSON: who holds it, beat and what the holder notes."""

    def __init__(self, path: Path, owner: str, descriptor: int) -> None:
        self.path, self.owner = path, owner
        self.note: dict[str, Any] = {}  # plain data for those who wait
        self._descriptor, self._beats = descriptor, 0
        self._lock = threading.Lock()
        self._done = threading.Event()

    @classmethod
    def take(cls, path: Path, *, beat_every: float | None = BEAT_EVERY_S) -> "Lease | None":
        """The lease at `path`, or None if somebody has it. It is kept alive by a thread, unless `beat_every` is None.

        Raises OSError where there can be none, as on a file system without links.
        """
        owner = uuid.uuid4().hex
        own = path.with_name(f".{path.name}.{owner}")
        descriptor = os.open(own, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        lease = cls(path, owner, descriptor)
        try:
            lease._write()
            refused: OSError | None = None
            try:
                os.link(own, path)
            except FileExistsError:
                pass  # somebody has it, or a server has done it and lost the answer
            except OSError as error:
                refused = error  # the same, or there can be no links here
            taken = os.fstat(descriptor).st_nlink == 2
            if refused and not taken:
                raise refused
        except BaseException:
            os.close(descriptor)
            raise
        finally:
            own.unlink(missing_ok=True)
        if not taken:
            os.close(descriptor)
            return None
        if beat_every is not None:
            threading.Thread(target=lease._keep, args=(beat_every,), daemon=True).start()
        return lease

    def _keep(self, every: float) -> None:
        while not self._done.wait(every):
            if not self.beat():
                return

    def _write(self) -> None:
        holder = {"process": _process(), "machine": _machine(), "born": _birth(os.getpid())}
        content = {**holder, "owner": self.owner, "beat": self._beats, **self.note}
        data = json.dumps(content).encode().ljust(256)  # of one length, so that a shorter one leaves nothing of a longer behind
        os.pwrite(self._descriptor, data, 0)
        os.fsync(self._descriptor)  # a network file system would keep it to itself

    @property
    def is_held(self) -> bool:
        """Whether the lease is still this one: it may have been stolen from a holder that slept."""
        try:
            return os.path.samestat(os.stat(self.path), os.fstat(self._descriptor))
        except OSError:
            return False

    def beat(self) -> bool:
        """Say that the holder lives. False if the lease is not its own any more."""
        with self._lock:
            if self._done.is_set() or not self.is_held:
                return False
            self._beats += 1
            try:
                self._write()
            except OSError:  # a full disk: the watchers will think what they think
                return False
            return True

    def release(self) -> None:
        """Give it back; doing it again changes nothing."""
        with self._lock:
            if self._done.is_set():
                return
            self._done.set()
            if self.is_held:
                _remove(self.path, lambda found: found.get("owner") == self.owner)
            os.close(self._descriptor)


class Watch:
    """Looks at a lease of somebody else."""

    def __init__(self, path: Path, *, stale: float = STALE_S, clock: Callable[[], float] = time.monotonic) -> None:
        self._path, self._stale, self._clock = path, stale, clock
        self._seen, self._since = b"", clock()

    def look(self) -> dict[str, Any] | None:
        """The content of a lease whose holder lives, {} while it is written; None if there is none. A dead one's is removed."""
        try:
            content = self._path.read_bytes()
        except OSError:
            return None
        if content != self._seen:
            self._seen, self._since = content, self._clock()
        if _has_died(_parse(content)) or self._clock() - self._since >= self._stale:
            _remove(self._path, lambda found: found == _parse(content))
            return None
        return _parse(content)


def is_own(content: dict[str, Any]) -> bool:
    """Whether a lease is held by this very process, which would wait for itself."""
    return content.get("process") == _process()


def _parse(content: bytes) -> dict[str, Any]:
    try:
        found = json.loads(content)
    except ValueError:  # in the middle of a beat
        return {}
    return found if isinstance(found, dict) else {}


def _remove(path: Path, meant: Callable[[dict[str, Any]], bool]) -> None:
    """Take a lease away if it is the one that is meant; one that was taken in the meantime is put back."""
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        os.rename(path, aside)
        if not meant(_parse(aside.read_bytes())):
            os.link(aside, path)
    except OSError:
        pass  # another was quicker
    finally:
        aside.unlink(missing_ok=True)
