"""Laws of the journal: one record a birth, the state last, and Optuna alone can open what is left after any kill."""

import os
import time
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from distprune.search.fitset import scores
from distprune.store.study import Truth

DIRECTIONS = ("maximize", "minimize")
PARAMS = {"lr": 0.1, "paradigm": "lth"}
DISTRIBUTIONS = {"lr": FloatDistribution(1e-3, 1.0, log=True), "paradigm": CategoricalDistribution(["lth", "snip"])}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "study.journal"


def opened(path: Path, name: str = "digits") -> Truth:
    return Truth.open(path, name, DIRECTIONS)


def born(truth: Truth, number: int) -> None:
    truth.born(number, PARAMS, DISTRIBUTIONS, {"identity": f"k{number}"})


def told(truth: Truth, number: int, **constraints: float) -> bool:
    return truth.tell(number, TrialState.COMPLETE, [0.9, 100.0], constraints, {"ended": "finished", "rung": 2})


def optuna_alone(path: Path) -> optuna.Study:
    """As optuna-dashboard opens it."""
    storage = JournalStorage(JournalFileBackend(str(path)))
    (study,) = storage.get_all_studies()
    return optuna.load_study(study_name=study.study_name, storage=storage)


def facts(truth: Truth) -> list[Any]:
    return [(trial.number, trial.state, trial.values, trial.params, trial.user_attrs, trial.constraints) for trial in truth.trials()]


def test_optuna_alone_reads_what_was_told(path: Path) -> None:
    truth = opened(path)
    born(truth, 0)
    born(truth, 1)
    born(truth, 2)
    told(truth, 0)
    told(truth, 1, unfinished=0.5)
    study = optuna_alone(path)
    assert study.directions == [optuna.study.StudyDirection.MAXIMIZE, optuna.study.StudyDirection.MINIMIZE]
    assert [trial.state for trial in study.trials] == [TrialState.COMPLETE, TrialState.COMPLETE, TrialState.RUNNING]
    first, second, third = study.trials
    assert (first.params, first.distributions, first.values) == (PARAMS, DISTRIBUTIONS, [0.9, 100.0])
    assert first.user_attrs == {"identity": "k0", "end": {"ended": "finished", "rung": 2}}
    assert first.datetime_start is not None and first.datetime_complete is not None and third.datetime_complete is None
    assert second.constraints == {"unfinished": 0.5}
    assert [trial.number for trial in study.best_trials] == [0], "a stopped trial is not on the front"


def test_a_birth_is_one_record_and_the_end_is_the_last(path: Path) -> None:
    truth = opened(path)
    before = path.read_bytes().count(b"\n")
    born(truth, 0)
    assert path.read_bytes().count(b"\n") == before + 1
    told(truth, 0, unfinished=0.5, late=0.1)
    lines = path.read_bytes().splitlines(keepends=True)
    assert len(lines) == before + 1 + 4
    path.write_bytes(b"".join(lines[:-1]))
    assert opened(path).trials()[0].state is TrialState.RUNNING, "without its last record nothing was told"


def test_an_end_is_told_once(path: Path) -> None:
    truth = opened(path)
    born(truth, 0)
    assert told(truth, 0)
    before = path.read_bytes()
    assert not truth.tell(0, TrialState.FAIL, None, {"late": 1.0}, {"ended": "error"})
    assert not told(opened(path), 0)
    assert path.read_bytes() == before


def test_an_interrupted_end_can_be_told_again(path: Path) -> None:
    truth = opened(path)
    born(truth, 0)
    told(truth, 0, unfinished=0.5)
    whole = facts(truth)
    lines = path.read_bytes().splitlines(keepends=True)
    for kept in range(len(lines) - 3, len(lines)):  # after the birth, the attributes, the constraint
        path.write_bytes(b"".join(lines[:kept]))
        again = opened(path)
        assert told(again, 0, unfinished=0.5)
        assert facts(again) == whole == facts(opened(path))


def test_a_wrong_number_writes_nothing(path: Path) -> None:
    truth = opened(path)
    before = path.read_bytes()
    with pytest.raises(AssertionError, match="the next trial is 0, not 3"):
        born(truth, 3)
    assert path.read_bytes() == before


def test_a_record_torn_at_any_byte_is_cut(path: Path) -> None:
    truth = opened(path)
    born(truth, 0)
    start = path.stat().st_size
    told(truth, 0)
    born(truth, 1)
    data = path.read_bytes()
    last = data.rfind(b"\n", 0, -1) + 1
    for size in [*range(0, start, 7), *range(last, len(data))]:
        path.write_bytes(data[:size])
        truth = opened(path)
        number = len(truth.trials())
        born(truth, number)
        assert [trial.number for trial in optuna_alone(path).trials] == list(range(number + 1))
        assert number == (1 if size >= last else 0)


def test_the_lock_of_a_dead_driver_costs_no_time(path: Path) -> None:
    opened(path)
    os.symlink(path, f"{path}.lock")
    Path(f"{path}.lock1234.rename").touch()
    start = time.monotonic()
    born(opened(path), 0)
    assert time.monotonic() - start < 5, "Optuna would wait for 30 s"
    assert optuna_alone(path).trials[0].number == 0
    assert not list(path.parent.glob("*.lock*"))


def test_opening_again_writes_nothing_and_a_renamed_folder_keeps_its_study(path: Path) -> None:
    born(opened(path, "digits"), 0)
    before = path.read_bytes()
    assert len(opened(path, "digits").trials()) == 1
    assert len(opened(path, "renamed").trials()) == 1
    assert path.read_bytes() == before


@pytest.mark.parametrize(("rung", "step"), [(-1, 0), (0, 0), (2, 2)])
def test_the_value_of_a_pruned_trial_lies_at_its_rung(rung: int, step: int, path: Path) -> None:
    """Where the fit set of a resumed search and that of one that went on look for it too."""
    truth = Truth.open(path, "digits", ["maximize"])
    born(truth, 0)
    truth.tell(0, TrialState.PRUNED, [0.5], {}, {"rung": rung})
    (trial,) = optuna_alone(path).trials
    assert trial.intermediate_values == {step: 0.5} == scores(trial)


def test_one_objective_works_too(path: Path) -> None:
    truth = Truth.open(path, "digits", ["maximize"])
    born(truth, 0)
    truth.tell(0, TrialState.COMPLETE, [0.9], {}, {})
    assert optuna_alone(path).best_value == 0.9
