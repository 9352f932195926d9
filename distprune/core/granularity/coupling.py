"""Channels and heads that can only be removed together (Fang et al. 2023, arXiv:2301.12900)."""

import copy
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from distprune.core.granularity.bounded import Say, bounded
from distprune.core.masks import PRUNABLE
from distprune.errors import UserError

Role = Literal["produces", "consumes", "carries"]


@dataclass(frozen=True)
class Part:
    """Where the units of a group lie in one tensor of the network."""

    name: str  # parameter or buffer, as named_parameters() or named_buffers() give it: the first name of tied ones
    dim: int
    index: Tensor  # int64 [units, width], the indices along `dim` that belong to each unit
    role: Role  # rows of weights that make the channel, columns of weights that read it, per-channel numbers


@dataclass(frozen=True)
class Group:
    """Channels (or heads) that can only be removed together across layers; unit i is removed from every part at once."""

    name: str  # of its first producing weight, e.g. "stage1.0.conv1.weight"
    parts: tuple[Part, ...]

    @property
    def units(self) -> int:
        """How many can be removed, less the one that has to stay."""
        return self.parts[0].index.shape[0]


def coupled(model: nn.Module, example: Tensor, *, memory: int = 4 * 2**30, seconds: float = 120.0) -> list[Group]:
    """The groups of `model` whose units can be removed for real, in the order of its parameters. `example` is one input, [n, ...].

    They obey a law: with the producing rows and consuming columns of any removed units at zero, the network computes in eval mode what it
    computes without these units. So channels that reach the output or come from the input, that a normalization mixes or that a raw
    parameter is added to belong to no group. torch-pruning proposes, and a numerical check of the law disposes.

    Both work in child processes with at most `memory` more bytes, and both together for at most `seconds`. Where torch-pruning fails on
    the whole network, it is asked for each of its blocks alone, which finds the groups inside of them.
    What the check has not come to when the time is over is left out.
    Raises UserError naming the network if no group is found.
    """
    try:
        import torch_pruning  # noqa: F401  # here, so that no child has to: an import that another thread is in would block it
    except ImportError as error:
        raise UserError("Coupled channels need torch-pruning, which is not installed. Run: pip install torch-pruning.") from error
    search = _Search(_on_cpu(model), example.detach().cpu(), memory, time.monotonic() + seconds)
    proposed = {group.name: group for group in (*search.proposed(), *_heads(model))}  # a block used in two places comes twice
    found = search.lawful(list(proposed.values()))
    if not found:
        why = f" {search.failure}" if search.failure else ""
        raise UserError(
            f"{type(model).__name__} must have channels that can be removed across layers, found none.{why} "
            "Prune single weights (granularity: weight), or give the search for them more seconds and memory."
        )
    order = {name: i for i, (name, _) in enumerate(model.named_parameters())}
    return sorted(found, key=lambda group: order[group.name])


class _Search:
    """One call of `coupled`: what it may still spend, and why it failed first."""

    def __init__(self, model: nn.Module, example: Tensor, memory: int, deadline: float) -> None:
        self.model, self.example, self.memory, self.deadline = model, example, memory, deadline
        self.failure = ""

    def _bounded(self, work: Any, share: float) -> tuple[list[Any], bool]:
        left = self.deadline - time.monotonic()
        said, failure = bounded(work, memory=self.memory, seconds=left * share)
        self.failure = self.failure or failure
        return said, not failure

    def proposed(self, path: str = "") -> Iterator[Group]:
        """What torch-pruning finds in the module at `path`, or where it fails in its children."""
        from distprune.core.granularity.graph import propose

        def work(say: Say) -> None:
            say([_plain(group) for group in propose(self.model, self.example, path)])

        # Half of what is left, so that a network that takes too long leaves time for its blocks, and all leave some for the check.
        said, fine = self._bounded(work, 0.5)
        if fine:
            yield from map(_group, said[-1])
            return
        for name, child in self.model.get_submodule(path).named_children():
            if sum(isinstance(module, PRUNABLE) for module in child.modules()) > 1 and time.monotonic() < self.deadline:
                yield from self.proposed(f"{path}.{name}" if path else name)

    def lawful(self, groups: list[Group]) -> list[Group]:
        """Those that pass the check of the law, all together."""
        from distprune.core.granularity.law import sound

        if not groups:
            return []

        def work(say: Say) -> None:
            sound(self.model, self.example, groups, say)

        said, _ = self._bounded(work, 1.0)
        return [groups[i] for i in said[-1]] if said else []


def _heads(model: nn.Module) -> list[Group]:
    """The heads of each nn.MultiheadAttention: rows of the query, key and value projections, columns of the output projection."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = []
    for module in model.modules():
        if not isinstance(module, nn.MultiheadAttention) or module.num_heads < 2 or module.bias_k is not None or module.add_zero_attn:
            continue
        units, wide = module.num_heads, module.num_heads * module.head_dim
        columns = torch.arange(wide, device="cpu").view(units, module.head_dim)
        packed = torch.cat([columns, columns + wide, columns + 2 * wide], dim=1)
        rows: list[tuple[Tensor | None, int, Tensor, Role]] = [
            (module.in_proj_weight, 0, packed, "produces"),
            (module.q_proj_weight, 0, columns, "produces"),  # these three where the packed one is missing
            (module.k_proj_weight, 0, columns, "produces"),
            (module.v_proj_weight, 0, columns, "produces"),
            (module.in_proj_bias, 0, packed, "carries"),
            (module.out_proj.weight, 1, columns, "consumes"),
        ]
        parts = [Part(names.get(id(tensor), ""), dim, index, role) for tensor, dim, index, role in rows if tensor is not None]
        if all(part.name for part in parts):  # a parametrized one has no name
            found.append(Group(parts[0].name, tuple(parts)))
    return found


def _plain(group: Group) -> Any:
    return [group.name, [[part.name, part.dim, part.index.tolist(), part.role] for part in group.parts]]


def _group(plain: Any) -> Group:
    name, parts = plain
    return Group(name, tuple(Part(part, dim, torch.tensor(index, device="cpu"), role) for part, dim, index, role in parts))


def _on_cpu(model: nn.Module) -> nn.Module:
    """The model itself if it is there, else a copy: a forked child has its own memory, but cannot use the accelerator of its parent."""
    tensors = [*model.parameters(), *model.buffers()]
    if all(tensor.device.type == "cpu" for tensor in tensors):
        return model
    memo: dict[int, Any] = {}
    for tensor in tensors:
        value = tensor.detach().cpu()
        memo[id(tensor)] = nn.Parameter(value, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else value
    return copy.deepcopy(model, memo)
