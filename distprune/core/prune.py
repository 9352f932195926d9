"""`distprune.prune`: masks for a network of your own, in one call."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from distprune.core import registry
from distprune.core.masks import Masks, prunable
from distprune.core.scoring import choose_masks
from distprune.core.tasks.given import GivenBatches


def prune(
    model: nn.Module,
    *,
    sparsity: float,
    criterion: str | Mapping[str, Any] = "magnitude",
    allocator: str | Mapping[str, Any] = "global",
    batches: Iterable[tuple[Tensor, Tensor]] | None = None,
    loss: Callable[[Tensor, Tensor], Tensor] = nn.functional.cross_entropy,
    include: Iterable[str] = ("*",),
    exclude: Iterable[str] = (),
    steps: int | None = None,
    seed: int = 0,
) -> Masks:
    """Masks that remove a share `sparsity` of a network's prunable weights; the network is left as it is.

    `batches` are (inputs, targets) pairs on the model's device, for criteria that look at data or at the shape of an input; `loss` takes
    (outputs, targets). `steps` is the number of exponential steps, by default the criterion's own.
    Raises UserError for an unknown name, an infeasible budget, a missing batch or a network without prunable weights.

    >>> masks = prune(model, criterion="snip", sparsity=0.9, batches=batches)
    >>> masks.apply_(model)
    """
    criterion_choice = registry.criterion.read(criterion, "criterion")
    given = list(batches) if batches is not None else []
    return choose_masks(
        model,
        GivenBatches(given, loss) if given else None,
        Masks.ones(prunable(model, include=include, exclude=exclude)),
        sparsity=sparsity,
        criterion=criterion_choice,
        allocator=registry.allocator.read(allocator, "allocator"),
        steps=steps or criterion_choice.entry.facts["steps"],
        seed=seed,
    )
