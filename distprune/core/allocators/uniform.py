"""The same density in every layer."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from distprune.core.budgets import Layer, proportional
from distprune.core.masks import Masks
from distprune.core.registry import allocator


@allocator("uniform", paper="Zhu & Gupta 2017, arXiv:1710.01878")
def uniform(layers: Sequence[Layer], kept: int, scores: Mapping[str, Tensor] | None, alive: Masks | None) -> dict[str, int]:
    """Every layer keeps the same share of its weights."""
    return proportional([layer.size for layer in layers], layers, kept)
