"""Generators: networks that make an image out of one fixed input."""

from collections.abc import Callable
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from distprune.core.registry import model

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"sigmoid": F.sigmoid, "tanh": F.tanh, "softplus": F.softplus}


class TwoLayer(nn.Module):
    """g(u) = V phi(W u) / sqrt(k) with a trained W and a frozen V."""

    def __init__(self, shape: tuple[int, int, int], channels: int, width: int, activation: str, spread: float) -> None:
        super().__init__()
        inputs, self.made = shape[0] * shape[1] * shape[2], (channels, *shape[1:])
        self.activation = ACTIVATIONS[activation]
        self.hidden = nn.Linear(inputs, width, bias=False)
        self.read = nn.Linear(width, channels * shape[1] * shape[2], bias=False).requires_grad_(False)
        nn.init.normal_(self.hidden.weight, std=spread)
        nn.init.uniform_(self.read.weight, -(3**0.5), 3**0.5)  # bounded, of variance 1

    def forward(self, x: Tensor) -> Tensor:
        """[n, latent, h, w] -> [n, channels, h, w]."""
        made: Tensor = self.read(self.activation(self.hidden(x.flatten(1)))) / self.hidden.out_features**0.5
        return made.view(-1, *self.made)


@model("two_layer", paper="Buskulic et al. 2023, arXiv:2303.11265, section 3")
def two_layer(
    shape: tuple[int, int, int],
    classes: int,
    *,
    width: int = 320,
    activation: Literal["sigmoid", "tanh", "softplus"] = "sigmoid",
    spread: float = 1.0,
) -> nn.Module:
    """One wide trained layer W ~ N(0, `spread`^2) and a frozen uniform readout V: an image of `classes` channels."""
    if width < 1 or not spread > 0:
        raise ValueError(
            f"two_layer.width must be at least 1 and spread above 0, got {width} and {spread}. Buskulic et al. take spread: 1."
        )
    return TwoLayer(shape, classes, width, activation, spread)


def _norm(channels: int) -> nn.BatchNorm2d:
    # There is one input ever, whose own statistics are exact: averages over steps would lag behind the weights.
    return nn.BatchNorm2d(channels, track_running_stats=False)


def _layer(before: int, after: int, size: int, stride: int = 1) -> list[nn.Module]:
    conv = nn.Conv2d(before, after, size, stride=stride, padding=size // 2, padding_mode="reflect", bias=False)
    return [conv, _norm(after), nn.LeakyReLU(0.2)]


@model("hourglass", paper="Ulyanov et al. 2018, arXiv:1711.10925; without skips as in Ghosh et al. 2024, Optimal Eye Surgeon")
def hourglass(shape: tuple[int, int, int], classes: int, *, widths: tuple[int, ...] = (16, 32, 64)) -> nn.Module:
    """Convolutions down to one level for each of `widths` and, by nearest neighbours, up again."""
    least = 2 ** (len(widths) - 1)
    if not widths or min(widths) < 1 or min(shape[1:]) <= least:
        raise ValueError(
            f"hourglass.widths must hold numbers of at least 1, one for each halving of the sides {shape[1:]} before they are 1, "
            f"got {list(widths)}. Write [16, 32, 64]."
        )
    layers: list[nn.Module] = []
    sizes = [shape[1:]]
    for before, after in zip((shape[0], *widths), widths, strict=False):
        layers += [*_layer(before, after, 3, stride=2), *_layer(after, after, 3)]
        sizes.append(((sizes[-1][0] + 1) // 2, (sizes[-1][1] + 1) // 2))
    for before, after, size in zip((widths[-1], *widths[:0:-1]), widths[::-1], sizes[-2::-1], strict=True):
        layers += [nn.Upsample(size=size), _norm(before), *_layer(before, after, 3), *_layer(after, after, 1)]
    return nn.Sequential(*layers, nn.Conv2d(widths[0], classes, 1))
