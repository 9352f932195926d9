"""One ranking over all layers."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from distprune.core.budgets import Layer, ranked
from distprune.core.registry import allocator


@allocator("global", paper="Han et al. 2015, arXiv:1506.02626", needs_scores=True)
def globally(layers: Sequence[Layer], kept: int, scores: Mapping[str, Tensor] | None, alive: Mapping[str, Tensor] | None) -> dict[str, int]:
    """A layer keeps as many units as it has among the best of the whole network.

    Formula:
        k_l = how many of the K best units of all layers lie in layer l
    """
    assert scores is not None
    return ranked(scores, layers, kept, alive)
