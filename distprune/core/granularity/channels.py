"""Filters and channels, removed across all layers that they couple."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from distprune.core.budgets import Layer, layers_of
from distprune.core.granularity.kernel import reduced
from distprune.core.masks import Masks
from distprune.core.registry import granularity
from distprune.core.units import Network, Reduction, Units
from distprune.errors import UserError

if TYPE_CHECKING:
    from distprune.core.granularity.coupling import Group, Part


@granularity("filter", paper="Li et al. 2017, arXiv:1608.08710; coupling: Fang et al. 2023, arXiv:2301.12900", channels=True)
def filter(network: Network) -> Units:
    """Output channels and heads, scored by the weights that make them; what reads a removed channel goes with it.

    Formula:
        unit = W[o, ...] of each layer that makes channel o and V[:, o, ...] of each that reads it,  scored by W
    """
    return Channels(network, "produces")


@granularity("channel", paper="He et al. 2017, arXiv:1707.06168; coupling: Fang et al. 2023, arXiv:2301.12900", channels=True)
def channel(network: Network) -> Units:
    """The same units as `filter`, scored by the weights that read them.

    Formula:
        unit = W[o, ...] of each layer that makes channel o and V[:, o, ...] of each that reads it,  scored by V
    """
    return Channels(network, "consumes")


class Channels(Units):
    """Units of shape [channels of a group]. A removed one takes rows of the layers that make it and columns of those that read it."""

    def __init__(self, network: Network, role: Literal["produces", "consumes"]) -> None:
        from distprune.core.granularity.coupling import coupled

        super().__init__(network.weights)
        device = next(iter(network.weights.values())).device
        groups = [group for group in coupled(network.model, network.example()) if all(p.name in self.shapes for p in _weights(group))]
        if not groups:
            raise UserError(
                "include and exclude must leave a layer together with those that its channels couple, got none. Prune more layers."
            )
        self.channels = tuple(replace(group, parts=tuple(replace(p, index=p.index.to(device)) for p in group.parts)) for group in groups)
        self._role = role

    def layers(self, alive: Mapping[str, Tensor] | None = None) -> list[Layer]:
        shapes = {group.name: self.shapes[group.name] for group in self.channels}
        return layers_of(shapes, alive, {group.name: group.units for group in self.channels})

    def reduce(self, values: Mapping[str, Tensor], reduction: Reduction) -> dict[str, Tensor]:
        found = {}
        for group in self.channels:
            parts = [_of_units(part, values[part.name]) for part in self._scoring(group)]
            found[group.name] = reduced(torch.cat(parts, dim=1), reduction)
        return found

    def spread(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        some = next(iter(values.values()))
        weights = {name: torch.ones(shape, dtype=some.dtype, device=some.device) for name, shape in self.shapes.items()}
        for group in self.channels:
            for part in self._scoring(group):
                weights[part.name].mul_(_along(part, values[group.name], self.shapes[part.name]))
        return weights

    def expand(self, kept: Mapping[str, Tensor]) -> Masks:
        some = next(iter(kept.values()))
        masks = {name: torch.ones(shape, dtype=torch.bool, device=some.device) for name, shape in self.shapes.items()}
        for group in self.channels:
            for part in _weights(group):
                masks[part.name] &= _along(part, kept[group.name], self.shapes[part.name])
        return Masks(masks)

    def kept_weights(self, counts: Mapping[str, int]) -> dict[str, int]:
        return {name: math.prod(shape) for name, shape in self.left(counts).items()}

    def left(self, counts: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
        left = {name: list(shape) for name, shape in self.shapes.items()}
        for group in self.channels:
            for part in _weights(group):
                left[part.name][part.dim] -= (group.units - counts[group.name]) * part.index.shape[1]
        return {name: tuple(shape) for name, shape in left.items()}

    def alive(self, masks: Masks) -> dict[str, Tensor]:
        return {
            group.name: torch.stack([_of_units(part, masks[part.name]).any(1) for part in _weights(group)]).any(0)
            for group in self.channels
        }

    def _scoring(self, group: "Group") -> "list[Part]":
        return [part for part in group.parts if part.role == self._role] or _weights(group)


def _weights(group: "Group") -> "list[Part]":
    return [part for part in group.parts if part.role != "carries"]


def _of_units(part: "Part", values: Tensor) -> Tensor:
    """Weight values of a part, [units, weights of a unit]."""
    return values.movedim(part.dim, 0)[part.index].flatten(1)


def _along(part: "Part", values: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Unit values where the units lie along the part's dimension, 1 elsewhere; broadcasts over the weight."""
    line = torch.ones(shape[part.dim], dtype=values.dtype, device=values.device)
    line[part.index.flatten()] = values.repeat_interleave(part.index.shape[1])
    return line.view([-1 if dim == part.dim else 1 for dim in range(len(shape))])
