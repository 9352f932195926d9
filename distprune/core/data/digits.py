"""The digits that scikit-learn carries: no files, no network."""

import torch

from distprune.core.data.dataset import Augment, Dataset, Split, assemble, split_off
from distprune.core.registry import data


@data("digits", paper="Alpaydin & Kaynak 1998, UCI Optical Recognition of Handwritten Digits", files=lambda choice: [])
def digits(*, validation: float = 0.2, limit: int | None = None, split_seed: int = 0, augment: Augment = "none") -> Dataset:
    """Handwritten digits: 1,797 grey images of 8x8, 10 classes. A fixed fifth is the test split, whatever `split_seed` is."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)  # float64 [1797, 64] in 0..16
    pixels = torch.from_numpy(images * 255 / 16).round().to(torch.uint8).view(-1, 1, 8, 8)
    train, test = split_off(Split(pixels, torch.from_numpy(labels).long()), validation=0.2, seed=0)
    return assemble("digits", train, test, classes=10, validation=validation, split_seed=split_seed, limit=limit, augment=augment)
