"""A search on data of your own: a folder of images with one subfolder for each class, and a network of your own.

    python examples/search_my_data.py

From the command line the same is `distprune search photos.yaml`: see examples/photos.
"""

import os
import tempfile
from pathlib import Path

from torch import nn

import distprune as dp


def network(shape: tuple[int, int, int], classes: int, *, hidden: int = 64) -> nn.Module:
    """Your network. A search builds it itself, for the images that it finds: (channels, height, width), and a number of classes."""
    return nn.Sequential(nn.Flatten(), nn.Linear(shape[0] * shape[1] * shape[2], hidden), nn.ReLU(), nn.Linear(hidden, classes))


def write_photos(folder: Path) -> None:
    """Your images would be there already. Here are some: scikit-learn's digits, as PNG files in folders 0 to 9."""
    from PIL import Image
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    for number, (image, label) in enumerate(zip(images[:800], labels[:800], strict=True)):
        (folder / str(label)).mkdir(parents=True, exist_ok=True)
        Image.fromarray((image * 15).reshape(8, 8).astype("uint8")).save(folder / str(label) / f"{number}.png")


def main(folder: Path) -> None:
    """Search, look at what was found, take the best along."""
    write_photos(folder / "photos")
    config = {
        "name": "mine",
        "recipe": {
            # Workers import the function by its place, as they do with one in your own module.
            "model": {"import": "search_my_data:network", "hidden": 32},
            # Decoded once and scaled to 8x8. Splits are drawn by class: 70 % to train, 10 % to compare trials, 20 % to test at the end.
            "data": {"name": "image_folder", "folder": str(folder / "photos"), "size": 8},
            "train": {"length": "6ep", "batch_size": 32, "optimizer": {"name": "sgd", "lr": 0.1}},
        },
        # What is left out is searched over everything there is; what makes no sense together is never tried.
        "space": {
            "paradigm": ["dense", "finetune", "gradual"],
            "criterion": ["magnitude", "taylor"],
            "allocator": ["global", "erk"],
            "regularizer": ["none"],
            "sparsity": [0.7, 0.95],
        },
        "limits": {"trials": 8},
        "storage": str(folder / "runs"),
        "log": ["tensorboard"],  # learning curves: tensorboard --logdir runs/mine/logs/tensorboard
    }
    result = dp.search(config)

    # The front: no other trial is both more accurate and smaller. Validation chose; test was looked at once, for these.
    print(f"{len(result.rows())} trials, {len(result.pareto())} of them on the front")
    for trial in result.pareto():
        row = trial.row
        print(
            f"  trial {trial.number}: {1 - row['sparsity']:6.1%} of the weights, validation {row['objective']:.3f}, test {row['test']:.3f}"
        )

    best = result.best(max_density=0.3)
    print(f"the best with at most 30 %: trial {best.number}, {best.row['paradigm']}, {best.masks}")
    print(f"taken along to {best.export(folder / 'best')}")


if __name__ == "__main__":
    os.chdir(Path(__file__).parent)  # workers look for `search_my_data` where the search is started
    with tempfile.TemporaryDirectory() as place:
        main(Path(place))
