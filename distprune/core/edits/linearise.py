"""The fused layer in closed form, from the means and variances of pre-activations alone, as if they were Gaussian."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from distprune.core.edits.pairs import DROPOUTS, ELEMENTWISE
from distprune.core.fusion import Affine, Window, linearised

_LINES = (*DROPOUTS, nn.BatchNorm1d, nn.BatchNorm2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.Flatten, nn.Identity)


def curve(between: Sequence[nn.Module]) -> nn.Module | None:
    """The one activation between two layers. Raises ValueError where something else there is no line: max-pooling, a second activation."""
    curves = [module for module in between if isinstance(module, ELEMENTWISE)]
    if len(curves) > 1 or any(not isinstance(module, (*_LINES, *ELEMENTWISE)) for module in between):
        raise ValueError
    return curves[0] if curves else None


class _Line(nn.Module):
    """z -> gain (z - mean) + value."""

    def __init__(self, mean: Tensor, gain: Tensor, value: Tensor) -> None:
        super().__init__()
        self.mean, self.gain, self.value = mean, gain, value

    def forward(self, z: Tensor) -> Tensor:
        return self.gain * (z - self.mean) + self.value


def linear_map(
    chain: Sequence[nn.Module], example: Tensor, mean: Tensor | None = None, std: Tensor | None = None, *, window: Window | None
) -> Affine:
    """The map that two layers and all between are for Gaussian pre-activations of `mean` and `std`, [units] or [channels, 1, 1].

    With the activation as the line of the same first and second moments, the chain is affine as it stands: for ReLU between dense layers
    W = W2 diag(Phi(mean / std)) W1. Its bias is its value at 0 and its weights are its gradient. Of two convolutions (`window`) it is that
    of a position to which no layer's padding reaches.
    """
    activation = curve(chain[1:-1])
    layers: list[nn.Module] = []
    for module in chain:
        if module is activation:
            assert mean is not None and std is not None
            layers.append(_Line(mean, *linearised(module, mean, std)))
        else:
            layers.append(copy.deepcopy(module).double().eval())
    if isinstance(layers[-1], nn.Linear) and isinstance(layers[0], nn.Conv2d):
        layers.insert(-1, nn.Flatten())  # where a function does it
    outputs = nn.Sequential(*layers)

    shape = tuple(example.shape[1:]) if isinstance(chain[0], nn.Conv2d) else example.shape[-1:]
    at: tuple[int, ...] = ()
    inside: tuple[Any, ...] = (...,)
    if window is not None:
        at = tuple(-(-p // s) for p, s in zip(window.padding, window.stride, strict=True))  # the first position with its kernel inside
        corner = [i * s - p for i, s, p in zip(at, window.stride, window.padding, strict=True)]
        ends = [start + k for start, k in zip(corner, window.kernel, strict=True)]
        shape, inside = (shape[0], *ends), (..., slice(corner[0], None), slice(corner[1], None))
    last = chain[-1]
    assert isinstance(last, nn.Linear | nn.Conv2d)
    count = last.weight.shape[0]
    with torch.enable_grad():
        inputs = torch.zeros(count, *shape, dtype=torch.double, device=example.device, requires_grad=True)
        values = outputs(inputs)[(slice(None), slice(None), *at)]
        gradient = torch.autograd.grad(values.diagonal().sum(), inputs)[0]
    return Affine(gradient[inside].flatten(1), values[0].detach())
