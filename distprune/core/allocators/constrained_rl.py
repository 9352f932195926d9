"""Budgets that a policy proposes: a keep ratio of every layer."""

from collections.abc import Mapping, Sequence
from typing import Annotated

from torch import Tensor

from distprune.core.budgets import Layer, proportional
from distprune.core.options import LogRange, PerLayer
from distprune.core.registry import allocator
from distprune.errors import unknown


@allocator("constrained_rl", paper="Malik et al. 2021, arXiv:2110.08558; action wall: He et al. 2018, arXiv:1802.03494", sets_sparsity=True)
def constrained_rl(
    layers: Sequence[Layer],
    kept: int,
    scores: Mapping[str, Tensor] | None,
    alive: Mapping[str, Tensor] | None,
    *,
    keep: Annotated[Mapping[str, float], PerLayer(LogRange(0.001, 1.0))],
) -> dict[str, int]:
    """A layer keeps `keep` of its units where that is the budget, else in proportion to it; a layer without a ratio is whole.

    Formula:
        k_l = round(keep_l n_l)  where these are the budget, else  d_l ~ keep_l

    In a search with a budget the sparsity is derived from the ratios, so the recipe's own is the first case; the rounds of an iterative
    paradigm on the way there are the second.
    """
    if wrong := keep.keys() - {layer.name for layer in layers}:
        raise unknown("layer in allocator.keep:", min(wrong), [layer.name for layer in layers])
    counts = {layer.name: count(keep.get(layer.name, 1.0), layer) for layer in layers}
    if sum(counts.values()) == kept and all(counts[layer.name] <= layer.alive for layer in layers):
        return counts
    return proportional([keep.get(layer.name, 1.0) for layer in layers], layers, kept)


def count(keep: float, layer: Layer) -> int:
    """Units that a layer keeps at a ratio: the nearest whole number, at least one."""
    return min(max(int(keep * layer.units + 0.5), 1), layer.units)
