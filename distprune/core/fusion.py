"""The mathematics of layer fusion (Ghods et al. 2020, arXiv:2001.10509): one affine map for two layers and all that is between them.

Of all maps y~ = W a + b, the best in mean square is W = Cov(y, a) Cov(a, a)^-1, b = E y - W E a. What lies between the layers (activation,
normalisation, pooling) is part of y, so it is measured and not assumed. For a convolution, a is the patch that an output position sees.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Sides = tuple[int, int]  # height, width


@dataclass(frozen=True)
class Affine:
    """y~ = weight a + bias, of rows in double."""

    weight: Tensor  # [outputs, inputs]
    bias: Tensor  # [outputs]

    def error(self, rows: Iterable[tuple[Tensor, Tensor]]) -> float:
        """Mean square of y - y~ over the variance of y on rows of inputs and outputs, part by part: 0 is perfect, 1 is a constant."""
        lost, count, total, squares = 0.0, 0, torch.zeros_like(self.bias), torch.zeros_like(self.bias)
        for inputs, outputs in rows:
            inputs, outputs = inputs.detach().double(), outputs.detach().double()
            lost += float((outputs - inputs @ self.weight.T - self.bias).square().sum())
            count += len(outputs)
            total += outputs.sum(0)
            squares += outputs.square().sum(0)
        spread = float((squares - total.square() / max(count, 1)).sum())
        return lost / spread if spread > 0 else 0.0


class Moments:
    """First and second moments of inputs [rows, inputs] and outputs [rows, outputs], in double, one batch after the other."""

    def __init__(self, inputs: int, outputs: int, device: torch.device) -> None:
        self.count = 0
        self._a = torch.zeros(inputs, dtype=torch.double, device=device)
        self._y = torch.zeros(outputs, dtype=torch.double, device=device)
        self._aa = torch.zeros(inputs, inputs, dtype=torch.double, device=device)
        self._ya = torch.zeros(outputs, inputs, dtype=torch.double, device=device)

    def add(self, inputs: Tensor, outputs: Tensor) -> None:
        """Take in some rows."""
        inputs, outputs = inputs.double(), outputs.double()
        self.count += len(inputs)
        self._a += inputs.sum(0)
        self._y += outputs.sum(0)
        self._aa.addmm_(inputs.T, inputs)
        self._ya.addmm_(outputs.T, inputs)

    def best(self, *, ridge: float, blocks: int = 1) -> Affine:
        """The map of the least mean square error on the rows so far.

        `ridge` times the mean variance of an input is added to all variances. With `blocks`, covariances between that many equal parts
        of the inputs are taken as zero: the channels of a convolution in the code that the paper's authors released.
        """
        a, y = self._a / self.count, self._y / self.count
        covariance = self._aa / self.count - a[:, None] * a
        cross = self._ya / self.count - y[:, None] * a
        damping = ridge * covariance.diagonal().mean()
        if not bool(covariance.diagonal().max() > 0):  # the inputs never vary
            return Affine(torch.zeros_like(cross), y)
        if blocks > 1:
            part = torch.arange(len(a), device=a.device) // (len(a) // blocks)
            covariance *= part[:, None] == part
        covariance.diagonal().add_(damping)
        weight = torch.cholesky_solve(cross.T, torch.linalg.cholesky(covariance)).T
        return Affine(weight, y - weight @ a)


@dataclass(frozen=True)
class Window:
    """What an output position of a chain of convolutions and poolings sees of its input: position i begins at i stride - padding."""

    kernel: Sides = (1, 1)
    stride: Sides = (1, 1)
    padding: Sides = (0, 0)

    def then(self, kernel: Sides, stride: Sides, padding: Sides, dilation: Sides = (1, 1)) -> "Window":
        """The chain with one more layer at its end: 3x3, pooling by 2 and 3x3 see 8x8 at stride 2."""
        seen = [k + (wide - 1) * gap * s for k, wide, gap, s in zip(self.kernel, kernel, dilation, self.stride, strict=True)]
        steps = [s * more for s, more in zip(self.stride, stride, strict=True)]
        border = [p + more * s for p, more, s in zip(self.padding, padding, self.stride, strict=True)]
        return Window((seen[0], seen[1]), (steps[0], steps[1]), (border[0], border[1]))

    def cut(self, most: int, sides: Sides) -> "Window":
        """The middle of the kernel, `most` wide or as near as the padding allows, with the same positions on an image of `sides`."""
        kernel, padding = list(self.kernel), list(self.padding)
        for axis in (0, 1):
            less = min(max(kernel[axis] - most, 0), 2 * padding[axis])
            if less % 2 and (sides[axis] + 2 * padding[axis] - kernel[axis] + 1) % self.stride[axis] == 0:
                less += 1 if less < 2 * padding[axis] else -1  # an odd cut would make room for one more position
            kernel[axis], padding[axis] = kernel[axis] - less, padding[axis] - less // 2
        return Window((kernel[0], kernel[1]), self.stride, (padding[0], padding[1]))

    def positions(self, sides: Sides) -> Sides:
        """Height and width of what comes out of an image of `sides`."""
        high, wide = ((side + 2 * p - k) // s + 1 for side, k, s, p in zip(sides, self.kernel, self.stride, self.padding, strict=True))
        return high, wide

    def rows(self, images: Tensor) -> Tensor:
        """[n, channels, height, width] -> [n * positions, channels * kernel], in the order of a convolution's weights; zeros outside."""
        patches = F.unfold(images, self.kernel, padding=self.padding, stride=self.stride)
        return patches.mT.flatten(0, 1)


_REACH, _POINTS = 8.0, 1025  # standard deviations each way; the trapezoid rule is then within 1e-5, at kinks too


def linearised(activation: nn.Module, mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
    """(E f'(z), E f(z)) of an elementwise f and z ~ N(mean, std^2), unit by unit.

    For Gaussian inputs a, Cov(f(z), a) = E f'(z) Cov(z, a) (Bussgang), so f acts in second moments as the line through these. By Stein's
    lemma E f'(z) = E (z - mean) f(z) / std^2, which needs no derivative; of ReLU it is Phi(mean / std). Units that never vary have gain 0.
    """
    t = torch.linspace(-_REACH, _REACH, _POINTS, dtype=torch.double, device=mean.device)
    density = torch.exp(-t.square() / 2) * (t[1] - t[0]) / math.sqrt(2 * math.pi)
    mean, std = mean.double(), std.double()
    values = activation(mean[..., None] + std[..., None] * t)
    gain = (values * t * density).sum(-1) / std.clamp(min=1e-12)
    return torch.where(std > 1e-9, gain, torch.zeros_like(gain)), (values * density).sum(-1)
