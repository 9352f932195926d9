"""Ratios that suit random tickets."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from distprune.core.budgets import Layer, proportional
from distprune.core.registry import allocator


@allocator("smart_ratio", paper="Su et al. 2020, arXiv:2009.11094, section 4")
def smart_ratio(
    layers: Sequence[Layer], kept: int, scores: Mapping[str, Tensor] | None, alive: Mapping[str, Tensor] | None, *, head: float = 0.3
) -> dict[str, int]:
    """Density in proportion to (L - l + 1)^2 + (L - l + 1) for layer l of L, and `head` in the last layer where the budget allows it.

    Formula:
        d_l ~ (L - l + 1)^2 + (L - l + 1),  l = 1 .. L - 1;   d_L = head
    """
    last, rest = layers[-1], layers[:-1]
    depth = len(layers)
    falling = [float((depth - i) ** 2 + (depth - i)) for i in range(len(rest))]
    if not rest:
        return proportional([1.0], layers, kept)
    most = min(last.alive, kept - len(rest))  # a layer keeps at least one unit
    least = max(1, kept - sum(layer.alive for layer in rest))
    of_head = max(least, min(most, int(head * last.units + 0.5), max(kept // depth, 1)))
    return {**proportional(falling, rest, kept - of_head), last.name: of_head}
