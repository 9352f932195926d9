"""Which of the trials that wait runs next: none whose beginning another trial is computing, if there is one that need not wait for it.

A trial's beginning is the prefix of its plan that others may share (`core/prefix.py`). The trials themselves stay the same, and none is
overtaken more than a few times.
"""

from collections import Counter
from collections.abc import Callable, Sequence

from distprune.core.recipe import Recipe

AHEAD = 4  # trials that are proposed at most before one runs
MOST_OVERTAKEN = 3

Prefixes = Sequence[tuple[str, int]]  # (key, bill in samples) of what a trial computes on its way and others may read


class Order:
    """What was computed, what is being computed, and what waits."""

    def __init__(self, prefixes: Callable[[Recipe], Prefixes] = lambda recipe: (), *, ahead: int = AHEAD) -> None:
        self._of, self._ahead = prefixes, ahead
        self._waiting: dict[int, Prefixes] = {}
        self._overtaken: dict[int, int] = {}
        self._left: dict[int, list[tuple[str, int]]] = {}  # running trial -> what it has not reached yet, the nearest last
        self._makers: Counter[str] = Counter()  # key -> running trials that will reach it
        self._made: set[str] = set()

    def wait(self, number: int, recipe: Recipe) -> None:
        """A trial was proposed and may run."""
        self._waiting[number], self._overtaken[number] = self._of(recipe), 0

    @property
    def waiting(self) -> bool:
        """Whether a trial waits."""
        return bool(self._waiting)

    def drop(self) -> list[int]:
        """Have none wait any more; returns those that did."""
        numbers = sorted(self._waiting)
        self._waiting, self._overtaken = {}, {}
        return numbers

    def take(self, *, more: bool) -> int | None:
        """The trial that runs now. None if none waits, or if there are `more` to be proposed and one of them may suit better."""
        if not self._waiting:
            return None
        oldest = min(self._waiting)
        number = oldest if self._overtaken[oldest] >= MOST_OVERTAKEN else min(self._waiting, key=self._rank)
        if more and len(self._waiting) < self._ahead and self._overtaken[number] < MOST_OVERTAKEN and self._awaits(number):
            return None
        for other in self._overtaken:
            self._overtaken[other] += other < number
        self.begun(number, self._waiting.pop(number))
        del self._overtaken[number]
        return number

    def _rank(self, number: int) -> tuple[bool, int, int]:
        """Smaller goes first: one that need not wait, with the longest finished beginning, the oldest."""
        return self._awaits(number), -self._ready(number), number

    def _ready(self, number: int) -> int:
        """Samples of a waiting trial that are computed already."""
        return max((cost for key, cost in self._waiting[number] if key in self._made), default=0)

    def _awaits(self, number: int) -> bool:
        """Whether a running trial is computing what this one would read."""
        ready = self._ready(number)
        return any(cost > ready and key in self._makers for key, cost in self._waiting[number])

    def begun(self, number: int, prefixes: Prefixes) -> None:
        """A trial runs."""
        self._left[number] = sorted((prefix for prefix in prefixes if prefix[0] not in self._made), key=lambda prefix: -prefix[1])
        self._makers.update(key for key, _ in self._left[number])

    def again(self, number: int, recipe: Recipe) -> None:
        """A trial that had begun goes on."""
        self.begun(number, self._of(recipe))

    def reached(self, number: int, cost: float) -> None:
        """A running trial was heard at a bill of `cost` samples."""
        left = self._left.get(number, [])
        while left and left[-1][1] <= cost:
            self._made.add(left[-1][0])
            self._unmake(left.pop()[0])

    def ended(self, number: int) -> None:
        """A running trial makes nothing more."""
        for key, _ in self._left.pop(number, []):
            self._unmake(key)

    def _unmake(self, key: str) -> None:
        self._makers[key] -= 1
        if not self._makers[key]:
            del self._makers[key]
