"""`trials.parquet`: a row a trial, a view that is rebuilt whole from the journal and the reports."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from distprune.store import files

_TEXT, _NUMBER, _COUNT = pa.string(), pa.float64(), pa.int64()
SCHEMA = pa.schema(
    [
        ("number", _COUNT),
        ("ended", _TEXT),  # finished, stopped, error, nan, oom, duplicate, running
        ("reason", _TEXT),
        ("pareto", pa.bool_()),
        ("paradigm", _TEXT),
        ("granularity", _TEXT),
        ("criterion", _TEXT),  # empty where the paradigm uses none, as the allocator
        ("allocator", _TEXT),
        ("regularizer", _TEXT),
        ("sparsity", _NUMBER),
        ("kept", _COUNT),
        ("objective", _NUMBER),  # on validation, at the last report
        ("score", _NUMBER),  # the best so far, of the network projected onto its final budget
        ("test", _NUMBER),  # trials on the front only
        ("params", _COUNT),  # kept weights and everything that is not prunable
        ("flops", _NUMBER),  # ideal sparse, of one sample
        ("cost", _NUMBER),  # billed samples
        ("spent", _NUMBER),  # samples really run
        ("bill_flops", _NUMBER),  # of the billed samples in the prunable layers, as dense hardware runs them; finished trials only
        ("bill_sparse_flops", _NUMBER),  # of the same, with zeros skipped
        ("rung", _COUNT),
        ("attempts", _COUNT),
        ("wall_s", _NUMBER),
        ("recipe_key", _TEXT),
        ("recipe", _TEXT),  # JSON
        ("parameters", _TEXT),  # JSON, as Optuna knows them
        ("layers", _TEXT),  # JSON: kept weights of each layer
    ]
)


def write_trials(path: str | Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Replace the table."""
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(list(rows), schema=SCHEMA), sink)
    files.publish(path, sink.getvalue().to_pybytes())


def read_trials(path: str | Path) -> pa.Table:
    """The table."""
    return pq.read_table(path)
