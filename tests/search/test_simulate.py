"""The simulator: recorded trials are looked up as they were, on a clock of their own, and what is simulated never passes for real."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from searches import STEPS, curve, search, start, trials

from distprune.cli import main
from distprune.core.recipe import Recipe
from distprune.errors import UserError
from distprune.result import Result
from distprune.search import driver, recorded
from distprune.search.recorded import Recorded, Recording
from distprune.search.simulate import Curve
from distprune.search.trial import Job
from distprune.store.folder import RunFolder
from distprune.store.reports import read

pytestmark = pytest.mark.usefixtures("no_finale")
SPACE = {"paradigm": ["at_init", "gradual"], "criterion": ["magnitude", "random"], "allocator": "erk", "regularizer": "none"}


def timed(job: Job) -> Iterator[dict[str, Any]]:
    """The made-up curve of a trial of which a report takes half a second more than the one before."""
    for row in curve(job):
        yield {**row, "wall_s": 0.5 * (row["index"] + 1) * (row["index"] + 2) / 2}


def record(storage: Path, *, trials: int = 20, using: Curve = timed, **changes: Any) -> RunFolder:
    """A run folder to simulate from."""
    from distprune.search.finale import close_tables

    value = search(storage, name="recorded", trials=trials, **{"space": SPACE, "scheduler": "none", **changes})
    original, driver.finalize = driver.finalize, close_tables
    try:
        return start(value, using=using)
    finally:
        driver.finalize = original


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """Twenty trials, not stopped; only read."""
    return record(tmp_path_factory.mktemp("recorded"))


def simulate(run: RunFolder, storage: Path, *, workers: int = 1, **changes: Any) -> Result:
    value = search(storage, name="simulated", **{"space": SPACE, "scheduler": "none", **changes})
    return Result(driver.simulate(value, recorded=Recorded(run.path), workers=workers, listen=lambda event, facts: None).path)


@pytest.mark.parametrize("limit", ["trial_wall", "wall"])
def test_limits_of_time_act_while_a_trial_says_nothing(limit: str, tmp_path: Path) -> None:
    """One report in nine hours: its worker is free when its time is up, and no report is heard after that of the search."""

    def hanging(job: Job) -> Iterator[dict[str, Any]]:
        for row in timed(job):
            yield {**row, "wall_s": 32400.0 + row["index"] if job.number == 0 and row["index"] > 1 else row["wall_s"]}

    result = simulate(record(tmp_path, using=hanging), tmp_path, limits={"trials": 4, limit: 20.0})
    ends = [(trial.user_attrs["end"]["ended"], trial.user_attrs["end"]["reason"]) for trial in trials(result.folder)]
    assert [len(rows) for rows in by_trial(result.folder).values()] == [2, *[STEPS] * (len(ends) - 1)]
    time = yaml.safe_load(result.folder.search_yaml.read_text())["simulated"]["time"]
    if limit == "wall":
        assert ends == [("stopped", "limit")] and time == 20.0
    else:
        assert ends == [("timeout", "it ran for 20 s, and limits.trial_wall is 20"), *[("finished", "")] * 3]
        assert time == pytest.approx(20 + 3 * 0.5 * STEPS * (STEPS + 1) / 2)


def by_trial(run: RunFolder) -> dict[int, list[dict[str, Any]]]:
    found: dict[int, list[dict[str, Any]]] = {}
    for row in read(run.reports).to_pylist():
        found.setdefault(row["trial"], []).append(row)
    return found


def job(recipe: dict[str, Any], *, rungs: list[int] | None = None, known: int = 0) -> Job:
    return Job(
        number=7,
        recipe=recipe,
        folder="",
        rungs=rungs or [],
        report_every="1ep",
        recovery="1it",
        known=known,
        threads=1,
        device="cpu",
        working_dir=".",
    )


def test_a_recipe_that_was_recorded_is_answered_by_itself(run: RunFolder) -> None:
    found, real = Recorded(run.path), by_trial(run)
    assert found.usable == sum(row.row["ended"] == "finished" for row in Result(run.path).rows()) > 8
    for trial in Result(run.path).rows():
        if trial.row["ended"] == "finished":
            rows = list(found.curve(job(trial.recipe)))
            columns = ("index", "cost", "kept", "objective", "final", "ended", "step", "sparsity")
            assert [[row[c] for c in columns] for row in rows] == [[row[c] for c in columns] for row in real[trial.number]]


def test_the_same_search_simulated_is_the_same_search(run: RunFolder, tmp_path: Path) -> None:
    """Same seed, same space, no scheduler: every proposal was recorded, so parameters, values and bill are those of the real run."""
    again = simulate(run, tmp_path, trials=20, workers=2)
    columns = ("number", "ended", "parameters", "objective", "kept", "cost", "pareto")
    assert [[t.row[c] for c in columns] for t in again.rows()] == [[t.row[c] for c in columns] for t in Result(run.path).rows()]
    assert again.hypervolume() == Result(run.path).hypervolume() > 0


def test_distances_count_in_spans_and_densities_in_their_logarithm(tmp_path: Path) -> None:
    """0.02 is nearer to 0.04 than to 0.001, though not by difference; and another allocator is a whole span."""
    space = {"paradigm": "at_init", "criterion": "magnitude", "allocator": ["erk", "uniform"], "regularizer": "none"}
    run = record(tmp_path, space={**space, "sparsity": [0.5, 0.9, 0.96, 0.999]}, trials=60)
    recipes = {(t.recipe["allocator"], t.recipe["sparsity"]): t for t in Result(run.path).rows() if t.row["ended"] == "finished"}
    found = Recorded(run.path)
    assert len(recipes) == 8 == found.usable
    for allocator in ("erk", "uniform"):
        asked = {**recipes[allocator, 0.999].recipe, "sparsity": 0.98}
        answer = list(found.curve(job(asked)))[-1]
        assert (answer["sparsity"], answer["objective"]) == (0.96, recipes[allocator, 0.96].row["objective"])


def test_only_finished_trials_count(tmp_path: Path) -> None:
    run = record(tmp_path, trials=40, scheduler="pareto_halving")
    ends = [trial.row["ended"] for trial in Result(run.path).rows()]
    assert "stopped" in ends
    assert Recorded(run.path).usable == ends.count("finished") and Recorded(run.path).trials == 40


def test_too_few_other_paradigms_and_other_networks_are_refused(run: RunFolder, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has 3 finished trials, and a simulation needs 8 .* Record a search with scheduler: none"):
        Recorded(record(tmp_path / "few", trials=3).path)
    with pytest.raises(UserError, match="has no finished trial of paradigm rigl. Write space.paradigm: \\[at_init, gradual\\]"):
        simulate(run, tmp_path, space={**SPACE, "paradigm": ["at_init", "rigl"]})
    from toys import BASE

    other = {**BASE, "train": {**BASE["train"], "batch_size": 64}}
    with pytest.raises(UserError, match="was recorded with recipe.train "):
        simulate(run, tmp_path, recipe=other)
    with pytest.raises(UserError, match="workers must be at least 1, got 0"):
        simulate(run, tmp_path, workers=0)
    assert not (tmp_path / "simulated").exists(), "nothing is written before everything is checked"


def test_virtual_time_is_that_of_the_trials(run: RunFolder, tmp_path: Path) -> None:
    """A trial takes 0.5 * (1 + ... + 6) = 10.5 seconds: n trials on w workers take n / w times that, rounded up."""
    ran = sum(row.row["ended"] == "finished" for row in simulate(run, tmp_path / "1", trials=9).rows())
    for workers in (1, 2, 4):
        result = simulate(run, tmp_path / str(workers * 10), trials=9, workers=workers)
        assert result.folder.simulated() is not None
        assert result.folder.simulated()["time"] == pytest.approx(10.5 * -(-ran // workers))


def test_a_limit_of_time_is_one_of_virtual_time(run: RunFolder, tmp_path: Path) -> None:
    result = simulate(run, tmp_path, limits={"trials": 20, "wall": 25.0})
    ends = [row.row["ended"] for row in result.rows() if row.row["ended"] != "duplicate"]
    assert ends == ["finished", "finished", "stopped"], "10.5 s each, one after the other"


def _recording(scores: dict[int, float], kept: list[int]) -> Recording:
    rows = [
        {"index": i, "cost": 100.0 * 2**i, "objective": 0.1 * i, "score": scores.get(i), "kept": k, "final": i == len(kept) - 1}
        for i, k in enumerate(kept)
    ]
    return Recording({}, rows)


def test_scores_are_of_the_nearest_scored_report_and_never_of_the_end() -> None:
    """Reports at 100, 200, 400, 800, 1600; scored at 400: it stands for 200 to 800 and for nothing else."""
    trial = _recording({2: 0.7}, [50, 50, 50, 50, 10])
    assert [trial.score(row) for row in trial.rows[:-1]] == [None, 0.7, 0.7, 0.7]
    pruned = _recording({}, [50, 10, 10, 10, 10])
    assert [pruned.score(row) for row in pruned.rows[:-1]] == [None, 0.1, 0.2, pytest.approx(0.3)], "on its final budget it is what it is"


def test_rungs_of_the_job_are_crossed_where_the_trial_is_judged(run: RunFolder) -> None:
    recipe = next(row.recipe for row in Result(run.path).rows() if row.row["ended"] == "finished")
    rows = list(Recorded(run.path).curve(job(recipe, rungs=[640, 1000])))  # reports at 320, 640, 960, 1280, ...
    assert [row["rung"] for row in rows] == [-1, 0, 0, 1, 1, 1]
    assert [row["index"] for row in rows if row["score"] is not None] == [1, 3, STEPS - 1]
    rest = list(Recorded(run.path).curve(job(recipe, rungs=[640, 1000], known=2)))
    assert [row["index"] for row in rest] == [2, 3, 4, 5] and [row["rung"] for row in rest] == [0, 1, 1, 1]


def test_a_scheduler_saves_samples_on_the_same_curves(run: RunFolder, tmp_path: Path) -> None:
    bills = {
        scheduler: sum(row.row["cost"] for row in simulate(run, tmp_path / scheduler, trials=20, scheduler=scheduler).rows())
        for scheduler in ("none", "pareto_halving")
    }
    assert bills["pareto_halving"] < bills["none"]


def test_attempts_are_summed() -> None:
    rows = [
        {"index": 0, "attempt": "a", "wall_s": 2.0, "spent": 10.0, "final": False},
        {"index": 1, "attempt": "a", "wall_s": 3.0, "spent": 20.0, "final": False},
        {"index": 2, "attempt": "b", "wall_s": 1.5, "spent": 10.0, "final": True},
    ]
    assert [(row["wall_s"], row["spent"]) for row in recorded._whole(rows)] == [(2.0, 10.0), (3.0, 20.0), (4.5, 30.0)]
    assert recorded._whole(rows[:2]) == [] and recorded._whole([rows[0], rows[2]]) == [], "cut short, or with a gap"


def test_a_simulated_run_is_marked_and_refuses_what_needs_networks(
    run: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "s.yaml"
    config.write_text(yaml.safe_dump(json.loads(json.dumps(search(tmp_path, name="x", space=SPACE).plain()))))
    assert main(["search", str(config), "--simulate", str(run.path), "--workers", "3", "--trials", "6"]) == 0
    output = capsys.readouterr().out
    assert "of its 20 trials are finished and answer" in output and "Virtual time on 3 workers" in output and "Hypervolume" in output
    path = str(tmp_path / "x")
    assert yaml.safe_load((tmp_path / "x" / "search.yaml").read_text())["simulated"]["run"] == str(run.path)
    for arguments in (["resume", path], ["export", path, "--to", str(tmp_path / "e")], ["replay", path, "0"]):
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert "is a simulated search" in error and error.count("\n") == 1, error
    assert main(["search", str(config), "--name", "y", "--simulate", path]) == 2
    assert "it cannot be simulated from" in capsys.readouterr().err
    assert main(["search", str(config), "--name", "y", "--workers", "3"]) == 2
    assert "workers are those of a simulated search" in capsys.readouterr().err


def test_values_of_a_recipe_are_named_and_logarithmic_where_they_are_searched_so() -> None:
    import math

    from toys import recipe

    values = recorded._values(Recipe.read({**recipe("gradual", sparsity=0.9).plain(), "criterion": {"name": "snip", "batches": 2}}))
    assert values["density"] == pytest.approx(math.log(0.1)) and values["criterion"] == "snip" and values["criterion.snip.batches"] == 2.0
    assert "paradigm" not in values and "seed" not in values
