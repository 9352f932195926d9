"""Promotion: trials wait at rungs, and the best of those that wait go on; what is told of those that never do."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
from laws import NONE, alone, broken, replayed, told
from optuna.trial import TrialState
from searches import STEPS, curve, reports, resume, search, start, trials
from test_kill import _killed_at, quick_and_the_same_each_time  # noqa: F401  # a fixture of every test here

from distprune.search import driver
from distprune.search.finale import close_tables
from distprune.search.trial import Job
from distprune.store.folder import RunFolder

PROMOTE = {"name": "pareto_halving", "reduction": 2, "front": 0.0, "variant": "promote"}
ASHA = {"minimize": [], "scheduler": {"name": "halving", "reduction": 2, "variant": "promote"}}


@pytest.fixture(autouse=True)
def only_tables_in_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Made-up curves leave no networks to measure on the test split."""
    monkeypatch.setattr(driver, "finalize", close_tables)


def _ends(folder: RunFolder) -> list[str]:
    return [trial.user_attrs["end"]["ended"] for trial in trials(folder)]


@pytest.mark.parametrize("workers", [1, 3])
def test_every_trial_waits_and_the_best_go_on(workers: int, tmp_path: Path) -> None:
    """Of the trials that came to a rung, as many go on as its rule allows of all of them, and those are the best by then."""
    folder = start(search(tmp_path, trials=16, **ASHA), workers=workers)
    rows, ended = reports(folder), trials(folder)
    assert all(trial.state.is_finished() for trial in ended) and len(ended) == 16
    first = {number: next(row["score"] for row in rows[number] if row["rung"] == 0) for number in rows}
    on = {number for number in rows if rows[number][-1]["index"] > next(row["index"] for row in rows[number] if row["rung"] == 0)}
    best = sorted(first, key=lambda number: (-first[number], number))[: (len(first) + 1) // 2]
    assert set(best) <= on, "what is among the best in the end went on, however early it came"
    stopped = set(first) - on
    assert stopped and all(ended[number].user_attrs["end"]["reason"] == "rung" for number in stopped)
    assert "finished" in _ends(folder)


def test_a_trial_that_waits_is_gone_on_with_from_its_checkpoint(tmp_path: Path) -> None:
    """Each report is made once; a later attempt sends only what lies after the rung."""
    made: dict[int, list[int]] = {}

    def watched(job: Job) -> Iterator[dict[str, Any]]:
        for row in curve(job):
            made.setdefault(job.number, []).append(row["index"])
            yield row

    folder = start(search(tmp_path, trials=12, scheduler=PROMOTE), workers=1, using=watched)
    assert all(indices == list(range(len(indices))) for indices in made.values())
    attempts = [trial.user_attrs["end"]["attempts"] for trial in trials(folder)]
    assert max(attempts) > 1 and min(attempts) == 1


def test_while_trials_wait_their_checkpoints_are_kept(tmp_path: Path) -> None:
    """A trial is told as running while it waits, and its checkpoint outlives sweeps; both go when it is told as stopped."""
    came: set[int] = set()
    held = []

    def watched(job: Job) -> Iterator[dict[str, Any]]:
        state = RunFolder(Path(job.folder))
        waiting = [number for number in came if not trials(state)[number].state.is_finished()]
        assert all(any((state.checkpoints / str(number)).iterdir()) for number in waiting)
        held.extend(waiting)
        for row in curve(job):
            came.add(job.number) if row["rung"] >= 0 and not row["final"] else came.discard(job.number)
            yield row

    folder = start(search(tmp_path, trials=12, scheduler=PROMOTE), workers=2, using=watched)
    ended = trials(folder)
    stopped = [trial.number for trial in ended if trial.user_attrs["end"]["ended"] == "stopped"]
    assert held and stopped and not any((folder.checkpoints / str(number)).exists() for number in stopped)


def test_the_search_that_promotes_runs_less_than_one_without_stopping_and_finds_the_same_best(tmp_path: Path) -> None:
    """Scores at rungs rank as final values do here, so that the best is among those that go on."""
    whole = start(search(tmp_path / "whole", trials=16, minimize=[], scheduler="none"), workers=1)
    folder = start(search(tmp_path / "promoted", trials=16, **ASHA), workers=2)

    def best(of: RunFolder) -> Any:
        finished = [trial for trial in trials(of) if trial.user_attrs["end"]["ended"] == "finished"]
        return max(finished, key=lambda trial: trial.values[0]).params

    assert best(folder) == best(whole)
    assert sum(map(len, reports(folder).values())) < 16 * STEPS


@pytest.mark.parametrize(("workers", "changes"), [(1, {"sampler": {"name": "tpe", "startup": 2}}), (2, {})], ids=["one worker", "two"])
def test_killed_while_trials_wait(workers: int, changes: dict[str, Any], tmp_path: Path) -> None:
    """At every eleventh write: none is lost, none run twice, ends follow from the reports; on one worker all is as undisturbed."""
    changes = {"scheduler": PROMOTE, **changes}
    whole = start(search(tmp_path / "whole", trials=6, **changes), workers=workers)
    moment, killed = 2, True
    while killed:
        value = search(tmp_path / f"at{moment}", trials=6, **changes)
        killed = _killed_at(value, moment, ("before", "half", "after")[moment % 3], workers=workers)
        folder = resume(value.folder, workers=workers)
        reference = alone(folder, curve, tmp_path / "alone")
        assert broken(folder, most=6, reference=reference, aside=tmp_path / "replayed") == NONE, moment
        if workers == 1:
            assert told(folder) == told(whole), moment
        moment += 11
    assert moment > 40


def test_decisions_follow_from_the_stream_alone(tmp_path: Path) -> None:
    folder = start(search(tmp_path, trials=12, scheduler=PROMOTE), workers=3)
    assert told(replayed(folder, tmp_path / "again")) == told(folder) and set(_ends(folder)) == {"finished", "stopped"}


def test_what_was_stopped_where_it_waited_is_not_promoted_by_an_extended_search(tmp_path: Path) -> None:
    """A trial that was told does not go on: it would hold its worker and come to nothing."""
    folder = start(search(tmp_path, trials=8, scheduler=PROMOTE), workers=1)
    before, begun = _ends(folder), list[int]()

    def watched(job: Job) -> Iterator[dict[str, Any]]:
        begun.append(job.number)
        yield from curve(job)

    resume(folder.path, workers=1, trials=24, using=watched)
    assert "stopped" in before and _ends(folder)[:8] == before and len(trials(folder)) == 24
    assert begun and min(begun) >= 8


def test_a_search_that_is_interrupted_tells_nothing_of_what_waits(tmp_path: Path) -> None:
    def dying(job: Job) -> Iterator[dict[str, Any]]:
        for row in curve(job):
            yield row
            if job.number == 7:
                raise KeyboardInterrupt

    value = search(tmp_path, trials=8, scheduler=PROMOTE)
    with pytest.raises(KeyboardInterrupt):
        start(value, workers=2, using=dying)
    folder = RunFolder(value.folder)
    waiting = [trial.number for trial in trials(folder) if trial.state == TrialState.RUNNING]
    assert len(waiting) > 1, "what waits can still go on"
    before = reports(folder)
    resume(value.folder, workers=1)
    assert all(trial.state.is_finished() for trial in trials(folder))
    assert all(reports(folder)[number][: len(rows)] == rows for number, rows in before.items()), "nothing is run again"


def test_a_limit_ends_what_waits(tmp_path: Path) -> None:
    folder = start(search(tmp_path, limits={"trials": 50, "cost": 9000}, scheduler=PROMOTE), workers=2)
    assert all(trial.state.is_finished() for trial in trials(folder))
    assert {trial.user_attrs["end"]["reason"] for trial in trials(folder)} <= {"", "rung", "limit"}


def _taught(folder: RunFolder, sampler: optuna.samplers.BaseSampler) -> optuna.Study:
    """Optuna's own study of a run folder's trials."""
    found = trials(folder)
    study = optuna.create_study(directions=["maximize", "minimize"][: max(len(t.values or []) for t in found)], sampler=sampler)
    study.add_trials(found)
    return study


@pytest.mark.parametrize("sampler", ["tpe", "nsga2", "random"])
@pytest.mark.parametrize("variant", ["stop", "promote"])
@pytest.mark.parametrize("minimize", [[], ["params"]], ids=["one objective", "two objectives"])
def test_a_stopped_trial_is_never_among_the_best(sampler: str, variant: str, minimize: list[str], tmp_path: Path) -> None:
    """And never the value of one rung beside that of another, or of the end: it is PRUNED at its rung, or violates a constraint."""
    scheduler = {"name": "pareto_halving", "reduction": 2, "front": 0.0, "variant": variant}
    folder = start(search(tmp_path, trials=24, minimize=minimize, scheduler=scheduler, sampler=sampler))
    for trial in trials(folder):
        end = trial.user_attrs["end"]
        if end["ended"] == "stopped" and minimize:
            assert trial.state == TrialState.COMPLETE and trial.constraints["unfinished"] > 0
        elif end["ended"] == "stopped":
            scores = [row["score"] for row in reports(folder)[trial.number] if row["score"] is not None]
            assert trial.state == TrialState.PRUNED and trial.intermediate_values == {end["rung"]: max(scores)}
    stopped = {trial.number for trial in trials(folder) if trial.user_attrs["end"]["ended"] == "stopped"}
    study = _taught(folder, optuna.samplers.RandomSampler(seed=0))
    assert stopped and not stopped & {trial.number for trial in study.best_trials}


def _told(study: optuna.Study, x: float, score: float, rung: int | None, several: bool) -> None:
    """A trial as the room tells it: finished, or stopped at a rung."""
    from toys import recipe

    from distprune.search.entry import Entry
    from distprune.search.goals import Goals
    from distprune.search.verdict import verdict

    last = {"kept": 100, "sparsity": 0.5, "objective": score}
    end = {"ended": "finished"} if rung is None else {"stopped": "rung", "rung": rung}
    entry = Entry(0, recipe(sparsity=0.5), "", best=score, last=last, **end)  # type: ignore[arg-type]
    _, state, values, constraints = verdict(entry, 3, Goals() if several else Goals(minimize=()))
    trial = optuna.trial.create_trial(
        params={"x": x},
        distributions={"x": optuna.distributions.FloatDistribution(0, 1)},
        state=state,
        values=values,
        intermediate_values={rung or 0: score} if state == TrialState.PRUNED else {},
        constraints=constraints,
    )
    study.add_trial(trial)


@pytest.mark.parametrize("several", [False, True], ids=["one objective", "two objectives"])
def test_tpe_prefers_what_came_further_to_what_looked_better(several: bool) -> None:
    """Early scores of 0.99 at x = 0.1, full values of 0.5 at x = 0.9: a sampler that mixed them would propose the former."""
    directions = ["maximize", "minimize"] if several else ["maximize"]
    study = optuna.create_study(directions=directions, sampler=optuna.samplers.TPESampler(seed=0, n_startup_trials=1, multivariate=True))
    for index in range(30):
        _told(study, 0.1 + index / 1000, 0.99, 0, several)
    for index in range(6):
        _told(study, 0.9 + index / 1000, 0.5, None, several)
    proposed = [study.ask().suggest_float("x", 0, 1) for _ in range(10)]
    assert sorted(proposed)[3] > 0.5


def test_nsga_breeds_what_finished_before_what_was_stopped() -> None:
    """Deb's constrained dominance: of 20 trials, the ten that finished are the parents though the others' scores are higher."""
    sampler = optuna.samplers.NSGAIISampler(population_size=10, seed=0, mutation_prob=0.0, crossover_prob=0.0)
    study = optuna.create_study(directions=["maximize", "minimize"], sampler=sampler)
    for index in range(10):
        _told(study, 0.1 + index / 1000, 0.99, 0, True)
    for index in range(10):
        _told(study, 0.9 + index / 1000, 0.5, None, True)
    parents = sampler._elite_population_selection_strategy(study, study.trials)
    assert len(parents) == 10 and all(parent.params["x"] >= 0.9 for parent in parents)
