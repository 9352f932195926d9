"""The space proposes legal recipes only, and every candidate that has one."""

import itertools
import math
from typing import Any

import optuna
import pytest
from toys import BASE

from distprune.core import registry
from distprune.core.legality import violations
from distprune.core.recipe import Recipe
from distprune.errors import UserError
from distprune.search.config import Search
from distprune.search.covering import covering
from distprune.search.setup import set_up
from distprune.search.space import Space

ALL = {"granularity": ["weight", "kernel", "n_m", "filter"], "sparsity": [0.5, 0.75, 0.9]}


def _drawn(space: Space, count: int) -> list[Recipe]:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    return [space.build(study.ask()) for _ in range(count)]


@pytest.mark.parametrize("value", [{}, ALL, {"granularity": ["filter", "channel"]}, {"granularity": ["layer", "weight"]}])
def test_every_proposal_is_legal(value: dict[str, Any]) -> None:
    for recipe in _drawn(Space(BASE, value, seed=0), 150):
        assert not violations(recipe)
        assert Recipe.read(recipe.plain()) == recipe


def test_the_first_trials_hold_every_candidate_and_cross_sparsities_with_paradigms() -> None:
    space = Space(BASE, ALL, seed=0)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    recipes = []
    for parameters in covering(space):
        study.enqueue_trial(parameters)
        trial = study.ask()
        recipes.append(space.build(trial))
        assert all(trial.params[name] == value for name, value in parameters.items())
    for axis in ("paradigm", "granularity", "criterion", "allocator", "regularizer"):
        found = {getattr(recipe, axis).name for recipe in recipes}
        assert {candidate.label for candidate in space.axes[axis]} <= found
    crossed = {(recipe.paradigm.name, recipe.sparsity) for recipe in recipes if recipe.granularity.name != "n_m"}
    pruning = [candidate.label for candidate in space.axes["paradigm"] if "sparsity" in candidate.choice.entry.facts["uses"]]
    assert crossed >= {(name, value) for name in pruning for value in ALL["sparsity"]}


def test_the_first_trials_spread_the_densities_of_a_range_from_the_sparsest_on() -> None:
    space = Space(BASE, {**ALL, "sparsity": [0.5, 0.98]}, seed=0)
    densities = [parameters["density"] for parameters in covering(space) if "density" in parameters]
    assert densities[0] == 0.02 and len(set(densities)) == len(densities) >= 8
    places = sorted(math.log(density / 0.02, 25) for density in densities)
    gaps = [after - before for before, after in itertools.pairwise([*places, 1.0])]
    assert max(gaps) < 2.7 / len(densities), "three gaps at most, of which the longest is the sum of the others (Steinhaus)"


def test_each_paradigm_is_first_tried_as_it_is_usually_run() -> None:
    base = {**BASE, "train": {**BASE["train"], "optimizer": {"name": "sgd", "lr": 0.03}}}
    optimizer = [{"name": "adamw"}, {"name": "sgd", "lr": [0.01, 0.03, 0.1]}]
    paradigms = ["at_init", {"name": "lth", "share": [0.5, 0.9]}, {"name": "finetune", "share": [0.2, 0.3, 0.5]}, "slimming"]
    space = Space(base, {**ALL, "paradigm": paradigms, "optimizer": optimizer}, seed=0)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    recipes: dict[str, Recipe] = {}
    for parameters in covering(space):
        study.enqueue_trial(parameters)
        recipe = space.build(study.ask())
        recipes.setdefault(recipe.paradigm.name, recipe)
    assert list(recipes) == ["at_init", "lth", "finetune", "slimming"]
    for name, recipe in recipes.items():
        assert recipe.train.optimizer.plain() == {"name": "sgd", "lr": 0.03}
        if name != "slimming":
            assert (recipe.granularity.name, recipe.criterion.name, recipe.regularizer.name) == ("weight", "magnitude", "none")
            assert (recipe.allocator.name == "global") is (name != "at_init"), "untrained layers' magnitudes are not comparable"
    assert recipes["slimming"].granularity.name == "filter", "the usual one is not legal there"
    assert 0.5 <= recipes["lth"].paradigm.option("share") <= 0.9, "its default, 0.2, is not in the space"


def test_a_pattern_comes_with_its_own_sparsity_or_not_at_all() -> None:
    at_half = [recipe for recipe in _drawn(Space(BASE, ALL, seed=0), 200) if recipe.granularity.name == "n_m"]
    assert at_half and all(recipe.sparsity == 0.5 and recipe.allocator.name == "uniform" for recipe in at_half)
    without = Space(BASE, {"granularity": ["weight", "n_m"], "sparsity": [0.9, 0.95, 0.98]}, seed=0)
    assert all(recipe.granularity.name == "weight" for recipe in _drawn(without, 50))
    assert any("it allows sparsity 0.5 only, which space.sparsity does not have" in line for line in without.excluded)


def test_what_is_legal_nowhere_is_left_out_and_listed_or_refused_if_it_was_asked_for() -> None:
    space = Space(BASE, {}, seed=0)
    assert "slimming" not in [candidate.label for candidate in space.axes["paradigm"]], "it needs filters, and the recipe has weights"
    assert any(line.startswith("granularity weight: paradigm 'slimming' works on granularity filter or channel") for line in space.excluded)
    with pytest.raises(UserError, match="space: paradigm 'slimming' can never be proposed. granularity weight: paradigm 'slimming'"):
        Space(BASE, {"paradigm": ["dense", "slimming"]}, seed=0)
    with pytest.raises(UserError, match="space: paradigm 'rigl' can never be proposed. allocator global"):
        Space(BASE, {"paradigm": ["rigl"], "allocator": ["global"]}, seed=0)


def test_what_the_network_lacks_parts_for_is_left_out_and_listed_or_refused_if_it_was_asked_for() -> None:
    value = {"name": "x", "recipe": {**BASE, "model": {"name": "resnet_cifar", "depth": 8, "width": 4}}, "space": {"sparsity": [0.3, 0.8]}}
    space = set_up(Search.read(value)).space
    assert "fusion" not in [candidate.label for candidate in space.axes["paradigm"]], "its activations are no modules"
    assert any(line.startswith("paradigm fusion: fusion needs neighbouring") for line in space.excluded)
    assert all(recipe.paradigm.name != "fusion" for recipe in _drawn(space, 50))
    with pytest.raises(UserError, match="space: paradigm 'fusion' can never be proposed. fusion needs neighbouring"):
        set_up(Search.read({**value, "space": {"paradigm": ["dense", "fusion"]}}))


def test_equal_sets_share_a_parameter_and_different_ones_do_not() -> None:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    space = Space(BASE, ALL, seed=0)
    values: dict[str, set[Any]] = {}
    for _ in range(200):
        trial = study.ask()
        space.build(trial)
        for name, distribution in trial.distributions.items():
            if isinstance(distribution, optuna.distributions.CategoricalDistribution):
                values.setdefault(name, set()).add(distribution.choices)
    assert all(len(choices) == 1 for choices in values.values()), "Optuna wants one set of values for one name"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([0.9, 0.5], "space.sparsity must rise"),
        ([0.9, 0.9], "space.sparsity must rise"),
        ([0.5, 0.6, 1.0], r"space.sparsity must be in \[0, 1\), got 1.0"),
        ([0.0, 0.5], "space.sparsity must be above 0"),
        ("high", "space.sparsity must be a number"),
        ([], "space.sparsity must be a number"),
    ],
)
def test_sparsities_that_make_no_sense(value: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Space(BASE, {"sparsity": value}, seed=0)


def test_mistakes_are_one_line() -> None:
    with pytest.raises(UserError, match=r"space.granularity.n_m.n must be one value: the sparsity depends on it"):
        Space(BASE, {"granularity": [{"name": "n_m", "n": [1, 2]}]}, seed=0)
    with pytest.raises(UserError, match=r"space.granularity must be a list of names, got 5 in it"):
        Space(BASE, {"granularity": [5]}, seed=0)
    only = Space(BASE, {"paradigm": ["rigl"], "granularity": ["weight", "layer"]}, seed=0)
    assert [granularity.name for granularity in only.granularities] == ["weight"]


def test_shares_are_searched_for_what_the_granularity_budgets() -> None:
    space = Space(BASE, {"allocator": ["per_layer"], "paradigm": ["finetune"]}, seed=0, layers=lambda granularity: [granularity.name, "b"])
    (recipe,) = _drawn(space, 1)
    assert set(recipe.allocator.options["shares"]) == {"weight", "b"}


def test_every_table_that_is_searched_is_an_axis() -> None:
    assert {candidate.table for candidates in Space(BASE, ALL, seed=0).axes.values() for candidate in candidates} == {
        registry.TABLES[axis] for axis in ("paradigm", "granularity", "criterion", "allocator", "regularizer", "optimizer")
    }
