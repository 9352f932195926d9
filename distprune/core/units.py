"""Units: what is kept or removed as one. A granularity divides the prunable weights of a network into them.

Allocators and top-k work on units and know nothing of weights; budgets are in weights. `choose` brings the two together: as many units
as fit into the budget, and for single weights exactly as many.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from torch import Tensor, nn

from distprune.core.budgets import Layer, allocate, budget, infeasible, layers_of, top_masks
from distprune.core.masks import Masks
from distprune.core.registry import Choice

if TYPE_CHECKING:
    from distprune.core.granularity.coupling import Group

_CLOSE = 0.9999  # share of the budget that is close enough
Reduction = Literal["mean", "sum", "squared_sum", "first"]


@dataclass(frozen=True)
class Network:
    """What a granularity may look at. `example()` gives one input; it raises UserError where there is none."""

    model: nn.Module
    weights: Mapping[str, nn.Parameter]  # the prunable ones
    example: Callable[[], Tensor]


class Units(ABC):
    """The units of a network, in layers: a layer is what an allocator gives one number to.

    "Unit values" are layer name -> tensor of any shape, one number a unit; "weight values" are weight name -> shape of the weight.
    """

    channels: "tuple[Group, ...]" = ()  # coupled channels, where units are some

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

    def check(self, sparsity: float) -> None:
        """Raise UserError if `sparsity` would leave a layer without a unit, naming the largest feasible one."""
        layers = self.layers()
        least = self.weights({layer.name: 1 for layer in layers})
        if budget(sparsity, self.total) < least:
            raise infeasible(sparsity, len(layers), least, self.total)

    def choose(self, scores: Mapping[str, Tensor], sparsity: float, allocator: Choice, masks: Masks | None) -> Masks:
        """Masks of the units of the highest score, at or below the budget; with `masks`, only of those that they keep.

        Raises UserError for an infeasible budget or scores that are not finite.
        """
        self.check(sparsity)
        alive = self.alive(masks) if masks is not None else None
        layers, target = self.layers(alive), budget(sparsity, self.total)

        def at(units: int) -> tuple[dict[str, int], int]:
            counts = allocate(allocator, layers, units, scores, alive)
            return counts, self.weights(counts)

        # As many units as fit: the weights they have are nearly linear in their number.
        low, high = len(layers), sum(layer.alive for layer in layers)
        (chosen, few), (all_of_them, many) = at(low), at(high)
        if many <= target:
            chosen, few, low = all_of_them, many, high
        while high - low > 1 and few < target * _CLOSE:
            share = (target - few) / (many - few)
            middle = min(max(low + int(share * (high - low)), low + max((high - low) // 16, 1)), high - max((high - low) // 16, 1))
            counts, found = at(middle)
            if found <= target:
                low, chosen, few = middle, counts, found
            else:
                high, many = middle, found
        return self.expand(top_masks(scores, chosen, alive))


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

    def choose(self, scores: Mapping[str, Tensor], sparsity: float, allocator: Choice, masks: Masks | None) -> Masks:
        """As many as the budget, exactly."""
        self.check(sparsity)
        counts = allocate(allocator, self.layers(masks), budget(sparsity, self.total), scores, masks)
        return top_masks(scores, counts, masks)
