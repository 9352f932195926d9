"""The network that theory can follow: one hidden layer of rectified powers over the patches of an input, and a fixed sum."""

import torch
from torch import Tensor, nn

from distprune.core.registry import model


class RePU(nn.Module):
    """Class j has the sum over its filters r and the patches x_p of max(0, <w_jr, x_p>)^power; the rows of an image are its patches."""

    def __init__(self, dimension: int, classes: int, filters: int, power: int, std: float) -> None:
        super().__init__()
        self.classes, self.power = classes, power
        self.hidden = nn.Linear(dimension, classes * filters, bias=False)  # rows: the filters of class 0, then those of class 1, ...
        nn.init.normal_(self.hidden.weight, std=std)

    @property
    def filters(self) -> Tensor:
        """The weights, [classes, filters, dimension]."""
        return self.hidden.weight.view(self.classes, -1, self.hidden.in_features)

    def forward(self, inputs: Tensor) -> Tensor:
        patches = inputs.flatten(1, -2)  # [n, patches, dimension]
        units: Tensor = torch.relu(self.hidden(patches)).pow(self.power).sum(1)  # [n, classes * filters]
        return units.view(len(units), self.classes, -1).sum(-1)


@model("repu", paper="Yang et al. 2023, arXiv:2301.00335", values_only=("std",))
def repu(shape: tuple[int, int, int], classes: int, *, filters: int = 20, power: int = 3, std: float = 0.03) -> nn.Module:
    """`filters` rectified powers a class over the rows of an image, drawn from N(0, std^2) and summed with weights of 1, which stay."""
    if filters < 1 or power < 1:
        raise ValueError(f"repu.filters and repu.power must be at least 1, got {filters} and {power}. Leave them out for 20 and 3.")
    if not std > 0:
        raise ValueError(f"repu.std must be above 0, got {std}: at zero a rectified power has no gradient. Write 0.03.")
    return RePU(shape[2], classes, filters, power, std)
