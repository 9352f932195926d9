"""Forward operators of inverse problems: what a detector measures of an image, linear in it."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distprune.errors import UserError

Kind = Literal["identity", "mask", "blur", "gaussian"]


class Pixels(nn.Module):
    """The pixels at `index`, in every channel: [1, c, h, w] -> [c, m]."""

    index: Tensor

    def __init__(self, index: Tensor) -> None:
        super().__init__()
        self.register_buffer("index", index)

    def forward(self, image: Tensor) -> Tensor:
        return image[0].flatten(1).index_select(1, self.index)


class Blur(nn.Module):
    """All pixels after a Gaussian blur of standard deviation `radius` pixels, borders reflected: [1, c, h, w] -> [c, h w]."""

    line: Tensor

    def __init__(self, radius: float) -> None:
        super().__init__()
        self.reach = max(1, round(3 * radius))
        line = torch.exp(-0.5 * (torch.arange(-self.reach, self.reach + 1) / radius) ** 2)
        self.register_buffer("line", line / line.sum())

    def forward(self, image: Tensor) -> Tensor:
        planes = F.pad(image, (self.reach,) * 4, mode="reflect").transpose(0, 1)
        return F.conv2d(F.conv2d(planes, self.line.view(1, 1, 1, -1)), self.line.view(1, 1, -1, 1)).flatten(1)


class Gaussian(nn.Module):
    """Products with rows of independent N(0, 1/n) numbers: [1, c, h, w] with n numbers -> [1, m]."""

    matrix: Tensor

    def __init__(self, measurements: int, n: int, generator: torch.Generator) -> None:
        super().__init__()
        self.register_buffer("matrix", torch.randn(measurements, n, generator=generator) / n**0.5)

    def forward(self, image: Tensor) -> Tensor:
        return (self.matrix @ image.flatten()).unsqueeze(0)


def operator(
    kind: Kind, shape: tuple[int, int, int], *, share: float, radius: float, measurements: int, generator: torch.Generator
) -> nn.Module:
    """The operator `kind` for images of `shape` (c, h, w); what is random in it is drawn from `generator`."""
    channels, height, width = shape
    pixels = height * width
    if kind == "identity":
        return Pixels(torch.arange(pixels))
    if kind == "mask":
        if not 0 < share < 1:
            raise UserError(f"task.share must be in (0, 1), got {share}. To measure half of the pixels write 0.5.")
        return Pixels(torch.randperm(pixels, generator=generator)[: max(2, round(share * pixels))].sort().values)
    if kind == "blur":
        if not 0 < radius or round(3 * radius) >= min(height, width):
            raise UserError(
                f"task.radius must be above 0 and below a third of the sides of {height}x{width} pixels, got {radius}. Write 1.5."
            )
        return Blur(radius)
    if measurements < 2:
        raise UserError(f"task.measurements must be at least 2, got {measurements}. Write how many rows the random matrix has.")
    return Gaussian(measurements, channels * pixels, generator)
