"""Rounds as results: what a trial came by on its way is what the recipe itself would have come to, and nobody trains for it."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from searches import job_in, outcome, reports, resume, search, start, trials
from toys import BASE, recipe

from distprune.core.masks import Masks
from distprune.core.recipe import Recipe
from distprune.search import tables
from distprune.search.byproducts import ByProducts
from distprune.search.config import Search
from distprune.search.entry import Entry
from distprune.search.proposer import Proposer
from distprune.search.replay import replay
from distprune.search.simulate import Curve
from distprune.search.space import Space
from distprune.search.trial import Job, run_trial
from distprune.store.folder import RunFolder
from distprune.store.trials import read_trials

pytestmark = pytest.mark.usefixtures("elsewhere")
ROUNDS = {"name": "finetune", "share": 0.6, "tune": "50%", "rate": "replay", "weights": "inherit"}
SPACE: dict[str, Any] = {
    "paradigm": [ROUNDS, "at_init"],
    "criterion": ["magnitude"],
    "allocator": ["erk", "uniform"],
    "regularizer": ["none"],
}


def _search(storage: Path, **changes: Any) -> Search:
    return search(storage, **{"trials": 4, "space": SPACE, "rounds": True, "scheduler": "none", **changes})


def _rounds(folder: RunFolder) -> list[Any]:
    return [trial for trial in trials(folder) if "round_of" in trial.user_attrs]


def test_a_round_is_what_its_recipe_comes_to_and_runs_nothing(tmp_path: Path) -> None:
    folder = start(_search(tmp_path), using=run_trial, workers=1)
    found = _rounds(folder)
    rows = {row["number"]: row for row in read_trials(folder.trials).to_pylist()}
    assert len(found) >= 2 and len({trial.user_attrs["identity"] for trial in found}) == len(found)
    for trial in found:
        parent, recipe = trials(folder)[trial.user_attrs["round_of"]], Recipe.read(trial.user_attrs["recipe"])
        whole = Recipe.read(parent.user_attrs["recipe"])
        assert recipe.sparsity < whole.sparsity and recipe.paradigm == whole.paradigm
        assert trial.params["density"] == pytest.approx(1 - recipe.sparsity)
        own = list(run_trial(job_in(tmp_path / f"own{trial.number}", number=trial.number, recipe=recipe.plain(), rungs=[])))[-1]
        row = rows[trial.number]
        assert (row["ended"], row["spent"], row["round_of"]) == ("finished", 0, parent.number)
        assert (row["objective"], row["kept"], row["cost"]) == (own["objective"], own["kept"], own["cost"])
        assert json.loads(row["layers"]) == json.loads(own["extra"])["layers"]
        if row["pareto"]:
            assert Masks.load(folder.masks_file(trial.number)).counts == json.loads(row["layers"])
    assert any(rows[trial.number]["pareto"] for trial in found)


def test_the_proposals_are_those_of_a_search_without(tmp_path: Path) -> None:
    with_rounds, without = (
        start(_search(tmp_path / str(rounds), rounds=rounds, sampler="tpe"), using=run_trial, workers=1) for rounds in (True, False)
    )

    def proposed(folder: RunFolder) -> list[Any]:
        return [(t.params, t.values, t.user_attrs["end"]["ended"]) for t in trials(folder) if "round_of" not in t.user_attrs]

    assert proposed(with_rounds) == proposed(without) and len(proposed(without)) == 4, "the limit is one of proposals"
    assert _rounds(with_rounds) and not _rounds(without)


@pytest.mark.parametrize("number", [1, 3])
def test_a_search_that_is_cut_goes_on_to_the_same(number: int, tmp_path: Path) -> None:
    whole = outcome(start(_search(tmp_path / "whole"), using=run_trial, workers=1))
    value = _search(tmp_path / "cut")
    with pytest.raises(KeyboardInterrupt):
        start(value, using=_dies_at(number), workers=1)
    assert outcome(resume(value.folder, using=run_trial, workers=1)) == whole


def _dies_at(number: int) -> Curve:
    def dying(job: Job) -> Iterator[dict[str, Any]]:
        if job.number == number:
            raise KeyboardInterrupt
        yield from run_trial(job)

    return dying


def test_a_stopped_trial_came_by_the_rounds_before_it(tmp_path: Path) -> None:
    space = {**SPACE, "paradigm": [ROUNDS]}
    value = _search(tmp_path, space=space, limits={"trials": 1, "cost": 2600})
    folder = start(value, using=run_trial, workers=1)
    first, *others = trials(folder)
    assert first.user_attrs["end"]["ended"] == "stopped" and first.user_attrs["end"]["reason"] == "limit"
    assert not others, "nothing runs beyond a limit"
    resume(folder.path, using=run_trial, workers=1, cost=1e9)
    came = [Recipe.read(trial.user_attrs["recipe"]).sparsity for trial in _rounds(folder)]
    billed = first.user_attrs["end"]["cost"]
    assert came == sorted(came) and came and max(came) < Recipe.read(first.user_attrs["recipe"]).sparsity
    assert all(rows[-1]["cost"] <= billed and rows[-1]["spent"] == 0 for n, rows in reports(folder).items() if n > 0)


def _losing(cache: Path) -> Curve:
    def losing(job: Job) -> Iterator[dict[str, Any]]:
        if not job.rungs:  # of a round
            shutil.rmtree(cache)
            cache.mkdir()
        yield from run_trial(job)

    return losing


def test_where_the_cache_has_lost_it_nothing_is_trained(tmp_path: Path) -> None:
    value = _search(tmp_path, trials=1, cache={"path": str(tmp_path / "cache")}, scheduler="pareto_halving")
    folder = start(value, using=_losing(tmp_path / "cache"), workers=1)
    found = _rounds(folder)
    assert found and all(t.user_attrs["end"]["ended"] == "stopped" and t.user_attrs["end"]["reason"] == "cache" for t in found)
    assert all(reports(folder)[trial.number][-1]["index"] == 0 for trial in found), "stopped at its first report"


def test_a_recipe_that_is_proposed_later_is_answered_by_the_round(tmp_path: Path) -> None:
    settings = [{"paradigm": "finetune", "sparsity": sparsity, "allocator": "erk"} for sparsity in (0.95, 0.84)]
    folder = start(_search(tmp_path, trials=2, start=settings), using=run_trial, workers=1)
    _, *found, last = trials(folder)
    assert [trial.user_attrs["round_of"] for trial in found] == [0] * len(found) and len(found) >= 2
    assert last.user_attrs["end"]["ended"] == "duplicate"
    answer = trials(folder)[last.user_attrs["end"]["duplicate_of"]]
    assert Recipe.read(answer.user_attrs["recipe"]).sparsity == 0.84 and answer.values == last.values


def test_one_that_came_to_nothing_answers_for_no_other(tmp_path: Path) -> None:
    settings = [{"paradigm": "finetune", "sparsity": sparsity, "allocator": "erk"} for sparsity in (0.95, 0.84)]
    value = _search(tmp_path, trials=2, start=settings, cache={"path": str(tmp_path / "cache")}, scheduler="pareto_halving")
    _, *found, last = trials(start(value, using=_losing(tmp_path / "cache"), workers=1))
    assert [trial.user_attrs["end"]["reason"] for trial in found] == ["cache"] * len(found) and found
    assert last.user_attrs["end"]["ended"] == "finished" and last.user_attrs["identity"] in {t.user_attrs["identity"] for t in found}


def test_rounds_of_trials_that_waited_to_the_end_are_entered_by_the_same_driver(tmp_path: Path) -> None:
    promote = {"name": "pareto_halving", "variant": "promote"}
    space = {**SPACE, "paradigm": [ROUNDS], "optimizer": [{"name": "sgd", "lr": [0.01, 0.1]}]}  # no two share a round
    folder = start(_search(tmp_path, trials=6, scheduler=promote, space=space), using=run_trial, workers=1)
    found = trials(folder)
    waited = {trial.number for trial in found if trial.user_attrs["end"]["reason"] == "rung"}
    assert waited & {trial.user_attrs["round_of"] for trial in _rounds(folder)}
    resume(folder.path, using=run_trial, workers=1)
    assert len(trials(folder)) == len(found), "a finished search is finished"


def test_a_round_is_replayed_as_it_was_recorded(tmp_path: Path) -> None:
    folder = start(_search(tmp_path, trials=1, scheduler="pareto_halving"), using=run_trial, workers=1)
    assert replay(folder.path, _rounds(folder)[-1].number).same


def test_a_sparsity_that_the_sampler_does_not_choose_is_not_changed(tmp_path: Path) -> None:
    """As with n:m, which has one, and where an allocator sets it."""
    whole = Entry(0, recipe(ROUNDS, 0.95), "", params={"paradigm": "finetune"}, last={"cost": 1e9})
    everything = ByProducts(lambda recipe: [("key", recipe.plan(10).cost)], lambda sparsity: True, steps_per_epoch=10)
    assert not list(everything.of(whole, lambda identity: False))
    assert len(list(everything.of(replace(whole, params={"density": 0.05}), lambda identity: False))) == 3


def test_a_plan_too_short_to_keep_anything_leaves_nothing(tmp_path: Path) -> None:
    whole = Entry(0, recipe(ROUNDS, 0.95), "", params={"density": 0.05}, last={"cost": 1e9})
    assert not list(ByProducts(lambda recipe: [], lambda sparsity: True, steps_per_epoch=10).of(whole, lambda identity: False))


def test_listed_sparsities_are_those_values_and_none_near_them() -> None:
    space = Space(BASE, {"paradigm": ["lth"], "sparsity": [0.5, 0.790285, 0.95]}, seed=0)
    assert space.searches(0.790285) and not space.searches(0.7902848)


def test_a_number_that_is_no_proposal_moves_no_place() -> None:
    """Proposals that were prepared are thrown away, so that each place is proposed once."""
    space = Space(BASE, {"paradigm": ["at_init", "finetune"]}, seed=0)

    def proposer() -> Proposer:
        return Proposer(tables.sampler.choose("tpe"), space, directions=("maximize", "minimize"), seed=0)

    plain, moved = proposer(), proposer()
    expected = [plain.ask(place).params for place in range(6)]
    found = [moved.ask(place).params for place in range(3)]
    assert moved.prepare(3, place=3, beside=2) and moved.prepare(4, place=4, beside=2)
    found += [moved.ask(place + 1, place=place).params for place in range(3, 6)]  # a round has taken number 3
    assert found == expected


@pytest.mark.parametrize("changes", [{"cache": False}, {"rounds": False}])
def test_without_a_cache_or_on_request_there_are_none(changes: dict[str, Any], tmp_path: Path) -> None:
    assert not _rounds(start(_search(tmp_path, trials=2, **changes), using=run_trial, workers=1))


def test_of_listed_sparsities_only_those_count(tmp_path: Path) -> None:
    space = {**SPACE, "paradigm": [ROUNDS], "sparsity": [0.5, 0.84, 0.98]}
    folder = start(_search(tmp_path, trials=3, space=space), using=run_trial, workers=1)
    searched = {Recipe.read(trial.user_attrs["recipe"]).sparsity for trial in _rounds(folder)}
    assert searched == {0.84}, "of 0.6, 0.84 and 0.936"


def test_the_usual_recipe_of_each_of_few_paradigms_is_at_the_sparsest_and_not_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("distprune.search.rungs.Rungs.goes_on", lambda self, number, rung, vector: False)
    found = trials(start(_search(tmp_path, rounds=False, scheduler="pareto_halving"), using=run_trial, workers=1))
    ends = [trial.user_attrs["end"]["ended"] for trial in found]
    assert ends[:2] == ["finished", "finished"] and set(ends[2:]) == {"stopped"}
    assert [trial.params["density"] for trial in found[:2]] == [0.02, 0.02]
