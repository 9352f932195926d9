"""Layer-adaptive magnitude scores as a budget."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from distprune.core.budgets import Layer, ranked
from distprune.core.registry import allocator


@allocator("lamp", paper="Lee et al. 2021, arXiv:2010.07611, eq. 4", needs_scores=True)
def lamp(layers: Sequence[Layer], kept: int, scores: Mapping[str, Tensor] | None, alive: Mapping[str, Tensor] | None) -> dict[str, int]:
    """Counts from one ranking of s_u^2 / sum of s_v^2 over the v ranked at or above u in its layer (the paper has s = |w|).

    Formula:
        a(u) = s_u^2 / sum over v with s_v >= s_u in its layer of s_v^2
        k_l = how many of the K largest a lie in layer l

    Scores that can be negative (GraSP) are shifted to start at zero in each layer. The best weight of a layer has 1: none collapses.
    """
    assert scores is not None
    return ranked({layer.name: _lamp(scores[layer.name], alive[layer.name] if alive else None) for layer in layers}, layers, kept, alive)


def _lamp(scores: Tensor, alive: Tensor | None) -> Tensor:
    flat = scores.detach().flatten().double()
    live = torch.ones_like(flat, dtype=torch.bool) if alive is None else alive.flatten()
    squared = (flat - flat[live].min().clamp(max=0)).square() * live
    ascending, order = torch.sort(squared, stable=True)
    tail = ascending.flip(0).cumsum(0).flip(0)
    return torch.empty_like(squared).scatter_(0, order, ascending / tail.clamp_min(1e-300)).view(scores.shape)
