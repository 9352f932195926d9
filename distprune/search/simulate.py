"""A search on a virtual clock: the same book and driver, with curves in place of Ray."""

import heapq
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

from distprune.search.book import Book
from distprune.search.config import Search
from distprune.search.entry import Assignment
from distprune.search.trial import Job

Curve = Callable[[Job], Iterator[dict[str, Any]]]  # the reports of a trial; `run_trial` is one


class Simulator:
    """An engine of `workers` that report when their trial says so: after as many units of time as it has billed samples, or run seconds.

    A trial that is gone on with takes only what is left of it. Limits of time act between reports too: that of the search on this clock,
    those of trials where it is in seconds.
    """

    def __init__(self, curve: Curve, *, workers: int, by: Literal["cost", "wall_s"] = "cost") -> None:
        self._curve, self._workers, self._by = curve, workers, by
        self._now = 0.0

    def clock(self) -> float:
        """The virtual time."""
        return self._now

    def open(self, search: Search) -> None:
        """Nothing to get ready."""

    def largest(self) -> float | None:
        """Unknown: nothing is set aside on a virtual clock."""
        return None

    def run(
        self, search: Search, book: Book, job: Callable[[Assignment], Job], ended: Callable[[int], None], draw: Callable[[], None]
    ) -> None:
        """Run until the book has no trial left."""
        # (time, worker, report, what follows, when the report comes: its worker may be looked at before, how long it is silent then)
        events: list[tuple[float, int, dict[str, Any], Iterator[dict[str, Any]], float, float]] = []
        over = math.inf if search.limits.wall is None else search.limits.wall
        idle: list[int] = []

        def begin(worker: int) -> None:
            if (assignment := book.next()) is None:
                idle.append(worker)
            else:
                follow(worker, self._curve(job(assignment)), self._time(book.entries[assignment.number].last) if assignment.known else 0.0)

        def follow(worker: int, rows: Iterator[dict[str, Any]], since: float) -> None:
            row = next(rows)
            comes = self._now + max(self._time(row) - since, 0.0)
            left = max(book.time_left(row["trial"]), 0.0) if self._by == "wall_s" else math.inf
            when = min(comes, self._now + left, max(over, self._now))
            heapq.heappush(events, (when, worker, row, rows, comes, left if when == self._now + left else when - self._now))

        for worker in range(self._workers):
            begin(worker)
        while events:
            self._now, worker, row, rows, comes, silent = heapq.heappop(events)
            if self._now < comes and not book.overdue(row["trial"], silent):
                heapq.heappush(events, (comes, worker, row, rows, comes, 0.0))
            elif self._now >= comes and book.hear(row) and not row["final"]:
                follow(worker, rows, self._time(row))
            else:
                book.finish(row["trial"])
                ended(row["trial"])
                free, idle[:] = [worker, *idle] if book.rungs.promotes else [worker], []  # at a rung it may have let another go on
                for one in free:
                    begin(one)
            draw()

    def _time(self, row: Mapping[str, Any]) -> float:
        return float(row.get(self._by) or 0.0)
