"""`reports.arrows`: every report of every trial, appended as it comes, readable while it grows.

An Arrow IPC stream of a fixed schema. Readers tolerate a torn tail; every row carries a checksum, so that damage in the middle costs the
rows it hit and none after them. A report is known by (trial, index): the first row of it counts. Rows with a negative index are no reports
but the driver's own notes on a trial, which only `recover` returns.
"""

import json
import time
import uuid
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from distprune.store import files

SCHEMA = pa.schema(
    [
        ("trial", pa.int32()),
        ("attempt", pa.string()),  # one life of a worker on the trial
        ("index", pa.int32()),  # 0, 1, 2, ... within the trial
        ("rung", pa.int32()),  # highest rung crossed, -1 for none
        ("final", pa.bool_()),
        ("ended", pa.string()),  # '', finished, error, nan, oom
        ("step", pa.int64()),
        ("cost", pa.float64()),  # billed samples so far
        ("spent", pa.float64()),  # samples really run in this attempt
        ("sparsity", pa.float64()),
        ("kept", pa.int64()),
        ("objective", pa.float64()),
        ("score", pa.float64()),  # at rungs and at the end
        ("wall_s", pa.float64()),  # of this attempt
        ("extra", pa.string()),  # JSON
        ("crc", pa.uint32()),
    ]
)
_NAMES = [field.name for field in SCHEMA if field.name != "crc"]
_FLOATS = [field.name for field in SCHEMA if pa.types.is_float64(field.type)]
_DEFAULTS = {"attempt": "", "rung": -1, "final": False, "ended": "", "extra": "{}"}
_FLUSH_EVERY_S = 0.5
_HEAD = SCHEMA.serialize().to_pybytes()
_MARK = b"\xff\xff\xff\xff"  # begins every message of a stream


def _checksum(row: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps([row[name] for name in _NAMES]).encode())


def _complete(row: Mapping[str, Any]) -> dict[str, Any]:
    full = {name: row.get(name, _DEFAULTS.get(name)) for name in _NAMES}
    for name in _FLOATS:
        if full[name] is not None:
            full[name] = float(full[name])
    return {**full, "crc": _checksum(full)}


def _batch(rows: list[dict[str, Any]]) -> bytes:
    return bytes(pa.RecordBatch.from_pylist(rows, schema=SCHEMA).serialize().to_pybytes())


class ReportWriter:
    """Appends reports. Rows wait for a flush: at the latest the first `add` half a second after the one before."""

    def __init__(self, path: str | Path, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._path, self._clock = Path(path), clock
        self._rows: list[dict[str, Any]] = []
        self._flushed = clock()
        self._synced = True  # whether all that was written would survive the death of the machine

    def add(self, row: Mapping[str, Any]) -> None:
        """Append a report; missing columns are empty."""
        self._rows.append(_complete(row))
        if self._clock() - self._flushed >= _FLUSH_EVERY_S:
            self.flush()

    def flush(self, *, sync: bool = False) -> None:
        """Write what waits, as one batch; with `sync`, have all of the stream survive the death of the machine."""
        self._flushed = self._clock()
        data = b""
        if self._rows:
            begun = self._path.exists() and self._path.stat().st_size > 0
            data = _batch(self._rows) if begun else _HEAD + _batch(self._rows)
        if data or (sync and not self._synced):
            files.append(self._path, data, sync=sync)
            self._rows, self._synced = [], sync

    def __enter__(self) -> "ReportWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.flush()


def read(path: str | Path) -> pa.Table:
    """The intact reports of a stream that may be growing, torn or damaged."""
    rows, _, _ = _scan(Path(path))
    return pa.Table.from_pylist([row for row in rows if row["index"] >= 0], schema=SCHEMA)


def recover(path: str | Path, *, born: int | None = None) -> tuple[list[dict[str, Any]], str]:
    """Make a stream fit for appending; returns its reports and a line that says what was wrong, empty if nothing of value was.

    A torn tail is cut. Where intact rows follow the damage, the file is set aside and a new one is made of all intact rows. So it is for
    rows of trials from number `born` on, of which the journal knows nothing: others will have their numbers. Killed anywhere in between,
    the next call finds the old file in its place.
    """
    path = Path(path)
    rows, end, damaged = _scan(path)
    known = [row for row in rows if born is None or row["trial"] < born]
    if damaged or len(known) < len(rows):
        aside = path.with_name(f"{path.name}.damaged-{uuid.uuid4().hex[:6]}")
        files.publish(aside, path.read_bytes())
        files.publish(path, _HEAD + _batch(known))
        found = [f"{path} was damaged in the middle: {len(rows)} intact reports were kept"] if damaged else []
        if lost := len(rows) - len(known):
            found.append(f"{lost} reports in {path} are of trials that {path.with_name('study.journal')} has lost, and were left out")
        return known, f"{'; '.join(found)}, the old file is {aside.name}."
    if path.exists() and end < path.stat().st_size:
        files.cut(path, end)
    return rows, ""


def to_parquet(source: str | Path, target: str | Path) -> None:
    """The whole stream as one Parquet file."""
    sink = pa.BufferOutputStream()
    pq.write_table(read(source), sink)
    files.publish(target, sink.getvalue().to_pybytes())


def _scan(path: Path) -> tuple[list[dict[str, Any]], int, bool]:
    """(rows, end of the last intact message in bytes, whether something before it is damaged)."""
    data = path.read_bytes() if path.exists() else b""
    rows: dict[tuple[int, int], dict[str, Any]] = {}
    end = position = 0
    damaged = False
    for start, stop, batch in _messages(data):
        damaged |= start != position
        position = end = stop
        for row in batch:
            if row["crc"] == _checksum(row):
                rows.setdefault((row["trial"], row["index"]), row)
            else:
                damaged = True
    return list(rows.values()), end, damaged


def _messages(data: bytes) -> Iterator[tuple[int, int, list[dict[str, Any]]]]:
    """(start, stop, rows) of every message that can be read; the schema has no rows.

    Nothing a damaged message says of itself is believed: offsets that point elsewhere would crash the process, a length that is too
    large would hide the messages after it.
    """
    source = pa.py_buffer(data)
    position = 0
    while (position := data.find(_MARK, position)) >= 0:
        stream = pa.BufferReader(source.slice(position))
        try:
            message = pa.ipc.read_message(stream)
            stop = position + stream.tell()
            if message.type == "schema":
                rows, size = [], len(_HEAD)
            else:
                batch = pa.ipc.read_record_batch(message, SCHEMA)
                batch.validate(full=True)
                rows, size = batch.to_pylist(), pa.ipc.get_record_batch_size(batch)
            if stop > len(data):
                raise EOFError
        except (pa.ArrowException, OSError, EOFError, ValueError, UnicodeDecodeError):
            position += 1
            continue
        yield position, stop, rows
        position = stop if stop - position == size else position + 1
