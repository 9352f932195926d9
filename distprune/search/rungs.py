"""Rungs: where in their bill trials are compared, and which of them go on.

Asynchronous successive halving on any number of objectives, after MO-ASHA (Schmucker et al. 2021, arXiv:2106.12639): the trials seen at
a rung are ranked by how many others dominate them (Fonseca & Fleming 1993) and, among equals, by an epsilon-net that spreads over them;
the best `1 / reduction` go on. With one objective that is ASHA.

With few trials most of a front is more than `1 / reduction`, and the net would keep little but its ends: it emptied the middle. So a
trial that none at its rung dominates goes on as well, as long as no more than the share `front` of those seen there has. Counts are kept
up to date with one pass over the rung a trial, whatever is asked of it.
"""

import bisect
import math
import statistics
from collections import defaultdict
from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt

from distprune.errors import UserError
from distprune.search.tables import scheduler

Vector = tuple[float, ...]  # (score, -cost, ...): larger is better in each
Variant = Literal["stop", "promote"]
_Floats = npt.NDArray[np.float64]
_Places = npt.NDArray[np.int64]
NET = 16  # members of an epsilon-net; what is left follows by its distance from it


@scheduler("pareto_halving", paper="Schmucker et al. 2021, arXiv:2106.12639")
def pareto_halving(
    least: int, most: int, objectives: int, *, reduction: int = 3, first: float = 0.5, front: float = 0.75, variant: Variant = "stop"
) -> "Rungs":
    """Rungs at the bill of `first` dense trainings and `reduction` times as far each; at each the best 1 / reduction go on.

    So does what no other dominates, up to the share `front` of those seen there. With `promote` all others wait, and go on should
    they come to be among the best; with `stop` they end.
    """
    _check(reduction, first)
    if not 0 <= front <= 1:
        raise UserError(f"scheduler.front must be a share in [0, 1], got {front}. Write 0 for 1 / reduction whatever is on the front.")
    return Rungs(boundaries(round(least * first), most, reduction), reduction, front=front, promotes=variant == "promote")


@scheduler("halving", paper="ASHA: Li et al. 2020, arXiv:1810.05934")
def halving(least: int, most: int, objectives: int, *, reduction: int = 3, first: float = 0.5, variant: Variant = "stop") -> "Rungs":
    """For one objective: rungs as in `pareto_halving`, and the best 1 / reduction by score go on. `promote` lets the others wait."""
    _check(reduction, first)
    _check_single("halving", objectives)
    return Rungs(boundaries(round(least * first), most, reduction), reduction, promotes=variant == "promote")


@scheduler("median", paper="Golovin et al. 2017, Google Vizier, section 3.2.2")
def median(least: int, most: int, objectives: int, *, reduction: int = 2, first: float = 0.5, grace: int = 5) -> "Rungs":
    """For one objective: a trial ends whose best score is below the median of at least `grace` others at the same rung."""
    _check(reduction, first)
    _check_single("median", objectives)
    if grace < 1:
        raise UserError(f"scheduler.grace must be at least 1, got {grace}. To stop nothing write scheduler: none.")
    return Median(boundaries(round(least * first), most, reduction), grace)


@scheduler("none")
def none(least: int, most: int, objectives: int) -> "Rungs":
    """Every trial runs to its end."""
    return Rungs([], 2)


def _check(reduction: int, first: float) -> None:
    if reduction < 2 or first <= 0:
        raise UserError(
            f"scheduler.reduction must be at least 2 and scheduler.first above 0, got {reduction} and {first}. Leave them out for their "
            "defaults."
        )


def _check_single(name: str, objectives: int) -> None:
    if objectives > 1:
        raise UserError(
            f"scheduler '{name}' compares trials by their score alone, and the search has {objectives} objectives: it would stop every "
            "sparse network. Write scheduler: pareto_halving."
        )


def boundaries(least: int, most: int, reduction: int) -> list[int]:
    """Costs (samples) of the rungs: least * reduction^k below `most`."""
    costs = []
    cost = max(least, 1)
    while cost < most:
        costs.append(cost)
        cost *= reduction
    return costs


def dominates(a: Vector, b: Vector) -> bool:
    """Whether `a` is at least as good in all and better in one."""
    return all(x >= y for x, y in zip(a, b, strict=True)) and a != b


class Rungs:
    """What was seen at each rung. Decisions are a pure function of what was heard, in order."""

    def __init__(self, costs: Sequence[int], reduction: int, *, front: float = 0.0, promotes: bool = False) -> None:
        """`front`: share that may go on for being dominated by none. `promotes`: whether trials wait until they are `promotable`."""
        self.costs = list(costs)
        self.reduction, self.front, self.promotes = reduction, front, promotes
        self._rungs: defaultdict[int, _Rung] = defaultdict(_Rung)

    def goes_on(self, number: int, rung: int, vector: Vector) -> bool:
        """Note the trial's vector at a rung and say whether it goes on. The first trial at a rung always does."""
        seen = self._rungs[rung]
        if not seen.add(number, vector):
            return False
        if self.promotes:
            seen.wait(number)
            return False
        goes = seen.best(seen.place(number), self.reduction, self.front) is not None
        seen.on += goes
        return goes

    def note(self, number: int, rung: int, vector: Vector) -> None:
        """Let a trial compete at a rung without deciding on it."""
        self._rungs[rung].add(number, vector)

    def finished(self, number: int, rung: int, vector: Vector) -> None:
        """A finished trial competes at all rungs above the last it crossed: it is worth no less for having been cheap."""
        for above in range(rung + 1, len(self.costs)):
            self.note(number, above, vector)

    def above(self, number: int, rung: int) -> int:
        """By how many others a trial is dominated at a rung that it came to."""
        return self._rungs[rung].above(number)

    def promotable(self) -> int | None:
        """The best trial that may go on from where it waits, from the highest rung that has one."""
        for rung in sorted(self._rungs, reverse=True):
            seen = self._rungs[rung]
            if seen.changed:
                if (best := seen.best(seen.waiting(), self.reduction, self.front)) is not None:
                    return best
                seen.changed = False
        return None

    def leaves(self, number: int, rung: int, *, goes_on: bool = True) -> None:
        """A trial that waited at a rung goes on, or has ended there."""
        self._rungs[rung].leave(number)
        self._rungs[rung].on += goes_on


class Median(Rungs):
    """Stops what is worse than the median of the others."""

    def __init__(self, costs: Sequence[int], grace: int) -> None:
        super().__init__(costs, 2)
        self._grace = grace
        self._scores: defaultdict[int, list[float]] = defaultdict(list)  # in order

    def goes_on(self, number: int, rung: int, vector: Vector) -> bool:
        """Note the trial's score at a rung and say whether it goes on."""
        others = self._scores[rung]
        goes = math.isfinite(vector[0]) and (len(others) < self._grace or vector[0] >= statistics.median(others))
        self.note(number, rung, vector)
        return goes

    def note(self, number: int, rung: int, vector: Vector) -> None:
        if math.isfinite(vector[0]):
            bisect.insort(self._scores[rung], vector[0])


class _Rung:
    """The vectors seen at one rung, and by how many others each is dominated."""

    def __init__(self) -> None:
        self.on = 0  # trials that went on
        self.changed = False  # since it was last asked in vain for one that goes on
        self._places: dict[int, int] = {}  # trial -> place, in the order in which they came
        self._vectors: _Floats = np.empty((0, 0))  # objective x place, with room for more
        self._numbers: _Places = np.empty(0, np.int64)
        self._above: _Places = np.empty(0, np.int64)  # how many dominate each
        self._waits: npt.NDArray[np.bool_] = np.empty(0, bool)  # whether each may yet go on
        self._low: list[float] = []  # of each objective
        self._high: list[float] = []

    def add(self, number: int, vector: Vector) -> bool:
        """Note a trial, if all of its vector is finite: one that is not is worse than any, and ranked with none."""
        if not all(map(math.isfinite, vector)):
            return False
        if number in self._places:
            return True
        count = len(self._places)
        if count == len(self._numbers):
            self._grow(len(vector), max(2 * count, NET))
        least, most = np.ones(count, bool), np.ones(count, bool)
        for row, value in zip(self._vectors[:, :count], vector, strict=True):
            least &= row >= value
            most &= row <= value
        self._above[:count] += most & ~least
        self._vectors[:, count], self._numbers[count], self._above[count] = vector, number, np.count_nonzero(least & ~most)
        self._low = list(map(min, self._low or vector, vector))
        self._high = list(map(max, self._high or vector, vector))
        self._places[number] = count
        self.changed = True
        return True

    def _grow(self, objectives: int, room: int) -> None:
        more = room - len(self._numbers)
        self._vectors = np.hstack([self._vectors.reshape(objectives, -1), np.zeros((objectives, more))])
        self._numbers = np.concatenate([self._numbers, np.zeros(more, np.int64)])
        self._above = np.concatenate([self._above, np.zeros(more, np.int64)])
        self._waits = np.concatenate([self._waits, np.zeros(more, bool)])

    def place(self, number: int) -> _Places:
        """Where a trial stands."""
        return np.array([self._places[number]])

    def above(self, number: int) -> int:
        """How many dominate a trial."""
        return int(self._above[self._places[number]])

    def waiting(self) -> _Places:
        """Where those stand that may yet go on."""
        return np.flatnonzero(self._waits)

    def wait(self, number: int) -> None:
        """A trial may go on later."""
        self._waits[self._places[number]] = True

    def leave(self, number: int) -> None:
        """A trial waits no longer."""
        if number in self._places:
            self._waits[self._places[number]] = False
            self.changed = True

    def best(self, candidates: _Places, reduction: int, front: float) -> int | None:
        """The best of the candidates, if it is among those that go on. The lowest number of equals that all do; else the net's first."""
        if not len(candidates):
            return None
        count = len(self._places)
        above = self._above[:count]
        least = above[candidates].min()
        allowed = math.ceil(count / reduction) - int(np.count_nonzero(above < least))
        if least == 0 and self.on < front * count:
            allowed = count
        equals = np.flatnonzero(above == least)
        if len(equals) <= allowed:
            return int(self._numbers[candidates[above[candidates] == least]].min())
        if allowed <= 0:
            return None
        equals = equals[np.argsort(self._numbers[equals])]
        spans = [high - low or 1.0 for low, high in zip(self._low, self._high, strict=True)]
        found = in_net(self._vectors[:, equals], spans, allowed, np.isin(equals, candidates))
        return None if found is None else int(self._numbers[equals[found]])


def in_net(vectors: _Floats, spans: Sequence[float], size: int, wanted: npt.NDArray[np.bool_]) -> int | None:
    """The first of the wanted places in the epsilon-net of `size` of the vectors (objective x place), if one is in it.

    The net takes the farthest first (Salinas et al. 2021, arXiv:2106.12639, algorithm 2), beginning with the best by the first objective,
    then by the next. After NET of them, the others follow by their distance from these. Of equal ones the lower place is taken.
    """
    place = int(np.lexsort(-vectors[::-1])[0])
    nearest = np.full(vectors.shape[1], np.inf)
    for _ in range(min(size, NET)):
        if wanted[place]:
            return place
        nearest = np.minimum(nearest, _distances(vectors, place, spans))
        nearest[place] = -1.0  # nearer than any that is not in it
        place = int(nearest.argmax())
    place = int(np.where(wanted, nearest, -1.0).argmax())
    farther = np.count_nonzero(nearest > nearest[place]) + np.count_nonzero(nearest[:place] == nearest[place])
    return place if wanted[place] and NET + farther < size else None


def _distances(vectors: _Floats, place: int, spans: Sequence[float]) -> _Floats:
    """Squared distances of all from one, objectives scaled to their spans."""
    total = np.zeros(vectors.shape[1])
    for row, span in zip(vectors, spans, strict=True):
        scaled = (row - row[place]) / span
        total += scaled * scaled
    return total
