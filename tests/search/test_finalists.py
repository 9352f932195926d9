"""Finalists: the best of the front are run again over further seeds, and are compared with nothing."""

import json
import os
import shutil
import signal
import statistics
from pathlib import Path
from typing import Any

import pytest
from searches import STEPS, outcome, reports, resume, search, start, trials

from distprune.core.recipe import Recipe
from distprune.result import Result
from distprune.search import driver
from distprune.search.finale import close_tables
from distprune.search.volume import contributions
from distprune.store import files

OWN = 6


@pytest.fixture(autouse=True)
def _tables_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "finalize", close_tables)


def _search(storage: Path, **changes: Any) -> Any:
    return search(storage, **{"trials": OWN, "finalists": {"count": 2, "seeds": 3}, "scheduler": "none", **changes})


def test_the_best_are_repeated_over_seeds_with_mean_and_spread(tmp_path: Path) -> None:
    folder = start(_search(tmp_path / "a"))
    plain = start(search(tmp_path / "b", trials=OWN, scheduler="none"))
    assert outcome(folder)[:OWN] == outcome(plain), "the search itself is the same"
    found = trials(folder)
    repeats = found[OWN:]
    rows = {row["number"]: row for row in Result(folder.path).trials.to_pylist()}
    front = {number: (row["objective"], row["sparsity"]) for number, row in rows.items() if row["pareto"]}
    assert set(front) == {row["number"] for row in Result(plain.path).trials.to_pylist() if row["pareto"]}
    worth = contributions({number: (*found[number].values[:1], -found[number].values[1]) for number in front})
    best = sorted(sorted(front, key=lambda number: (-worth[number], number))[:2])
    assert [trial.user_attrs["repeat_of"] for trial in repeats] == best * 3
    assert [trial.user_attrs["repeat"] for trial in repeats] == [1, 1, 2, 2, 3, 3]
    for trial in repeats:
        recipe, original = Recipe.read(trial.user_attrs["recipe"]), Recipe.read(found[trial.user_attrs["repeat_of"]].user_attrs["recipe"])
        assert recipe.seed != original.seed and {**recipe.plain(), "seed": 0} == {**original.plain(), "seed": 0}
        assert trial.constraints["repeat"] > 0 and not rows[trial.number]["pareto"]
    for number in best:
        values = [trial.values[0] for trial in repeats if trial.user_attrs["repeat_of"] == number]
        row = rows[number]
        assert row["seeds"] == 3 and row["mean"] == pytest.approx(statistics.fmean(values))
        assert row["spread"] == pytest.approx(statistics.stdev(values))
    assert all(rows[number]["seeds"] is None for number in rows if number not in best)


def test_a_finished_search_with_finalists_changes_no_more_and_goes_on_as_without(tmp_path: Path) -> None:
    folder = start(_search(tmp_path / "a"), workers=1)
    before = outcome(folder)
    assert outcome(resume(folder.path, workers=1)) == before
    longer = resume(folder.path, workers=1, trials=2 * OWN)
    own = [trial for trial in trials(longer) if "repeat_of" not in trial.user_attrs]
    plain = trials(start(search(tmp_path / "b", trials=2 * OWN, scheduler="none"), workers=1))
    assert [(t.params, t.values) for t in own] == [(t.params, t.values) for t in plain]
    after = trials(longer)
    pairs = [(t.user_attrs["repeat_of"], t.user_attrs["repeat"]) for t in after if "repeat_of" in t.user_attrs]
    assert len(set(pairs)) == len(pairs), "who was a finalist already is not run again"


def test_a_limit_of_cost_holds_for_the_search_and_not_for_its_finalists(tmp_path: Path) -> None:
    limits = {"trials": 50, "cost": 320.0 * STEPS * 4}
    folder = start(search(tmp_path, limits=limits, scheduler="none", finalists={"count": 1, "seeds": 2}), workers=1)
    kinds = ["repeat_of" in trial.user_attrs for trial in trials(folder)]
    assert kinds[-2:] == [True, True] and 4 <= kinds.index(True) <= 5
    assert trials(folder)[-1].user_attrs["end"]["ended"] == "finished"


def test_what_finalists_cost_is_beyond_the_limit_of_an_extended_search(tmp_path: Path) -> None:
    whole, more = 320.0 * STEPS, {"count": 2, "seeds": 3}
    folder = start(search(tmp_path / "a", limits={"trials": 50, "cost": 5 * whole}, scheduler="none", finalists=more), workers=1)
    resume(folder.path, workers=1, cost=10 * whole)
    plain = start(search(tmp_path / "b", limits={"trials": 50, "cost": 10 * whole}, scheduler="none"), workers=1)
    own = [trial for trial in trials(folder) if "repeat_of" not in trial.user_attrs]
    assert [(t.params, t.values) for t in own] == [(t.params, t.values) for t in trials(plain)] and len(own) == 10


@pytest.mark.parametrize("mode", ["before", "half", "after"])
def test_finalists_survive_a_kill_at_every_write(mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the last writes of the search itself to the end: the same repeats, each once, with the same values."""
    count, original = [0], files._write

    def counting(descriptor: int, data: Any) -> int:
        count[0] += 1
        return original(descriptor, data)

    monkeypatch.setattr(files, "_write", counting)
    value = _search(tmp_path / "whole", trials=3, finalists={"count": 1, "seeds": 2})
    expected = _told(start(value))
    monkeypatch.setattr(files, "_write", original)
    for at in range(count[0] // 2, count[0], 3):
        value = _search(tmp_path / "killed", trials=3, finalists={"count": 1, "seeds": 2})
        if child := os.fork():
            _, status = os.waitpid(child, 0)
            assert os.WIFSIGNALED(status)
        else:
            _die_at(value, at, mode)
        assert _told(resume(value.folder)) == expected
        shutil.rmtree(tmp_path / "killed")


def _told(folder: Any) -> list[Any]:
    """Each trial's end; repeats of two workers may be born in either order of the trials that they wait for, but not in another."""
    rows = reports(folder)
    assert all([row["index"] for row in rows[number]] == list(range(STEPS)) for number in rows)
    return [(t.number, t.values, t.user_attrs.get("repeat_of"), t.user_attrs.get("repeat"), json.dumps(t.params)) for t in trials(folder)]


def _die_at(value: Any, at: int, mode: str) -> None:
    count, original = [0], files._write

    def dying(descriptor: int, data: Any) -> int:
        count[0] += 1
        if count[0] < at:
            return original(descriptor, data)
        if mode == "half":
            original(descriptor, bytes(data)[: len(data) // 2])
        if mode == "after":
            original(descriptor, data)
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError

    files._write = dying
    try:
        start(value)
    finally:
        os._exit(0)
