"""VGG with batch normalization and one linear layer, for small images."""

from collections import OrderedDict
from typing import Literal

from torch import nn

from distprune.core.registry import model

CONVS = {11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}  # depth -> convolutions in each stage


@model("vgg_cifar", paper="Simonyan & Zisserman 2014, arXiv:1409.1556, table 1; CIFAR form with one linear layer as in Liu et al. 2017")
def vgg_cifar(shape: tuple[int, int, int], classes: int, *, depth: Literal[11, 13, 16, 19] = 16, width: float = 1.0) -> nn.Module:
    """Five stages of 3x3 convolutions, 64 to 512 channels times `width` (VGG-19, 100 classes: 20,070,080 weights)."""
    if not width > 0:
        raise ValueError(f"vgg_cifar.width must be above 0, got {width}. For half of the channels write 0.5.")
    if min(shape[1:]) < 32:
        raise ValueError(
            f"vgg_cifar needs images of at least 32x32, got {shape[1]}x{shape[2]}. For smaller ones take lenet5 or resnet_cifar."
        )
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    before = shape[0]
    for stage, (convs, channels) in enumerate(zip(CONVS[depth], (64, 128, 256, 512, 512), strict=True), start=1):
        after = max(1, round(channels * width))
        for i in range(1, convs + 1):
            conv = nn.Conv2d(before, after, 3, padding=1, bias=False)
            nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
            layers |= {f"conv{stage}_{i}": conv, f"bn{stage}_{i}": nn.BatchNorm2d(after), f"relu{stage}_{i}": nn.ReLU()}
            before = after
        layers[f"pool{stage}"] = nn.MaxPool2d(2)
    layers |= {"mean": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten(), "fc": nn.Linear(before, classes)}
    return nn.Sequential(layers)
