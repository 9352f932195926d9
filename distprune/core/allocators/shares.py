"""Budgets that are searched: a share of every layer, or two exponents for all."""

import math
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
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
    """Density of a layer in proportion to its share, normalised so that the budget is met exactly. A layer without a share has 1.

    Formula:
        d_l ~ shares_l,  at most 1

    `shares` is by names of layers or shell patterns, `{"stage1.*": 0.25, "stage3.*": 0.68}`: a layer takes the share of its name, or of the
    longest pattern that fits it.
    """
    names = [layer.name for layer in layers]
    if wrong := sorted(key for key in shares if not any(_fits(key, name) for name in names)):
        patterns = {f"{name.partition('.')[0]}.*" for name in names}
        raise unknown("layer in allocator.shares:", wrong[0], patterns if set(wrong[0]) & set("*?[") else names)
    # Not the first that fits: two mappings that differ in their order are the same recipe, with the same key.
    order = sorted(shares, key=lambda key: (key not in names, -len(key), key))
    return proportional([next((shares[key] for key in order if _fits(key, name)), 1.0) for name in names], layers, kept)


def _fits(key: str, name: str) -> bool:
    return key == name or fnmatchcase(name, key)


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
    """Density in proportion to size^`size` * (1 + position)^`depth`, position 0 for the first layer and 1 for the last.

    Formula:
        d_l ~ (weights of layer l)^size (1 + position_l)^depth,  at most 1
    """
    return proportional([math.prod(layer.shape) ** size * (1 + layer.depth) ** depth for layer in layers], layers, kept)
