"""Reports that go to the driver together: what it costs to hear of a trial does not grow with how often the trial reports.

What is decided on at once, a report at a rung and the last one, is never kept back. Others wait while the next is expected soon.
"""

import time
from collections.abc import Callable, Iterator
from typing import Any

MOST_WAIT_S = 2.0  # that a report waits for others, as far as can be foreseen


class Parcels:
    """The reports of a trial, a list of them at a time."""

    def __init__(self, rows: Iterator[dict[str, Any]], *, clock: Callable[[], float] = time.monotonic) -> None:
        self._rows, self._clock, self._rung = rows, clock, -1
        self._failure: Exception | None = None  # raised when what came before it was handed on

    def next(self) -> list[dict[str, Any]]:
        """The next report, and those that follow it quickly. Called again only where the last of them was not final."""
        if self._failure:
            raise self._failure
        found: list[dict[str, Any]] = []
        first = None  # when the first of them came
        while True:
            begun = self._clock()
            try:
                row = next(self._rows)
            except Exception as failure:
                if not found:
                    raise
                self._failure = failure
                return found
            now = self._clock()
            found.append(row)
            first = now if first is None else first
            decided, self._rung = row["final"] or row["rung"] > self._rung, max(row["rung"], self._rung)
            if decided or now - first + (now - begun) >= MOST_WAIT_S:  # the next will take as long
                return found
