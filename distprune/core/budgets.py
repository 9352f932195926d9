"""Budgets: how many weights are kept, in the network and in each layer, as integers that add up exactly.

An allocator turns the network's budget into one of each layer; `top_masks` keeps exactly that many in each.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from distprune.core.masks import Masks
from distprune.core.registry import Choice
from distprune.errors import UserError


@dataclass(frozen=True)
class Layer:
    """What an allocator may know of a layer besides its scores."""

    name: str
    shape: tuple[int, ...]
    alive: int  # weights that may be kept: all of them, or under nested masks those kept so far
    depth: float  # position in the network, 0 = first layer, 1 = last

    @property
    def size(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)


def layers_of(shapes: Mapping[str, Sequence[int]], alive: Masks | None = None) -> list[Layer]:
    """The layers of a network in the order of its parameters."""
    counts = alive.counts if alive else {}
    last = max(len(shapes) - 1, 1)
    return [
        Layer(name, tuple(shape), counts.get(name, math.prod(shape)), position / last)
        for position, (name, shape) in enumerate(shapes.items())
    ]


def check_sparsity(value: float, where: str = "sparsity") -> float:
    """Return `value` if it is in [0, 1). Raises UserError otherwise."""
    if not 0 <= value < 1:
        raise UserError(f"{where} must be in [0, 1), got {value}. To keep 5 % of the weights write 0.95.")
    return value


def kept_for(sparsity: float, layers: Sequence[Layer]) -> int:
    """Weights to keep so that the network has `sparsity`, rounded half up.

    Raises UserError if that is less than one weight a layer, naming the largest feasible sparsity.
    """
    total = sum(layer.size for layer in layers)
    kept = math.floor(total * (1 - check_sparsity(sparsity)) + 0.5 + 1e-9)
    if kept < len(layers):
        largest = math.floor((1 - len(layers) / total) * 1e6) / 1e6
        raise UserError(
            f"sparsity must leave at least one weight in each of {len(layers)} layers, got {sparsity} of {total:,} weights. "
            f"The largest feasible sparsity is {largest}."
        )
    return kept


def allocate(
    allocator: Choice, layers: Sequence[Layer], kept: int, scores: Mapping[str, Tensor] | None = None, alive: Masks | None = None
) -> dict[str, int]:
    """Kept weights of each layer by `allocator`: they sum to `kept` exactly, at least one and at most `alive` in each layer."""
    if kept > (most := sum(layer.alive for layer in layers)):
        raise UserError(
            f"A nested mask cannot keep {kept:,} weights: only {most:,} are left. Ask for a higher sparsity or set nested: false."
        )
    counts: dict[str, int] = allocator(layers, kept, scores, alive)
    assert sum(counts.values()) == kept and all(1 <= counts[layer.name] <= layer.alive for layer in layers), (allocator, counts)
    return counts


def proportional(weights: Sequence[float], layers: Sequence[Layer], kept: int) -> dict[str, int]:
    """Counts in proportion to `weights`, by largest remainder, each between one and the layer's alive weights, summing to `kept`.

    `weights` are the wished counts up to a common factor. The factor is solved again whenever a layer hits a bound, as ERK's own
    procedure does for layers that would become denser than dense.
    """
    low, high = 0.0, 1.0
    bounded = [max(weight, 1e-30) for weight in weights]

    def counts(factor: float) -> list[float]:
        return [min(max(factor * weight, 1.0), float(layer.alive)) for weight, layer in zip(bounded, layers, strict=True)]

    while sum(counts(high)) < kept:
        high *= 2
    for _ in range(200):  # bisection to the last bit: the sum is monotone in the factor
        middle = (low + high) / 2
        low, high = (middle, high) if sum(counts(middle)) < kept else (low, middle)
    real = counts(high)
    whole = [math.floor(value) for value in real]
    order = sorted(range(len(layers)), key=lambda i: (whole[i] - real[i], i))  # largest remainder first, ties by position
    missing = kept - sum(whole)
    while missing:
        for i in order:
            if missing and whole[i] < layers[i].alive:
                whole[i] += 1
                missing -= 1
    return {layer.name: count for layer, count in zip(layers, whole, strict=True)}


def ranked(scores: Mapping[str, Tensor], layers: Sequence[Layer], kept: int, alive: Masks | None) -> dict[str, int]:
    """Counts from one ranking over all layers: how many of the network's `kept` best weights lie in each; at least one in each."""
    sizes = [layer.size for layer in layers]
    flat = torch.cat([scores[layer.name].detach().flatten().double() for layer in layers])
    owner = torch.repeat_interleave(torch.arange(len(layers), device=flat.device), torch.tensor(sizes, device=flat.device))
    if alive is not None:
        flat[~torch.cat([alive[layer.name].flatten() for layer in layers])] = -math.inf
    best = owner[torch.sort(flat, descending=True, stable=True).indices[:kept]]
    counts = torch.bincount(best, minlength=len(layers)).tolist()
    # One unit a layer: an empty layer takes its one from the layer that has most.
    for i in range(len(counts)):
        if counts[i] == 0:
            counts[max(range(len(counts)), key=counts.__getitem__)] -= 1
            counts[i] = 1
    return {layer.name: count for layer, count in zip(layers, counts, strict=True)}


def top_masks(scores: Mapping[str, Tensor], counts: Mapping[str, int], alive: Masks | None = None) -> Masks:
    """Masks that keep exactly `counts[name]` weights of the highest score in each layer; ties go to the lower index.

    With `alive`, only weights that it keeps are candidates. Raises UserError on a score that is not finite.
    """
    masks = {}
    for name, score in scores.items():
        flat = score.detach().flatten().double()
        if not bool(torch.isfinite(flat).all()):
            raise UserError(f"Scores of '{name}' must be finite, got NaN or infinity. Score in float64, or check the loss and the weights.")
        if alive is not None:
            flat = flat.masked_fill(~alive[name].flatten(), -math.inf)
        mask = torch.zeros(flat.numel(), dtype=torch.bool, device=flat.device)
        mask[torch.sort(flat, descending=True, stable=True).indices[: counts[name]]] = True
        masks[name] = mask.view(score.shape)
    return Masks(masks)
