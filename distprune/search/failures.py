"""Failures that no trial sees of itself: errors that repeat, workers that die, workers that are silent."""

import re
from collections.abc import Callable, Hashable, Sequence

SAME_ERRORS = 5  # in a row: then it is not the trials that are at fault
MOST_DEATHS = 3  # of a trial's workers without a report in between; restarts that come further are free
MOST_SILENCES = 2  # of a trial's workers without a report in between


class Repeated:
    """Counts equal errors in a row. A report that came further than any of them is a success, and the row begins anew.

    A pure function of the stream of reports. Errors are equal if they differ in numbers at most.
    """

    def __init__(self) -> None:
        self.verdict = ""  # why the search should end; once there, it stays
        self._latest, self._count, self._reached = "", 0, 0

    def failed(self, reason: str, index: int) -> None:
        """A trial ended with an error in place of its report `index`."""
        text = re.sub(r"\d+", "#", reason)
        if text != self._latest:
            self._latest, self._count, self._reached = text, 0, 0
        self._count, self._reached = self._count + 1, max(index, self._reached)
        if self._count >= SAME_ERRORS and not self.verdict:
            self.verdict = f"{self._count} trials in a row ended with the same error: {reason}"

    def went_on(self, index: int) -> None:
        """A trial has made its report `index`."""
        if index >= self._reached:
            self._latest, self._count, self._reached = "", 0, 0

    def forgive(self) -> None:
        """Someone has looked and goes on: after a verdict, counting begins anew."""
        if self.verdict:
            self.verdict, self._latest, self._count, self._reached = "", "", 0, 0


class Silence:
    """Since when each of a few workers has said nothing. `limit` is in seconds, None for no limit."""

    def __init__(self, limit: float | None, clock: Callable[[], float]) -> None:
        self._limit, self._clock = limit, clock
        self._since: dict[Hashable, float] = {}

    def heard(self, worker: Hashable) -> None:
        """It has begun, or said something."""
        self._since[worker] = self._clock()

    def gone(self, worker: Hashable) -> None:
        """Nothing is expected of it any more."""
        self._since.pop(worker, None)

    def excuse(self) -> None:
        """All have a reason to be silent now."""
        self._since = dict.fromkeys(self._since, self._clock())

    def too_long(self) -> list[Hashable]:
        """Those that have been silent for longer than the limit."""
        return [worker for worker, seconds in self.lengths() if self._limit is not None and seconds > self._limit]

    def lengths(self) -> list[tuple[Hashable, float]]:
        """All of them, with how long each has been silent."""
        now = self._clock()
        return [(worker, now - since) for worker, since in self._since.items()]


OF_MEMORY = "memory of the node"
NOBODYS_FAULT = ("preempted", "node died")
_CAUSES = {  # the first whose words are there
    "low on memory": OF_MEMORY,
    "node was preempted": "preempted",
    "node has died": "node died",
    "worker process has died": "worker process died",
}


def end_of(causes: Sequence[str]) -> tuple[str, str]:
    """(how a trial ended, why) whose workers died of these causes, without a report in between."""
    times = f"{len(causes)} times without a report in between"
    if set(causes) == {OF_MEMORY}:
        return "oom", f"its workers were killed for the memory of their node {times}"
    return "lost", f"its workers died {times}: {', '.join(causes)}"


def cause_of_death(message: str) -> str:
    """Why a worker is gone, from what Ray says. It cannot tell a segmentation fault from SIGKILL by the system: both are a dead process."""
    return next((cause for words, cause in _CAUSES.items() if words in message.lower()), "unknown")
