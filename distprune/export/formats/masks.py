"""Masks alone, as bool tensors and as a table with a bit a weight."""

from pathlib import Path

from distprune.core.masks import Masks
from distprune.export.source import Source, Written
from distprune.export.tables import format


@format("masks", always=True)
def masks(source: Source, folder: Path) -> Written:
    """The masks: bool tensors (safetensors), and a bit a weight in a table that pandas, polars and duckdb read (Parquet)."""
    files = ("masks.safetensors", "masks.parquet")
    for name in files:
        source.masks.save(folder / name)
        if not Masks.load(folder / name).equal(source.masks):
            raise RuntimeError(f"{name} holds other masks than the trial.")
    return Written(files=files, facts={"exact": True})
