"""Your own network, which photos.yaml names as {import: "mine:network"}."""

from torch import nn


def network(shape: tuple[int, int, int], classes: int, *, width: int = 8) -> nn.Module:
    """Called with (channels, height, width) of an image and the number of classes; what follows the star can be set in the file."""
    layers: list[nn.Module] = []
    channels = shape[0]
    for level in range(3):
        layers += [nn.Conv2d(channels, width << level, 3, padding=1), nn.BatchNorm2d(width << level), nn.ReLU(), nn.MaxPool2d(2)]
        channels = width << level
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))
