"""What reports come to: how far each trial got, whether it goes on, what is on the front.

A pure function of the reports so far, in their order: a resumed driver repeats it from the stream.
"""

import math
from collections.abc import Mapping
from typing import Any

from distprune.search.entry import Entry
from distprune.search.failures import Repeated
from distprune.search.goals import Goals
from distprune.search.rungs import Rungs, Vector, dominates


class Decisions:
    """Decides on reports."""

    def __init__(self, goals: Goals, rungs: Rungs, *, most_wall: float | None = None) -> None:
        """`most_wall`: seconds that a trial may run."""
        self._goals, self._rungs, self._most_wall = goals, rungs, most_wall
        self.repeated = Repeated()
        self.cost = 0.0  # billed samples of all trials that were proposed: repeats of finalists are beyond the search, rounds were billed
        self.front: dict[int, Vector] = {}  # finished trials within the budget that no other such trial dominates

    def take(self, entry: Entry, row: Mapping[str, Any]) -> None:
        """Decide on a trial's report."""
        entry.reports = row["index"] + 1
        if row["attempt"] not in entry.attempts:
            entry.attempts.append(row["attempt"])
            entry.spent, entry.spent_now = entry.spent + entry.spent_now, 0.0
            entry.wall, entry.wall_now = entry.wall + entry.wall_now, 0.0
        entry.stuck = entry.silences = 0
        if row["ended"] not in ("", "finished"):
            entry.ended, entry.last = row["ended"], {**entry.last, "extra": row["extra"]}
            if entry.ended == "error":
                self.repeated.failed(entry.extra.get("reason", ""), row["index"])
            return
        self.repeated.went_on(row["index"])
        if entry.proposed:
            self.cost += float(row["cost"]) - entry.cost
        entry.last, entry.spent_now, entry.wall_now = dict(row), row["spent"], float(row.get("wall_s") or 0.0)
        if row["final"]:
            entry.ended = "finished"
            vector = self._goals.reached(entry)
            if entry.repeat_of is not None:
                return
            if entry.proposed:  # rounds of others have not come the same way
                self._rungs.finished(entry.number, entry.rung, self._goals.ranked(entry))
            if self._goals.met(entry):
                self._enter_front(entry.number, vector)
            return
        if row["score"] is not None and math.isfinite(row["score"]):
            entry.best = max(row["score"], entry.best if entry.best is not None else row["score"])
            entry.costs = entry.extra.get("costs", entry.costs)
        if entry.round_of is not None and row["spent"] > 0 and not entry.owed:
            entry.stopped = "cache"  # what it was to be read from is gone: it would train what nobody proposed
        if row["rung"] > entry.rung:
            entry.rung = row["rung"]
            self._compare(entry)
        self.time_out(entry)

    def _compare(self, entry: Entry) -> None:
        """Let a trial compete at the rung that it came to: it goes on, waits there or is stopped."""
        if entry.repeat_of is not None:
            return
        vector = None if entry.best is None else self._goals.ranked(entry)
        if entry.spared or entry.owed:
            if vector is not None:
                self._rungs.note(entry.number, entry.rung, vector)
        elif vector is None or not self._rungs.goes_on(entry.number, entry.rung, vector):
            if self._rungs.promotes and vector is not None:
                entry.paused = entry.rung
            else:
                entry.stopped = "rung"

    def _enter_front(self, number: int, vector: Vector) -> None:
        if not any(dominates(other, vector) for other in self.front.values()):
            for beaten in [n for n, other in self.front.items() if dominates(vector, other)]:
                del self.front[beaten]
            self.front[number] = vector

    def time_left(self, entry: Entry) -> float:
        """Seconds that a trial may yet run, from its last word on."""
        return math.inf if self._most_wall is None or entry.owed else self._most_wall - entry.wall - entry.wall_now

    def time_out(self, entry: Entry, silent: float = 0.0) -> None:
        """End a running trial whose time is up, where its worker has said nothing for `silent` seconds."""
        if not entry.decided and silent >= self.time_left(entry):
            ran = entry.wall + entry.wall_now + silent
            entry.fail("timeout", f"it ran for {ran:.0f} s, and limits.trial_wall is {self._most_wall:g}")

    # Rungs at which trials wait.

    def leave_rung(self, entry: Entry, *, goes_on: bool = True) -> None:
        """A trial that waits at a rung does so no longer."""
        if entry.paused >= 0:
            self._rungs.leaves(entry.number, entry.paused, goes_on=goes_on)
            entry.paused = -1

    def went_on(self, entry: Entry) -> None:
        """A trial came further than its rung, as is known by now: it was promoted, or let go on by reports that were lost."""
        self.leave_rung(entry)
        if entry.stopped:
            self._rungs.leaves(entry.number, entry.rung)
            entry.stopped = ""
