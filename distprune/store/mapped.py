"""A data set as files that processes map: a folder with a manifest and each tensor's raw numbers in a file of its own.

A file begins on a page, so that what is computed from it has the bits that it has from memory. A mapping is private: who writes into a
tensor writes into pages of its own process.
"""

import fcntl
import json
import os
import shutil
import time
import uuid
import zlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distprune.core.data.dataset import Dataset, Split
from distprune.store.files import free_bytes

MANIFEST = "manifest.json"
SPARE = 10**9  # bytes that are left free on the disk
OLD_S, OLD_OWN_S = 3 * 86400.0, 3600.0  # unused, after which a data set is removed; one that only its own search could use
_DTYPES = {
    str(dtype): dtype
    for dtype in (
        torch.uint8,
        torch.int8,
        torch.int16,
        torch.int32,
        torch.int64,
        torch.float16,
        torch.bfloat16,
        torch.float32,
        torch.float64,
    )
}
_SPLITS = ("train", "validation", "test")
_CHUNK = 2**24


class NotShared(Exception):
    """A data set of a kind that cannot be, or no room for it."""


def write_dataset(entry: Path, dataset: Dataset, facts: dict[str, Any]) -> None:
    """Make the folder `entry`, whole or not at all; `facts` are kept beside it. Raises OSError, and NotShared."""
    tensors, splits = _tensors(dataset)
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    if free_bytes(entry.parent) < size + SPARE:
        raise NotShared("the disk is nearly full")
    aside = entry.with_name(f".{entry.name}.{uuid.uuid4().hex[:8]}")
    try:
        aside.mkdir(mode=0o700)
        manifest = {
            **facts,
            "name": dataset.name,
            "classes": dataset.classes,
            "mean": list(dataset.mean),
            "std": list(dataset.std),
            "augment": dataset.augment,
            "splits": splits,
            "tensors": [_write_tensor(aside / f"{index}.bin", tensor) for index, tensor in enumerate(tensors)],
        }
        _write(aside / MANIFEST, [json.dumps(manifest).encode()])
        aside.rename(entry)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def _tensors(dataset: Dataset) -> tuple[list[Tensor], dict[str, list[int]]]:
    """Its tensors, each once, and which of them are inputs and labels of which split."""
    if type(dataset) is not Dataset or any(type(getattr(dataset, name)) is not Split for name in _SPLITS):
        raise NotShared("it is more than a Dataset of Splits")
    found: list[Tensor] = []
    splits: dict[str, list[int]] = {}
    for name in _SPLITS:
        split = getattr(dataset, name)
        for tensor in (split.inputs, split.labels):
            plain = type(tensor) is Tensor and tensor.device.type == "cpu" and tensor.layout == torch.strided
            if not plain or tensor.requires_grad or str(tensor.dtype) not in _DTYPES:
                raise NotShared("its tensors are not plain")
            index = next((index for index, other in enumerate(found) if other is tensor), len(found))
            found += [tensor] if index == len(found) else []
            splits.setdefault(name, []).append(index)
    return found, splits


def _write_tensor(path: Path, tensor: Tensor) -> dict[str, Any]:
    array: Any = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    numbers = memoryview(array)
    parts = [numbers[start : start + _CHUNK] for start in range(0, len(numbers), _CHUNK)]
    checksum = 0
    for part in parts:
        checksum = zlib.crc32(part, checksum)
    changed = _write(path, parts)
    kind = {"dtype": str(tensor.dtype), "shape": list(tensor.shape)}
    return {**kind, "size": len(numbers), "checksum": checksum, "changed": changed}


def _write(path: Path, parts: list[Any]) -> int:
    """Write a file through to the disk; returns the time of its last change."""
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb", buffering=0) as file:
        for part in parts:
            view = memoryview(part)
            while view:
                view = view[file.write(view) :]
        os.fsync(file.fileno())
        return os.fstat(file.fileno()).st_mtime_ns


def open_dataset(entry: Path) -> tuple[Dataset, int] | None:
    """The data set in `entry`, mapped, and an open file that keeps it from being removed; None if there is none, or a damaged one.

    Sizes and times are looked at each time. Where a time has changed, all is read and compared with the checksum.
    """
    try:
        held = os.open(entry / MANIFEST, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(held, fcntl.LOCK_SH | fcntl.LOCK_NB)
        with open(held, "rb", closefd=False) as file:
            manifest = json.load(file)
        tensors = [_map(entry / f"{index}.bin", facts) for index, facts in enumerate(manifest["tensors"])]
        splits = {name: Split(*(tensors[index] for index in manifest["splits"][name])) for name in _SPLITS}
        os.utime(held)  # it was used
        made = Dataset(
            name=str(manifest["name"]),
            **splits,
            classes=int(manifest["classes"]),
            mean=tuple(manifest["mean"]),
            std=tuple(manifest["std"]),
            augment=str(manifest["augment"]),
        )
        return made, held
    except (OSError, ValueError, KeyError, TypeError, IndexError, RuntimeError):  # removed just now, or damaged
        os.close(held)
        return None


def _map(path: Path, facts: dict[str, Any]) -> Tensor:
    now, dtype, shape = path.stat(), _DTYPES[facts["dtype"]], [int(side) for side in facts["shape"]]
    numbers = int(facts["size"]) // dtype.itemsize
    if now.st_size != facts["size"]:
        raise ValueError(f"{path} has another size than it was written with")
    if now.st_mtime_ns != facts["changed"]:
        with open(path, "rb") as file:
            checksum = 0
            while part := file.read(_CHUNK):
                checksum = zlib.crc32(part, checksum)
        if checksum != facts["checksum"]:
            raise ValueError(f"{path} has other numbers than it was written with")
    if not numbers:
        return torch.empty(shape, dtype=dtype)
    return torch.from_file(str(path), shared=False, size=numbers, dtype=dtype).view(shape)


def remove_unused(folder: Path, key: str) -> None:
    """Remove what no process has mapped and nobody has asked for in days, and what producers of `key` who died have left."""
    for unfinished in folder.glob(".*"):
        if unfinished.name.startswith(f".{key}.") or _age(unfinished) > OLD_S:  # only the caller may produce that one now
            shutil.rmtree(unfinished, ignore_errors=True)
    for entry in folder.glob("*"):
        try:
            held = os.open(entry / MANIFEST, os.O_RDONLY)
        except OSError:  # the locks
            continue
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if entry.name == key or _age(entry / MANIFEST) > (OLD_OWN_S if _is_own(held) else OLD_S):
                gone = entry.with_name(f".{entry.name}.{uuid.uuid4().hex[:8]}")
                entry.rename(gone)
                shutil.rmtree(gone, ignore_errors=True)
        except OSError:  # in use
            continue
        finally:
            os.close(held)


def _age(path: Path) -> float:
    return time.time() - path.lstat().st_mtime


def _is_own(manifest: int) -> bool:
    try:
        return bool(json.loads(os.read(manifest, 2**20))["own"])
    except (ValueError, KeyError, TypeError):
        return True
