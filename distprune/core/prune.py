"""`distprune.prune`, `hold` and `shrink`: masks for a network of your own, training under them, and the smaller network, a call each."""

import copy
import itertools
import numbers
from collections.abc import Callable, Iterable, Iterator, Mapping
from fnmatch import fnmatch
from types import TracebackType
from typing import Any

import torch
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
    batches: Iterable[tuple[Tensor, Tensor]] | tuple[Tensor, Tensor] | None = None,
    loss: Callable[[Tensor, Tensor], Tensor] = nn.functional.cross_entropy,
    include: str | Iterable[str] = ("*",),
    exclude: str | Iterable[str] = (),
    steps: int | None = None,
    seed: int = 0,
) -> Masks:
    """Masks that remove a share `sparsity` of a network's prunable weights; the network is left as it is.

    `batches` are (inputs, targets) pairs, or one such pair, for criteria and granularities that look at data or at the shape of an input: a
    list or a DataLoader, of which no more is read than is needed. They are moved to the model's device. `loss` takes (outputs, targets).
    `allocator` is global by default, or what the granularity asks for; `steps` is the number of exponential steps, by default the
    criterion's own; `include` and `exclude` are shell patterns over parameter names, such as "head.*".
    Raises UserError for an unknown name, a pattern that matches nothing, an infeasible budget, a missing batch or a network that has no
    prunable weights.

    >>> masks = prune(model, criterion="snip", sparsity=0.9, batches=loader)
    >>> masks.apply_(model)
    """
    if not isinstance(sparsity, numbers.Real) or isinstance(sparsity, bool):
        raise UserError(f"sparsity must be a number, got {sparsity!r}. To keep 10 % of the weights write sparsity=0.9.")
    if steps is not None and (not isinstance(steps, numbers.Integral) or isinstance(steps, bool) or steps < 1):
        raise UserError(f"steps must be a number of at least 1, got {steps!r}. Leave it out for the criterion's own.")
    criterion_choice = registry.criterion.read(criterion, "criterion")
    granularity_choice = registry.granularity.read(granularity, "granularity")
    allocator_choice = registry.allocator.read(allocator or granularity_choice.entry.facts["allocator"] or "global", "allocator")
    for problem in mismatches(criterion_choice, allocator_choice, granularity_choice, sparsity).values():
        raise UserError(problem)
    if not isinstance(model, nn.Module):
        raise UserError(f"model must be a torch.nn.Module, got {type(model).__name__}. Build the network first.")
    weights = prunable(model, include=_patterns(model, include, "include"), exclude=_patterns(model, exclude, "exclude"))
    pairs = _pairs(batches, next(iter(weights.values())).device)
    first = next(pairs, None)
    task = GivenBatches(itertools.chain([first], pairs), loss) if first is not None else None

    def example() -> Tensor:
        if task is None:
            raise UserError(f"granularity '{granularity_choice.name}' runs the network: pass batches=..., or granularity='weight'.")
        return task.example()

    return choose_masks(
        model,
        task,
        Masks.ones(weights),
        sparsity=sparsity,
        criterion=criterion_choice,
        allocator=allocator_choice,
        units=granularity_choice(Network(model, weights, example)),
        steps=steps or criterion_choice.entry.facts["steps"],
        seed=seed,
    )


def _patterns(model: nn.Module, given: str | Iterable[str], where: str) -> tuple[str, ...]:
    """Patterns that each match a prunable weight: one that does not would leave in silence what it was to name."""
    patterns, names = (given,) if isinstance(given, str) else tuple(given), list(prunable(model))
    for pattern in patterns:
        if not any(fnmatch(name, pattern) for name in names):
            raise UserError(
                f"{where} must hold patterns of parameter names, and '{pattern}' matches none of {', '.join(names)}. "
                f"For the weights of a module write '{pattern}.*'."
            )
    return patterns


def _pairs(batches: Iterable[Any] | None, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches as they are asked for, on `device`."""
    if isinstance(batches, tuple | list) and len(batches) == 2 and all(isinstance(part, Tensor) for part in batches):
        batches = [batches]  # one pair
    for batch in batches if batches is not None else ():
        if not (isinstance(batch, tuple | list) and len(batch) == 2 and isinstance(batch[0], Tensor)):
            got = f"{len(batch)} parts" if isinstance(batch, tuple | list) else type(batch).__name__
            raise UserError(f"Each of batches must be a pair of tensors, (inputs, targets), got {got}. Write batches=[(inputs, targets)].")
        inputs, targets = batch
        yield inputs.to(device), targets.to(device) if isinstance(targets, Tensor) else targets


_KINDS = {"model": "a torch.nn.Module", "masks": "Masks, as prune and Masks.load give them", "optimizer": "an optimizer of torch's kind"}


class Held:
    """Masks that are held through the steps of an optimizer, until `release` or, as a context manager, to the end of its block."""

    def __init__(self, model: nn.Module, masks: Masks, optimizer: torch.optim.Optimizer) -> None:
        for name, given, kind in (("model", model, nn.Module), ("masks", masks, Masks), ("optimizer", optimizer, torch.optim.Optimizer)):
            if not isinstance(given, kind):
                raise UserError(f"{name} must be {_KINDS[name]}, got {type(given).__name__}. Write hold(model, masks, optimizer).")
        match = masks.match(model)
        match.check(strict=True)
        parameters, pairs = dict(model.named_parameters(remove_duplicate=False)), match.pairs
        trained = {id(weight) for group in optimizer.param_groups for weight in group["params"]}
        if not any(id(parameters[name]) in trained for name in pairs.values()):
            raise UserError(
                "The optimizer must train weights that have masks, got one that trains none of them. Build it from the same network: "
                "torch.optim.SGD(model.parameters(), lr=0.1)."
            )
        self._weights = [parameters[name] for name in pairs.values()]
        self._removed = [~masks[mask].to(weight.device) for mask, weight in zip(pairs, self._weights, strict=True)]
        self._optimizer = optimizer
        self._zero()  # of a network that was trained before, the optimizer's memory would move what is removed
        self._hooks = [
            optimizer.register_step_pre_hook(lambda *step: self._mask_gradients()),
            optimizer.register_step_post_hook(lambda *step: self._zero()),
        ]

    @torch.no_grad()
    def _mask_gradients(self) -> None:
        for weight, removed in zip(self._weights, self._removed, strict=True):
            if weight.grad is not None:
                weight.grad.masked_fill_(removed, 0)  # a product with zero would leave what is not finite

    @torch.no_grad()
    def _zero(self) -> None:
        """Removed weights and all that the optimizer remembers of them."""
        for weight, removed in zip(self._weights, self._removed, strict=True):
            weight.masked_fill_(removed, 0)
            for value in self._optimizer.state.get(weight, {}).values():
                if isinstance(value, Tensor) and value.shape == weight.shape and value.is_floating_point():
                    value.masked_fill_(removed, 0)

    def release(self) -> None:
        """Let the optimizer train all weights again."""
        for hook in self._hooks:
            hook.remove()

    def __enter__(self) -> "Held":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.release()


def hold(model: nn.Module, masks: Masks, optimizer: torch.optim.Optimizer) -> Held:
    """Put masks on a network and keep its removed weights at zero, exactly, through every step of an optimizer of torch's kind.

    Masking the weights once is not enough: momentum and weight decay bring them back. Before each step the gradients are masked, after it
    the weights and the optimizer's memory. To be called again after `load_state_dict`, `to` or another optimizer.
    Raises UserError, with the network as it was, for masks of another one, and for an optimizer that trains none of the masked weights.

    >>> with hold(model, prune(model, sparsity=0.9), optimizer):
    ...     train(model, optimizer)
    """
    return Held(model, masks, optimizer)


def shrink(model: nn.Module, masks: Masks, example: Tensor) -> nn.Module:
    """A smaller network that computes what `model` does under `masks`: channels and heads of which they keep nothing are taken out.

    `example` is one input, [1, ...], on the model's device; the model is left as it is. Masks of granularity filter or channel are taken
    out whole; masks of single weights where a channel happens to be removed, and they go on in what is left. Frozen weights may be
    taken out like others, and what is left of them is frozen.
    Raises UserError for masks of another network, and for a network without channels that can be removed.

    >>> small = shrink(model, prune(model, granularity="filter", sparsity=0.7, batches=batches), example)
    """
    sparse = masks.apply_(copy.deepcopy(model))
    trained = {name: parameter.requires_grad for name, parameter in sparse.named_parameters(remove_duplicate=False)}
    masks = Masks({name: masks[mask] for mask, name in masks.match(sparse).pairs.items()})  # under the names that wrappers give
    for parameter in sparse.parameters():
        parameter.requires_grad_(parameter.is_floating_point() or parameter.is_complex())
    weights = {name: weight for name, weight in prunable(sparse).items() if name in masks}
    units: Units = registry.granularity.choose("filter")(Network(sparse, weights, lambda: example))
    kept = units.alive(masks)
    for line in kept.values():
        line[0] |= not line.any()  # of a layer that is removed as a whole, one channel of zeros has to stay
    small = edits.shrink(sparse, units.channels, kept)
    for name, parameter in small.named_parameters():
        parameter.requires_grad_(trained[name])
    return small
