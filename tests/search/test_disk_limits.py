"""Limits of the disk: what counts as a checkpoint, what goes first where trials wait at rungs, and a quota that is used up."""

import errno
import json
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from books import book_of, row_of
from disks import Held, checkpoint_of, on_disk
from searches import curve, job_in, outcome, reports, search, start
from toys import BASE, recipe

from distprune.search import driver, retention
from distprune.search.disk import LATELY_S, Disk, tell_waiting
from distprune.search.finale import close_tables
from distprune.search.retention import Retention
from distprune.search.rungs import Rungs
from distprune.search.trial import KEPT_CHECKPOINTS, Job, run_trial
from distprune.store import files
from distprune.store.folder import RunFolder
from distprune.store.trials import read_trials

pytestmark = pytest.mark.usefixtures("elsewhere")
SIZE = 1000  # of a made-up checkpoint
PROMOTE = {"name": "pareto_halving", "reduction": 2, "front": 0.0, "variant": "promote"}


def test_samples_that_were_served_are_no_checkpoint(tmp_path: Path) -> None:
    """Nor do they supersede one: the only checkpoint of a running trial stays."""
    folder, book = RunFolder(tmp_path / "x").create(), book_of(tmp_path, entries=3)
    keeper = Retention(folder, book, limit=150)
    keeper.heard(checkpoint_of(folder, 0, "a", 5))
    for index in (6, 7):
        keeper.heard(row_of(0, index, attempt="a", extra=json.dumps({"saved": 1280, "metrics": {"checkpoint": 1.0}})))
    assert on_disk(folder) == {"0/a/5"} and keeper.total == 100


def test_a_search_that_may_keep_nothing_takes_nothing_from_the_cache_of_others(tmp_path: Path) -> None:
    """Nor does it add anything; it is served all the same."""
    common: dict[str, Any] = {
        "recipe": {**BASE, "train": {**BASE["train"], "length": "1ep"}},
        "scheduler": "none",
        "space": {"paradigm": ["dense"]},
    }
    start(search(tmp_path, name="first", trials=1, **common), using=run_trial)
    kept = {path.name: path.read_bytes() for path in (tmp_path / ".cache").iterdir() if path.is_file()}
    space = {"paradigm": ["dense"], "regularizer": ["none", "l2"]}
    value = search(tmp_path, name="second", **{**common, "space": space, "limits": {"trials": 2, "disk": 1}})
    rows = read_trials(start(value, using=run_trial).trials).to_pylist()
    assert sorted(row["saved"] for row in rows) == [0, 320]
    assert {path.name: path.read_bytes() for path in (tmp_path / ".cache").iterdir() if path.is_file()} == kept != {}


# Trials that wait.


def _sized(made: dict[int, list[dict[str, Any]]]) -> Any:
    """A curve that writes a checkpoint at each rung and in the end, and remembers all that it has reported."""

    def run(job: Job) -> Iterator[dict[str, Any]]:
        for row in curve(job):
            made.setdefault(job.number, []).append(row)
            if row["score"] is not None:
                path = RunFolder(Path(job.folder)).checkpoint(job.number, row["attempt"], row["index"])
                path.mkdir(parents=True, exist_ok=True)
                (path / "state.safetensors").write_bytes(b"x" * SIZE)
                for old in sorted(path.parent.iterdir(), key=lambda path: int(path.name))[:-KEPT_CHECKPOINTS]:
                    shutil.rmtree(old)
                row = {**row, "extra": json.dumps({"checkpoint": SIZE})}
            yield row

    return run


def _bytes(folder: RunFolder) -> int:
    return sum(path.stat().st_size for path in folder.checkpoints.rglob("state.safetensors"))


@pytest.mark.parametrize("workers", [1, 3])
def test_what_waits_keeps_to_the_limit_and_begins_again(workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same decisions and the same stream as without a limit; what is run again reports the same; the search is never crowded.

    On the disk lies no more than the limit and the two checkpoints that each worker keeps, which is heard of when they are new.
    """
    monkeypatch.setattr(driver, "finalize", close_tables)
    monkeypatch.setattr(retention, "write_masks", lambda *args: None)
    limit, most, crowded = 3 * SIZE, [0, 0], list[bool]()
    heard = Retention.heard

    def watched(self: Retention, row: Any) -> None:
        heard(self, row)
        most[self._limit is not None] = max(most[self._limit is not None], self.total, _bytes(self._folder) - 2 * workers * SIZE)
        crowded.append(self.crowded)

    monkeypatch.setattr(Retention, "heard", watched)
    runs, made = [], list[dict[int, list[dict[str, Any]]]]()
    for name, disk in (("free", None), ("bound", limit)):
        made.append({})
        value = search(tmp_path, name=name, scheduler=PROMOTE, limits={"trials": 40, **({"disk": disk} if disk else {})})
        runs.append(start(value, workers=workers, using=_sized(made[-1])))
    free, bound = runs
    assert most[0] > 3 * limit and most[1] <= limit and not any(crowded)
    assert outcome(bound) == outcome(free)
    streams = [{n: [(r["index"], r["cost"], r["score"]) for r in rows] for n, rows in reports(folder).items()} for folder in runs]
    assert streams[0] == streams[1] and all([at for at, *_ in rows] == list(range(len(rows))) for rows in streams[1].values())
    again = {number for number, rows in made[1].items() if len({row["index"] for row in rows}) < len(rows)}
    assert again and not any(len({row["index"] for row in rows}) < len(rows) for rows in made[0].values())
    for number in again:  # a report that was made twice is the same but for its attempt
        told = {(row["index"], *(row[key] for key in ("rung", "cost", "sparsity", "objective", "score"))) for row in made[1][number]}
        assert len(told) == len({row["index"] for row in made[1][number]})


def test_of_those_that_wait_the_most_dominated_goes_first_and_what_runs_stays(tmp_path: Path) -> None:
    folder, book, said = RunFolder(tmp_path / "x").create(), book_of(tmp_path, entries=5, rungs=Rungs([10], 3, promotes=True)), list[str]()
    keeper = Retention(folder, book, limit=400, listen=lambda event, facts: said.append(facts["message"]))
    for number, vector in enumerate([(0.5, -100.0), (0.9, -100.0), (0.4, -200.0), (0.8, -100.0)]):
        book.rungs.goes_on(number, 0, vector)
        book.entries[number].paused = 0
        keeper.heard(checkpoint_of(folder, number, "a", 1))
    assert said == [] and keeper.total == 400
    keeper.heard(checkpoint_of(folder, 4, "a", 1))
    assert on_disk(folder) == {"0/a/1", "1/a/1", "3/a/1", "4/a/1"}
    keeper.heard(checkpoint_of(folder, 4, "b", 2, size=200))
    assert on_disk(folder) == {"1/a/1", "3/a/1", "4/b/2"}, "what is superseded goes before them"
    keeper.heard(checkpoint_of(folder, 4, "c", 3, size=500))
    assert on_disk(folder) == {"4/c/3"}, "however large, it is what runs"
    assert "the checkpoints of waiting trials 2" in said[0] and "waiting trials 0" in said[1] and "waiting trials 3, 1" in said[2]


def test_a_trial_of_which_nothing_is_left_reports_the_same_again(tmp_path: Path) -> None:
    """As its worker runs it, on the toys."""
    job = job_in(tmp_path, recipe=recipe({"name": "lth", "share": 0.6, "rewind_to": "10%"}, sparsity=0.8).plain())

    def plain(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [{key: value for key, value in row.items() if key not in ("attempt", "wall_s", "extra")} for row in rows]

    whole = list(run_trial(job))
    for path in sorted((tmp_path / "checkpoints" / "3").rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    assert plain(list(run_trial(replace(job, known=7)))) == plain(whole)


# A quota.


def test_a_quota_that_is_used_up_is_a_full_disk_to_the_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a worker waits to write its checkpoint, no trial is begun though there is free space, and none is silent; then it goes on."""
    folder, said, now, left, seen = RunFolder(tmp_path / "x").create(), list[str](), [0.0], [3], list[str]()
    disk = Disk(
        folder, 10**9, Held(), lambda event, facts: said.append(facts["message"]), free=lambda path: 5 * 10**9, clock=lambda: now[0]
    )  # type: ignore[arg-type]
    make = Path.mkdir

    def refused(self: Path, *args: Any, **options: Any) -> None:
        if self.name.startswith(".") and left[0]:
            left[0] -= 1
            raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))
        make(self, *args, **options)

    def sleep(seconds: float) -> None:
        time.sleep(0.02)  # a file system's clock may not tick faster
        now[0] += 100  # what is said each time is believed anew
        seen.append(disk.holds())

    monkeypatch.setattr(Path, "mkdir", refused)
    monkeypatch.setattr(files, "_sleep", sleep)
    assert disk.holds() == ""
    job = Job(
        number=0,
        recipe=recipe("dense", train={"length": "1ep"}).plain(),
        folder=str(folder.path),
        rungs=[],
        report_every="1ep",
        recovery=None,
        known=0,
        threads=1,
        device="cpu",
        working_dir=os.getcwd(),
    )
    rows = list(run_trial(job))
    assert rows[-1]["ended"] == "finished" and seen == ["full"] * 3 and disk.holds() == "full"
    assert len(said) == 1 and "5 GB are free" in said[0] and "as where a quota is used up" in said[0]
    now[0] += LATELY_S
    assert disk.holds() == "" and said[1:] == ["There is room on the disk again."]
    assert Disk(folder, 0, Held(), lambda event, facts: None, free=lambda path: 1).holds() == "", "an old sign"  # type: ignore[arg-type]


def test_the_driver_says_once_that_it_waits(tmp_path: Path) -> None:
    said: list[str] = []
    for failed in (1, 2, 3, 0):
        tell_waiting(lambda event, facts: said.append(facts["message"]), tmp_path / "x", failed)
    assert said == [f"The disk is full: waiting to write {tmp_path / 'x'}.", f"{tmp_path / 'x'} is written, the search goes on."]
