"""Plain convolutional networks: a chain of blocks and one linear layer, deep or shallow."""

from collections import OrderedDict
from typing import Literal

from torch import nn

from distprune.core.registry import model

ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "elu": nn.ELU, "tanh": nn.Tanh}


@model(
    "plain_conv",
    paper="Ghods et al. 2020, arXiv:2001.10509, section 4: 2-4-8-16 channels; with ELU and batch norm six blocks",
    values_only=("init",),
)
def plain_conv(
    shape: tuple[int, int, int],
    classes: int,
    *,
    channels: tuple[int, ...] = (2, 4, 8, 16),
    pool_every: int = 1,
    activation: Literal["relu", "elu", "tanh"] = "relu",
    batch_norm: bool = False,
    dropout: float = 0.0,
    init: Literal["torch", "he"] = "torch",
) -> nn.Module:
    """A block of each of `channels`, 3x3 convolution, activation, batch norm, and after every `pool_every` of them 2x2 max-pooling.

    `dropout` follows each pooling. `init: he` draws weights from N(0, 2 / fan-in) (He et al. 2015, arXiv:1502.01852) and zeroes biases.
    """
    if not channels or min(channels) < 1 or pool_every < 1:
        raise ValueError(f"plain_conv needs channels and pool_every of at least 1, got {list(channels)} and {pool_every}. Leave them out.")
    if pools := len(channels) // pool_every:
        if min(shape[1:]) >> pools < 1:
            raise ValueError(
                f"plain_conv halves images of {shape[1]}x{shape[2]} {pools} times. Write a larger pool_every than {pool_every}."
            )
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    before, high, wide = shape
    for block, after in enumerate(channels, start=1):
        layers[f"conv{block}"] = nn.Conv2d(before, after, 3, padding=1)
        layers[f"act{block}"] = ACTIVATIONS[activation]()
        if batch_norm:
            layers[f"bn{block}"] = nn.BatchNorm2d(after)
        if block % pool_every == 0:
            layers[f"pool{block}"] = nn.MaxPool2d(2)
            high, wide = high // 2, wide // 2
            if dropout:
                layers[f"drop{block}"] = nn.Dropout(dropout)
        before = after
    layers |= {"flatten": nn.Flatten(), "fc": nn.Linear(before * high * wide, classes)}
    for layer in layers.values():
        if init == "he" and isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.constant_(layer.get_parameter("bias"), 0.0)
    return nn.Sequential(layers)
