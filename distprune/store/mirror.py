"""What takes a driver's run folder up to its URL, in a thread of its own: a search never waits for it but in the beginning and at the end.

Tables go up as numbered parts (`parts.py`), other files whole. What a driver deletes at the URL goes only when the tables are up that say
why, so that another driver, on another machine, finds all that it needs. A head that is lost costs what was written since the last upload.
"""

import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from distprune.errors import TakenOver, UserError, command
from distprune.store import copies, parts
from distprune.store.folder import RunFolder
from distprune.store.parts import Part
from distprune.store.place import Objects, answering, is_refusal, why

EVERY_S = 5.0  # between two uploads: what a lost head costs
PATIENCE_S = 600.0  # at the end of a search, for a store that does not answer
LAST_S = 20.0  # the same where a search was interrupted
MOST_PARTS = 200  # after which they are put together
_TAIL = 4096  # bytes before the end of what went up that are looked at again
_AGAIN_S = 2.0

Listener = Callable[[str, dict[str, Any]], None]


class Here:
    """In place of a mirror for a run that lies in a folder: nothing is to be done, and what is to be deleted is deleted at once."""

    def begin(self) -> None:
        """Nothing to begin with."""

    def check(self) -> None:
        """Nobody else can have gone on with it: its lock is held."""

    def later(self, work: Callable[[], None]) -> None:
        """Do it."""
        work()

    @property
    def waits(self) -> bool:
        """Whether who has to write there waits, as it does not answer."""
        return False


class Mirror(Here):
    """Takes a run folder up to its URL."""

    def __init__(self, folder: RunFolder, listen: Listener) -> None:
        assert folder.url is not None
        self._folder, self._url, self._listen = folder.path, folder.url, listen
        self._resume = command(f"resume {folder.quoted}")
        with answering(self._url):
            self._objects = Objects.open(self._url)
        self._last = Part(0, "", 0, True)  # that this driver has sent
        self._whole = 0  # the number of its last whole one
        self._sent: dict[str, int] = {}  # bytes of each stream
        self._tails: dict[str, bytes] = {}
        self._files: dict[str, tuple[int, int, int]] = {}  # name -> (inode, size, time of change) of what went up
        self._works: list[Callable[[], None]] = []
        self._superseded, self._failing = "", False
        self._begun, self._stop = False, threading.Event()
        self._thread = threading.Thread(target=self._run, name="mirror", daemon=True)

    def begin(self) -> None:
        """Have all that is here go up under a generation of its own.

        Raises UserError if the store does not take it, or if another driver has just done the same.
        """
        with answering(self._url):
            newest = max((part.generation for part in parts.listed(self._objects)), default=0)
            first = Part(newest + 1, uuid.uuid4().hex[:8], 0, True)
            copies.owned(self._folder, first.owner)
            self._send_files()
            self._send_part(first)
            for part in parts.listed(self._objects):
                if part.generation >= first.generation and part.driver != first.driver:
                    self._objects.remove(first.name)
                    raise UserError(f"{self._url} is being gone on with by another driver since just now. Wait for it, or end it first.")
            for name in copies.listed(self._objects).keys() - self._files.keys():
                self._objects.remove(name)
        self._begun = True
        self._start()

    def _start(self) -> None:
        self._thread.start()

    def later(self, work: Callable[[], None]) -> None:
        """Have `work` done when everything that was written before is up."""
        self._works.append(work)

    @property
    def waits(self) -> bool:
        return self._failing

    def check(self) -> None:
        """Raise TakenOver if another driver has gone on with the run: what this one does counts no more."""
        if self._superseded:
            raise TakenOver(self._superseded)

    def upload(self) -> None:
        """Take up what is new. Raises OSError where the store does not take it; all of that is tried again."""
        works = list(self._works)  # done after what was written before they were asked for
        found = parts.listed(self._objects)
        if newer := [part for part in found if part.driver > self._last.driver]:
            self._superseded = (
                f"{self._url} is gone on with by another driver, generation {newer[-1].generation}: this one, of generation "
                f"{self._last.generation}, ends. What it did since counts no more."
            )
            return
        whole = self._is_cut() or self._last.number - self._whole >= MOST_PARTS
        if whole or any(self._size(name) > self._sent[name] for name in parts.STREAMS):
            self._send_part(self._last._replace(number=self._last.number + 1, whole=whole))
        self._send_files()
        for part in found:
            if part.driver < self._last.driver or part.number < self._whole:
                self._objects.remove(part.name)
        for work in works:
            work()
            self._works.remove(work)

    def close(self, *, patience: float) -> None:
        """End, when all is up. Raises UserError if the store has not taken it after `patience` seconds, TakenOver if it counts no more."""
        self._stop.set()
        if not self._begun:
            return
        if self._thread.ident is not None:
            self._thread.join()
        until, said = time.monotonic() + patience, False
        while not (done := self._try()) and not self._superseded and time.monotonic() < until:
            if not said:
                self._listen("storage", {"message": f"Waiting for {self._url} to take the rest, for {patience:.0f} s at most."})
            said = True
            time.sleep(_AGAIN_S)
        self.check()
        if not done:
            raise UserError(
                f"{self._url} has not taken all of the run, which lies in {self._folder}. Nothing is lost: when the store answers again, "
                f"on this machine: {self._resume}"
            )

    def _run(self) -> None:
        while not self._stop.wait(EVERY_S) and not self._superseded:
            self._try()

    def _try(self) -> bool:
        try:
            self.upload()
        except Exception as error:  # whatever a store or a full disk does, the search goes on
            if not self._failing:
                says = "refuses" if isinstance(error, OSError) and is_refusal(error) else "does not take what is new"
                self._listen(
                    "storage",
                    {"message": f"{self._url} {says}: {why(error)}. The search goes on; what it writes waits in {self._folder}."},
                )
            self._failing = True
            return False
        if self._failing:
            self._listen("storage", {"message": f"{self._url} is up to date again."})
        self._failing = False
        return True

    def _send_part(self, part: Part) -> None:
        pieces, tails = {}, {}
        for name in parts.STREAMS:
            start = 0 if part.whole else self._sent[name]
            data = self._read(name, start)
            pieces[name], tails[name] = (start, data), (self._tails.get(name, b"") * (start > 0) + data)[-_TAIL:]
        self._objects.put(part.name, parts.pack(pieces))
        self._last, self._tails, self._whole = part, tails, part.number if part.whole else self._whole
        self._sent = {name: start + len(data) for name, (start, data) in pieces.items()}

    def _is_cut(self) -> bool:
        """Whether a stream is not what went up and more, as where a write was given up on a full disk."""
        return any(self._read(name, self._sent[name] - len(tail), len(tail)) != tail for name, tail in self._tails.items())

    def _send_files(self) -> None:
        names = copies.whole_files(self._folder)
        for name in sorted(names, key=lambda name: name != copies.SEARCH):
            self._send_file(name)
        for name in self._files.keys() - set(names):
            self._objects.remove(name)
            del self._files[name]

    def _send_file(self, name: str) -> None:
        path = self._folder / name
        try:
            facts = path.stat()
            if self._files.get(name) != (stamp := (facts.st_ino, facts.st_size, facts.st_mtime_ns)):
                self._objects.send(path, name)
                self._files[name] = stamp
        except FileNotFoundError:
            if path.exists():  # else it was deleted just now
                raise

    def _size(self, name: str) -> int:
        path = self._folder / name
        return path.stat().st_size if path.exists() else 0

    def _read(self, name: str, start: int, size: int = -1) -> bytes:
        path = self._folder / name
        if not path.exists():
            return b""
        with open(path, "rb") as file:
            file.seek(start)
            return file.read(size)


@contextmanager
def mirrored(folder: RunFolder, listen: Listener) -> Iterator[Here]:
    """The mirror of a run folder; what is not up at the end is waited for."""
    if folder.url is None:
        yield Here()
        return
    mirror = Mirror(folder, listen)
    try:
        yield mirror
    except BaseException:
        try:
            mirror.close(patience=LAST_S)
        except UserError as error:
            listen("storage", {"message": str(error)})
        except TakenOver:
            pass  # which is why it ends
        raise
    mirror.close(patience=PATIENCE_S)
