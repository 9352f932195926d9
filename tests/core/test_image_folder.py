"""A folder of one's own images: splits that keep every class's share, pixels as torchvision has them, and one line for what is wrong."""

import os
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from distprune.core import registry
from distprune.core.data import image_folder as module
from distprune.core.data.dataset import Dataset, Split, statistics
from distprune.core.recipe import Recipe
from distprune.core.run import root_key
from distprune.errors import UserError
from distprune.store.datasets import SharedData


def load(folder: Path | str, **options: object) -> Dataset:
    return registry.data.choose("image_folder", folder=str(folder), **options)()


def refused(words: list[str], folder: Path | str, **options: object) -> None:
    """Loading is a UserError of one line with all `words`."""
    with pytest.raises(UserError) as caught:
        load(folder, **options)
    text = str(caught.value)
    assert "\n" not in text and all(word in text for word in words), text


def picture(number: int, *, high: int = 6, wide: int = 6, mode: str = "RGB") -> Image.Image:
    """An image that no other number has."""
    pixels = np.random.default_rng(number).integers(0, 256, (high, wide, 3), np.uint8)
    return Image.fromarray(pixels).convert(mode)


def fill(folder: Path, counts: dict[str, int], *, start: int = 0, **kind: object) -> Path:
    """Folders of classes with so many PNG images each."""
    for name, count in counts.items():
        (folder / name).mkdir(parents=True)
        for index in range(count):
            picture(start, **kind).save(folder / name / f"{index:03}.png")  # type: ignore[arg-type]
            start += 1
    return folder


def rows(split: Split) -> set[bytes]:
    return {image.numpy().tobytes() for image in split.inputs}


def labels(split: Split) -> dict[int, int]:
    return dict(sorted(Counter(split.labels.tolist()).items()))


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """40 cats, 20 dogs and 10 owls."""
    return fill(tmp_path / "photos", {"cats": 40, "dogs": 20, "owls": 10})


def test_each_class_is_shared_out_alike(photos: Path) -> None:
    loaded = load(photos, size=6, validation=0.1, test=0.2)
    assert (labels(loaded.test), labels(loaded.validation)) == ({0: 8, 1: 4, 2: 2}, {0: 4, 1: 2, 2: 1})
    assert labels(loaded.train) == {0: 28, 1: 14, 2: 7} and loaded.classes == 3
    splits = [rows(loaded.train), rows(loaded.validation), rows(loaded.test)]
    assert len(set.union(*splits)) == sum(map(len, splits)) == 70, "no image is in two splits, and none is lost"
    assert (loaded.mean, loaded.std) == statistics(loaded.train)


def test_the_test_split_is_the_same_under_every_seed(photos: Path) -> None:
    first, again, other = load(photos, size=6), load(photos, size=6), load(photos, size=6, split_seed=1)
    assert all(torch.equal(getattr(first, name).inputs, getattr(again, name).inputs) for name in ("train", "validation", "test"))
    assert torch.equal(first.test.inputs, other.test.inputs) and rows(first.validation) != rows(other.validation)
    assert not rows(other.validation) & rows(first.test)


def test_the_order_in_which_the_system_lists_files_does_not_matter(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, walk, listed = load(photos, size=6), os.walk, Path.iterdir

    def backwards(top: Path):  # type: ignore[no-untyped-def]
        for where, below, names in walk(top):
            yield where, below, sorted(names, reverse=True)

    monkeypatch.setattr(os, "walk", backwards)
    monkeypatch.setattr(Path, "iterdir", lambda self: iter(sorted(listed(self), reverse=True)))
    again = load(photos, size=6)
    assert torch.equal(first.train.inputs, again.train.inputs) and torch.equal(first.train.labels, again.train.labels)


def test_folders_of_splits_are_the_splits(tmp_path: Path) -> None:
    for number, split in enumerate(("train", "val", "test")):
        fill(tmp_path / split, {"b": 3, "a": 2}, start=100 * number)
    loaded = load(tmp_path, size=6)
    assert labels(loaded.train) == labels(loaded.validation) == labels(loaded.test) == {0: 2, 1: 3}, "a is the first class"
    expected = {np.asarray(picture(200 + index)).transpose(2, 0, 1).tobytes() for index in range(5)}
    assert rows(loaded.test) == expected


def test_splits_without_a_folder_are_drawn_from_train(tmp_path: Path) -> None:
    fill(tmp_path / "train", {"a": 20, "b": 10})
    fill(tmp_path / "test", {"a": 3, "b": 1}, start=100)
    loaded = load(tmp_path, size=6, validation=0.1)
    assert [labels(split) for split in (loaded.train, loaded.validation, loaded.test)] == [{0: 18, 1: 9}, {0: 2, 1: 1}, {0: 3, 1: 1}]


def test_train_may_be_a_class(tmp_path: Path) -> None:
    fill(tmp_path, {"bus": 4, "train": 5})
    loaded = load(tmp_path, size=6)
    assert loaded.classes == 2 and len(rows(loaded.train) | rows(loaded.validation) | rows(loaded.test)) == 9


def test_the_middle_square_is_scaled_as_torchvision_does(tmp_path: Path) -> None:
    from torchvision.transforms import functional as reference

    fill(tmp_path, {"a": 4, "b": 4}, high=40, wide=61)
    found = rows(load(tmp_path, size=16).train)
    squares = [reference.resize(reference.center_crop(picture(number, high=40, wide=61), [40, 40]), [16, 16]) for number in range(8)]
    assert len(found) == 4 and found <= {reference.pil_to_tensor(square).numpy().tobytes() for square in squares}


def test_a_large_jpeg_is_decoded_in_part_to_nearly_the_same(tmp_path: Path) -> None:
    ramp = np.linspace(0, 255, 800).astype(np.uint8)
    smooth = Image.fromarray(np.stack([np.tile(ramp, (640, 1)), np.tile(ramp[:640, None], (1, 800)), np.full((640, 800), 90, np.uint8)], 2))
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for index in range(3):
            smooth.save(tmp_path / name / f"{index}.jpeg", quality=95)
            smooth.save(tmp_path / name / f"{index}.png")
    images = load(tmp_path, size=32).train.inputs.float()
    assert len(images) == 8 and float((images - images[0]).abs().max()) <= 3, "JPEG and PNG in one split"


def test_kinds_of_files_and_depths(tmp_path: Path) -> None:
    fill(tmp_path, {"a": 3, "b": 3})
    (tmp_path / "b" / "deep" / "er").mkdir(parents=True)
    for number, name in enumerate(("x.BMP", "x.webp", "x.tif", "x.gif")):
        picture(50 + number).save(tmp_path / "b" / "deep" / "er" / name, lossless=True)
    for other in ("notes.txt", ".hidden.png", "._0.png"):
        (tmp_path / "a" / other).write_text("no image")
    (tmp_path / ".cache").mkdir()
    loaded = load(tmp_path, size=6)
    assert Counter(labels(loaded.train)) + Counter(labels(loaded.validation)) + Counter(labels(loaded.test)) == {0: 3, 1: 7}
    first = np.asarray(picture(50)).transpose(2, 0, 1).tobytes()
    assert first in rows(loaded.train) | rows(loaded.validation) | rows(loaded.test), "a bitmap deep in b"


def test_a_photo_is_turned_as_its_camera_says(tmp_path: Path) -> None:
    fill(tmp_path, {"a": 3, "b": 3})
    turned = Image.Exif()
    turned[0x0112] = 3  # by half a turn
    for path in (tmp_path / "a").iterdir():
        picture(7).save(path, exif=turned)
    image = load(tmp_path, size=6).train.inputs[load(tmp_path, size=6).train.labels == 0][0]
    assert np.array_equal(image.permute(1, 2, 0).numpy(), np.asarray(picture(7))[::-1, ::-1])


def test_grey_and_colour(tmp_path: Path) -> None:
    grey = fill(tmp_path / "grey", {"a": 3, "b": 3}, mode="L")
    assert load(grey, size=6).shape == (1, 6, 6) and load(grey, size=6, colour="rgb").shape == (3, 6, 6)
    assert load(grey, size=6).train.inputs.numpy().tobytes() in {
        (np.asarray(picture(i, mode="L")).tobytes() + np.asarray(picture(j, mode="L")).tobytes()) for i in range(6) for j in range(6)
    }
    mixed = fill(tmp_path / "mixed", {"a": 3}, mode="L")
    fill(mixed, {"b": 3}, start=10)
    loaded = load(mixed, size=6)
    of_a = loaded.train.inputs[loaded.train.labels == 0]
    assert loaded.shape == (3, 6, 6) and torch.equal(of_a[:, :1].expand(-1, 3, -1, -1), of_a)
    both = load(mixed, size=6, colour="grey")
    assert both.shape == (1, 6, 6)
    of_b = both.train.inputs[both.train.labels == 1][0, 0].numpy().tobytes()
    assert of_b in {np.asarray(picture(10 + index).convert("L")).tobytes() for index in range(3)}


@pytest.mark.parametrize("mode", ["P", "RGBA", "CMYK"])
def test_other_kinds_of_colour_are_colour(tmp_path: Path, mode: str) -> None:
    fill(tmp_path, {"a": 3, "b": 3})
    for path in sorted(tmp_path.rglob("*.png")):
        picture(3).convert(mode).save(path.with_suffix(".tif"))
        path.unlink()
    loaded = load(tmp_path, size=6)
    assert loaded.shape == (3, 6, 6)
    assert np.array_equal(loaded.train.inputs[0].permute(1, 2, 0).numpy(), np.asarray(picture(3).convert(mode).convert("RGB")))


def test_sixteen_bits_become_eight_and_are_not_clipped(tmp_path: Path) -> None:
    fill(tmp_path, {"a": 3, "b": 3}, mode="L")
    deep = np.arange(36, dtype=np.uint16).reshape(6, 6) * 1800
    for path in tmp_path.rglob("*.png"):
        Image.fromarray(deep).save(path)
    assert np.array_equal(load(tmp_path, size=6).train.inputs[0, 0].numpy(), deep // 256)


def test_a_deep_pgm_is_as_a_deep_png(tmp_path: Path) -> None:
    deep = np.arange(36, dtype=np.uint16).reshape(6, 6) * 1800
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for index in range(3):
            (tmp_path / name / f"{index}.pgm").write_bytes(b"P5 6 6 65535\n" + deep.astype(">u2").tobytes())
    loaded = load(tmp_path, size=6)
    assert loaded.shape == (1, 6, 6) and np.array_equal(loaded.train.inputs[0, 0].numpy(), deep // 256)


@pytest.mark.parametrize("kind", [np.float32, np.int32])
@pytest.mark.parametrize("most", [1, 255, 60_000, 2**30])
def test_pixels_of_unknown_range_are_refused(photos: Path, kind: type, most: int) -> None:
    path = photos / "dogs" / "flat.tif"
    Image.fromarray(np.linspace(0, most, 36).reshape(6, 6).astype(kind)).save(path)
    refused([f"{path} must be a whole image", "have no known range; save it with 8 or 16 bits"], photos, size=6)


def test_a_limit_takes_from_all_classes_of_train_alone(photos: Path) -> None:
    whole, part = load(photos, size=6), load(photos, size=6, limit=20)
    assert torch.equal(part.train.inputs, whole.train.inputs[:20]) and set(labels(part.train)) == {0, 1, 2}
    assert torch.equal(part.validation.inputs, whole.validation.inputs) and (part.mean, part.std) == statistics(part.train)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"size": 0}, ["image_folder.size must be in [1, 1024] pixels", "got 0", "size: 64"]),
        ({"size": 5000}, ["image_folder.size must", "got 5000", "size: 64"]),
        ({"limit": 0}, ["image_folder.limit must be at least 1", "got 0", "leave it out"]),
        ({"validation": 0.0}, ["image_folder.validation must be a share in (0, 1)", "got 0.0", "write 0.1"]),
        ({"test": 1.0}, ["image_folder.test must be a share", "got 1.0", "write 0.1"]),
        ({"validation": 0.5, "test": 0.5}, ["must leave images for train", "got 1 together", "Write 0.1 and 0.2"]),
        ({"colour": "blue"}, ["'blue'", "auto, grey, rgb"]),
    ],
)
def test_options_that_make_no_sense(photos: Path, options: dict[str, object], words: list[str]) -> None:
    refused(words, photos, **options)


def test_folders_that_hold_no_classes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rule = "image_folder.folder must be a folder with one subfolder of images for each class"
    monkeypatch.chdir(tmp_path)
    refused([rule, "got 'photo', which is not a folder", f"as seen from {tmp_path}", "folder: photos"], "photo")
    refused([rule, "got ''", "folder: photos"], "")
    (tmp_path / "photos").mkdir()
    picture(0).save(tmp_path / "photos" / "0.png")
    refused([rule, "got no subfolder in photos", "photos/cats/, photos/dogs/"], "photos")
    fill(tmp_path / "photos", {"cats": 3})
    refused([rule, "got the one class cats in photos", "Sort the images into two or more"], "photos")
    (tmp_path / "photos" / "dogs").mkdir()
    (tmp_path / "photos" / "dogs" / "about.txt").write_text("none yet")
    refused(["photos/dogs must hold images (.jpg, ", "got none", "Put some there, or remove the folder"], "photos")
    fill(tmp_path / "photos" / "dogs", {"puppies": 2})
    refused(["photos/dogs must hold at least 3 images, one each for train", "got 2", "Add some, or remove the folder"], "photos")


def test_splits_that_do_not_fit_together(tmp_path: Path) -> None:
    fill(tmp_path / "train", {"a": 3, "b": 3})
    fill(tmp_path / "test", {"a": 1, "b": 1, "c": 1})
    refused(["the same classes in each split", "got 'c' in test and not in train", "remove it from test"], tmp_path)
    shutil.rmtree(tmp_path / "test" / "b")
    shutil.rmtree(tmp_path / "test" / "c")
    fill(tmp_path / "test", {"d": 1})
    refused(["got 'b' in train and not in test"], tmp_path)
    shutil.rmtree(tmp_path / "test")
    fill(tmp_path / "val", {"a": 1, "b": 1})
    fill(tmp_path / "labels", {"x": 1})
    refused(["either folders of classes or of splits (train, validation, test)", "got train, val and labels", "Move labels"], tmp_path)


@pytest.mark.parametrize("content", [b"", b"no image at all", b"cut"])
def test_a_file_that_cannot_be_read_is_named(photos: Path, content: bytes) -> None:
    path = photos / "dogs" / "007.png"
    path.write_bytes(path.read_bytes()[:60] if content == b"cut" else content)
    refused([f"{path} must be a whole image, got one that cannot be read", "Replace it, or remove it."], photos)


def test_more_than_the_machine_can_hold(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.os, "sysconf", lambda name: 100 if name == "SC_PAGE_SIZE" else 50)
    refused(["at most half of this machine's memory, 0.0 GB", "got 70 images of 64 pixels", "Write a smaller size, or a limit"], photos)
    assert len(load(photos, size=1).train) == 49, "210 bytes of 5000"


def recipe(folder: Path) -> Recipe:
    return Recipe.read({"model": "lenet5", "data": {"name": "image_folder", "folder": str(folder)}, "paradigm": "dense"})


def key_of(folder: Path) -> str:
    """In a new process, which has looked at nothing yet."""
    module._content.cache_clear()
    return root_key(recipe(folder), torch.device("cpu"))


def test_a_process_looks_at_its_images_once_for_all_keys(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = key_of(photos)
    monkeypatch.setattr(module, "_listed", lambda root: pytest.fail("each trial has keys, and a folder may have a million files"))
    assert root_key(recipe(photos), torch.device("cpu")) == first


def test_other_images_are_other_keys(photos: Path) -> None:
    def key() -> str:
        return key_of(photos)

    first = key()
    (photos / "cats" / "000.png").touch()
    assert key() == first, "the same images at another time, or on another node"
    (photos / "cats" / "000.png").rename(photos / "cats" / "999.png")
    renamed = key()
    picture(99).save(photos / "owls" / "999.png")
    assert len({first, renamed, key()}) == 3
    added = key()
    (photos / "cats" / "gone.png").symlink_to(photos / "nowhere.png")
    assert key() == added and len(load(photos, size=6).train), "a link to nothing is no image"


@pytest.mark.parametrize("ending", ["bmp", "pgm", "PPM", "tif", "tiff"])
def test_other_pixels_in_a_file_of_the_same_size_are_another_key(photos: Path, ending: str) -> None:
    path = photos / "owls" / f"x.{ending}"
    mode = "L" if ending == "pgm" else "RGB"

    def written(number: int, second: int) -> str:
        picture(number, mode=mode).save(path)
        os.utime(path, (second, second))
        return key_of(photos)

    first, size = written(1, 1), path.stat().st_size
    other = written(2, 2)
    assert path.stat().st_size == size and other != first and written(1, 3) == first


def test_images_are_decoded_once_a_node(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISTPRUNE_NODE_CACHE", str(tmp_path / "node"))
    choice = registry.data.choose("image_folder", folder=str(photos), size=6)
    decoded = []

    def make() -> Dataset:
        decoded.append(1)
        return choice()

    def one() -> Dataset:
        return SharedData()(choice, make)

    first, second = one(), one()
    assert (
        len(decoded) == 1 and torch.equal(first.train.inputs, second.train.inputs) and (first.mean, first.std) == (second.mean, second.std)
    )
    picture(99).save(photos / "cats" / "000.png")
    changed = one()
    found, before = (rows(data.train) | rows(data.validation) | rows(data.test) for data in (changed, first))
    assert len(decoded) == 2 and len(found - before) == len(before - found) == 1, "an image that is changed in place is seen"
