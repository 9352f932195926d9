"""A driver killed before, in the middle of or after any write: what is left is enough to go on as if nothing had happened."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from distprune.store import files
from distprune.store.folder import RunFolder
from distprune.store.reports import ReportWriter, read, recover
from distprune.store.study import Truth
from distprune.store.trials import read_trials, write_trials

pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")

TRIALS, REPORTS = 3, 2
WRITES = 1 + TRIALS * (1 + REPORTS + 3) + 1  # the study; birth, reports, attributes, constraint, state; the table
KILLED, BROKEN = 9, 70  # exit codes


def drive(folder: RunFolder) -> None:
    """A small search: starts or goes on, like the real driver."""
    truth = Truth.open(folder.journal, "x", ("maximize", "minimize"))
    rows, damage = recover(folder.reports)
    assert not damage, "a kill tears tails only"
    with ReportWriter(folder.reports) as reports:
        for number in range(TRIALS):
            if number == len(truth.trials()):
                truth.born(number, {}, {}, {"identity": f"k{number}"})
            for index in range(sum(row["trial"] == number for row in rows), REPORTS):
                reports.add({"trial": number, "index": index, "attempt": "a", "cost": 10.0 * index, "final": index == REPORTS - 1})
                reports.flush()
            truth.tell(number, TrialState.COMPLETE, [number / 2, 10.0], {"unfinished": 0.5}, {"ended": "finished"})
    write_trials(folder.trials, [{"number": trial.number} for trial in truth.trials()])


def killed(work: Callable[[], object], at: int, share: float) -> bool:
    """Do `work` in a process that dies at its write number `at`, having written a `share` of it. False if it ended before."""
    if (child := os.fork()) == 0:
        left = at

        def write(descriptor: int, data: Any) -> int:
            nonlocal left
            if left == 0:
                os.write(descriptor, data[: int(len(data) * share)])
                os._exit(KILLED)
            left -= 1
            return os.write(descriptor, data)

        try:
            files._write = write
            work()
            os._exit(0)
        finally:
            os._exit(BROKEN)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, KILLED)
    return code == KILLED


def outcome(folder: RunFolder) -> Any:
    """All that must not depend on kills, as Optuna alone and a plain reader see it."""
    storage = JournalStorage(JournalFileBackend(str(folder.journal)))
    study = optuna.load_study(study_name="x", storage=storage)
    trials = [(trial.number, trial.state, trial.values, trial.constraints, trial.user_attrs) for trial in study.trials]
    return trials, read(folder.reports).to_pylist(), read_trials(folder.trials).to_pylist()


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "x").create()


@pytest.fixture
def undisturbed(tmp_path: Path) -> Any:
    folder = RunFolder(tmp_path / "undisturbed").create()
    drive(folder)
    trials, rows, _ = outcome(folder)
    assert [(number, state) for number, state, *_ in trials] == [(number, TrialState.COMPLETE) for number in range(TRIALS)]
    assert [(row["trial"], row["index"]) for row in rows] == [(n, index) for n in range(TRIALS) for index in range(REPORTS)]
    return outcome(folder)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0], ids=["before", "half", "after"])
def test_killed_at_any_write_ends_as_undisturbed(tmp_path: Path, undisturbed: Any, share: float) -> None:
    for at in range(WRITES):
        folder = RunFolder(tmp_path / str(at)).create()
        assert killed(lambda folder=folder: drive(folder), at, share)
        drive(folder)
        assert outcome(folder) == undisturbed, f"killed at write {at}"
        ends = [line for line in folder.journal.read_bytes().splitlines() if b'"values":[' in line and b'"directions"' not in line]
        assert len(ends) == TRIALS, "every trial ends once"
    assert not killed(lambda: drive(RunFolder(tmp_path / "whole").create()), WRITES, share), "every write was tried"


def test_killed_again_and_again_ends_as_undisturbed(folder: RunFolder, undisturbed: Any) -> None:
    lives = 1
    while killed(lambda: drive(folder), 3, 0.5):  # as many writes as a tell takes, and the next one is torn
        lives += 1
        assert lives <= WRITES, "a tell that was begun is repeated, the rest is progress"
    assert lives > TRIALS
    assert outcome(folder) == undisturbed


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0], ids=["before", "half", "after"])
def test_killed_while_a_damaged_stream_is_recovered(tmp_path: Path, folder: RunFolder, share: float) -> None:
    drive(folder)
    data = bytearray(folder.reports.read_bytes())
    data[-1500] ^= 0xFF
    for at in range(2):  # the old file is set aside, the new one is made
        folder.reports.write_bytes(data)
        assert killed(lambda: recover(folder.reports), at, share)
        rows, _ = recover(folder.reports)
        assert len(rows) >= TRIALS * REPORTS - 1
        assert read(folder.reports).to_pylist() == rows
