"""Warm starts: settings that come first, and earlier searches that are learned from. Duplicates: known, or run with a seed of their own."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from searches import outcome, reports, resume, search, start, trials
from toys import BASE

from distprune.core.recipe import Recipe
from distprune.errors import UserError
from distprune.search.config import Search
from distprune.search.covering import covering
from distprune.search.setup import set_up
from distprune.search.space import Space
from distprune.search.starts import settle
from distprune.store import files

pytestmark = pytest.mark.usefixtures("no_finale")

SPACE: dict[str, Any] = {
    "paradigm": ["dense", "at_init", {"name": "lth", "share": [0.4, 0.8]}],
    "criterion": ["magnitude", "snip", "random"],
    "allocator": ["erk", "uniform"],
}


def _settled(*settings: dict[str, Any], space: dict[str, Any] = SPACE, seed: int = 0) -> list[dict[str, Any]]:
    return settle(Space(BASE, space, seed=0), settings, seed=seed)


def _recipes(folder: Any) -> list[Recipe]:
    return [Recipe.read(trial.user_attrs["recipe"]) for trial in trials(folder)]


def test_settings_come_first_then_what_covers_the_space_and_what_is_open_is_drawn(tmp_path: Path) -> None:
    settings = [
        {"paradigm": "lth", "sparsity": 0.95},
        {"criterion": "snip"},
        {"paradigm": {"name": "lth", "share": 0.5}, "allocator": "erk"},
    ]
    folder = start(search(tmp_path / "a", trials=9, space=SPACE, start=settings))
    first = _recipes(folder)
    assert first[0].paradigm.name == "lth" and first[0].sparsity == 0.95
    assert first[1].criterion.name == "snip"
    assert first[2].paradigm.option("share") == 0.5 and first[2].allocator.name == "erk"
    for parameters, trial in zip(covering(Space(BASE, SPACE, seed=0)), trials(folder)[3:], strict=False):
        assert all(trial.params[name] == value for name, value in parameters.items())
    other = _recipes(start(search(tmp_path / "b", trials=3, space=SPACE, start=settings, seed=1)))
    assert other[0].sparsity == 0.95 and [r.plain() for r in other] != [{**r.plain(), "seed": 1} for r in first[:3]]


def test_a_setting_is_always_used_as_a_whole() -> None:
    """`dense` uses no criterion: whatever is drawn for the rest, it is not drawn for a setting that has one."""
    space = Space(BASE, SPACE, seed=0)
    for seed in range(30):
        for setting in ({"criterion": "snip", "sparsity": 0.9}, {"lth/share": 0.6}, {"sparsity": 0.7, "allocator": "uniform"}):
            (found,) = settle(space, [setting], seed=seed)
            assert "paradigm" in found and found["paradigm"] != "dense"
            assert ("density" in found) == ("sparsity" in setting) and found.get("lth/share") == setting.get("lth/share")
            assert ("lth/share" in found) <= (found["paradigm"] == "lth")
    drawn = {settle(space, [{"criterion": "snip"}], seed=seed)[0]["paradigm"] for seed in range(30)}
    assert drawn == {"at_init", "lth"}


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"paradigmm": "lth"}, r"Unknown key in start\[0\]: 'paradigmm'. Did you mean 'paradigm'\?"),
        ({"paradigm": "lht"}, r"Unknown paradigm in start\[0\], which the space has not: 'lht'. Did you mean 'lth'\?"),
        ({"paradigm": "rigl"}, r"Unknown paradigm in start\[0\], which the space has not: 'rigl'"),
        ({"paradigm": {"name": "lth", "shares": 0.5}}, r"Unknown option of start\[0\].paradigm lth: 'shares'. Did you mean 'share'\?"),
        (
            {"paradigm": {"name": "lth", "share": 0.9}},
            r"start\[0\].paradigm must be within the space, got \{'name': 'lth', 'share': 0.9\}. The space has "
            r"lth with share in \[0.4, 0.8\], rewind_to in \[.*\]",
        ),
        ({"allocatr": "erk"}, r"Did you mean 'allocator'\? Known: allocator, criterion, "),
        ({"lth/share": 0.9}, r"start\[0\].lth/share must be in \[0.4, 0.8\], got 0.9"),
        ({"sparsity": 0.999}, r"start\[0\].sparsity must be within space.sparsity, \[0.5, 0.98\], got 0.999"),
        ({"sparsity": "high"}, "got 'high'"),
        ({"paradigm": "dense", "criterion": "snip"}, "its keys do not go together. Leave out paradigm or criterion."),
        ({"paradigm": "at_init", "lth/share": 0.5}, "its keys do not go together"),
        ({"paradigm": "dense", "sparsity": 0.9}, "its keys do not go together"),
    ],
)
def test_a_setting_that_the_space_has_not_is_one_line(setting: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message) as error:
        set_up(search(tmp_path, space=SPACE, start=[setting]))
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


def test_listed_sparsities_are_the_only_ones() -> None:
    space = {**SPACE, "sparsity": [0.5, 0.75, 0.9]}
    assert _settled({"sparsity": 0.75}, space=space)[0]["sparsity"] == 0.75
    with pytest.raises(UserError, match=r"Unknown value of start\[0\].sparsity: '0.8'. .*Known: 0.5, 0.75, 0.9"):
        _settled({"sparsity": 0.8}, space=space)


# Earlier searches.


def test_a_search_learns_from_an_earlier_one_and_never_lists_its_trials(tmp_path: Path) -> None:
    old = start(search(tmp_path / "old", trials=16, space=SPACE, scheduler="none"))
    wider = {**SPACE, "paradigm": [*SPACE["paradigm"], "gradual"], "sparsity": [0.4, 0.99]}
    value = search(tmp_path / "new", trials=12, space=wider, sampler="tpe", learn_from=[str(old.path)])
    assert Search.read(value.plain()) == value
    setup = set_up(value)
    assert sum(map(len, setup.learned.values())) == 16
    new = start(value, workers=1)
    assert len(trials(new)) == 12 and len(json.loads(new.learned.read_text())[str(old.path)]) == 16
    without = start(search(tmp_path / "without", trials=12, space=wider, sampler="tpe"), workers=1)
    first = len(covering(Space(BASE, wider, seed=0)))
    assert outcome(new)[:first] != outcome(without)[:first], "what the covering trials leave open is drawn from a model"
    part = start(search(tmp_path / "part", trials=6, space=wider, sampler="tpe", learn_from=[str(old.path)]), workers=1)
    (old.path / "search.yaml").unlink()  # a search goes on from what it learned when it began
    assert outcome(resume(part.path, workers=1, trials=12)) == outcome(new)


def test_what_is_of_no_use_is_counted_out_or_refused(tmp_path: Path) -> None:
    old = start(search(tmp_path / "old", trials=16, space=SPACE, scheduler="none"))
    fits = [t for t in trials(old) if t.params["paradigm"] != "lth" and 0.1 <= t.params.get("density", 0.1) <= 0.4]
    narrow = {**SPACE, "paradigm": ["dense", "at_init"], "sparsity": [0.6, 0.9]}
    setup = set_up(search(tmp_path / "new", space=narrow, sampler="tpe", learn_from=[str(old.path)]))
    assert [row["params"] for row in setup.learned[str(old.path)]] == [t.params for t in fits] and 0 < len(fits) < 16
    with pytest.raises(UserError, match="nothing to learn, as none of its 16 ended trials is one of this space"):
        set_up(search(tmp_path / "new", space={"paradigm": ["rigl"]}, sampler="tpe", learn_from=[str(old.path)]))
    with pytest.raises(UserError, match="nowhere is not a run folder"):
        set_up(search(tmp_path / "new", sampler="tpe", learn_from=[str(tmp_path / "nowhere")]))
    with pytest.raises(UserError, match=r"it must minimize what this search does, \[\], got \['params'\]"):
        set_up(search(tmp_path / "new", space=SPACE, sampler="tpe", minimize=[], learn_from=[str(old.path)]))


def test_trials_of_other_networks_data_or_training_and_simulated_ones_are_refused(tmp_path: Path) -> None:
    old = start(search(tmp_path / "old", trials=6, space=SPACE, scheduler="none"))
    common: dict[str, Any] = {"space": SPACE, "sampler": "tpe", "learn_from": [str(old.path)]}
    for change in (
        {"model": {"import": "toys:network", "hidden": 16}},
        {"train": {**BASE["train"], "length": "5ep"}},
        {"include": ["*.weight"]},
    ):
        with pytest.raises(
            UserError, match=rf"learn_from\[0\] .*: its trials had recipe.{next(iter(change))} .*, and this search has .* Write"
        ):
            set_up(search(tmp_path / "new", recipe={**BASE, **change}, **common))
    assert sum(map(len, set_up(search(tmp_path / "new", seed=3, **common)).learned.values())) == 6, "seeds may differ"
    fixed = {**common, "space": {**SPACE, "allocator": ["erk"]}}
    learned = set_up(search(tmp_path / "new", **fixed)).learned.values()
    assert not any("allocator" in row["params"] for rows in learned for row in rows)
    facts = yaml.safe_load(old.search_yaml.read_text())
    old.search_yaml.write_text(yaml.safe_dump({**facts, "simulated": {"run": "x"}}))
    with pytest.raises(UserError, match=r"learn_from\[0\] .* is a simulated search, .*: it cannot be learned from"):
        set_up(search(tmp_path / "new", **common))


def test_a_recipe_that_says_nothing_of_an_axis_is_learned_from_only_where_it_is_the_same(tmp_path: Path) -> None:
    """`criterion` is no parameter where there is one: the parameters of both searches are alike, their networks are not."""
    one = {**SPACE, "paradigm": ["at_init"], "criterion": ["magnitude"]}
    old = start(search(tmp_path / "old", trials=4, space=one, scheduler="none"))
    new = search(tmp_path / "new", space={**one, "criterion": ["random"]}, sampler="tpe", learn_from=[str(old.path)])
    with pytest.raises(UserError, match="none of its 4 ended trials is one of this space"):
        set_up(new)


def test_what_learned_trials_violate_is_said_of_the_limits_of_the_search_that_learns(tmp_path: Path) -> None:
    old = start(
        search(tmp_path / "old", trials=16, space=SPACE, budget={"cost": "params", "most": 0.3}, finalists={"count": 1, "seeds": 2})
    )
    told = {t.number: t for t in trials(old)}
    assert any("repeat_of" in t.user_attrs for t in told.values()) and any(t.user_attrs["end"]["ended"] == "stopped" for t in told.values())
    ended = [t for t in told.values() if t.user_attrs["end"]["ended"] in ("finished", "stopped") and "repeat_of" not in t.user_attrs]
    common: dict[str, Any] = {"space": SPACE, "sampler": "tpe", "learn_from": [str(old.path)]}
    limits: dict[str, Any]
    for limits in ({}, {"budget": {"cost": "params", "most": 0.05}}, {"budget": {"cost": "params", "most": 0.3}, "floor": 0.7}):
        rows = set_up(search(tmp_path / "new", **common, **limits)).learned[str(old.path)]
        assert len(rows) == len(ended), "repeats of finalists are not proposals"
        for row in rows:
            score, share = row["values"]
            expected = {"budget": share / limits["budget"]["most"] - 1} if "budget" in limits else {}
            expected |= {"floor": (limits["floor"] - score) / limits["floor"]} if "floor" in limits else {}
            if "unfinished" in row["constraints"]:
                assert row["constraints"].keys() == {"unfinished"}
            else:
                assert row["constraints"] == pytest.approx(expected)
    with pytest.raises(
        UserError, match=r"it must have the budget of this search, as .* flops, got \[\{'cost': 'params', 'most': 0.3\}\]. Minimize"
    ):
        set_up(search(tmp_path / "new", **common, budget={"cost": "flops", "most": 0.5}))


# Duplicates.

FEW: dict[str, Any] = {"paradigm": ["at_init"], "criterion": ["magnitude", "random"], "allocator": ["erk", "uniform"], "sparsity": 0.9}
FEW |= {"regularizer": ["none"]}


def test_a_known_recipe_never_runs_twice_stopped_and_running_ones_too(tmp_path: Path) -> None:
    folder = start(search(tmp_path, trials=14, space=FEW, scheduler={"name": "pareto_halving", "first": 0.3}), workers=4)
    found = trials(folder)
    ran = reports(folder)
    recipes = [json.dumps(trial.user_attrs["recipe"], sort_keys=True) for trial in found]
    assert len({recipes[number] for number in ran}) == len(ran) <= 4 and len(found) > 6
    ends = {trial.number: trial.user_attrs["end"] for trial in found}
    doubles = [trial for trial in found if ends[trial.number]["ended"] == "duplicate"]
    for trial in doubles:
        original = found[ends[trial.number]["duplicate_of"]]
        assert recipes[trial.number] == recipes[original.number] and trial.values == original.values
    assert {ends[ends[trial.number]["duplicate_of"]]["ended"] for trial in doubles} == {"stopped", "finished"}


@pytest.mark.parametrize("at", [18, 22, 26, 30, 36])
def test_nor_after_a_kill(at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The original runs, was stopped or has ended when the driver dies."""
    value = search(tmp_path, trials=14, space=FEW, scheduler={"name": "pareto_halving", "first": 0.3})
    writes, original = [0], files._write

    class Dead(BaseException):
        pass

    def dying(descriptor: int, data: Any) -> int:
        writes[0] += 1
        if writes[0] >= at:
            raise Dead
        return original(descriptor, data)

    monkeypatch.setattr(files, "_write", dying)
    with pytest.raises(Dead):
        start(value, workers=4)
    monkeypatch.setattr(files, "_write", original)
    folder = resume(value.folder, workers=4)
    found = trials(folder)
    recipes = [json.dumps(trial.user_attrs["recipe"], sort_keys=True) for trial in found]
    ran = {recipes[number] for number, rows in reports(folder).items()}
    assert len(ran) == len(reports(folder)) and all(trial.state.is_finished() for trial in found)


def test_or_it_runs_with_a_seed_of_its_own(tmp_path: Path) -> None:
    value = search(tmp_path / "a", trials=14, space=FEW, duplicates="new_seed", scheduler="none")
    folder = start(value, workers=1)
    found = trials(folder)
    assert len(found) == 14 == len(reports(folder)) and {t.user_attrs["end"]["ended"] for t in found} == {"finished"}
    by_recipe: dict[str, list[Any]] = {}
    for trial in found:
        recipe = dict(trial.user_attrs["recipe"])
        recipe.pop("seed", None)
        by_recipe.setdefault(json.dumps(recipe, sort_keys=True), []).append(trial)
    assert len(by_recipe) == 4
    for group in by_recipe.values():
        seeds = [Recipe.read(trial.user_attrs["recipe"]).seed for trial in group]
        assert seeds[0] == 0 and len(set(seeds)) == len(seeds)
        assert [trial.user_attrs.get("repeat", 0) for trial in group] == list(range(len(group)))
    second = {Recipe.read(group[1].user_attrs["recipe"]).seed for group in by_recipe.values() if len(group) > 1}
    assert len(second) == 1, "equal prefixes of different recipes stay equal work"
    part = start(search(tmp_path / "b", trials=6, space=FEW, duplicates="new_seed", scheduler="none"), workers=1)
    assert outcome(resume(part.path, workers=1, trials=14)) == outcome(folder)
