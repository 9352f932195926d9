"""A search on a virtual clock: the same book and driver, with curves in place of Ray."""

import heapq
from collections.abc import Callable, Iterator
from typing import Any

from distprune.search.book import Assignment, Book
from distprune.search.config import Search
from distprune.search.trial import Job

Curve = Callable[[Job], Iterator[dict[str, Any]]]  # the reports of a trial; `run_trial` is one


class Simulator:
    """An engine of `workers` that report when the bill of their trial says so: a sample takes a unit of time."""

    def __init__(self, curve: Curve, *, workers: int) -> None:
        self._curve, self._workers = curve, workers

    def open(self, search: Search) -> None:
        """Nothing to get ready."""

    def run(
        self, search: Search, book: Book, job: Callable[[Assignment], Job], ended: Callable[[int], None], draw: Callable[[], None]
    ) -> None:
        """Run until the book has no trial left."""
        events: list[tuple[float, int, dict[str, Any], Iterator[dict[str, Any]]]] = []  # (time, worker, report, what follows)
        now = 0.0

        def begin(worker: int) -> None:
            if (assignment := book.next()) is not None:
                follow(worker, self._curve(job(assignment)), 0.0)

        def follow(worker: int, rows: Iterator[dict[str, Any]], billed: float) -> None:
            row = next(rows)
            heapq.heappush(events, (now + max(float(row.get("cost") or 0.0) - billed, 0.0), worker, row, rows))

        for worker in range(self._workers):
            begin(worker)
        while events:
            now, worker, row, rows = heapq.heappop(events)
            if book.hear(row) and not row["final"]:
                follow(worker, rows, float(row["cost"]))
            else:
                book.finish(row["trial"])
                ended(row["trial"])
                begin(worker)
            draw()
