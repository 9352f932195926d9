"""CIFAR-10 and CIFAR-100: 50,000 + 10,000 colour images of 32x32."""

from distprune.core.data.dataset import Augment, Dataset, assemble
from distprune.core.data.folder import files, read
from distprune.core.registry import data


@data("cifar10", paper="Krizhevsky 2009, Learning multiple layers of features from tiny images", files=files)
def cifar10(
    *,
    folder: str = "",
    download: bool = False,
    validation: float = 0.1,
    limit: int | None = None,
    split_seed: int = 0,
    augment: Augment = "crop_flip",
) -> Dataset:
    """Ten classes of things, 32x32 RGB, from Parquet in `folder` or through torchvision."""
    train, test = read("cifar10", source="CIFAR10", channels=3, classes=10, folder=folder, download=download)
    return assemble("cifar10", train, test, classes=10, validation=validation, split_seed=split_seed, limit=limit, augment=augment)


@data("cifar100", paper="Krizhevsky 2009, Learning multiple layers of features from tiny images", files=files)
def cifar100(
    *,
    folder: str = "",
    download: bool = False,
    validation: float = 0.1,
    limit: int | None = None,
    split_seed: int = 0,
    augment: Augment = "crop_flip",
) -> Dataset:
    """A hundred classes of things, 32x32 RGB, from Parquet in `folder` or through torchvision."""
    train, test = read("cifar100", source="CIFAR100", channels=3, classes=100, folder=folder, download=download)
    return assemble("cifar100", train, test, classes=100, validation=validation, split_seed=split_seed, limit=limit, augment=augment)
