"""Erdős–Rényi-Kernel densities."""

import math
from collections.abc import Mapping, Sequence

from torch import Tensor

from distprune.core.budgets import Layer, proportional
from distprune.core.registry import allocator


@allocator("erk", paper="Evci et al. 2020, arXiv:1911.11134, section 3; Mocanu et al. 2018, arXiv:1707.04780")
def erk(layers: Sequence[Layer], kept: int, scores: Mapping[str, Tensor] | None, alive: Mapping[str, Tensor] | None) -> dict[str, int]:
    """Density in proportion to (n_in + n_out + kernel sides) / (n_in * n_out * kernel area); layers that would exceed 1 are dense.

    Formula:
        d_l ~ (n_in + n_out + k_h + k_w) / (n_in n_out k_h k_w),  at most 1
    """
    return proportional([sum(layer.shape) / math.prod(layer.shape) for layer in layers], layers, kept)
