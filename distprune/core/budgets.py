"""Budgets: how many units are kept, in the network and in each layer, as integers that add up exactly.

An allocator turns the network's budget into one of each layer; `top_masks` keeps exactly that many in each. A unit is what is kept or
removed as one (`units.py`): a weight, unless the recipe's granularity says otherwise.
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
    """What an allocator may know of a layer besides its scores: a layer is a tensor of units, which for most networks are weights."""

    name: str
    shape: tuple[int, ...]  # of the weight, for coupled channels of the first that makes them
    units: int
    alive: int  # units that may be kept: all of them, or under nested masks those kept so far
    depth: float  # position in the network, 0 = first layer, 1 = last


def layers_of(
    shapes: Mapping[str, Sequence[int]], alive: Mapping[str, Tensor] | None = None, units: Mapping[str, int] | None = None
) -> list[Layer]:
    """The layers of a network in order. `alive` holds a bool for each unit; without `units`, every weight is one."""
    last = max(len(shapes) - 1, 1)
    counts = {name: math.prod(shape) for name, shape in shapes.items()} if units is None else units
    left = counts if alive is None else {name: int(alive[name].sum()) for name in shapes}
    return [Layer(name, tuple(shape), counts[name], left[name], position / last) for position, (name, shape) in enumerate(shapes.items())]


def check_sparsity(value: float, where: str = "sparsity") -> float:
    """Return `value` if it is in [0, 1). Raises UserError otherwise."""
    if not 0 <= value < 1:
        raise UserError(f"{where} must be in [0, 1), got {value}. To keep 5 % of the weights write 0.95.")
    return value


def budget(sparsity: float, total: int) -> int:
    """Weights to keep of `total` so that the network has `sparsity`, rounded half up."""
    return math.floor(total * (1 - check_sparsity(sparsity)) + 0.5 + 1e-9)


def infeasible(sparsity: float, layers: int, least: int, total: int) -> UserError:
    """The error for a budget that leaves a layer without a unit, naming the largest feasible sparsity."""
    largest = math.floor((1 - least / total) * 1e6) / 1e6
    return UserError(
        f"sparsity must leave at least one unit in each of {layers} layers, got {sparsity} of {total:,} weights. "
        f"The largest feasible sparsity is {largest}."
    )


def kept_for(sparsity: float, layers: Sequence[Layer]) -> int:
    """The budget of a network whose units are its weights. Raises UserError if that is less than one weight a layer."""
    total = sum(layer.units for layer in layers)
    kept = budget(sparsity, total)
    if kept < len(layers):
        raise infeasible(sparsity, len(layers), len(layers), total)
    return kept


def allocate(
    allocator: Choice,
    layers: Sequence[Layer],
    kept: int,
    scores: Mapping[str, Tensor] | None = None,
    alive: Mapping[str, Tensor] | None = None,
) -> dict[str, int]:
    """Kept units of each layer by `allocator`: they sum to `kept` exactly, at least one and at most `alive` in each layer."""
    if kept > (most := sum(layer.alive for layer in layers)):
        raise UserError(
            f"A nested mask cannot keep {kept:,} units: only {most:,} are left. Ask for a higher sparsity or set nested: false."
        )
    counts: dict[str, int] = allocator(layers, kept, scores, alive)
    assert sum(counts.values()) == kept and all(1 <= counts[layer.name] <= layer.alive for layer in layers), (allocator, counts)
    return counts


def proportional(densities: Sequence[float], layers: Sequence[Layer], kept: int) -> dict[str, int]:
    """Counts of units by densities, up to a common factor, and largest remainder: each between one and `alive`, summing to `kept`.

    The factor is solved again whenever a layer hits a bound, as ERK's own procedure does for layers that would become denser than dense.
    """
    low, high = 0.0, 1.0
    bounded = [max(density, 1e-30) * layer.units for density, layer in zip(densities, layers, strict=True)]

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


def ranked(scores: Mapping[str, Tensor], layers: Sequence[Layer], kept: int, alive: Mapping[str, Tensor] | None) -> dict[str, int]:
    """Counts from one ranking over all layers: how many of the network's `kept` best units lie in each; at least one in each."""
    check_finite(scores)
    flat = torch.cat([scores[layer.name].detach().flatten() for layer in layers])
    if alive is not None:
        flat[~torch.cat([alive[layer.name].flatten() for layer in layers])] = -math.inf
    parts = torch.split(best(flat, kept), [layer.units for layer in layers])
    counts = torch.stack([part.sum() for part in parts]).tolist()
    # One unit a layer: an empty layer takes its one from the layer that has most.
    for i in range(len(counts)):
        if counts[i] == 0:
            counts[max(range(len(counts)), key=counts.__getitem__)] -= 1
            counts[i] = 1
    return {layer.name: count for layer, count in zip(layers, counts, strict=True)}


def top_masks(scores: Mapping[str, Tensor], counts: Mapping[str, int], alive: Mapping[str, Tensor] | None = None) -> Masks:
    """Masks that keep exactly `counts[name]` units of the highest score in each layer; ties go to the lower index.

    With `alive`, only units that it keeps are candidates. Raises UserError on a score that is not finite.
    """
    check_finite(scores)
    masks = {}
    for name, score in scores.items():
        flat = score.detach().flatten()
        if alive is not None:
            flat = flat.masked_fill(~alive[name].flatten(), -math.inf)
        masks[name] = best(flat, counts[name]).view(score.shape)
    return Masks(masks)


def check_finite(scores: Mapping[str, Tensor]) -> None:
    """Raise UserError naming the first layer with a score that is not finite."""
    for name, score in scores.items():
        if not bool(torch.isfinite(score).all()):
            raise UserError(f"Scores of '{name}' must be finite, got NaN or infinity. Score in float64, or check the loss and the weights.")


def best(scores: Tensor, count: int) -> Tensor:
    """A bool for each of a row of scores: whether it is among the `count` highest, ties going to the lower index.

    By selection, which takes a tenth of the time of a stable sort.
    """
    if count >= len(scores):
        return torch.ones_like(scores, dtype=torch.bool)
    if count == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    threshold = scores.kthvalue(len(scores) - count + 1).values
    chosen = scores > threshold
    ties = (scores == threshold).nonzero().flatten()
    chosen[ties[: count - int(chosen.sum())]] = True
    return chosen
