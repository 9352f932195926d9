"""Laws of the report stream: any prefix reads, damage costs the rows it hit and none after them, the first of two equal rows counts."""

import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from distprune.store import files, reports
from distprune.store.reports import ReportWriter, read, recover, to_parquet

Row = dict[str, Any]


def row(trial: int, index: int, **others: Any) -> Row:
    given = {"trial": trial, "index": index, "attempt": "a1", "step": 10 * index, "cost": 640.0 * index, "kept": 100, "objective": 0.5}
    return {**given, "extra": '{"metrics": {"accuracy": 0.5}}', **others}


ROWS = [row(trial, index) for trial in range(2) for index in range(3)]


def write(path: Path, rows: list[Row]) -> list[int]:
    """Write one batch a row; returns where each ends, in bytes."""
    ends = []
    with ReportWriter(path) as writer:
        for each in rows:
            writer.add(each)
            writer.flush()
            ends.append(path.stat().st_size)
    return ends


def names(rows: list[Row]) -> list[tuple[int, int]]:
    return [(each["trial"], each["index"]) for each in rows]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "reports.arrows"


def test_rows_come_back_as_they_were_written(path: Path) -> None:
    full = row(0, 0, rung=2, final=True, ended="finished", spent=640.0, sparsity=0.9, score=float("inf"), wall_s=1.5)
    write(path, [full, row(0, 1, objective=None)])
    first, second = read(path).to_pylist()
    assert {name: first[name] for name in full} == full
    assert (second["objective"], second["score"], second["rung"], second["final"], second["ended"]) == (None, None, -1, False, "")


def test_a_healthy_stream_is_plain_arrow(path: Path) -> None:
    write(path, ROWS)
    assert names(pa.ipc.open_stream(path.read_bytes()).read_all().to_pylist()) == names(ROWS)


def test_no_file_is_an_empty_stream(path: Path) -> None:
    assert read(path).num_rows == 0
    assert recover(path) == ([], "")


def test_the_first_of_two_rows_with_one_name_counts(path: Path) -> None:
    write(path, [row(0, 0, objective=0.1), row(0, 1), row(0, 0, objective=0.9)])
    assert [(each["index"], each["objective"]) for each in read(path).to_pylist()] == [(0, 0.1), (1, 0.5)]
    assert len(recover(path)[0]) == 2


def test_rows_wait_for_half_a_second_at_most(path: Path) -> None:
    now = 0.0
    writer = ReportWriter(path, clock=lambda: now)
    writer.add(ROWS[0])
    assert not path.exists()
    now = 0.5
    writer.add(ROWS[1])
    assert read(path).num_rows == 2


def test_every_prefix_reads_as_a_prefix(path: Path) -> None:
    ends = write(path, ROWS[:2])
    data = path.read_bytes()
    for size in range(len(data) + 1):
        path.write_bytes(data[:size])
        assert names(read(path).to_pylist()) == names(ROWS[: sum(end <= size for end in ends)])


def test_a_torn_tail_is_cut_and_the_stream_goes_on(path: Path) -> None:
    ends = write(path, ROWS)
    data = path.read_bytes()
    for size in range(0, len(data) + 1, 37):  # the torn header among them
        path.write_bytes(data[:size])
        rows, damage = recover(path)
        whole = sum(end <= size for end in ends)
        assert names(rows) == names(ROWS[:whole]) and not damage
        write(path, ROWS[whole:])
        assert path.read_bytes() == data
    assert [other.name for other in path.parent.iterdir()] == [path.name]


def test_a_flipped_bit_costs_its_own_row_at_most(path: Path) -> None:
    head = len(reports.SCHEMA.serialize().to_pybytes())
    ends = write(path, ROWS[:2])
    data = path.read_bytes()
    for place in range(len(data)):  # lengths, offsets and text among them: a reader that trusts them crashes or skips what follows
        flipped = bytearray(data)
        flipped[place] ^= 0x80 if place % 2 else 0x01
        path.write_bytes(flipped)
        hit = sum(end <= place for end in ends) if place >= head else None
        got = names(read(path).to_pylist())
        assert set(got) >= {name for n, name in enumerate(names(ROWS[:2])) if n != hit}, place
        assert set(got) <= set(names(ROWS[:2]))


def test_damage_in_the_middle_is_said_and_the_old_file_is_kept(path: Path) -> None:
    ends = write(path, ROWS)
    data = bytearray(path.read_bytes())
    for place in range(ends[1], ends[2]):  # the third message, all of it
        data[place] ^= 0xFF
    path.write_bytes(data)
    rows, damage = recover(path)
    (aside,) = path.parent.glob("reports.arrows.damaged-*")
    assert names(rows) == names(ROWS[:2] + ROWS[3:])
    assert aside.name in damage and "5 intact" in damage and "\n" not in damage
    assert aside.read_bytes() == data
    assert recover(path) == (rows, ""), "recovered twice is recovered once"
    write(path, [row(5, 0)])
    assert names(read(path).to_pylist()) == [*names(rows), (5, 0)]


def test_rows_of_trials_that_were_never_born_are_set_aside(path: Path) -> None:
    write(path, ROWS)
    data = path.read_bytes()
    assert recover(path, born=2) == (recover(path)[0], "") and path.read_bytes() == data
    rows, said = recover(path, born=1)
    (aside,) = path.parent.glob("reports.arrows.damaged-*")
    assert names(rows) == names(ROWS[:3]) == names(read(path).to_pylist()) and aside.read_bytes() == data
    assert "3 reports" in said and aside.name in said and "\n" not in said
    assert recover(path, born=1) == (rows, "")


def test_a_flush_that_syncs_covers_what_was_written_before(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    monkeypatch.setattr(files, "_sync", lambda descriptor: synced.append(os.fstat(descriptor).st_size))
    with ReportWriter(path) as writer:
        writer.flush(sync=True)
        assert not path.exists()
        writer.add(ROWS[0])
        writer.flush()
        assert synced == []
        writer.flush(sync=True)
        assert synced == [path.stat().st_size]
        writer.flush(sync=True)
        assert len(synced) == 1, "there is nothing new"
        writer.add(ROWS[1])
        writer.flush(sync=True)
        assert synced[1:] == [path.stat().st_size]


def test_the_finished_stream_becomes_parquet(path: Path) -> None:
    write(path, [*ROWS, ROWS[0]])
    to_parquet(path, path.with_suffix(".parquet"))
    assert names(pq.read_table(path.with_suffix(".parquet")).to_pylist()) == names(ROWS)
