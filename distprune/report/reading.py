"""What lies in a run folder beside the table of trials: reports, sanity checks, and signs of life."""

import json
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from distprune.store import reports as stream
from distprune.store.folder import RunFolder

_PATIENCE_S = 900.0  # a search whose driver cannot be asked runs if its files changed this lately
_MOST_JSON = 10_000_000  # bytes of a file that may be one of sanity checks

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Curve:
    """The reports of one trial in order, as columns; NaN for what was not measured."""

    cost: Floats  # billed samples
    objective: Floats
    score: Floats  # of the network projected onto its final budget: at rungs and at the end
    rung: npt.NDArray[np.int64]  # highest rung crossed, -1 for none


def signs_of_life(folder: RunFolder, table: pa.Table) -> tuple[bool, float | None]:
    """Whether a driver is at work on a search, as far as its files say, and for how long one that cannot be asked has written nothing (s).

    The second is None where the driver can be asked, or has ended the search; infinite where there is no trace of it.
    """
    if driven := folder.is_driven:
        return True, None
    stream_there, closed = folder.reports.exists(), folder.reports_parquet.exists()
    if folder.url:  # files of a copy are as old as the copy
        if closed and "running" not in table["ended"].to_pylist():
            return False, None
    elif closed and not (stream_there and folder.reports.stat().st_mtime > folder.reports_parquet.stat().st_mtime):
        return False, None
    if driven is False:
        return False, None
    # Perhaps on another machine. Of a copy, the table alone has kept its time.
    files = [folder.trials] if folder.url else [folder.trials, folder.reports, folder.search_yaml]
    silent = time.time() - max((path.stat().st_mtime for path in files if path.exists()), default=-math.inf)
    return silent < _PATIENCE_S, max(silent, 0.0)


def read_curves(folder: RunFolder) -> tuple[dict[int, Curve], str]:
    """The curve of every trial, and the name of the objective."""
    closed, growing = folder.reports_parquet, folder.reports
    if closed.exists() and not (growing.exists() and growing.stat().st_mtime > closed.stat().st_mtime):
        table = pq.read_table(pa.BufferReader(closed.read_bytes()))  # opened once: it may be replaced meanwhile
    elif growing.exists():
        table = stream.read(growing)
    else:
        return {}, "objective"
    trial, index = (table[name].to_numpy() for name in ("trial", "index"))
    order = np.lexsort((index, trial))
    numbers, begins = np.unique(trial[order], return_index=True)
    columns = {name: _floats(table[name])[order] for name in ("cost", "objective", "score")}
    rungs = table["rung"].to_numpy()[order].astype(np.int64)
    bounds = np.append(begins, len(order))
    curves = {
        int(number): Curve(**{name: column[begin:end] for name, column in columns.items()}, rung=rungs[begin:end])
        for number, begin, end in zip(numbers, bounds[:-1], bounds[1:], strict=True)
    }
    return curves, _objective(table)


def _floats(column: pa.ChunkedArray) -> Floats:
    return np.asarray(column.cast(pa.float64()).fill_null(np.nan).to_numpy(), dtype=np.float64)


def _objective(table: pa.Table) -> str:
    """The metric that is reported as the objective."""
    for batch in table.select(["objective", "extra"]).to_batches(max_chunksize=64):
        for row in batch.to_pylist():
            metrics = json.loads(row["extra"] or "{}").get("metrics") or {}
            for name, value in metrics.items():
                if value == row["objective"]:
                    return str(name)
    return "objective"


def read_checks(folder: Path) -> tuple[tuple[str, Mapping[str, Any]], ...]:
    """Sanity checks that were written into the run folder."""
    return tuple(sorted(_checks(folder), key=lambda found: (-(folder / found[0]).stat().st_mtime, found[0])))


def _checks(folder: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for path in folder.glob("*.json"):
        try:
            found = json.loads(path.read_text()) if path.stat().st_size <= _MOST_JSON else None
        except (OSError, ValueError):
            continue
        if isinstance(found, dict) and found.get("format") == "distprune.sanity/1":
            yield path.name, found
