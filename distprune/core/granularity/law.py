"""The law of coupled channels, checked in numbers: a network with removed units at zero computes what it computes without them."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from distprune.core.edits.shrink import shrink
from distprune.core.granularity.bounded import out_of_memory

if TYPE_CHECKING:
    from distprune.core.granularity.bounded import Say
    from distprune.core.granularity.coupling import Group

_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4}


def sound(model: nn.Module, example: Tensor, groups: "Sequence[Group]", say: "Say") -> None:
    """Say which of `groups` (their numbers) obey the law all together, again each time one more is known to. Changes the model.

    Halves what fails until it is found: few checks where few groups are wrong.
    """
    dtype = _prepare(model, example)
    accepted: list[int] = []
    waiting = [list(range(len(groups)))]
    while waiting:
        batch = waiting.pop()
        if _holds(model, example, [groups[i] for i in accepted + batch], dtype):
            accepted = sorted(accepted + batch)
            say(accepted)
        elif len(batch) > 1:
            half = len(batch) // 2
            waiting += [batch[half:], batch[:half]]


def _prepare(model: nn.Module, example: Tensor) -> torch.dtype:
    """Random numbers for all that a network may have learned, so that no zero hides a mistake; the widest dtype that it runs in."""
    model.eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for dtype in _TOLERANCE:
        model.to(dtype)
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if tensor.is_floating_point():
                tensor.data = tensor.data.clone()  # its memory may be shared with other processes
                _randomize(name.rpartition(".")[2], tensor, generator)
        try:
            if all(bool(out.isfinite().all()) for out in _outputs(model, example, dtype)):
                return dtype
        except RuntimeError as error:  # such as a float32 constant in the code
            if out_of_memory(error) or dtype == torch.float32:
                raise
    raise RuntimeError("its output is not finite when its weights are random")


def _randomize(name: str, tensor: Tensor, generator: torch.Generator) -> None:
    if name in ("running_var", "weight") and tensor.dim() == 1:
        tensor.uniform_(0.5, 1.5, generator=generator)
    elif tensor.dim() > 1 and isinstance(tensor, nn.Parameter):
        tensor.normal_(0, (2 * tensor.shape[0] / tensor.numel()) ** 0.5, generator=generator)
    elif isinstance(tensor, nn.Parameter) or name == "running_mean":
        tensor.normal_(0, 0.3, generator=generator)


def _outputs(model: nn.Module, example: Tensor, dtype: torch.dtype) -> list[Tensor]:
    torch.manual_seed(0)
    x = torch.randn(example.shape, dtype=dtype) if example.is_floating_point() else example
    with torch.no_grad():
        return list(leaves(model(x)))


def leaves(out: Any) -> Iterator[Tensor]:
    """The tensors of what a network returns: one, or lists and dicts of them."""
    if isinstance(out, Tensor):
        yield out
    elif isinstance(out, Mapping):
        for value in out.values():
            yield from leaves(value)
    elif isinstance(out, list | tuple):
        for value in out:
            yield from leaves(value)


def _holds(model: nn.Module, example: Tensor, groups: "Sequence[Group]", dtype: torch.dtype) -> bool:
    """Whether the law holds for two draws. Their counts of kept units follow on each other, so no divisor above one hides in both."""
    generator = torch.Generator().manual_seed(1)
    counts = {group.name: int(torch.randint(1, group.units, (), generator=generator)) for group in groups}
    for more in (0, 1):
        kept = {}
        for group in groups:
            count = counts[group.name] + more
            count = count if count < group.units else max(1, count - 2)
            kept[group.name] = torch.randperm(group.units, generator=generator) < count
        try:
            small = _outputs(shrink(model, groups, kept), example, dtype)
            with _masked(model, groups, kept):
                whole = _outputs(model, example, dtype)
        except Exception as error:  # whatever a network does when its shapes do not fit
            if out_of_memory(error):
                raise
            return False
        if len(small) != len(whole) or not all(_close(a, b, _TOLERANCE[dtype]) for a, b in zip(small, whole, strict=True)):
            return False
    return True


def _close(a: Tensor, b: Tensor, tolerance: float) -> bool:
    if a.shape != b.shape or a.numel() == 0:
        return a.shape == b.shape
    return bool((a - b).abs().max() <= tolerance * b.abs().max())


@contextmanager
def _masked(model: nn.Module, groups: "Sequence[Group]", kept: Mapping[str, Tensor]) -> Iterator[None]:
    """The network with the removed weights at zero, and back: only what is removed lies in memory twice."""
    parameters = dict(model.named_parameters())
    saved = []
    for group in groups:
        for part in group.parts:
            if part.role != "carries":
                weight, index = parameters[part.name], part.index[~kept[group.name]].flatten()
                saved.append((weight, part.dim, index, weight.index_select(part.dim, index)))
                weight.index_fill_(part.dim, index, 0)
    try:
        yield
    finally:
        for weight, dim, index, values in reversed(saved):
            weight.index_copy_(dim, index, values)
