"""Fully connected networks."""

from collections import OrderedDict
from typing import Literal

from torch import nn

from distprune.core.registry import model


@model("mlp", paper="LeCun et al. 1998, Gradient-based learning applied to document recognition")
def mlp(
    shape: tuple[int, int, int], classes: int, *, hidden: tuple[int, ...] = (300, 100), activation: Literal["relu", "tanh"] = "relu"
) -> nn.Module:
    """Linear layers with ReLU or tanh between; LeNet-300-100 by default (266,200 weights on 28x28x1)."""
    if any(units < 1 for units in hidden):
        raise ValueError(f"mlp.hidden must hold numbers of at least 1, got {list(hidden)}. For a linear classifier write hidden: [].")
    layers: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
    units = shape[0] * shape[1] * shape[2]
    for i, after in enumerate(hidden, start=1):
        layers[f"fc{i}"] = nn.Linear(units, after)
        layers[f"{activation}{i}"] = nn.ReLU() if activation == "relu" else nn.Tanh()
        units = after
    layers[f"fc{len(hidden) + 1}"] = nn.Linear(units, classes)
    return nn.Sequential(layers)
