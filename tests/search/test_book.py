"""The book: what runs, what goes on, and how an end is told."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from searches import curve, outcome, reports, resume, search, start, trials

from distprune.errors import UserError
from distprune.search import driver
from distprune.search.known import MOST_DUPLICATES
from distprune.search.simulate import Simulator
from distprune.search.trial import Job
from distprune.store.files import lock
from distprune.store.folder import RunFolder

pytestmark = pytest.mark.usefixtures("no_finale")


def _ending(ended: str) -> Any:
    def failing(job: Job) -> Iterator[dict[str, Any]]:
        rows = curve(job)
        if job.number != 1:
            yield from rows
            return
        first = next(rows)
        yield first
        yield {**first, "index": 1, "final": True, "ended": ended, "objective": None, "extra": '{"reason": "it broke"}'}

    return failing


@pytest.mark.parametrize("ended", ["nan", "error", "oom"])
def test_a_failed_trial_is_told_as_failed_with_its_reason_and_the_search_goes_on(ended: str, tmp_path: Path) -> None:
    folder = start(search(tmp_path), using=_ending(ended))
    rows = trials(folder)
    assert rows[1].state.name == "FAIL" and rows[1].user_attrs["end"]["ended"] == ended
    assert rows[1].user_attrs["end"]["reason"] == "it broke"
    assert len(rows) == 8 and all(trial.state.is_finished() for trial in rows)
    whole = start(search(tmp_path, name="whole"))
    assert [trial.params for trial in trials(whole)] == [trial.params for trial in rows], "proposals of a random sampler are unaffected"


def test_stopped_trials_carry_values_and_a_violated_constraint(tmp_path: Path) -> None:
    folder = start(search(tmp_path, trials=20))
    stopped = [trial for trial in trials(folder) if trial.user_attrs["end"]["ended"] == "stopped"]
    assert stopped
    for trial in stopped:
        assert trial.state.name == "COMPLETE" and trial.constraints["unfinished"] > 0 and trial.values is not None
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    study = optuna.load_study(study_name="s", storage=JournalStorage(JournalFileBackend(str(folder.journal))))
    assert not {trial.number for trial in study.best_trials} & {trial.number for trial in stopped}, "a stopped trial is never on the front"


def test_the_longer_a_stopped_trial_ran_the_less_it_violates() -> None:
    from toys import recipe

    from distprune.search.entry import Entry
    from distprune.search.goals import Goals
    from distprune.search.verdict import verdict

    def constraint(rung: int) -> float:
        last = {"kept": 100, "sparsity": 0.5, "objective": 0.5}
        entry = Entry(0, recipe(sparsity=0.9), "", rung=rung, best=0.5, last=last, stopped="rung")
        return verdict(entry, 4, Goals())[3]["unfinished"]

    found = [constraint(rung) for rung in range(4)]
    assert found == sorted(found, reverse=True) and min(found) > 0


def test_equal_recipes_run_once(tmp_path: Path) -> None:
    space = {"paradigm": ["at_init"], "criterion": ["magnitude", "random"], "allocator": ["erk"], "regularizer": ["none"], "sparsity": 0.9}
    folder = start(search(tmp_path, trials=10, space=space, scheduler="none"))
    ends = [trial.user_attrs["end"] for trial in trials(folder)]
    assert [end["ended"] for end in ends].count("finished") == 2 and [end["ended"] for end in ends].count("duplicate") == 8
    assert len(reports(folder)) == 2
    assert all(not trial.constraints["duplicate"] <= 0 for trial in trials(folder) if trial.user_attrs["end"]["ended"] == "duplicate")


def test_a_space_that_is_exhausted_stays_so(tmp_path: Path) -> None:
    """However often it is resumed, and killed on the way: as many are answered in a row as without."""
    space = {"paradigm": ["at_init"], "criterion": ["magnitude", "random"], "allocator": ["erk"], "regularizer": ["none"], "sparsity": 0.9}
    whole = outcome(start(search(tmp_path / "whole", trials=500, space=space, scheduler="none"), workers=1))
    assert MOST_DUPLICATES < len(whole) < 2 * MOST_DUPLICATES
    folder = start(search(tmp_path / "short", trials=len(whole) - 7, space=space, scheduler="none"), workers=1)
    assert outcome(resume(folder.path, workers=1, trials=500)) == whole
    assert outcome(resume(folder.path, workers=1)) == outcome(resume(folder.path, workers=1, trials=900)) == whole


def test_a_smaller_limit_of_time_leaves_what_was_told_alone(tmp_path: Path) -> None:
    def timed(job: Job) -> Iterator[dict[str, Any]]:
        yield from ({**row, "wall_s": 10.0 * (row["index"] + 1)} for row in curve(job))

    fronts: list[dict[int, Any]] = []

    def noting(event: str, facts: dict[str, Any]) -> None:
        if event == "finishing":
            fronts.append(facts["front"])

    value = search(tmp_path, scheduler="none")
    driver.start(value, engine=Simulator(timed, workers=1), listen=noting)
    before = outcome(RunFolder(value.folder))
    driver.resume(value.folder, limits={"trial_wall": 15.0}, engine=Simulator(timed, workers=1), listen=noting)
    assert len(fronts[0]) > 1 and fronts[1] == fronts[0] and outcome(RunFolder(value.folder)) == before
    longer = outcome(resume(value.folder, workers=1, using=timed, trials=10))
    assert [end for _, _, end, _, _ in longer[8:]] == ["timeout"] * 2, "for those that come it holds"


def test_a_cost_limit_stops_what_runs_and_says_so(tmp_path: Path) -> None:
    folder = start(search(tmp_path, limits={"trials": 50, "cost": 4000}, scheduler="none"), workers=4)
    rows = trials(folder)
    assert len(rows) == 4 and all(trial.state.is_finished() for trial in rows)
    assert "limit" in [trial.user_attrs["end"]["reason"] for trial in rows]


def test_a_limit_ends_what_was_interrupted_too(tmp_path: Path) -> None:
    """Driver dies with trials running, and the limit holds when it comes back: none stays RUNNING."""

    def dying(job: Job) -> Iterator[dict[str, Any]]:
        for row in curve(job):
            yield row
            if row["index"] == 2 and job.number == 3:
                raise KeyboardInterrupt

    value = search(tmp_path, trials=50, scheduler="none")
    with pytest.raises(KeyboardInterrupt):
        start(value, workers=4, using=dying)
    folder = resume(value.folder, workers=1, cost=2500)
    assert all(trial.state.is_finished() for trial in trials(folder))
    assert {trial.user_attrs["end"]["reason"] for trial in trials(folder)} == {"limit"}


def test_a_time_limit_stops_the_search(tmp_path: Path) -> None:
    folder = start(search(tmp_path, limits={"trials": 50, "wall": 1e-9}))
    assert trials(folder) == []
    resume(folder.path, wall=1e9, trials=3)
    assert [trial.user_attrs["end"]["ended"] for trial in trials(folder)].count("finished") >= 1


@pytest.mark.parametrize("limits", [{"trials": 0}, {"cost": -1.0}])
def test_a_bad_limit_leaves_the_run_as_it_was(limits: dict[str, Any], tmp_path: Path) -> None:
    folder = start(search(tmp_path, trials=2))
    before = folder.search_yaml.read_bytes()
    with pytest.raises(UserError, match="must be above 0"):
        resume(folder.path, **limits)
    assert folder.search_yaml.read_bytes() == before


def test_a_run_in_use_is_not_touched(tmp_path: Path) -> None:
    folder = start(search(tmp_path, trials=2))
    before = folder.search_yaml.read_bytes()
    with lock(folder.path), pytest.raises(UserError, match="is in use by process"):
        resume(folder.path, trials=9)
    assert folder.search_yaml.read_bytes() == before


def test_a_zombies_reports_are_ignored(tmp_path: Path) -> None:
    def twice(job: Job) -> Iterator[dict[str, Any]]:
        for row in curve(job):
            yield row
            if not row["final"]:
                yield {**row, "objective": 0.0}

    assert outcome(start(search(tmp_path / "a"), workers=1, using=twice)) == outcome(start(search(tmp_path / "b"), workers=1))


def test_every_candidate_is_in_a_first_trial(tmp_path: Path) -> None:
    folder = start(search(tmp_path, trials=12, space={"paradigm": ["dense", "at_init", "rigl"]}))
    values = {value for trial in trials(folder) for value in trial.params.values()}
    assert {"dense", "at_init", "rigl", "magnitude", "snip", "grasp", "synflow", "random"} <= values
    assert {"erk", "uniform", "global", "lamp", "per_layer", "power", "l1", "l2", "none", "growing_l2"} <= values


@pytest.mark.parametrize("sampler", ["tpe", "random", "nsga2"])
def test_samplers_live_through_a_search_and_a_resume(sampler: str, tmp_path: Path) -> None:
    one = start(search(tmp_path / "a", trials=18, sampler=sampler), workers=1)
    two = start(search(tmp_path / "b", trials=13, sampler=sampler), workers=1)
    resume(two.path, workers=1, trials=18)
    assert outcome(one) == outcome(two), "a proposal is a function of seed, number and fit set"


def test_workers_do_not_change_what_one_trial_is(tmp_path: Path) -> None:
    one = trials(start(search(tmp_path / "a", scheduler="none"), workers=1))
    five = trials(start(search(tmp_path / "b", scheduler="none"), workers=5))
    assert [(t.params, t.values) for t in one] == [(t.params, t.values) for t in five]
