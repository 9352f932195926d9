"""Units: what is kept or removed as one. A granularity divides the prunable weights of a network into them.

Allocators and top-k work on units and know nothing of weights; budgets are in weights, or in another cost that has a price. `choose` brings
the two together: as many units as fit into the budget, and for single weights exactly as many.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from torch import Tensor, nn

from distprune.core.budgets import Layer, allocate, budget, check_sparsity, infeasible, layers_of, top_masks
from distprune.core.masks import Masks
from distprune.core.registry import Choice
from distprune.errors import UserError

if TYPE_CHECKING:
    from distprune.core.granularity.coupling import Group

_CLOSE = 0.9999  # share of the budget that is close enough
CLOSE = 1e-12  # of the dense cost: what sums of shares are off by
Reduction = Literal["mean", "sum", "squared_sum", "first"]


@dataclass(frozen=True)
class Network:
    """What a granularity may look at. `example()` gives one input; it raises UserError where there is none."""

    model: nn.Module
    weights: Mapping[str, nn.Parameter]  # the prunable ones
    example: Callable[[], Tensor]


@dataclass(frozen=True)
class Price:
    """A cost that sparsity is a share of in place of the number of weights."""

    name: str
    share: Callable[[Mapping[str, int], Mapping[str, tuple[int, ...]]], float]  # (kept weights, shapes) by name -> share of the dense cost


class Units(ABC):
    """The units of a network, in layers: a layer is what an allocator gives one number to.

    "Unit values" are layer name -> tensor of any shape, one number a unit; "weight values" are weight name -> shape of the weight.
    """

    channels: "tuple[Group, ...]" = ()  # coupled channels, where units are some
    price: Price | None = None  # None: sparsity is a share of the weights

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        self.shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
        self.total = sum(map(math.prod, self.shapes.values()))

    @abstractmethod
    def layers(self, alive: Mapping[str, Tensor] | None = None) -> list[Layer]:
        """What an allocator sees."""

    @abstractmethod
    def reduce(self, values: Mapping[str, Tensor], reduction: Reduction) -> dict[str, Tensor]:
        """Unit values from weight values."""

    @abstractmethod
    def spread(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Weight values from unit values: every weight has that of the unit in whose score it counts, and 1 if it is in none."""

    @abstractmethod
    def expand(self, kept: Mapping[str, Tensor]) -> Masks:
        """Masks from bool unit values."""

    @abstractmethod
    def alive(self, masks: Masks) -> dict[str, Tensor]:
        """Bool unit values: which units keep a weight."""

    @abstractmethod
    def kept_weights(self, counts: Mapping[str, int]) -> dict[str, int]:
        """Weight name -> how many are kept where a layer keeps `counts[name]` of its units."""

    def weights(self, counts: Mapping[str, int]) -> int:
        """How many weights are kept in all."""
        return sum(self.kept_weights(counts).values())

    def left(self, counts: Mapping[str, int]) -> Mapping[str, tuple[int, ...]]:
        """The shapes of the weights once what is removed is taken out, which only channels are."""
        return self.shapes

    def share(self, counts: Mapping[str, int]) -> float:
        """What keeping `counts[name]` units of each layer costs, as a share of keeping all."""
        if self.price is None:
            return self.weights(counts) / self.total
        return self.price.share(self.kept_weights(counts), self.left(counts))

    def sparsity(self, masks: Masks) -> float:
        """The share of the cost that masks save."""
        if self.price is None:
            return masks.sparsity
        return 1 - self.share({name: int(alive.sum()) for name, alive in self.alive(masks).items()})

    def check(self, sparsity: float) -> None:
        """Raise UserError if `sparsity` would leave a layer without a unit, naming the largest feasible one."""
        layers = self.layers()
        one_each = {layer.name: 1 for layer in layers}
        if self.price is not None:
            check_share(self.price.name, sparsity, self.share(one_each), f"at least one unit in each of {len(layers)} layers")
        elif budget(sparsity, self.total) < (least := self.weights(one_each)):
            raise infeasible(sparsity, len(layers), least, self.total)

    def counts(
        self, sparsity: float, allocator: Choice, scores: Mapping[str, Tensor] | None = None, alive: Mapping[str, Tensor] | None = None
    ) -> dict[str, int]:
        """How many units each layer keeps: as many as fit, at or below the budget. Raises UserError for an infeasible one.

        With a price, and units of different ones, what the allocator leaves goes to the layers whose next unit is dearest, so that in the
        end no layer's next unit fits.
        """
        self.check(sparsity)
        layers = self.layers(alive)
        if self.price is None:
            return self._most(layers, budget(sparsity, self.total), self.weights, allocator, scores, alive)
        most = 1 - sparsity + CLOSE
        counts = self._most(layers, most, self.share, allocator, scores, alive, close=1.0)
        return self._filled(counts, layers, most)

    def _most(
        self,
        layers: list[Layer],
        target: float,
        cost: Callable[[Mapping[str, int]], float],
        allocator: Choice,
        scores: Mapping[str, Tensor] | None,
        alive: Mapping[str, Tensor] | None,
        *,
        close: float = _CLOSE,
    ) -> dict[str, int]:
        """The allocator's counts of as many units as cost at most `target`, or a share `close` of that."""

        def at(units: int) -> tuple[dict[str, int], float]:
            counts = allocate(allocator, layers, units, scores, alive)
            return counts, cost(counts)

        # What units cost is nearly linear in their number.
        low, high = len(layers), sum(layer.alive for layer in layers)
        (chosen, few), (all_of_them, many) = at(low), at(high)
        if many <= target:
            chosen, few, low = all_of_them, many, high
        while high - low > 1 and few < target * close:
            share = (target - few) / max(many - few, 1e-12)
            middle = min(max(low + int(share * (high - low)), low + max((high - low) // 16, 1)), high - max((high - low) // 16, 1))
            counts, found = at(middle)
            if found <= target:
                low, chosen, few = middle, counts, found
            else:
                high, many = middle, found
        return chosen

    def _filled(self, counts: dict[str, int], layers: list[Layer], most: float) -> dict[str, int]:
        """`counts` and what else fits, layers with the dearest units first; costs never fall with a unit more, so once round is enough."""
        costs = {layer: self.share({**counts, layer.name: counts[layer.name] + 1}) for layer in layers if counts[layer.name] < layer.alive}
        for layer in sorted((layer for layer in costs if costs[layer] <= most), key=lambda layer: (-costs[layer], layer.depth)):
            low, high = counts[layer.name], layer.alive + 1
            while high - low > 1:
                middle = (low + high) // 2
                low, high = (middle, high) if self.share({**counts, layer.name: middle}) <= most else (low, middle)
            counts = {**counts, layer.name: low}
        return counts

    def choose(self, scores: Mapping[str, Tensor], sparsity: float, allocator: Choice, masks: Masks | None) -> Masks:
        """Masks of the units of the highest score, at or below the budget; with `masks`, only of those that they keep.

        Raises UserError for an infeasible budget or scores that are not finite.
        """
        alive = self.alive(masks) if masks is not None else None
        return self.expand(top_masks(scores, self.counts(sparsity, allocator, scores, alive), alive))


def check_share(name: str, sparsity: float, least: float, rule: str) -> None:
    """Raise UserError if more than `1 - least` of a cost is to be saved, naming the largest feasible sparsity."""
    if 1 - check_sparsity(sparsity) + CLOSE < least:
        raise UserError(
            f"sparsity must leave {rule}, got {sparsity} of the network's {name}. "
            f"The largest feasible sparsity of {name} is {max(math.floor((1 - least) * 1e6), 0) / 1e6}."
        )


class Weights(Units):
    """Every weight is a unit."""

    def layers(self, alive: Mapping[str, Tensor] | None = None) -> list[Layer]:
        return layers_of(self.shapes, alive)

    def reduce(self, values: Mapping[str, Tensor], reduction: Reduction) -> dict[str, Tensor]:
        return {name: value.square() if reduction == "squared_sum" else value for name, value in values.items()}

    def spread(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return dict(values)

    def expand(self, kept: Mapping[str, Tensor]) -> Masks:
        return Masks(kept)

    def alive(self, masks: Masks) -> dict[str, Tensor]:
        return dict(masks)

    def kept_weights(self, counts: Mapping[str, int]) -> dict[str, int]:
        return dict(counts)

    def counts(
        self, sparsity: float, allocator: Choice, scores: Mapping[str, Tensor] | None = None, alive: Mapping[str, Tensor] | None = None
    ) -> dict[str, int]:
        """As many as the budget, exactly."""
        if self.price is not None:
            return super().counts(sparsity, allocator, scores, alive)
        self.check(sparsity)
        return allocate(allocator, self.layers(alive), budget(sparsity, self.total), scores, alive)
