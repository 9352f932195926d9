"""Budgets that are searched: a share of every layer, or two exponents for all."""

import math
from collections.abc import Mapping, Sequence
from typing import Annotated

from torch import Tensor

from distprune.core.budgets import Layer, proportional
from distprune.core.options import LogRange, PerLayer, Range
from distprune.core.registry import allocator
from distprune.errors import unknown


@allocator("per_layer")
def per_layer(
    layers: Sequence[Layer],
    kept: int,
    scores: Mapping[str, Tensor] | None,
    alive: Mapping[str, Tensor] | None,
    *,
    shares: Annotated[Mapping[str, float], PerLayer(LogRange(0.05, 1.0))],
) -> dict[str, int]:
    """Density of a layer in proportion to its share, normalised so that the budget is met exactly. A layer without a share has 1."""
    if wrong := shares.keys() - {layer.name for layer in layers}:
        raise unknown("layer in allocator.shares:", min(wrong), [layer.name for layer in layers])
    return proportional([shares.get(layer.name, 1.0) for layer in layers], layers, kept)


@allocator("power")
def power(
    layers: Sequence[Layer],
    kept: int,
    scores: Mapping[str, Tensor] | None,
    alive: Mapping[str, Tensor] | None,
    *,
    size: Annotated[float, Range(-1.0, 0.5)] = -0.5,
    depth: Annotated[float, Range(-2.0, 2.0)] = 0.0,
) -> dict[str, int]:
    """Density in proportion to size^`size` * (1 + position)^`depth`, position 0 for the first layer and 1 for the last."""
    return proportional([math.prod(layer.shape) ** size * (1 + layer.depth) ** depth for layer in layers], layers, kept)
