"""`trials.parquet`: a row a trial, a view that is rebuilt whole from the journal and the reports."""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from distprune.store import files

FAILED = ("error", "nan", "oom", "timeout", "lost")  # ends of trials that have no result
_BATCH = 1000
_TEXT, _NUMBER, _COUNT = pa.string(), pa.float64(), pa.int64()
SCHEMA = pa.schema(
    [
        ("number", _COUNT),
        ("ended", _TEXT),  # finished, stopped, error, nan, oom, timeout, lost, duplicate, running
        ("reason", _TEXT),
        ("pareto", pa.bool_()),
        ("violated", pa.list_(pa.string())),  # of a finished trial: the constraints that keep it from the front
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
        ("repeat_of", _COUNT),  # the finalist that it repeats with another seed
        ("round_of", _COUNT),  # the trial that came by its result in an earlier round: it cost nothing
        ("seeds", _COUNT),  # finished repeats of a finalist; the mean and standard deviation of their objective, its own not included
        ("mean", _NUMBER),
        ("spread", _NUMBER),
        ("params", _COUNT),  # kept weights and everything that is not prunable
        ("flops", _NUMBER),  # ideal sparse, of one sample
        ("costs", _TEXT),  # JSON: shares of the dense network's costs, by name
        ("cost", _NUMBER),  # billed samples
        ("spent", _NUMBER),  # samples really run
        ("saved", _COUNT),  # billed samples that other trials had run
        ("bill_flops", _NUMBER),  # of the billed samples in the prunable layers, as dense hardware runs them; finished trials only
        ("bill_sparse_flops", _NUMBER),  # of the same, with zeros skipped
        ("rung", _COUNT),
        ("attempts", _COUNT),
        ("deaths", _TEXT),  # JSON: why its workers died, as far as a driver saw it
        ("micro_batch", _COUNT),  # the most samples in one pass, where memory ran out; empty where it did not
        ("retries", _COUNT),  # times that it was begun again with half of the samples in a pass
        ("asked", _COUNT),  # times that it was given more memory: twice the share of a GPU, or twice what it sets aside on its node
        ("wall_s", _NUMBER),
        ("recipe_key", _TEXT),
        ("recipe", _TEXT),  # JSON
        ("parameters", _TEXT),  # JSON, as Optuna knows them
        ("layers", _TEXT),  # JSON: kept weights of each layer
    ]
)


def write_trials(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Replace the table. Rows are made and written a batch at a time: as Python objects they are many times larger than the file."""
    sink = pa.BufferOutputStream()
    left = iter(rows)
    with pq.ParquetWriter(sink, SCHEMA) as writer:
        while batch := list(itertools.islice(left, _BATCH)):
            writer.write_table(pa.Table.from_pylist(batch, schema=SCHEMA))
    files.publish(path, sink.getvalue().to_pybytes())


def read_trials(path: str | Path, *, columns: Sequence[str] | None = None) -> pa.Table:
    """The table, or some of its columns; those that an earlier version did not write are empty."""
    wanted = SCHEMA.names if columns is None else list(columns)
    data = pa.py_buffer(Path(path).read_bytes())  # opened once: the driver of a running search replaces the file
    there = set(pq.read_schema(pa.BufferReader(data)).names)
    table = pq.read_table(pa.BufferReader(data), columns=[name for name in wanted if name in there])
    for name in wanted:
        if name not in there:
            table = table.append_column(SCHEMA.field(name), pa.nulls(table.num_rows, SCHEMA.field(name).type))
    return table.select(wanted)
