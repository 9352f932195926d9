"""Residual networks for small images."""

import torch.nn.functional as F
from torch import Tensor, nn

from distprune.core.registry import model


class Shortcut(nn.Module):
    """Option A: every second pixel, and zeros for the new channels, so that channel i stays channel i. No parameters."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.grow = after - before

    def forward(self, x: Tensor) -> Tensor:
        """[n, before, h, w] -> [n, after, ceil(h / 2), ceil(w / 2)]."""
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 0, self.grow))


class Block(nn.Module):
    """Two 3x3 convolutions around a shortcut; where the channels grow, the sides are halved."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride=1 if before == after else 2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(after)
        self.shortcut = nn.Identity() if before == after else Shortcut(before, after)

    def forward(self, x: Tensor) -> Tensor:
        """[n, before, h, w] -> [n, after, h', w']."""
        inner = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(inner)) + self.shortcut(x))


class ResNet(nn.Module):
    """A 3x3 stem, three stages of `blocks` blocks, global average pooling and one linear layer."""

    def __init__(self, channels: int, classes: int, blocks: int, width: int) -> None:
        super().__init__()
        widths = (width, 2 * width, 4 * width)
        self.conv = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(width)
        self.stage1, self.stage2, self.stage3 = (
            nn.Sequential(Block(before, after), *(Block(after, after) for _ in range(blocks - 1)))
            for before, after in zip((width, *widths), widths, strict=False)
        )
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(widths[-1], classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """[n, channels, h, w] -> [n, classes]."""
        x = F.relu(self.bn(self.conv(x)))
        x = self.stage3(self.stage2(self.stage1(x)))
        logits: Tensor = self.fc(self.pool(x).flatten(1))
        return logits


@model("resnet_cifar", paper="He et al. 2015, arXiv:1512.03385, section 4.2")
def resnet_cifar(shape: tuple[int, int, int], classes: int, *, depth: int = 20, width: int = 16) -> nn.Module:
    """ResNet-20, 32, 44, 56, 110 with parameter-free shortcuts, `width` channels in the first stage (ResNet-56: 848,944 weights)."""
    if depth < 8 or depth % 6 != 2:
        raise ValueError(f"resnet_cifar.depth must be 6n + 2 with n of at least 1, got {depth}. Write 20, 32, 44, 56 or 110.")
    if width < 1:
        raise ValueError(f"resnet_cifar.width must be at least 1, got {width}. He et al. take 16.")
    return ResNet(shape[0], classes, blocks=(depth - 2) // 6, width=width)
