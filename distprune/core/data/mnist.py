"""MNIST and Fashion-MNIST: 60,000 + 10,000 grey images of 28x28, 10 classes."""

from distprune.core.data.dataset import Augment, Dataset, assemble
from distprune.core.data.folder import files, read
from distprune.core.registry import data


@data("mnist", paper="LeCun et al. 1998, Gradient-based learning applied to document recognition", files=files)
def mnist(
    *,
    folder: str = "",
    download: bool = False,
    validation: float = 0.1,
    limit: int | None = None,
    split_seed: int = 0,
    augment: Augment = "none",
) -> Dataset:
    """Handwritten digits, 28x28 grey, from the original IDX files or Parquet in `folder`, or through torchvision."""
    train, test = read("mnist", source="MNIST", channels=1, classes=10, folder=folder, download=download)
    return assemble("mnist", train, test, classes=10, validation=validation, split_seed=split_seed, limit=limit, augment=augment)


@data("fashion_mnist", paper="Xiao et al. 2017, arXiv:1708.07747", files=files)
def fashion_mnist(
    *,
    folder: str = "",
    download: bool = False,
    validation: float = 0.1,
    limit: int | None = None,
    split_seed: int = 0,
    augment: Augment = "none",
) -> Dataset:
    """Articles of clothing, 28x28 grey, from the original IDX files or Parquet in `folder`, or through torchvision."""
    train, test = read("fashion_mnist", source="FashionMNIST", channels=1, classes=10, folder=folder, download=download)
    return assemble("fashion_mnist", train, test, classes=10, validation=validation, split_seed=split_seed, limit=limit, augment=augment)
