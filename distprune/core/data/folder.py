"""Where train and test images come from: IDX or Parquet files in a folder, or torchvision's own reader and cache."""

import gzip
import math
import zlib
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distprune.core.data.dataset import Split
from distprune.core.registry import Choice
from distprune.errors import UserError

PARQUET = ("train.parquet", "test.parquet")  # columns: image (encoded bytes, or a struct with `bytes`), label
IDX = ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz", "t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz")
CACHE = "~/.cache/distprune/data"


def files(choice: Choice) -> list[Path]:
    """What `read` may read for a choice."""
    folder = Path(choice.option("folder") or CACHE).expanduser()
    return [folder / name for name in (*PARQUET, *IDX)] if choice.option("folder") else sorted(folder.rglob("*"))


def read(name: str, *, source: str, channels: int, classes: int, folder: str, download: bool) -> tuple[Split, Split]:
    """(train, test) of the data set `name`: from `folder` if one is given, else through torchvision's class `source`."""
    if folder and download:
        raise UserError(f"{name} takes folder or download, got both. Leave download out to read {folder}.")
    if not folder:
        return _read_torchvision(name, source, channels, classes, download)
    path = Path(folder).expanduser()
    kinds = (PARQUET, IDX) if channels == 1 else (PARQUET,)  # IDX as LeCun wrote it is grey
    kind = next((kind for kind in kinds if all((path / file).is_file() for file in kind)), None)
    if kind is None:
        needed = ", or ".join(", ".join(kind) for kind in kinds)
        found = "does not hold them" if path.is_dir() else "is not a folder"
        raise UserError(
            f"{name}.folder must hold {needed}, got {folder}, which {found}. Correct folder: or write download: true in its place."
        )
    if kind is PARQUET:
        train, test = (_read_parquet(path / file, channels, classes) for file in PARQUET)
    else:
        train, test = (_read_idx_pair(path / images, path / labels, classes) for images, labels in (IDX[:2], IDX[2:]))
    if train.inputs.shape[1:] != test.inputs.shape[1:]:
        sizes = [f"{split.inputs.shape[2]}x{split.inputs.shape[3]}" for split in (train, test)]
        raise UserError(f"{path} must hold train and test images of one size, got {sizes[0]} and {sizes[1]}. Write its files again.")
    return train, test


def _read_torchvision(name: str, source: str, channels: int, classes: int, download: bool) -> tuple[Split, Split]:
    from torchvision import datasets

    cache = Path(CACHE).expanduser()
    try:
        parts = [getattr(datasets, source)(cache, train=train, download=download) for train in (True, False)]
    except Exception as error:  # absent, damaged or not to be had: torchvision raises a different kind for each
        if download:
            raise UserError(
                f"{name} could not be downloaded to {cache} or read there ({_reason(error)}). Try again, or write folder: with its files."
            ) from error
        raise UserError(f"{name} needs folder: with its files or download: true, got neither, and {CACHE} has no whole copy.") from error
    images = [_channels_first(torch.as_tensor(part.data), channels) for part in parts]
    labels = [torch.as_tensor(part.targets).long() for part in parts]
    return _split(images[0], labels[0], classes, cache), _split(images[1], labels[1], classes, cache)


def _read_idx_pair(images: Path, labels: Path, classes: int) -> Split:
    return _split(_channels_first(_read_idx(images, 3), 1), _read_idx(labels, 1).long(), classes, labels)


def _read_idx(path: Path, dimensions: int) -> Tensor:
    """The uint8 array of an IDX file: magic (0, 0, 8, dimensions), big-endian sizes, bytes (LeCun et al. 1998)."""
    try:
        raw = gzip.decompress(path.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} must be a whole gzip file, got {_reason(error)}. Fetch it again.") from error
    start = 4 + 4 * dimensions
    if raw[:4] != bytes((0, 0, 8, dimensions)) or len(raw) < start:
        raise UserError(
            f"{path} must be an IDX file that starts with 000008{dimensions:02x}, got {raw[:4].hex() or 'nothing'}. Fetch it again."
        )
    sizes = [int(size) for size in np.frombuffer(raw, ">u4", dimensions, offset=4)]
    if not 0 < math.prod(sizes) == len(raw) - start:
        raise UserError(f"{path} must hold the bytes that its sizes {sizes} promise, got {len(raw) - start} bytes. Fetch it again.")
    return torch.from_numpy(np.frombuffer(raw, np.uint8, offset=start).reshape(sizes).copy())


def _read_parquet(path: Path, channels: int, classes: int) -> Split:
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    again = "Write the file again."
    try:
        with pq.ParquetFile(path) as file:
            names = file.schema_arrow.names
            table = file.read(columns=[name for name in ("image", "label") if name in names])
    except (pa.ArrowException, OSError, ValueError) as error:  # ValueError: a column name that is not UTF-8
        raise UserError(f"{path} must be a whole Parquet file, got {_reason(error)}. {again}") from error
    if table.num_columns < 2:
        raise UserError(f"{path} must have the columns image and label, got {', '.join(names)}. Rename them.")
    images, labels = table["image"], table["label"]
    if pa.types.is_struct(images.type) and "bytes" in [field.name for field in images.type]:
        images = pc.struct_field(images, "bytes")
    if not (pa.types.is_binary(images.type) or pa.types.is_large_binary(images.type)):
        raise UserError(f"{path} must have encoded images (PNG, JPEG) as bytes in image, got {images.type}. {again}")
    if not pa.types.is_integer(labels.type) or labels.null_count:
        raise UserError(f"{path} must have a whole number in every label, got {labels.type} with {labels.null_count} nulls. {again}")
    if not len(images):
        raise UserError(f"{path} must hold images, got none. {again}")
    return _split(_decode(images.to_pylist(), channels, path), torch.from_numpy(labels.to_numpy().astype(np.int64)), classes, path)


def _decode(encoded: list[bytes], channels: int, path: Path) -> Tensor:
    """uint8 [n, channels, height, width] of encoded images; grey and colour are converted into each other."""
    from PIL import Image

    pixels: Any = None  # allocated when the first image tells the size
    for row, raw in enumerate(encoded):
        try:
            image = np.asarray(Image.open(BytesIO(raw)).convert("L" if channels == 1 else "RGB"))
        except Exception as error:  # PIL raises a different kind for each way to be broken
            raise UserError(f"{path} must hold whole images, got one that cannot be decoded in row {row}. Write the file again.") from error
        if pixels is None:
            pixels = np.empty((len(encoded), *image.shape), np.uint8)
        if image.shape != pixels.shape[1:]:
            sizes = [f"{height}x{width}" for height, width in (pixels.shape[1:3], image.shape[:2])]
            raise UserError(f"{path} must hold images of one size, got {sizes[0]} and, in row {row}, {sizes[1]}. Scale them.")
        pixels[row] = image
    return _channels_first(torch.from_numpy(pixels), channels)


def _channels_first(images: Tensor, channels: int) -> Tensor:
    """[n, height, width] or [n, height, width, channels] -> [n, channels, height, width]."""
    return images.reshape(*images.shape[:3], channels).permute(0, 3, 1, 2).contiguous()


def _split(images: Tensor, labels: Tensor, classes: int, path: Path) -> Split:
    if len(images) != len(labels):
        raise UserError(f"{path} must hold one label for each image, got {len(labels)} labels for {len(images)} images. Fetch both again.")
    if wrong := labels[(labels < 0) | (labels >= classes)].tolist():
        raise UserError(
            f"{path} must hold labels in 0..{classes - 1}, got {wrong[0]}. Correct the labels or take a data set of more classes."
        )
    return Split(images, labels)


def _reason(error: Exception) -> str:
    """An exception in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
