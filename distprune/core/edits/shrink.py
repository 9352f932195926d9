"""Real removal: a network without the removed channels and heads."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from distprune.core.edits.resize import tensors_of, with_tensors
from distprune.errors import UserError

if TYPE_CHECKING:
    from distprune.core.granularity.coupling import Group


def shrink(model: nn.Module, groups: "Sequence[Group]", kept: Mapping[str, Tensor]) -> nn.Module:
    """A copy of `model` without the units where `kept[group.name]` (bool, [units]) is False; a group without an entry stays whole.

    Values, dtype, device, tied weights and training mode stay; gradients are dropped. In eval mode it computes what the model computes
    when the weights that make and read the removed units are zero. Raises UserError if a group would lose all its units.
    """
    tensors = tensors_of(model)
    lines: dict[tuple[str, int], Tensor] = {}  # (name, dim) -> bool [size of dim], what is kept of it
    for group in groups:
        if group.name not in kept:
            continue
        unit_kept = kept[group.name]
        if not bool(unit_kept.any()):
            raise UserError(f"At least one unit of group '{group.name}' must be kept, got none of {group.units}. Keep its best unit.")
        for part in group.parts:
            tensor = tensors[part.name]
            line = lines.setdefault((part.name, part.dim), torch.ones(tensor.shape[part.dim], dtype=torch.bool, device=tensor.device))
            line[part.index[~unit_kept.to(part.index.device)].to(tensor.device)] = False

    cut: dict[str, Tensor] = {}
    for (name, dim), line in lines.items():
        cut[name] = cut.get(name, tensors[name].detach()).index_select(dim, line.nonzero().squeeze(1))
    return with_tensors(model, cut)
