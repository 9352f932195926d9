"""Masks as a Parquet file, a bit a weight: a row a layer, which pandas, polars and duckdb read.

    name   string        of the weight, as in the network
    shape  list<int64>   of the weight
    kept   int64         bits that are set
    bits   binary        True = kept, in row-major order, the first in the highest bit of the first byte, the last byte filled up with zeros

The schema's metadata holds JSON by key: format, sparsity, kept, total, sha256 (of all rows) and what the caller adds. A row is a mask by
`numpy.unpackbits(numpy.frombuffer(bits, "u1"), count=prod(shape)).astype(bool).reshape(shape)`.
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distprune.errors import UserError

FORMAT = "distprune.masks/1"
MAGIC = b"PAR1"
_Row = dict[str, Any]


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:  # core runs where only torch is installed
        raise UserError('Masks in Parquet need pyarrow, which is not installed. pip install "pyarrow>=21", or use .safetensors.') from error
    return pyarrow, pyarrow.parquet


def write(path: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, str]) -> None:
    """Write bool tensors; `facts` go into the metadata beside the digest. Raises UserError if pyarrow is not installed."""
    pa, pq = _pyarrow()
    rows = [_packed(name, tensor) for name, tensor in tensors.items()]
    fields = [("name", pa.string()), ("shape", pa.list_(pa.int64())), ("kept", pa.int64()), ("bits", pa.binary())]
    schema = pa.schema([pa.field(name, kind, nullable=False) for name, kind in fields])
    table = pa.Table.from_pylist(rows, schema=schema.with_metadata({**facts, "sha256": json.dumps(_digest(rows))}))
    pq.write_table(table, str(path), compression="zstd", use_dictionary=False, write_statistics=False)


def read(path: Path) -> dict[str, Tensor]:
    """The bool tensors of a file that `write` wrote. Raises UserError if it is another one, or is damaged."""
    pa, pq = _pyarrow()
    try:
        with pq.ParquetFile(str(path)) as file:
            found = {key.decode(): value.decode() for key, value in (file.schema_arrow.metadata or {}).items()}
            rows = file.read().to_pylist()
        form, digest = json.loads(found.get("format", "null")), json.loads(found.get("sha256", "null"))
    except (pa.ArrowException, OSError, ValueError) as error:  # ValueError: metadata that is not UTF-8 or JSON
        raise UserError(f"{path} is not a readable Parquet file of masks: {' '.join(str(error).split())}. Write it again.") from error
    if form != FORMAT:
        raise UserError(f"{path} must be a Parquet file of masks in the format {FORMAT}, got {form or 'another table'}. Save masks to it.")
    if not all(map(_is_row, rows)) or _digest(rows) != digest:
        raise UserError(f"{path} is damaged: its rows are not those that it was written with. Copy or write it again.")
    found = {row["name"]: _unpacked(path, row) for row in rows}
    if len(found) < len(rows):
        twice = next(name for name in found if sum(row["name"] == name for row in rows) > 1)
        raise UserError(f"{path} names '{twice}' twice, and must have a row a layer. Write it again.")
    return found


def _is_row(row: _Row) -> bool:
    kinds = {name: type(value) for name, value in row.items()}
    return kinds == {"name": str, "shape": list, "kept": int, "bits": bytes} and all(type(size) is int for size in row["shape"])


def _packed(name: str, tensor: Tensor) -> _Row:
    bits = np.packbits(tensor.detach().cpu().numpy().reshape(-1)).tobytes()
    return {"name": name, "shape": list(tensor.shape), "kept": int(tensor.sum()), "bits": bits}


def _unpacked(path: Path, row: _Row) -> Tensor:
    """[*shape], bool. The digest only says that the rows are as written: another program may have written them wrong."""
    shape, count = row["shape"], math.prod(row["shape"])
    raw = np.frombuffer(row["bits"], np.uint8)
    if min(shape, default=0) < 0 or len(raw) != -(-count // 8):
        raise UserError(
            f"{path}: mask '{row['name']}' of shape {tuple(shape)} must have a bit a weight, got {len(raw)} bytes. Write it again."
        )
    bits = np.unpackbits(raw)
    if (found := int(bits[:count].sum())) != row["kept"] or bits[count:].any():
        extra = ", or bits beyond its shape" if found == row["kept"] else ""
        raise UserError(f"{path}: mask '{row['name']}' must keep {row['kept']} weights as it says, got {found}{extra}. Write it again.")
    return torch.from_numpy(bits[:count].astype(bool)).reshape(shape)


def _digest(rows: Sequence[_Row]) -> str:
    """sha256 over a line of JSON a row, and its bits."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps([row["name"], row["shape"], row["kept"], len(row["bits"])]).encode() + b"\n" + row["bits"])
    return digest.hexdigest()
