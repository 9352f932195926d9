"""The same density in every layer."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from distprune.core.budgets import Layer, proportional
from distprune.core.registry import allocator


@allocator("uniform", paper="Zhu & Gupta 2017, arXiv:1710.01878")
def uniform(layers: Sequence[Layer], kept: int, scores: Mapping[str, Tensor] | None, alive: Mapping[str, Tensor] | None) -> dict[str, int]:
    """Every layer keeps the same share of its units.

    Formula:
        d_l = const
    """
    return proportional([1.0] * len(layers), layers, kept)
