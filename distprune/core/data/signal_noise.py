"""Points of two patches, one of signal and one of noise, on which memorising and learning can be told apart."""

import math

import torch

from distprune.core.data.dataset import Dataset, Split, statistics
from distprune.core.registry import data
from distprune.core.streams import stream
from distprune.errors import UserError


@data("signal_noise", paper="Yang et al. 2023, arXiv:2301.00335", files=lambda choice: [])
def signal_noise(
    *,
    dimension: int = 1000,
    train: int = 50,
    test: int = 1000,
    classes: int = 2,
    signal: float = 1.0,
    ratio: float = 1.5,
    seed: int = 0,
) -> Dataset:
    """`signal` e_y and noise N(0, s^2 I) in random order, two patches [1, 2, dimension]; `test` points each to validate and to test.

    `ratio` = train * SNR^2 / classes with SNR = signal / (s sqrt(dimension)) gives s: how strongly all points of a class together show its
    signal against how strongly a point shows its own noise. A network learns the signal where it is large, memorises where it is small.
    """
    least = {"dimension": max(2, classes), "train": 1, "test": 1, "classes": 2}
    given = {"dimension": dimension, "train": train, "test": test, "classes": classes}
    for name, value in given.items():
        if value < least[name]:
            raise UserError(f"signal_noise.{name} must be at least {least[name]}, got {value}. Leave it out for the default.")
    for name, number in (("signal", signal), ("ratio", ratio)):
        if not 0 < number < math.inf:
            raise UserError(f"signal_noise.{name} must be above 0 and finite, got {number}. Write 1.5.")
    spread = signal * math.sqrt(train / (classes * ratio * dimension))

    def draw(split: str, n: int) -> Split:
        generator = stream(seed, f"signal_noise/{split}")
        labels = torch.randint(classes, (n,), generator=generator)
        order = torch.randint(2, (n,), generator=generator)  # which of the two patches is the signal
        points = torch.arange(n)
        inputs = torch.zeros(n, 1, 2, dimension)
        inputs[points, 0, order, labels] = signal
        inputs[points, 0, 1 - order] = spread * torch.randn(n, dimension, generator=generator)
        return Split(inputs, labels)

    shown = draw("train", train)
    mean, std = statistics(shown)
    return Dataset("signal_noise", shown, draw("validation", test), draw("test", test), classes, mean, std)
