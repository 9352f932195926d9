"""Masks in Parquet, a bit a weight: what other programs read, and that a damaged or foreign file is refused."""

import builtins
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from distprune.core.masks import Masks
from distprune.errors import UserError


def _masks() -> Masks:
    generator = torch.Generator().manual_seed(0)
    shapes = {"conv.weight": (3, 2, 3, 3), "fc.weight": (5, 7), "scale": (), "none.weight": (0, 4), "whole.weight": (4, 8)}
    return Masks(
        {name: torch.rand(shape, generator=generator) < (2 if name.startswith("whole") else 0.4) for name, shape in shapes.items()}
    )


def _rows(path: Path) -> list[dict[str, Any]]:
    return list(pq.read_table(path).to_pylist())


def _by_hand(row: dict[str, Any]) -> Tensor:
    """As the file's description says, with numpy alone."""
    bits = np.unpackbits(np.frombuffer(row["bits"], "u1"), count=math.prod(row["shape"]))
    return torch.from_numpy(bits.astype(bool).reshape(row["shape"]))


def test_round_trip_and_what_other_programs_read(tmp_path: Path) -> None:
    masks = _masks()
    path = masks.save(tmp_path / "m.parquet", trial=3)
    loaded = Masks.load(path)
    assert loaded.equal(masks) and list(loaded) == list(masks) and {t.dtype for t in loaded.values()} == {torch.bool}
    rows = _rows(path)
    assert [(row["name"], tuple(row["shape"]), row["kept"]) for row in rows] == [
        (name, tuple(mask.shape), int(mask.sum())) for name, mask in masks.items()
    ]
    assert all(torch.equal(_by_hand(row), masks[row["name"]]) and len(row["bits"]) == -(-masks[row["name"]].numel() // 8) for row in rows)
    facts = {key.decode(): json.loads(value) for key, value in pq.read_schema(path).metadata.items()}
    assert facts["format"] == "distprune.masks/1" and facts["sparsity"] == masks.sparsity and facts["trial"] == 3
    assert facts["kept"] == masks.kept and facts["total"] == masks.total


@settings(max_examples=30, deadline=None)
@given(st.dictionaries(st.text(max_size=5), st.lists(st.booleans(), max_size=20), max_size=4))
def test_any_masks_come_back_bit_for_bit(tmp_path_factory: pytest.TempPathFactory, values: Any) -> None:
    path = tmp_path_factory.getbasetemp() / "any.parquet"
    masks = Masks({name: torch.tensor(bits, dtype=torch.bool) for name, bits in values.items()})
    assert Masks.load(masks.save(path)).equal(masks)


def test_the_content_says_which_form_a_file_has(tmp_path: Path) -> None:
    masks = _masks()
    masks.save(tmp_path / "a.parquet").rename(tmp_path / "a.masks")
    masks.save(tmp_path / "b.safetensors").rename(tmp_path / "b.parquet")
    assert Masks.load(tmp_path / "a.masks").equal(masks) and Masks.load(tmp_path / "b.parquet").equal(masks)
    large = Masks({"w": torch.rand(1000, 1000) < 0.5})
    assert large.save(tmp_path / "l.parquet").stat().st_size < large.save(tmp_path / "l.safetensors").stat().st_size / 7.5


def test_no_changed_byte_gives_other_masks(tmp_path: Path) -> None:
    """Every byte in turn: the file is refused, or what is not of the masks has changed and they are the same."""
    path, masks = tmp_path / "m.parquet", _masks()
    raw = masks.save(path).read_bytes()
    refused = 0
    for place in range(len(raw)):
        path.write_bytes(raw[:place] + bytes([raw[place] ^ 0xFF]) + raw[place + 1 :])
        try:
            assert Masks.load(path).equal(masks), place
        except UserError as error:
            assert "\n" not in str(error)
            refused += 1
    for rows in _rows_changed(raw, tmp_path):
        path.write_bytes(rows)
        with pytest.raises(UserError, match="is damaged: its rows are not those that it was written with"):
            Masks.load(path)
    for cut in (4, 20, len(raw) // 2, len(raw) - 1):
        path.write_bytes(raw[:cut])
        with pytest.raises(UserError, match="is not a readable Parquet file of masks"):
            Masks.load(path)
    assert refused > 0.2 * len(raw)


def _rows_changed(raw: bytes, folder: Path) -> list[bytes]:
    """The file with one cell of its table changed, its metadata left as it was."""
    (folder / "whole").write_bytes(raw)
    table, found = pq.read_table(folder / "whole"), []
    for column, value in (("name", "other"), ("shape", [3, 18]), ("kept", 1), ("bits", b"\0" * 7)):
        rows = table.to_pylist()
        rows[0][column] = value
        pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), folder / "changed")
        found.append((folder / "changed").read_bytes())
    pq.write_table(table.slice(1), folder / "changed")
    return [*found, (folder / "changed").read_bytes()]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            {"name": ["w"], "shape": [[3, 3]], "kept": [9], "bits": [b"\xff"]},
            r"mask 'w' of shape \(3, 3\) must have a bit a weight, got 1 by",
        ),
        ({"name": ["w"], "shape": [[3]], "kept": [2], "bits": [b"\xe0"]}, "mask 'w' must keep 2 weights as it says, got 3"),
        ({"name": ["w"], "shape": [[3]], "kept": [3], "bits": [b"\xf0"]}, "mask 'w' must keep 3 weights as it says, got 3, or bits beyond"),
        ({"name": ["w"], "shape": [[-3]], "kept": [0], "bits": [b""]}, r"mask 'w' of shape \(-3,\) must have a bit a weight"),
        ({"name": ["w", "w"], "shape": [[1], [1]], "kept": [0, 0], "bits": [b"\0", b"\0"]}, "names 'w' twice"),
        ({"name": [None], "shape": [[1]], "kept": [0], "bits": [b"\0"]}, "is damaged"),
        ({"name": ["w"], "shape": [[1]], "kept": [0]}, "is damaged"),
    ],
)
def test_a_digest_that_fits_wrong_rows_does_not_help_them(columns: dict[str, Any], message: str, tmp_path: Path) -> None:
    from distprune.core import packed

    table = pa.table(columns)
    try:
        digest = packed._digest(table.to_pylist())
    except (TypeError, KeyError):
        digest = ""
    facts = {"format": json.dumps(packed.FORMAT), "sha256": json.dumps(digest)}
    pq.write_table(table.replace_schema_metadata(facts), tmp_path / "m.parquet")
    with pytest.raises(UserError, match=message):
        Masks.load(tmp_path / "m.parquet")


def test_another_table_is_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": [b"x"], "label": [1]}), tmp_path / "train.parquet")
    with pytest.raises(UserError, match="must be a Parquet file of masks in the format distprune.masks/1, got another table"):
        Masks.load(tmp_path / "train.parquet")
    table = pa.table({"name": ["w"]}).replace_schema_metadata({"format": '"distprune.masks/9"'})
    pq.write_table(table, tmp_path / "new.parquet")
    with pytest.raises(UserError, match="got distprune.masks/9"):
        Masks.load(tmp_path / "new.parquet")


def test_without_pyarrow_it_is_said_and_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = _masks().save(tmp_path / "m.parquet")
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.split(".")[0] == "pyarrow":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    for wanted in (lambda: Masks.load(path), lambda: _masks().save(tmp_path / "n.parquet")):
        with pytest.raises(UserError, match="Masks in Parquet need pyarrow, which is not installed"):
            wanted()
    assert [file.name for file in tmp_path.iterdir()] == ["m.parquet"]
    _masks().save(tmp_path / "n.safetensors")
