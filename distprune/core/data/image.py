"""One image or signal as a data set, for inverse problems: every split holds it."""

import torch
import torch.nn.functional as F

from distprune.core.data.dataset import Dataset, Split, statistics
from distprune.core.registry import data
from distprune.core.streams import stream
from distprune.errors import UserError

_LUMA = (0.299, 0.587, 0.114)  # grey of red, green and blue (ITU-R BT.601)


@data("image", paper="scikit-learn's sample images; Ulyanov et al. 2018, arXiv:1711.10925", files=lambda choice: [choice.option("picture")])
def image(*, picture: str = "china", side: int = 64, grey: bool = True) -> Dataset:
    """The middle square of one picture, scaled to `side` pixels: scikit-learn's china or flower, or the path of a file of your own."""
    if side < 8:
        raise UserError(f"data.side must be at least 8 pixels, got {side}. Write side: 64.")
    pixels = _read(picture).permute(2, 0, 1).float()
    edge = min(pixels.shape[1:])
    top, left = (pixels.shape[1] - edge) // 2, (pixels.shape[2] - edge) // 2
    square = pixels[None, :, top : top + edge, left : left + edge]
    if grey:
        square = (square * torch.tensor(_LUMA).view(1, 3, 1, 1)).sum(1, keepdim=True)
    scaled = F.interpolate(square, size=(side, side), mode="bilinear", antialias=True, align_corners=False)
    return _alone("image", Split(scaled.round().clamp(0, 255).byte(), torch.zeros(1, dtype=torch.int64)))


@data("gaussian_signal", paper="Buskulic et al. 2023, arXiv:2303.11265, section 4", files=lambda choice: [])
def gaussian_signal(*, n: int = 60, seed: int = 0) -> Dataset:
    """A vector of `n` independent N(0, 1) numbers, as an image of one pixel with `n` channels."""
    if n < 1:
        raise UserError(f"data.n must be at least 1, got {n}. Write n: 60.")
    return _alone("gaussian_signal", Split(torch.randn(1, n, 1, 1, generator=stream(seed, "signal")), torch.zeros(1, dtype=torch.int64)))


def _alone(name: str, split: Split) -> Dataset:
    mean, std = statistics(split)
    return Dataset(name, split, split, split, classes=1, mean=mean, std=std)


def _read(picture: str) -> torch.Tensor:
    """Bytes [height, width, 3]. Raises UserError for a file that cannot be read."""
    import numpy as np

    if picture in ("china", "flower"):
        from sklearn.datasets import load_sample_image

        return torch.from_numpy(np.array(load_sample_image(f"{picture}.jpg")))
    from PIL import Image

    try:
        with Image.open(picture) as file:
            return torch.from_numpy(np.array(file.convert("RGB")))
    except OSError as error:
        raise UserError(f"data.picture must be china, flower or the path of an image, got {picture!r}: {error}.") from error
