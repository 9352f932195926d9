"""Kernels."""

import math
from collections.abc import Mapping

from torch import Tensor

from distprune.core.budgets import Layer, layers_of
from distprune.core.masks import Masks
from distprune.core.registry import granularity
from distprune.core.units import Network, Reduction, Units


@granularity("kernel", paper="Mao et al. 2017, arXiv:1705.08922")
def kernel(network: Network) -> Units:
    """The kernel between one input and one output channel of a convolution is a unit; in linear layers every weight is.

    Formula:
        unit = W[o, i, :, :]
    """
    return Kernels(network.weights)


class Kernels(Units):
    """Units of shape [out, in]."""

    def layers(self, alive: Mapping[str, Tensor] | None = None) -> list[Layer]:
        return layers_of(self.shapes, alive, {name: math.prod(shape[:2]) for name, shape in self.shapes.items()})

    def reduce(self, values: Mapping[str, Tensor], reduction: Reduction) -> dict[str, Tensor]:
        kernels = {name: value.reshape(*value.shape[:2], -1) for name, value in values.items()}
        return {name: reduced(value, reduction) for name, value in kernels.items()}

    def spread(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {
            name: value.view(*value.shape, *[1] * (len(self.shapes[name]) - 2)).expand(self.shapes[name]) for name, value in values.items()
        }

    def expand(self, kept: Mapping[str, Tensor]) -> Masks:
        return Masks({name: mask.contiguous() for name, mask in self.spread(kept).items()})

    def kept_weights(self, counts: Mapping[str, int]) -> dict[str, int]:
        return {name: count * math.prod(self.shapes[name][2:]) for name, count in counts.items()}

    def alive(self, masks: Masks) -> dict[str, Tensor]:
        return {name: mask.reshape(*mask.shape[:2], -1).any(-1) for name, mask in masks.items()}


def reduced(values: Tensor, reduction: Reduction) -> Tensor:
    """[..., n] -> [...]."""
    if reduction == "first":
        return values[..., 0]
    total = values.sum(-1)
    return {"mean": total / values.shape[-1], "sum": total, "squared_sum": total.square()}[reduction]
