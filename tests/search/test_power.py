"""A machine that dies takes what was written and not synced, a bad disk takes anything: what was told is not lost by that."""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from laws import front, replayed
from searches import STEPS, curve, outcome, reports, resume, search, start, trials

from distprune.search import driver
from distprune.search.finale import close_tables
from distprune.search.trial import Job
from distprune.store import files
from distprune.store.folder import RunFolder
from distprune.store.reports import ReportWriter, read
from distprune.store.study import Truth
from distprune.store.trials import read_trials

Row = dict[str, Any]


@pytest.fixture(autouse=True)
def only_tables_in_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Made-up curves leave no networks to measure on the test split."""
    monkeypatch.setattr(driver, "finalize", close_tables)


def _numbers(folder: RunFolder) -> list[int]:
    return [row["number"] for row in read_trials(folder.trials).to_pylist() if row["pareto"]]


def _lose(folder: RunFolder, lost: Callable[[Row], bool]) -> None:
    """As if those rows had never come to the disk, or were damaged there."""
    rows = [row for row in read(folder.reports).to_pylist() if not lost(row)]
    folder.reports.unlink()
    with ReportWriter(folder.reports) as writer:
        for row in rows:
            writer.add(row)


LOST: dict[str, Callable[[Row, int], bool]] = {
    "the last report": lambda row, number: row["trial"] == number and row["final"],
    "the first report": lambda row, number: row["trial"] == number and row["index"] == 0,
    "one in between": lambda row, number: row["trial"] == number and row["index"] == 2,
    "one in between and the last": lambda row, number: row["trial"] == number and row["index"] in (2, STEPS - 1),
    "all of a trial": lambda row, number: row["trial"] == number,
    "all": lambda row, number: True,
}


@pytest.mark.parametrize("changes", [{}, {"floor": 0.1}, {"sampler": {"name": "tpe", "startup": 2}}], ids=["plain", "floor", "tpe"])
@pytest.mark.parametrize("lost", LOST)
def test_what_was_told_keeps_its_place_on_the_front_and_its_weights(lost: str, changes: dict[str, Any], tmp_path: Path) -> None:
    folder = start(search(tmp_path, trials=10, scheduler="none", **changes), workers=1)
    ends, best, numbers, journal = outcome(folder), front(folder), _numbers(folder), folder.journal.read_bytes()
    _lose(folder, lambda row: LOST[lost](row, numbers[-1]))
    resume(folder.path, workers=1)
    assert len(numbers) > 2 and front(folder) == best and outcome(folder) == ends
    assert folder.journal.read_bytes() == journal, "an end is told once"
    assert all((folder.checkpoints / str(number)).exists() for number in numbers)
    assert all(rows[-1]["final"] for rows in reports(folder).values()) and len(reports(folder)) == 10
    longer = start(search(tmp_path / "longer", trials=14, scheduler="none", **changes), workers=1)
    assert outcome(resume(folder.path, workers=1, trials=14)) == outcome(longer), "and the search goes on as it would have"


def test_decisions_that_were_told_stay_though_the_reports_would_give_others(tmp_path: Path) -> None:
    scheduler = {"name": "pareto_halving", "front": 0.0}
    folder = start(search(tmp_path, trials=30, scheduler=scheduler), workers=2)
    ends, best = outcome(folder), front(folder)
    assert {"finished", "stopped"} <= {end for _, _, end, _, _ in ends}
    stopped = {number for number, _, end, _, _ in ends if end == "stopped"}
    columns = ("number", "ended", "reason", "objective", "kept", "cost")

    def table() -> list[Any]:
        return [[row[name] for name in columns] for row in read_trials(folder.trials).to_pylist() if row["ended"] == "finished"]

    before = table()
    _lose(folder, lambda row: row["trial"] in stopped and row["rung"] >= 0)  # so that fewer may go on
    again = trials(replayed(folder, tmp_path / "aside"))
    finished = {trial.number for trial in again if trial.user_attrs.get("end", {}).get("ended") == "finished"}
    assert {number for number, _, end, _, _ in ends if end == "finished"} - finished, "some would not have gone on"
    resume(folder.path)
    assert outcome(folder) == ends and front(folder) == best and table() == before


@pytest.mark.parametrize("records", [1, 3, 5, 9, 30, None])
def test_reports_of_trials_that_the_journal_has_lost_are_set_aside(records: int | None, tmp_path: Path) -> None:
    """Other trials will have their numbers. With a random sampler they are the same ones again, and come to the same."""
    folder = start(search(tmp_path, trials=8, scheduler="none"), workers=1)
    ends, best, stream = outcome(folder), front(folder), folder.reports.read_bytes()
    lines = folder.journal.read_text().splitlines(keepends=True)
    folder.journal.write_text("".join(lines[:-records] if records else []))
    born = len(trials(folder))
    resume(folder.path, workers=1)
    assert outcome(folder) == ends and front(folder) == best
    aside = list(folder.path.glob("reports.arrows.damaged-*"))
    assert [path.read_bytes() for path in aside] == ([stream] if born < 8 else [])
    assert all([row["index"] for row in rows] == list(range(STEPS)) for rows in reports(folder).values())
    assert outcome(resume(folder.path, workers=1)) == ends


def test_nothing_is_told_before_its_reports_are_safe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    safe, path = dict[int, int](), search(tmp_path).folder / "reports.arrows"
    told, checked = Truth.tell, list[int]()

    def sync(descriptor: int) -> None:
        safe[os.fstat(descriptor).st_ino] = os.fstat(descriptor).st_size

    def tell(truth: Truth, number: int, *arguments: Any) -> bool:
        if number in (rows := reports(RunFolder(path.parent))):
            assert safe[path.stat().st_ino] == path.stat().st_size and len(rows[number]) == STEPS
            checked.append(number)
        return told(truth, number, *arguments)

    monkeypatch.setattr(files, "_sync", sync)
    monkeypatch.setattr(Truth, "tell", tell)
    folder = start(search(tmp_path, scheduler="none"))
    assert checked == sorted(checked) and len(checked) == 8
    for file in (folder.reports, folder.journal):
        assert safe[file.stat().st_ino] == file.stat().st_size, "in the end all of it"


def test_one_that_cannot_be_run_again_is_kept_for_the_next_driver(tmp_path: Path) -> None:
    folder = start(search(tmp_path, trials=8, scheduler="none"), workers=1)
    ends, best, number = outcome(folder), front(folder), _numbers(folder)[0]
    _lose(folder, lambda row: row["trial"] == number and row["index"] >= 2)

    def failing(job: Job) -> Iterator[Row]:
        row = {**next(curve(job)), "attempt": "f", "index": 2, "final": True, "ended": "error", "extra": json.dumps({"reason": "no data"})}
        yield row if job.number == number else next(curve(job))

    resume(folder.path, workers=1, using=failing)
    table = {row["number"]: row for row in read_trials(folder.trials).to_pylist()}
    assert (table[number]["ended"], table[number]["reason"]) == ("error", "no data") and outcome(folder) == ends
    assert (folder.checkpoints / str(number)).exists()
    _lose(folder, lambda row: row["ended"] == "error")
    resume(folder.path, workers=1)
    assert front(folder) == best and outcome(folder) == ends


@pytest.mark.parametrize("limits", [{"cost": 320.0 * STEPS}, {"wall": 1e-9}, {"trial_wall": 1e-9}], ids=["cost", "wall", "trial_wall"])
def test_limits_that_are_reached_keep_nobody_from_being_run_again(limits: dict[str, float], tmp_path: Path) -> None:
    def timed(job: Job) -> Iterator[Row]:
        yield from ({**row, "wall_s": 1.0 + row["index"]} for row in curve(job))

    folder = start(search(tmp_path, trials=8, scheduler="none"), workers=1, using=timed)
    ends, best = outcome(folder), front(folder)
    _lose(folder, lambda row: row["trial"] in _numbers(folder) and row["index"] > 2)
    resume(folder.path, workers=1, using=timed, **limits)
    assert front(folder) == best and outcome(folder) == ends
