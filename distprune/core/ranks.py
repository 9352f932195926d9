"""One run on several processes (ranks). Each runs the whole plan from the same seeds, on a network and a state of its own.

What is shared out is the gradient of a training batch: each rank takes its slice of every batch, and gradients are summed, weighted by
samples, into what the whole batch gives, before any hook sees them. Batch normalisation takes its statistics over all slices. Scores,
masks, penalties and mask updates are computed on every rank alike, from the same numbers, and so once for the network. A split that is
measured is shared out by batches, which gives the same bits as one process.

Rounding on a GPU may differ from process to process where sums have no order. So masks are those of rank 0 whenever they change, rank 0
says when a stage ends before its time, and what a rank holds, tensors and plain numbers, is that of rank 0 at every report and between
stages: ranks cannot come apart. Against one process numbers differ by rounding, and dropout draws for each slice anew.
"""

import functools
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from distprune.errors import UserError

if TYPE_CHECKING:
    from distprune.core.masks import Masks
    from distprune.core.state import State


class Lost(RuntimeError):
    """Another rank does not answer."""


class Ranks:
    """The processes of a run and this one among them; `ALONE` is a run of one process, to which it costs nothing."""

    rank = 0
    size = 1

    def __deepcopy__(self, memo: dict[int, Any]) -> "Ranks":
        return self

    def total(self, model: nn.Module, loss: Tensor) -> Tensor:
        """Sum the gradients of a network, in place, and a loss over all ranks; each has its own share of the batch's mean."""
        return loss

    def agree(self, masks: "Masks") -> "Masks":
        """The masks of rank 0."""
        return masks

    def align(self, state: "State") -> None:
        """Make what a state holds that of rank 0. Raises UserError if it holds other tensors there."""

    def each(self, parts: Sequence[Tensor], compute: Callable[[Tensor], Tensor]) -> Tensor:
        """`compute` of all parts, in order as one tensor; each part is computed by one rank."""
        return torch.cat([compute(part) for part in parts])

    def tell(self, content: bytes) -> bytes:
        """What rank 0 says."""
        return content

    def normalising(self, model: nn.Module) -> AbstractContextManager[None]:
        """Have batch normalisation in training take its statistics over the slices of all ranks."""
        return nullcontext()


ALONE = Ranks()


class Together(Ranks):
    """This process of a torch.distributed group, which the caller makes and ends. `device` is where its network is."""

    def __init__(self, device: torch.device | str) -> None:
        from torch import distributed

        self._distributed, self._device = distributed, torch.device(device)
        self.rank, self.size = distributed.get_rank(), distributed.get_world_size()

    def _sum(self, values: Tensor) -> Tensor:
        try:
            self._distributed.all_reduce(values)
        except RuntimeError as error:  # the connection is gone, or nobody came in time
            raise Lost(f"Another rank does not answer: {error}") from error
        return values

    def _of_first(self, values: Tensor) -> Tensor:
        try:
            self._distributed.broadcast(values, src=0)
        except RuntimeError as error:
            raise Lost(f"Another rank does not answer: {error}") from error
        return values

    @torch.no_grad()
    def total(self, model: nn.Module, loss: Tensor) -> Tensor:
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        width = torch.float64 if any(parameter.dtype == torch.float64 for parameter in parameters) else torch.float32
        # A parameter that took no part in the loss has no gradient, and should have none unless it took part elsewhere.
        there = torch.tensor([float(parameter.grad is not None) for parameter in parameters], dtype=width, device=self._device)
        grads = [(torch.zeros_like(p) if p.grad is None else p.grad).flatten().to(width) for p in parameters]
        whole = self._sum(torch.cat([*grads, there, loss.detach().reshape(1).to(width)]))
        sums = torch.split(whole, [*map(len, grads), len(parameters), 1])  # type: ignore[no-untyped-call]
        some = any(parameter.grad is None for parameter in parameters)
        present = sums[-2].tolist() if some else [True] * len(parameters)  # a look waits for the device
        for parameter, grad, is_there in zip(parameters, sums, present, strict=False):
            if is_there:
                parameter.grad = grad.view_as(parameter).to(parameter.dtype)
        total: Tensor = sums[-1].reshape(()).to(loss.dtype)
        return total

    def agree(self, masks: "Masks") -> "Masks":
        flat = self._of_first(torch.cat([mask.flatten() for mask in masks.values()]).to(self._device, torch.uint8))
        sizes = [mask.numel() for mask in masks.values()]
        parts = zip(masks.items(), torch.split(flat.bool(), sizes), strict=True)  # type: ignore[no-untyped-call]
        return type(masks)({name: part.view(mask.shape).to(mask.device) for (name, mask), part in parts})

    @torch.no_grad()
    def align(self, state: "State") -> None:
        held = {f"model/{name}": tensor for name, tensor in state.model.state_dict().items()}
        held |= {f"leaves/{name}": leaf.detach() for name, leaf in state.leaves.items()}
        plain: dict[str, dict[str, dict[str, Any]]] = {"memory": {}, "slots": {}}
        rooms = {"memory": state.memory, "slots": state.slots}
        for room, rows in rooms.items():
            for owner, memory in rows.items():
                plain[room][owner] = {key: value for key, value in memory.items() if not isinstance(value, Tensor)}
                held |= {f"{room}/{owner}/{key}": value.detach() for key, value in memory.items() if isinstance(value, Tensor)}
        self._align_plain(state, rooms, plain, {name: [str(tensor.dtype), *tensor.shape] for name, tensor in held.items()})
        ordered = [held[name] for name in sorted(held)]
        for dtype in sorted({tensor.dtype for tensor in ordered}, key=str):
            alike = [tensor for tensor in ordered if tensor.dtype == dtype]
            flat = torch.cat([tensor.flatten().to(self._device) for tensor in alike])
            flat = self._of_first(flat.to(torch.uint8)).bool() if dtype == torch.bool else self._of_first(flat)
            parts = torch.split(flat, [tensor.numel() for tensor in alike])  # type: ignore[no-untyped-call]
            for tensor, values in zip(alike, parts, strict=True):
                tensor.copy_(values.view(tensor.shape))

    def _align_plain(self, state: "State", rooms: dict[str, Any], plain: dict[str, Any], held: dict[str, list[Any]]) -> None:
        """Take over what is no tensor, in place, as hooks hold on to their memory; tensors must be the same ones."""
        own = {"plain": plain, "penalties": state.penalties, "held": held}
        told = json.loads(self.tell(json.dumps(own).encode() if self.rank == 0 else b""))
        if self.rank == 0:
            return
        if differing := sorted(name for name in held.keys() | told["held"].keys() if held.get(name) != told["held"].get(name)):
            raise UserError(
                f"Ranks must hold the same tensors, and rank {self.rank} differs from rank 0 in {', '.join(differing[:3])}. Have the hook "
                "or optimizer decide by what all ranks see alike, or write workers.ranks: 1."
            )
        state.penalties = told["penalties"]
        for room, rows in rooms.items():
            for owner, values in told["plain"][room].items():
                memory = rows.setdefault(owner, {})
                for key in plain[room].get(owner, {}).keys() - values.keys():
                    del memory[key]
                memory.update(values)

    @torch.no_grad()
    def each(self, parts: Sequence[Tensor], compute: Callable[[Tensor], Tensor]) -> Tensor:
        own = {index: compute(part) for index, part in enumerate(parts) if index % self.size == self.rank}
        shape = (next(iter(own.values())) if own else compute(parts[0][:1])).shape[1:]
        # All others are zero: the sum has the bits of whoever computed them.
        found = [own.get(index, torch.zeros(len(part), *shape, device=self._device)) for index, part in enumerate(parts)]
        return self._sum(torch.cat(found))

    def tell(self, content: bytes) -> bytes:
        length = int(self._of_first(torch.tensor([len(content)], device=self._device)))
        if not length:
            return b""
        own = torch.frombuffer(bytearray(content), dtype=torch.uint8) if self.rank == 0 else torch.zeros(length, dtype=torch.uint8)
        return bytes(self._of_first(own.to(self._device)).cpu().numpy())

    @contextmanager
    def normalising(self, model: nn.Module) -> Iterator[None]:
        norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
        for norm in norms:
            norm.forward = functools.partial(self._normalised, norm)  # type: ignore[method-assign]
        try:
            yield
        finally:
            for norm in norms:
                del norm.forward

    def _normalised(self, norm: Any, inputs: Tensor) -> Tensor:
        """Batch normalisation (Ioffe & Szegedy 2015, arXiv:1502.03167, algorithm 1) over the batch of all ranks; inputs [n, channels, ...].

        Mean first, then the squares about it, as torch does on one process: the difference of two large sums would lose the variance.
        """
        if not norm.training and norm.running_mean is not None:
            return type(norm).forward(norm, inputs)  # type: ignore[no-any-return]
        values = inputs.float() if inputs.dtype in (torch.bfloat16, torch.float16) else inputs
        rest = [axis for axis in range(inputs.dim()) if axis != 1]
        shape = [-1 if axis == 1 else 1 for axis in range(inputs.dim())]
        own = values.new_tensor([values.numel() / values.shape[1]])
        sums = _Sum.apply(torch.cat([values.sum(rest), own]), self)  # type: ignore[no-untyped-call]
        count = sums[-1].detach()
        mean = sums[:-1] / count
        centred = values - mean.view(shape)
        variance = _Sum.apply(centred.square().sum(rest), self) / count  # type: ignore[no-untyped-call]
        if norm.training and norm.track_running_stats and norm.running_mean is not None:
            _remember(norm, mean.detach(), variance.detach() * count / (count - 1))
        outputs = centred * (variance + norm.eps).rsqrt().view(shape)
        if norm.affine:
            outputs = outputs * norm.weight.view(shape) + norm.bias.view(shape)
        normalised: Tensor = outputs.to(inputs.dtype)
        return normalised


class _Sum(torch.autograd.Function):
    """A sum over ranks that all of them go on with: so is the gradient."""

    @staticmethod
    def forward(context: Any, values: Tensor, ranks: Together) -> Tensor:  # type: ignore[override]
        context.ranks = ranks
        return ranks._sum(values.detach().clone())

    @staticmethod
    def backward(context: Any, grads: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return context.ranks._sum(grads.contiguous().clone()), None


@torch.no_grad()
def _remember(norm: Any, mean: Tensor, variance: Tensor) -> None:
    """Move the running statistics as torch does; without a momentum they are the plain mean of all batches."""
    norm.num_batches_tracked += 1
    share = 1 / float(norm.num_batches_tracked) if norm.momentum is None else norm.momentum
    norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), share)
    norm.running_var.lerp_(variance.to(norm.running_var.dtype), share)
