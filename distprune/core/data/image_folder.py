"""A folder of your own images: one subfolder for each class, optionally below `train`, `validation` and `test`."""

import functools
import hashlib
import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from distprune.core.data.dataset import Augment, Dataset, Split, statistics
from distprune.core.registry import Choice, data
from distprune.core.streams import stream
from distprune.errors import UserError

ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".pgm", ".ppm", ".tif", ".tiff", ".webp")
SPLITS = {"train": ("train",), "validation": ("validation", "val", "valid"), "test": ("test",)}  # what their folders may be called
MOST_SIZE = 1024
MOST_THREADS = 8  # that decode
_AS_LARGE = (".bmp", ".pgm", ".ppm", ".tif", ".tiff")  # whatever their pixels are, files of these are of one size
_GREY = ("1", "L", "LA", "I;16", "I;16B", "I")  # Pillow's modes
_SCALED = ("PNG", "PPM")  # formats whose pixels Pillow scales to 16 bits where its mode is I

Colour = Literal["auto", "grey", "rgb"]


def files(choice: Choice) -> list[Path]:
    """All images below the folder of a choice, in the order of their names."""
    return _images(Path(choice.option("folder")).expanduser()) if choice.option("folder") else []


@functools.cache
def _content(root: str) -> str:
    found = [_told(path, facts, f"{root.rstrip('/')}/") for path, facts in _listed(root)]
    return hashlib.sha256(json.dumps(found).encode()).hexdigest()[:16]


def _told(path: str, facts: os.stat_result, root: str) -> list[Any]:
    told = [path.removeprefix(root), facts.st_size]
    if path.lower().endswith(_AS_LARGE):
        with open(path, "rb") as file:
            told.append(hashlib.file_digest(file, "sha256").hexdigest()[:16])
    return told


def content(choice: Choice) -> str:
    """What tells the images of a choice from others under the same path, the same on every node.

    Names and sizes; of files whose size says nothing about their pixels, a digest, too. A process looks once, as it loads them once: its
    keys are those of the images that it has, and every trial asks for them.
    """
    folder = choice.option("folder")
    return _content(os.path.abspath(os.path.expanduser(folder))) if folder else ""


@data("image_folder", files=files, content=content)
def image_folder(
    *,
    folder: str = "",
    size: int = 64,
    colour: Colour = "auto",
    validation: float = 0.1,
    test: float = 0.2,
    limit: int | None = None,
    split_seed: int = 0,
    augment: Augment = "none",
) -> Dataset:
    """Images in `folder`/CLASS/, their shorter side scaled to `size` pixels and the middle square taken.

    Classes are the names of the subfolders in order. Where they lie below `train`, `validation` and `test`, so are the splits; of
    splits that have no folder, shares `validation` and `test` of every class are drawn, `test` the same under every `split_seed`.
    With colour auto, images are grey if all are grey, else RGB. A photo is turned as its camera says, of an animation the first
    picture is taken, transparency is ignored.
    """
    if not 1 <= size <= MOST_SIZE:
        raise UserError(f"image_folder.size must be in [1, {MOST_SIZE}] pixels, got {size}. Write size: 64.")
    if limit is not None and limit < 1:
        raise UserError(f"image_folder.limit must be at least 1, got {limit}. For all images leave it out.")
    found = _look(Path(folder).expanduser(), folder)
    listed = _drawn(found, {"validation": validation, "test": test}, split_seed)
    # Classes follow each other in a list of files, and a limit is to take from all of them.
    order = torch.randperm(len(listed["train"]), generator=stream(split_seed, "image_folder/train")).tolist()
    listed["train"] = [listed["train"][index] for index in order[:limit]]
    _check_memory(sum(map(len, listed.values())), size)
    decoded = {name: _decode([path for path, _ in images], size, grey=colour == "grey") for name, images in listed.items()}
    grey = colour == "grey" or (colour == "auto" and all(all_grey for _, all_grey in decoded.values()))
    splits = {
        name: Split(
            pixels[:, :1].clone() if grey else pixels,  # the channels of a grey image are equal
            torch.tensor([label for _, label in listed[name]], dtype=torch.int64),
        )
        for name, (pixels, _) in decoded.items()
    }
    mean, std = statistics(splits["train"])
    return Dataset("image_folder", **splits, classes=len(found.classes), mean=mean, std=std, augment=augment)


@dataclass(frozen=True)
class _Found:
    """What lies in a folder."""

    classes: tuple[str, ...]
    folders: dict[str, Path]  # of the classes, in `train` where there are splits
    splits: dict[str, dict[str, list[Path]]]  # split -> class -> images; only `train` where the folder has no splits


def _images(folder: Path) -> list[Path]:
    return [Path(path) for path, _ in _listed(str(folder))]


def _listed(folder: str) -> list[tuple[str, os.stat_result]]:
    """The images below a folder with what the system says of them, sorted as text of their paths: systems list files in any order.

    Hidden ones are none, nor are links to what is not there.
    """
    found = []
    for where, below, names in os.walk(folder):
        below[:] = [name for name in below if not name.startswith(".")]
        for name in names:
            if name.lower().endswith(ENDINGS) and not name.startswith("."):
                path = os.path.join(where, name)
                with suppress(FileNotFoundError):
                    found.append((path, os.stat(path)))
    return sorted(found)


def _subfolders(folder: Path) -> dict[str, Path]:
    return {path.name: path for path in sorted(folder.iterdir()) if path.is_dir() and not path.name.startswith(".")}


def _look(root: Path, written: str) -> _Found:
    rule = "image_folder.folder must be a folder with one subfolder of images for each class"
    if not written or not root.is_dir():
        raise UserError(f"{rule}, got {written!r}, which is not a folder. Write it as seen from {Path.cwd()}: folder: photos.")
    inside = _subfolders(root)
    named = {split: name for split, names in SPLITS.items() for name in names if name in inside}
    strange = sorted(set(inside) - set(named.values()))
    if "train" not in named or (strange and len(named) == 1):  # a train may be a class of things, too
        folders, splits = inside, {"train": _classes(root, inside, rule)}
    elif strange:
        raise UserError(
            f"{root} must hold either folders of classes or of splits ({', '.join(SPLITS)}), got {', '.join(named.values())} "
            f"and {', '.join(strange)}. Move {strange[0]} elsewhere, or the classes into train."
        )
    else:
        folders = _subfolders(root / "train")
        splits = {split: _classes(root / name, _subfolders(root / name), rule) for split, name in named.items()}
    classes = tuple(splits["train"])
    for split, images in splits.items():
        for name in sorted(set(classes) ^ set(images)):
            has, lacks = (split, "train") if name in images else ("train", split)
            raise UserError(
                f"{root} must have the same classes in each split, got '{name}' in {has} and not in {lacks}. "
                f"Add the folder {name} to {lacks}, or remove it from {has}."
            )
    return _Found(classes, folders, splits)


def _classes(folder: Path, inside: dict[str, Path], rule: str) -> dict[str, list[Path]]:
    if len(inside) < 2:
        got = f"the one class {next(iter(inside))}" if inside else "no subfolder"
        ways = f"{folder.name}/cats/, {folder.name}/dogs/"
        raise UserError(f"{rule}, got {got} in {folder}. Sort the images into two or more: {ways}.")
    found = {name: _images(path) for name, path in inside.items()}
    for name, images in found.items():
        if not images:
            raise UserError(f"{inside[name]} must hold images ({', '.join(ENDINGS)}), got none. Put some there, or remove the folder.")
    return found


def _drawn(found: _Found, shares: dict[str, float], seed: int) -> dict[str, list[tuple[Path, int]]]:
    """Split -> its images with their classes; a split without a folder gets its share of each class of `train`, one at least."""
    drawn = {split: share for split, share in shares.items() if split not in found.splits}
    for split, share in drawn.items():
        if not 0 < share < 1:
            raise UserError(f"image_folder.{split} must be a share in (0, 1), got {share}. To hold out a tenth write 0.1.")
    if (held := sum(drawn.values())) >= 1:
        raise UserError(f"image_folder.validation and test must leave images for train, got {held:g} together. Write 0.1 and 0.2.")
    listed: dict[str, list[tuple[Path, int]]] = {"train": [], "validation": [], "test": []}
    for label, name in enumerate(found.classes):
        for split in found.splits.keys() - {"train"}:
            listed[split] += [(path, label) for path in found.splits[split][name]]
        images = found.splits["train"][name]
        if len(images) <= len(drawn):
            raise UserError(
                f"{found.folders[name]} must hold at least {len(drawn) + 1} images, one each for {' and '.join(['train', *drawn])}, got "
                f"{len(images)}. Add some, or remove the folder."
            )
        left, wanted = images, [split for split in ("test", "validation") if split in drawn]
        for index, split in enumerate(wanted):
            order = _shuffled(left, 0 if split == "test" else seed, f"{split}/{name}")  # test is the same under every seed
            count = min(max(round(len(images) * shares[split]), 1), len(left) - len(wanted[index:]))
            listed[split] += [(path, label) for path in sorted(order[:count])]
            left = sorted(order[count:])
        listed["train"] += [(path, label) for path in left]
    return listed


def _shuffled(images: list[Path], seed: int, purpose: str) -> list[Path]:
    order = torch.randperm(len(images), generator=stream(seed, f"image_folder/{purpose}"))
    return [images[index] for index in order.tolist()]


def _check_memory(images: int, size: int) -> None:
    """Raise UserError for more than half of the machine's memory, which would take it down."""
    needs, has = images * 3 * size**2, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needs > has / 2:
        raise UserError(
            f"image_folder decodes to at most half of this machine's memory, {has / 2e9:.1f} GB, got {images:,} images of {size} pixels, "
            f"which take {needs / 1e9:.1f} GB. Write a smaller size, or a limit."
        )


def _decode(paths: list[Path], size: int, *, grey: bool) -> tuple[Tensor, bool]:
    """(uint8 [n, 3, size, size], whether all were grey). Raises UserError naming the first file that cannot be read."""
    pixels, found = torch.empty(len(paths), 3, size, size, dtype=torch.uint8), []
    with ThreadPoolExecutor(min(MOST_THREADS, os.cpu_count() or 1)) as pool:  # Pillow decodes outside of Python's lock
        for index, (image, was_grey) in enumerate(pool.map(_reader(size, grey), paths)):
            pixels[index] = torch.from_numpy(image).permute(2, 0, 1)
            found.append(was_grey)
    return pixels, all(found)


def _reader(size: int, grey: bool) -> Callable[[Path], tuple[Any, bool]]:
    from PIL import Image, ImageOps

    def read(path: Path) -> tuple[Any, bool]:
        """(bytes [size, size, 3], whether the file is grey)."""
        try:
            with Image.open(path) as file:
                was_grey = file.mode in _GREY
                file.draft(None, (2 * size, 2 * size))  # a photo need not be decoded in full
                image: Any = ImageOps.exif_transpose(file)
                if image.mode == "F" or (image.mode == "I" and file.format not in _SCALED):
                    raise ValueError(f"pixels of mode {image.mode} have no known range; save it with 8 or 16 bits")
                if image.mode.startswith("I"):  # Pillow's conversion would clip
                    image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
                image = (image.convert("L") if grey else image).convert("RGB")
        except Exception as error:  # Pillow raises a different kind for each way to be broken
            why = " ".join(str(error).replace(repr(str(path)), "it").split()).rstrip(".") or type(error).__name__
            raise UserError(f"{path} must be a whole image, got one that cannot be read: {why}. Replace it, or remove it.") from error
        edge = min(image.size)
        left, top = ((side - edge) // 2 for side in image.size)
        square = image.crop((left, top, left + edge, top + edge)).resize((size, size), Image.Resampling.BILINEAR)
        return np.array(square), was_grey

    return read
