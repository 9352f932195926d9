"""What is kept on disk while a search runs: checkpoints of running trials and of those on the front.

Under a limit, what is needed least goes first: superseded checkpoints of unfinished trials, then all of those that wait at rungs, the most
dominated first, who begin again should they go on; then the weights of the trials that add least to the hypervolume of the front, whose
masks are written before. The newest checkpoint of a running trial stays. Between two reports the workers may be above the limit by what
each writes in that time.
"""

import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from distprune.search.book import Book
from distprune.search.finale import write_masks
from distprune.search.trial import KEPT_CHECKPOINTS
from distprune.search.volume import contributions
from distprune.store.checkpoints import Checkpoint, checkpoints_at
from distprune.store.folder import RunFolder


def _quiet(event: str, facts: dict[str, Any]) -> None:
    return


class Retention:
    """Deletes checkpoints that nobody needs, and under a `limit` (bytes) those that are needed least.

    Sizes are known from what workers say of what they have written; what lies there is looked at by a sweep. What is deleted because of
    how a trial ended is left to `later`, which does it when that is known wherever the search may be gone on with.
    """

    def __init__(
        self,
        folder: RunFolder,
        book: Book,
        *,
        limit: int | None = None,
        listen: Callable[[str, dict[str, Any]], None] = _quiet,
        later: Callable[[Callable[[], None]], None] = lambda work: work(),
    ) -> None:
        self._folder, self._book, self._limit, self._listen, self._later = folder, book, limit, listen, later
        self._store = checkpoints_at(folder.place)
        self._held: dict[int, dict[Checkpoint, int]] = {}
        self._going: set[tuple[int, Checkpoint]] = set()  # that are to be deleted, or were
        self._dropped: set[int] = set()  # trials of the front that have lost their weights
        self._needed: set[int] = set()  # trials of the front whose masks could not be written

    @property
    def total(self) -> int:
        """Bytes of all checkpoints."""
        return sum(sum(sizes.values()) for sizes in self._held.values())

    @property
    def crowded(self) -> bool:
        """Whether running trials need more than the limit, so that others have to wait: for those that run, so there must be one."""
        return self._limit is not None and self.total > self._limit and self._book.is_busy

    @property
    def room(self) -> int | None:
        """What checkpoints leave of the limit (bytes): a stage cache that is as large gets nothing more from this search."""
        return None if self._limit is None else max(self._limit - self.total, 0)

    def heard(self, row: Mapping[str, Any]) -> None:
        """Learn from a report what its worker has written, and keep to the limit."""
        if '"checkpoint"' not in (row["extra"] or "") or (size := json.loads(row["extra"]).get("checkpoint")) is None:
            return
        sizes = self._held.setdefault(row["trial"], {})
        sizes[Checkpoint(row["index"], row["attempt"])] = int(size)
        own = sorted(at for at in sizes if at.attempt == row["attempt"])
        for at in own[:-KEPT_CHECKPOINTS]:  # its worker has deleted them
            del sizes[at]
        self._keep_to_limit()

    def sweep(self, ended: int | None = None) -> None:
        """Delete what nobody needs any more: when trial `ended` was told, or everywhere, in the beginning and at the end.

        The second finds also what a worker that was thought dead has written since its trial ended.
        """
        if ended is None or not self._is_over(ended):  # what was reported a second time, as by a trial that began again, was not heard
            self._look(ended)
        for number in sorted(self._held) if ended is None else [ended]:
            if self._is_over(number):
                self._delete(number)
            elif number in self._book.front and self._book.entries[number].told:
                self._drop(number) if number in self._dropped else self._thin(number)
        self._keep_to_limit()

    def _look(self, number: int | None) -> None:
        """See what lies there of a trial, or of all. What was heard stands where nobody answers."""
        with suppress(OSError):
            found = self._store.all() if number is None else {number: self._store.held(number)}
            left = {trial: {at: size for at, size in held.sizes.items() if (trial, at) not in self._going} for trial, held in found.items()}
            self._held = left if number is None else {**self._held, **left}
            self._dropped |= {trial for trial, held in found.items() if held.dropped}
            for trial in found:
                self._store.tidy(trial)

    def _is_over(self, number: int) -> bool:
        """Whether nobody needs the checkpoints of a trial any more."""
        return number < len(self._book.entries) and self._book.entries[number].told and number not in self._book.front

    def _runs(self, number: int) -> bool:
        return number < len(self._book.entries) and not self._book.entries[number].told and number not in self._book.front

    def _delete(self, number: int) -> None:
        self._later(lambda: self._store.remove(number))
        self._held.pop(number, None)

    def _waiting(self) -> list[int]:
        """Trials that wait at rungs and have checkpoints, the least likely to go on first."""
        entries = [self._book.entries[number] for number, sizes in self._held.items() if sizes and number < len(self._book.entries)]
        order = {entry.number: (-self._book.rungs.above(entry.number, entry.paused), entry.paused) for entry in entries if entry.waits}
        return sorted(order, key=lambda number: (order[number], -number))

    def _thin(self, number: int) -> int:
        """Delete all checkpoints of a trial but the newest, and what attempts that have died left unfinished; returns how many."""
        sizes = self._held.get(number, {})
        old = sorted(sizes)[:-1]

        def delete() -> None:
            for at in old:
                self._store.remove(number, at)

        for at in old:
            del sizes[at]
            self._going.add((number, at))
        if old:
            self._later(delete)
        return len(old)

    def _keep_to_limit(self) -> None:
        if self._limit is None or self.total <= self._limit:
            return
        superseded = 0
        for number in sorted(self._held):
            if self.total > self._limit and self._runs(number):
                superseded += self._thin(number)
        begin_again = []
        for number in self._waiting():
            if self.total <= self._limit:
                break
            with suppress(OSError):  # now, and never what it writes when it goes on
                self._store.remove(number)
            self._held.pop(number)
            begin_again.append(number)
        dropped = []
        while self.total > self._limit and (left := [n for n in self._book.front if self._held.get(n) and n not in self._needed]):
            worth = contributions(self._book.front)
            number = min(left, key=lambda n: (worth[n], -n))
            try:
                write_masks(self._folder, self._book.entries[number])
            except Exception:  # the network and its data are the user's
                self._needed.add(number)
                continue
            self._drop(number)
            dropped.append(number)
        if superseded or begin_again or dropped:
            did = [f"{superseded} superseded checkpoints"] if superseded else []
            did += [f"the checkpoints of waiting trials {', '.join(map(str, begin_again))}"] if begin_again else []
            did += [f"the weights of trials {', '.join(map(str, dropped))}, whose masks are kept"] if dropped else []
            self._listen("disk", {"message": f"To keep to limits.disk, {size_text(self._limit)}, these were deleted: {' and '.join(did)}."})

    def _drop(self, number: int) -> None:
        """Give up the weights of a trial on the front."""
        self._later(lambda: self._store.drop(number))
        self._held[number] = {}
        self._dropped.add(number)


def size_text(size: int) -> str:
    """A size for people."""
    unit, name = next((pair for pair in ((10**9, "GB"), (10**6, "MB"), (10**3, "KB")) if size >= pair[0]), (1, "bytes"))
    return f"{size / unit:.3g} {name}"
