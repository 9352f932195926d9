"""`distprune.prune` and `distprune.shrink`: masks for a network of your own, and the smaller network, in one call each."""

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from distprune.core import registry
from distprune.core.edits import shrink as edits
from distprune.core.legality import mismatches
from distprune.core.masks import Masks, prunable
from distprune.core.scoring import choose_masks
from distprune.core.tasks.given import GivenBatches
from distprune.core.units import Network, Units
from distprune.errors import UserError


def prune(
    model: nn.Module,
    *,
    sparsity: float,
    criterion: str | Mapping[str, Any] = "magnitude",
    allocator: str | Mapping[str, Any] | None = None,
    granularity: str | Mapping[str, Any] = "weight",
    batches: Iterable[tuple[Tensor, Tensor]] | None = None,
    loss: Callable[[Tensor, Tensor], Tensor] = nn.functional.cross_entropy,
    include: Iterable[str] = ("*",),
    exclude: Iterable[str] = (),
    steps: int | None = None,
    seed: int = 0,
) -> Masks:
    """Masks that remove a share `sparsity` of a network's prunable weights; the network is left as it is.

    `batches` are (inputs, targets) pairs on the model's device, for criteria and granularities that look at data or at the shape of an
    input; `loss` takes (outputs, targets). `allocator` is global by default, or what the granularity asks for; `steps` is the number of
    exponential steps, by default the criterion's own.
    Raises UserError for an unknown name, an infeasible budget, a missing batch or a network without prunable weights.

    >>> masks = prune(model, criterion="snip", sparsity=0.9, batches=batches)
    >>> masks.apply_(model)
    """
    criterion_choice = registry.criterion.read(criterion, "criterion")
    granularity_choice = registry.granularity.read(granularity, "granularity")
    allocator_choice = registry.allocator.read(allocator or granularity_choice.entry.facts["allocator"] or "global", "allocator")
    for problem in mismatches(criterion_choice, allocator_choice, granularity_choice, sparsity).values():
        raise UserError(problem)
    given = list(batches) if batches is not None else []
    weights = prunable(model, include=include, exclude=exclude)

    def example() -> Tensor:
        if not given:
            raise UserError(f"granularity '{granularity_choice.name}' runs the network: pass batches=..., or granularity='weight'.")
        return given[0][0][:1]

    return choose_masks(
        model,
        GivenBatches(given, loss) if given else None,
        Masks.ones(weights),
        sparsity=sparsity,
        criterion=criterion_choice,
        allocator=allocator_choice,
        units=granularity_choice(Network(model, weights, example)),
        steps=steps or criterion_choice.entry.facts["steps"],
        seed=seed,
    )


def shrink(model: nn.Module, masks: Masks, example: Tensor) -> nn.Module:
    """A smaller network that computes what `model` does under `masks`: channels and heads of which they keep nothing are taken out.

    `example` is one input, [1, ...], on the model's device; the model is left as it is. Masks of granularity filter or channel are taken
    out whole; masks of single weights where a channel happens to be removed, and they go on in what is left.
    Raises UserError for masks of another network, and for a network without channels that can be removed.

    >>> small = shrink(model, prune(model, granularity="filter", sparsity=0.7, batches=batches), example)
    """
    sparse = masks.apply_(copy.deepcopy(model))
    weights = {name: weight for name, weight in prunable(sparse).items() if name in masks}
    units: Units = registry.granularity.choose("filter")(Network(sparse, weights, lambda: example))
    kept = units.alive(masks)
    for line in kept.values():
        line[0] |= not line.any()  # of a layer that is removed as a whole, one channel of zeros has to stay
    return edits.shrink(sparse, units.channels, kept)
