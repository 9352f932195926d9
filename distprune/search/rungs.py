"""Rungs: where in their bill trials are compared, and which of them go on.

Asynchronous successive halving on two objectives (MO-ASHA, Schmucker et al. 2021, arXiv:2106.12639): at a rung, the trials seen there
are ranked by non-dominated front and, within a front, by an epsilon-net that spreads over it; the best `1 / reduction` go on.
"""

import math
from collections.abc import Sequence

from distprune.errors import UserError
from distprune.search.tables import scheduler

Vector = tuple[float, float]  # (score, -kept weights): both larger is better


@scheduler("pareto_halving", paper="Schmucker et al. 2021, arXiv:2106.12639")
def pareto_halving(least: int, most: int, *, reduction: int = 3, first: float = 0.5) -> "Rungs":
    """Rungs at the bill of `first` dense trainings and `reduction` times as far each; at each the best 1 / reduction go on."""
    if reduction < 2 or first <= 0:
        raise UserError(f"scheduler.reduction must be at least 2 and scheduler.first above 0, got {reduction} and {first}.")
    return Rungs(boundaries(round(least * first), most, reduction), reduction)


@scheduler("none")
def none(least: int, most: int) -> "Rungs":
    """Every trial runs to its end."""
    return Rungs([], 2)


def boundaries(least: int, most: int, reduction: int) -> list[int]:
    """Costs (samples) of the rungs: least * reduction^k below `most`."""
    costs = []
    cost = max(least, 1)
    while cost < most:
        costs.append(cost)
        cost *= reduction
    return costs


class Rungs:
    """What was seen at each rung. Decisions are a pure function of what was heard, in order."""

    def __init__(self, costs: Sequence[int], reduction: int) -> None:
        self.costs = list(costs)
        self.reduction = reduction
        self._seen: list[dict[int, Vector]] = [{} for _ in costs]

    def goes_on(self, number: int, rung: int, vector: Vector) -> bool:
        """Note the trial's vector at a rung and say whether it goes on. The first trial at a rung always does."""
        self.note(number, rung, vector)
        ranked = order(list(self._seen[rung].items()))
        return ranked.index(number) < math.ceil(len(ranked) / self.reduction)

    def note(self, number: int, rung: int, vector: Vector) -> None:
        """Let a trial compete at a rung without deciding on it."""
        if rung < len(self._seen):
            self._seen[rung][number] = vector

    def finished(self, number: int, rung: int, vector: Vector) -> None:
        """A finished trial competes at all rungs above the last it crossed: it is worth no less for having been cheap."""
        for above in range(rung + 1, len(self._seen)):
            self.note(number, above, vector)


def dominates(a: Vector, b: Vector) -> bool:
    """Whether `a` is at least as good in both and better in one."""
    return a[0] >= b[0] and a[1] >= b[1] and a != b


def order(rows: Sequence[tuple[int, Vector]]) -> list[int]:
    """Numbers from best to worst: by non-dominated front, then by epsilon-net within it, ties by number."""
    left = sorted(rows)
    ranked: list[int] = []
    spans = [max(v[i] for _, v in left) - min(v[i] for _, v in left) or 1.0 for i in range(2)] if left else []
    while left:
        front = [row for row in left if not any(dominates(other[1], row[1]) for other in left)]
        left = [row for row in left if row not in front]
        ranked += _spread(front, spans)
    return ranked


def _spread(front: list[tuple[int, Vector]], spans: Sequence[float]) -> list[int]:
    """Farthest first, from the one with the best score (Salinas et al. 2021, arXiv:2106.12639, algorithm 2)."""

    def distance(a: Vector, b: Vector) -> float:
        return math.hypot((a[0] - b[0]) / spans[0], (a[1] - b[1]) / spans[1])

    front = sorted(front, key=lambda row: (-row[1][0], -row[1][1], row[0]))
    chosen, rest = front[:1], front[1:]
    while rest:
        best = max(rest, key=lambda row: (min(distance(row[1], other[1]) for other in chosen), -row[0]))
        chosen.append(best)
        rest.remove(best)
    return [number for number, _ in chosen]
