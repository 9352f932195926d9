"""Per-layer budgets as a constrained decision process: one pass over the layers, each step says what share of a layer is kept.

The cost is a black box that is only evaluated (Malik et al. 2021, arXiv:2110.08558): a function of how many units each layer keeps that
never falls when one more is kept. The state vector and the action wall are those of AMC (He et al. 2018, arXiv:1802.03494, section 3).
"""

import math
from collections.abc import Callable, Mapping, Sequence

from distprune.core.allocators.constrained_rl import count
from distprune.core.budgets import Layer
from distprune.errors import UserError

LEAST = 0.001  # keep ratio
_FAR = 30.0  # a logit at which every layer keeps all, or next to nothing


class Budgets:
    """The layers of a network, what keeping their units costs as a share of the dense network, and the most that it may cost.

    `measured` says that the cost of a trial is measured, and that `cost` is only in proportion to it.
    """

    def __init__(self, layers: Sequence[Layer], cost: Callable[[Mapping[str, int]], float], most: float, *, measured: bool = False) -> None:
        """Raises UserError for a budget below what the smallest keep ratios cost."""
        self.layers, self.cost, self.most, self.measured = list(layers), cost, most, measured
        self.smallest = {layer.name: count(LEAST, layer) for layer in layers}
        self.whole = {layer.name: layer.units for layer in layers}
        self.least_cost = cost(self.smallest)
        if self.least_cost > most:
            raise UserError(
                f"budget.most must be at least {self.least_cost:.4g}, what remains where every layer keeps {LEAST:.1%} of its units or "
                f"a single one, got {most:g}. Raise it."
            )
        full = cost(self.whole)
        alone = [full - cost({**self.whole, layer.name: self.smallest[layer.name]}) for layer in layers]
        self._share = [value / max(sum(alone), 1e-12) for value in alone]
        self._facts = self._describe()
        self.uniform_logit = self._bisect([0.0] * len(self.layers), most)

    @property
    def features(self) -> int:
        """Length of a state vector."""
        return len(self.layers) + len(self._facts[0]) + 4

    def counts(self, keep: Mapping[str, float]) -> dict[str, int]:
        """Units that each layer keeps."""
        return {layer.name: count(keep[layer.name], layer) for layer in self.layers}

    def start(self) -> dict[str, int]:
        """Counts before the first step: AMC's assumption that all later layers are pruned to the minimum."""
        return dict(self.smallest)

    def state(self, step: int, counts: Mapping[str, int], last: float) -> list[float]:
        """What the policy sees before it decides on layer `step`: all numbers are of the order of one.

        `counts` has the decisions so far and the minimum for what follows; `last` is the latest keep ratio. One entry a layer says which
        it is; then come its shape and cost, what is committed and what is left of the budget (in budgets), and the cost of what follows.
        """
        committed = self.cost(counts) / self.most
        place = [float(step == other) for other in range(len(self.layers))]
        return [*place, *self._facts[step], min(committed, 4.0), max(1 - committed, -3.0), sum(self._share[step:]), last]

    def wall(self, step: int, counts: Mapping[str, int], keep: float) -> float:
        """The action wall: `keep`, or the most that layer `step` may keep if every later layer keeps its minimum."""
        layer = self.layers[step]
        low, high = self.smallest[layer.name], count(keep, layer)
        if self.cost({**counts, layer.name: high}) <= self.most:
            return keep
        while high - low > 1:  # `low` fits, `high` does not
            middle = (low + high) // 2
            low, high = (middle, high) if self.cost({**counts, layer.name: middle}) <= self.most else (low, middle)
        return ratio(low, layer)

    def fit(self, logits: Sequence[float], most: float | None = None) -> dict[str, float]:
        """Keep ratios of `logits` plus one shift for all, with which the cost is at or below the budget and as near to it as units allow.

        The shift is found by bisection; then layers are given one unit more each, those first that rounding robbed of most.
        """
        most = self.most if most is None else most
        shift = self._bisect(logits, most)
        keep = {layer.name: keep_of(logit + shift) for layer, logit in zip(self.layers, logits, strict=True)}
        for layer in sorted(self.layers, key=lambda layer: count(keep[layer.name], layer) - keep[layer.name] * layer.units):
            more = {**keep, layer.name: ratio(min(count(keep[layer.name], layer) + 1, layer.units), layer)}
            if self.cost(self.counts(more)) <= most:
                keep = more
        return keep

    def _bisect(self, logits: Sequence[float], most: float) -> float:
        """The highest shift of all logits at which the cost is at most `most`."""

        def fits(shift: float) -> bool:
            return self.cost({layer.name: count(keep_of(z + shift), layer) for layer, z in zip(self.layers, logits, strict=True)}) <= most

        low, high = -_FAR - max(logits), _FAR - min(logits)
        if fits(high):
            return high
        for _ in range(50):
            middle = (low + high) / 2
            low, high = (middle, high) if fits(middle) else (low, middle)
        return low

    def _describe(self) -> list[list[float]]:
        """Of each layer, relative to the largest: position, convolution or not, units, inputs, kernel area, and its share of the cost."""
        shapes = [(*layer.shape, 1, 1, 1)[:4] for layer in self.layers]
        columns = [
            [layer.depth for layer in self.layers],
            [float(len(layer.shape) > 2) for layer in self.layers],
            [math.log1p(layer.units) for layer in self.layers],
            [math.log1p(shape[1]) for shape in shapes],
            [float(shape[2] * shape[3]) for shape in shapes],
            self._share,
        ]
        scaled = [[value / (max(column) or 1.0) for value in column] for column in columns]
        return [list(row) for row in zip(*scaled, strict=True)]


def keep_of(logit: float) -> float:
    """A keep ratio from an action: its sigmoid, in six digits as recipes hold it."""
    return float(f"{max(1 / (1 + math.exp(-max(min(logit, 500.0), -500.0))), LEAST):.6g}")


def ratio(units: int, layer: Layer) -> float:
    """The keep ratio of a number of units, rounded down to six digits: it never keeps more."""
    share = units / layer.units
    digits = 10.0 ** (5 - math.floor(math.log10(share)))
    return max(math.floor(share * digits + 1e-9) / digits, LEAST)
