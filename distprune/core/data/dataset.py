"""What a data set is: three splits of images as bytes, small enough to sit on the device.

A user's own is `data: {import: "my_pkg.my_mod:fn", ...}`: a function whose keyword-only parameters are its options and that
returns a Dataset. `assemble` splits and measures what it has read:

    def crosses(*, folder: str, validation: float = 0.1, split_seed: int = 0) -> Dataset:
        train, test = Split(...), Split(...)
        return assemble("crosses", train, test, classes=2, validation=validation, split_seed=split_seed)
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from distprune.errors import UserError

Augment = Literal["none", "shift", "crop_flip"]


@dataclass(frozen=True)
class Split:
    """Images and their classes."""

    inputs: Tensor  # [n, channels, height, width], uint8, or float32 that networks take as it is
    labels: Tensor  # int64, [n]

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, index: Tensor) -> "Split":
        """The images at `index`."""
        return Split(self.inputs[index], self.labels[index])


@dataclass(frozen=True)
class Dataset:
    """Masks are scored and weights trained on `train`, trials compared on `validation`, `test` is read once, for what is exported."""

    name: str
    train: Split
    validation: Split
    test: Split
    classes: int
    mean: tuple[float, ...]  # of each channel, in [0, 1], over the train split
    std: tuple[float, ...]
    augment: str = "none"  # what classification does to a training batch: none, shift, crop_flip

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, height, width)."""
        return tuple(self.train.inputs.shape[1:])  # type: ignore[return-value]


def split_off(train: Split, *, validation: float, seed: int, limit: int | None = None) -> tuple[Split, Split]:
    """(train, validation): a share `validation` of a seeded permutation goes to validation, at most `limit` images stay in train."""
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))
    held = round(len(train) * validation)
    return train.take(order[held:][:limit]), train.take(order[:held])


def statistics(split: Split) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(mean, std) of each channel, in [0, 1]; of floats, which are not normalised, (0, 1).

    From the 256 counts of a channel: exact, and without a float copy of the images.
    """
    if split.inputs.is_floating_point():
        return (0.0,) * split.inputs.shape[1], (1.0,) * split.inputs.shape[1]
    values = torch.arange(256, dtype=torch.float64) / 255
    means, stds = [], []
    for channel in split.inputs.unbind(1):
        shares = torch.bincount(channel.flatten(), minlength=256).double() / channel.numel()
        mean = float(shares @ values)
        means.append(mean)
        stds.append(float(shares @ (values - mean) ** 2) ** 0.5 or 1.0)  # a constant channel is shifted, not divided by 0
    return tuple(means), tuple(stds)


def assemble(
    name: str,
    train: Split,
    test: Split,
    *,
    classes: int,
    validation: float,
    split_seed: int,
    limit: int | None = None,
    augment: Augment = "none",
) -> Dataset:
    """The Dataset of `train` and `test`: validation is split off from `train`, mean and std are measured on what is left of it."""
    if not 0 < validation < 1 or not 0 < round(len(train) * validation) < len(train):
        raise UserError(
            f"{name}.validation must be in (0, 1) and leave images on both sides, got {validation} of {len(train)} images. "
            "To hold out a tenth write 0.1."
        )
    if limit is not None and limit < 1:
        raise UserError(f"{name}.limit must be at least 1, got {limit}. For all images leave it out.")
    train, held = split_off(train, validation=validation, seed=split_seed, limit=limit)
    mean, std = statistics(train)
    return Dataset(name, train, held, test, classes, mean, std, augment)
