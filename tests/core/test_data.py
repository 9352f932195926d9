"""Data sets: splits that never meet, statistics counted by hand, and one line for everything that can be wrong with a file."""

import gzip
from io import BytesIO
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from distprune.core import registry
from distprune.core.data.dataset import Dataset, Split, assemble, statistics
from distprune.core.data.folder import IDX, PARQUET
from distprune.errors import UserError

ENTRIES = {entry.name: entry for entry in registry.data}
MADE = {"signal_noise", "image", "gaussian_signal"}  # drawn, or one image: no labelled images are read and split
REAL = Path(__file__).parents[2].parent / "shared/data"
LINES = torch.randint(0, 256, (12, 3, 6, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))  # 12 images of 6x4


def load(name: str, **options: object) -> Dataset:
    return registry.data.choose(name, **options)()


def refused(words: list[str], name: str, **options: object) -> None:
    """Loading is a UserError of one line with all `words`."""
    with pytest.raises(UserError) as caught:
        load(name, **options)
    text = str(caught.value)
    assert "\n" not in text and all(word in text for word in words), text


def idx(array: np.ndarray, *, code: int = 8) -> bytes:
    return bytes((0, 0, code, array.ndim)) + np.array(array.shape, ">u4").tobytes() + array.astype(np.uint8).tobytes()


def write_idx(folder: Path, images: np.ndarray, labels: np.ndarray) -> Path:
    for file, array in zip(IDX, (images, labels) * 2, strict=True):
        (folder / file).write_bytes(gzip.compress(idx(array)))
    return folder


def png(image: torch.Tensor, kind: str = "PNG") -> bytes:
    """Encoded bytes of a uint8 [channels, height, width] image."""
    buffer = BytesIO()
    Image.fromarray(image.permute(1, 2, 0).squeeze(2).numpy()).save(buffer, kind)
    return buffer.getvalue()


def write_parquet(folder: Path, columns: dict[str, object]) -> Path:
    for file in PARQUET:
        pq.write_table(pa.table(columns), folder / file)
    return folder


@pytest.fixture
def grey(tmp_path):
    """A folder with IDX files of 10 + 10 images of 5x3."""
    images = np.arange(150).reshape(10, 5, 3)
    return write_idx(tmp_path, images, np.arange(10))


@pytest.fixture
def colour(tmp_path):
    """A folder with Parquet files of 12 + 12 images of 6x4."""
    return write_parquet(tmp_path, {"image": [png(image) for image in LINES], "label": [i % 10 for i in range(12)]})


def test_statistics_of_two_pixels():
    mean, std = statistics(Split(torch.tensor([[[[0]], [[51]]], [[[255]], [[51]]]], dtype=torch.uint8), torch.zeros(2, dtype=torch.int64)))
    assert mean == pytest.approx((0.5, 0.2)) and std == (0.5, 1.0)  # the constant channel is not divided by 0


def test_statistics_are_those_of_the_float_images():
    mean, std = statistics(Split(LINES, torch.zeros(12)))
    images = LINES.double() / 255
    assert mean == pytest.approx(images.mean((0, 2, 3)).tolist())
    assert std == pytest.approx(images.std((0, 2, 3), correction=0).tolist())


@pytest.mark.parametrize("name", ENTRIES)
def test_every_entry_of_labelled_images_has_the_common_options(name):
    options = ENTRIES[name].options
    assert name in MADE or {"validation", "limit", "split_seed", "augment"} <= set(options)
    assert not [option for option in options.values() if option.default is registry.REQUIRED]


def test_digits_are_split_in_three():
    digits = load("digits")
    assert (len(digits.train), len(digits.validation), len(digits.test)) == (1150, 288, 359)  # 1,797: a fifth, and a fifth of the rest
    assert digits.shape == (1, 8, 8) and digits.classes == 10
    assert digits.train.inputs.dtype == torch.uint8 and int(digits.train.inputs.max()) == 255
    assert sorted(digits.test.labels.unique().tolist()) == list(range(10))
    assert (digits.mean, digits.std) == statistics(digits.train)


def rows(split: Split) -> set[bytes]:
    return {image.numpy().tobytes() for image in split.inputs}


def test_splits_never_meet_and_the_test_split_is_fixed():
    first, again, other = load("digits"), load("digits"), load("digits", split_seed=1, validation=0.5, limit=100)
    for digits in (first, other):  # no two images of digits are equal
        train, validation, test = rows(digits.train), rows(digits.validation), rows(digits.test)
        assert not train & validation and not train & test and not validation & test
    assert torch.equal(first.train.inputs, again.train.inputs) and torch.equal(first.validation.labels, again.validation.labels)
    assert torch.equal(first.test.inputs, other.test.inputs) and rows(first.validation) != rows(other.validation)
    assert (len(other.train), len(other.validation)) == (100, 719)


def test_a_limit_takes_from_train_only():
    whole, part = load("digits"), load("digits", limit=10)
    assert torch.equal(part.train.inputs, whole.train.inputs[:10]) and torch.equal(part.validation.inputs, whole.validation.inputs)
    assert (part.mean, part.std) == statistics(part.train)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"validation": 0.0}, ["digits.validation must be in (0, 1)", "got 0.0", "write 0.1"]),
        ({"validation": 1.0}, ["digits.validation must", "got 1.0", "write 0.1"]),
        ({"validation": -0.5}, ["digits.validation must", "got -0.5", "write 0.1"]),
        ({"validation": 0.0001}, ["leave images on both sides", "got 0.0001 of 1438", "write 0.1"]),
        ({"limit": 0}, ["digits.limit must be at least 1", "got 0", "leave it out"]),
        ({"augment": "flip"}, ["'flip'", "crop_flip, none, shift"]),
    ],
)
def test_splits_that_cannot_be_made(options, words):
    refused(words, "digits", **options)


def test_idx_files_are_read_as_written(grey):
    mnist = load("mnist", folder=str(grey), validation=0.2)
    assert mnist.shape == (1, 5, 3) and (len(mnist.train), len(mnist.validation)) == (8, 2)
    assert torch.equal(mnist.test.inputs, torch.arange(150, dtype=torch.uint8).view(10, 1, 5, 3))
    assert mnist.test.labels.tolist() == list(range(10)) and mnist.test.labels.dtype == torch.int64


@pytest.mark.parametrize("struct", [False, True])
def test_parquet_round_trip(tmp_path, struct):
    images = [png(image) for image in LINES]
    column = [{"bytes": image, "path": "x.png"} for image in images] if struct else images
    cifar = load("cifar10", folder=str(write_parquet(tmp_path, {"image": column, "label": [9] * 12})))
    assert torch.equal(cifar.test.inputs, LINES) and cifar.test.labels.tolist() == [9] * 12
    assert cifar.shape == (3, 6, 4) and cifar.augment == "crop_flip"


def test_grey_and_colour_are_converted(tmp_path):
    write_parquet(tmp_path, {"image": [png(image[:1]) for image in LINES], "label": pa.array([1] * 12, pa.int8())})
    assert torch.equal(load("mnist", folder=str(tmp_path)).test.inputs, LINES[:, :1])
    assert torch.equal(load("cifar100", folder=str(tmp_path)).test.inputs, LINES[:, :1].expand(-1, 3, -1, -1))


def test_folders_are_relative_to_the_working_directory_and_home(grey, monkeypatch):
    monkeypatch.chdir(grey.parent)
    monkeypatch.setenv("HOME", str(grey.parent))
    assert len(load("mnist", folder=grey.name).test) == len(load("fashion_mnist", folder=f"~/{grey.name}").test) == 10


@pytest.mark.parametrize(
    ("name", "files"), [("mnist", (*PARQUET, *IDX)), ("fashion_mnist", (*PARQUET, *IDX)), ("cifar10", PARQUET), ("cifar100", PARQUET)]
)
def test_a_folder_without_the_files(tmp_path, name, files):
    (tmp_path / IDX[0]).touch()
    refused(
        [f"{name}.folder must hold", *files, f"got {tmp_path}, which does not hold them", "Correct folder:", "download: true"],
        name,
        folder=str(tmp_path),
    )
    refused(["got no/such, which is not a folder", "download: true"], name, folder="no/such")


def test_folder_and_download_exclude_each_other(grey):
    refused(["folder or download, got both", "Leave download out"], "mnist", folder=str(grey), download=True)


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist", "cifar10", "cifar100"])
def test_neither_folder_nor_download(tmp_path, monkeypatch, name):
    monkeypatch.setenv("HOME", str(tmp_path))
    refused([f"{name} needs folder:", "or download: true", "~/.cache/distprune/data"], name)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["fashion_mnist", "cifar100"])
def test_a_download_that_fails(tmp_path, monkeypatch, name):
    from torchvision import datasets

    def fail(self):
        raise RuntimeError("no\nnetwork")

    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(datasets.MNIST, "download", fail)
    monkeypatch.setattr(datasets.CIFAR10, "download", fail)
    refused([f"{name} could not be downloaded to {tmp_path}", "RuntimeError: no network", "write folder:"], name, download=True)


@pytest.mark.parametrize(("name", "source", "shape"), [("mnist", "MNIST", (1, 6, 4)), ("cifar10", "CIFAR10", (3, 6, 4))])
def test_torchvision_images_arrive_channels_first(monkeypatch, name, source, shape):
    from torchvision import datasets

    class Fake:
        def __init__(self, root, train, download):
            assert not download and root.name == "data"
            self.data = LINES[:, 0] if name == "mnist" else LINES.permute(0, 2, 3, 1).numpy()
            self.targets = [1] * 12

    monkeypatch.setattr(datasets, source, Fake)
    loaded = load(name)
    assert loaded.shape == shape and torch.equal(loaded.test.inputs, LINES[:, : shape[0]])


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        (IDX[0], b"", ["starts with 00000803", "got nothing"]),
        (IDX[0], b"no gzip at all", ["whole gzip file", "BadGzipFile"]),
        (IDX[1], gzip.compress(idx(np.arange(10)), mtime=0)[:-9], ["whole gzip file", "EOFError"]),
        (IDX[1], gzip.compress(idx(np.arange(10)), mtime=0)[:12] + b"\xff" * 20, ["whole gzip file"]),
        (IDX[2], gzip.compress(idx(np.zeros((10, 5, 3)), code=9), mtime=0), ["starts with 00000803", "got 00000903"]),
        (IDX[2], gzip.compress(idx(np.zeros(10)), mtime=0), ["starts with 00000803", "got 00000801"]),
        (IDX[2], gzip.compress(idx(np.zeros((10, 5, 3)))[:9], mtime=0), ["starts with 00000803"]),
        (IDX[2], gzip.compress(idx(np.zeros((10, 5, 3)))[:-1], mtime=0), ["[10, 5, 3]", "got 149 bytes"]),
        (IDX[2], gzip.compress(idx(np.zeros((10, 5, 3))) + b"x", mtime=0), ["[10, 5, 3]", "got 151 bytes"]),
        (IDX[2], gzip.compress(idx(np.zeros((0, 5, 3))), mtime=0), ["[0, 5, 3]", "got 0 bytes"]),
        (IDX[3], gzip.compress(idx(np.zeros(9)), mtime=0), ["one label for each image", "got 9 labels for 10 images"]),
    ],
)
def test_damaged_idx_files(grey, file, content, words):
    (grey / file).write_bytes(content)
    refused([str(grey / file), "must", *words, "again."], "mnist", folder=str(grey))


def test_a_class_that_an_idx_file_cannot_have(grey):
    (grey / IDX[3]).write_bytes(gzip.compress(idx(np.full(10, 10))))
    refused([str(grey / IDX[3]), "must hold labels in 0..9", "got 10", "Correct the labels"], "mnist", folder=str(grey))


def test_train_and_test_of_two_sizes(grey):
    (grey / IDX[2]).write_bytes(gzip.compress(idx(np.zeros((10, 4, 4)))))
    refused([str(grey), "one size", "got 5x3 and 4x4", "again"], "mnist", folder=str(grey))


def whole() -> bytes:
    buffer = BytesIO()
    pq.write_table(pa.table({"image": [b"x" * 1000], "label": [0]}), buffer)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "content", [b"", b"no Parquet at all", whole()[:-30], whole()[:4] + b"\xff" * 60 + whole()[64:], whole().replace(b"label", b"labe\xff")]
)
def test_damaged_parquet_files(colour, content):
    (colour / PARQUET[1]).write_bytes(content)
    refused([f"{colour / PARQUET[1]} must be a whole Parquet file, got", "Write the file again."], "cifar10", folder=str(colour))


GOOD = png(LINES[0])


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"image": [GOOD]}, ["columns image and label", "got image.", "Rename"]),
        ({"img": [GOOD], "label": [0]}, ["columns image and label", "got img, label.", "Rename"]),
        ({"image": ["text"], "label": [0]}, ["encoded images", "got string", "again"]),
        ({"image": [{"path": "x.png"}], "label": [0]}, ["encoded images", "got struct", "again"]),
        ({"image": [GOOD], "label": [0.5]}, ["whole number in every label", "got double with 0 nulls", "again"]),
        ({"image": [GOOD, GOOD], "label": [0, None]}, ["whole number in every label", "with 1 nulls", "again"]),
        ({"image": pa.array([], pa.binary()), "label": pa.array([], pa.int8())}, ["must hold images", "got none", "again"]),
        ({"image": [GOOD], "label": [10]}, ["labels in 0..9", "got 10", "Correct the labels"]),
        ({"image": [GOOD], "label": [-1]}, ["labels in 0..9", "got -1", "Correct the labels"]),
        ({"image": [GOOD, b"no image"], "label": [0, 0]}, ["whole images", "cannot be decoded in row 1", "again"]),
        ({"image": [GOOD, None], "label": [0, 0]}, ["whole images", "cannot be decoded in row 1", "again"]),
        ({"image": [GOOD[:50]], "label": [0]}, ["whole images", "cannot be decoded in row 0", "again"]),
        ({"image": [png(LINES[0], "JPEG")[:-80]], "label": [0]}, ["whole images", "cannot be decoded in row 0", "again"]),
        ({"image": [GOOD, png(LINES[0, :, :5])], "label": [0, 0]}, ["one size", "got 6x4 and, in row 1, 5x4", "Scale them"]),
    ],
)
def test_parquet_files_that_hold_the_wrong_things(colour, columns, words):
    pq.write_table(pa.table(columns), colour / PARQUET[1])
    refused([str(colour / PARQUET[1]), "must", *words], "cifar10", folder=str(colour))


def crosses(*, validation: float = 0.5) -> Dataset:
    """A user's own data set, as the docstring of dataset.py describes it."""
    split = Split(LINES, torch.arange(12) % 2)
    return assemble("crosses", split, split, classes=2, validation=validation, split_seed=0)


def test_a_users_own_data_set(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    loaded = registry.data.read({"import": f"{Path(__file__).stem}:crosses", "validation": 0.25}, "data")()
    assert (len(loaded.train), len(loaded.validation), loaded.augment) == (9, 3, "none")


def real(folder: str) -> str:
    if not (REAL / folder).is_dir():
        pytest.skip(f"{REAL / folder} is not on this machine")
    return str(REAL / folder)


@pytest.mark.parametrize(
    ("name", "folder", "mean", "std"),
    [("mnist", "mnist", 0.1307, 0.3081), ("fashion_mnist", "fashion-mnist", 0.2860, 0.3530)],  # of all 60,000, as everyone writes them
)
def test_the_real_grey_files(name, folder, mean, std):
    loaded = load(name, folder=real(folder))
    assert (len(loaded.train), len(loaded.validation), len(loaded.test), loaded.shape) == (54_000, 6_000, 10_000, (1, 28, 28))
    assert loaded.mean == pytest.approx((mean,), abs=2e-3) and loaded.std == pytest.approx((std,), abs=2e-3)
    assert sorted(loaded.train.labels.unique().tolist()) == list(range(10))


def test_the_real_colour_files(tmp_path):
    some = pq.read_table(f"{real('cifar10')}/test.parquet").slice(0, 2000)  # all 60,000 take 7 s
    for file in PARQUET:
        pq.write_table(some, tmp_path / file)
    loaded = load("cifar10", folder=str(tmp_path))
    assert (len(loaded.train), len(loaded.validation), len(loaded.test), loaded.shape) == (1800, 200, 2000, (3, 32, 32))
    assert loaded.mean == pytest.approx((0.4914, 0.4822, 0.4465), abs=2e-2)
    assert sorted(loaded.train.labels.unique().tolist()) == list(range(10))
