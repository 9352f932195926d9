"""Every rule of what goes together, each with its own message."""

from collections.abc import Callable
from typing import Any

import pytest
from toys import BASE, recipe

from distprune.core import registry
from distprune.core.hooks.hook import Hook
from distprune.core.legality import check_plan
from distprune.core.plan import Plan, Stage
from distprune.core.recipe import Recipe
from distprune.core.stages import Prune, SetWeights, Snapshot, Train
from distprune.errors import UserError


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"paradigm": "dense", "sparsity": 0.5}, "prunes nothing, so sparsity must be 0, got 0.5"),
        ({"paradigm": "at_init", "sparsity": 0.0}, "needs a sparsity above 0, got 0"),
        ({"paradigm": "rigl", "allocator": "global"}, "allocator 'global' ranks scores, and paradigm 'rigl' sets the counts of its layers"),
        ({"paradigm": "rigl", "granularity": "filter"}, "paradigm 'rigl' works on granularity weight, got 'filter'"),
        (
            {"paradigm": "at_init", "criterion": "obd_fisher"},
            "criterion 'obd_fisher' expands the loss .* paradigm 'at_init'",
        ),
        ({"paradigm": "at_init", "allocator": "global"}, "allocator 'global' ranks magnitudes of untrained weights"),
        (
            {"paradigm": "finetune", "criterion": "slimming"},
            "criterion 'slimming' scores whole channels, so granularity must",
        ),
        ({"paradigm": "finetune", "granularity": "n_m", "sparsity": 0.5}, "granularity 'n_m' decides itself .* allocator must be uniform"),
        (
            {"paradigm": "finetune", "granularity": "n_m", "allocator": "uniform", "sparsity": 0.9},
            "granularity 'n_m' allows one sparsity only, 0.5 with n_m, got 0.9",
        ),
        (
            {"paradigm": "finetune", "granularity": {"name": "n_m", "n": 1, "m": 4}, "allocator": "uniform", "sparsity": 0.5},
            "allows one sparsity only, 0.75",
        ),
        (
            {"paradigm": "finetune", "granularity": "layer", "allocator": "erk"},
            "granularity 'layer' decides .* must be global, got 'erk'",
        ),
        (
            {"paradigm": "edge_popup", "allocator": "uniform", "regularizer": "l2"},
            "regularizer 'l2' draws weights, and paradigm 'edge_popup' leaves them frozen. Write regularizer: none",
        ),
        (
            {"paradigm": "greg", "regularizer": "growing_l2"},
            "regularizer 'growing_l2' grows a penalty on all weights, on top of the one that paradigm 'greg' grows",
        ),
    ],
)
def test_illegal_recipes_say_why(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Recipe.read({**BASE, "sparsity": 0.5, **changes})


def _train(*, hooks: tuple[Hook, ...] = ()) -> Train:
    return Train(config=recipe().resolved(10).train, until=10, hooks=hooks)


def _prune(criterion: str = "magnitude") -> Prune:
    return Prune(sparsity=0.5, criterion=registry.criterion.choose(criterion), allocator=registry.allocator.choose("erk"))


class Regrows(Hook):
    regrows = True


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        (lambda: [_train(), SetWeights(policy="rewind", tag="late"), _train()], "rewinds to 'late' before there is such a snapshot"),
        (lambda: [SetWeights(policy="rewind", tag="a"), Snapshot(tag="a"), _train()], "rewinds to 'a' before there is such a snapshot"),
        (lambda: [_prune("obd_fisher"), _train()], "criterion 'obd_fisher' expands the loss around a minimum"),
        (lambda: [_prune(), _train(hooks=(Regrows(),)), _prune(), _train()], "prunes after masks were regrown"),
        (lambda: [_train(), _prune(), SetWeights(policy="reinit")], "ends with weights that were drawn or shuffled anew"),
        (lambda: [_train(), _prune(), SetWeights(policy="shuffle")], "ends with weights that were drawn or shuffled anew"),
        (lambda: [Snapshot(tag="a"), _prune(), SetWeights(policy="compensate", tag="a"), _train()], "compensates untrained weights"),
        (lambda: [_prune("magnitude")], "trains nothing, so its criterion must look at data, got 'magnitude'"),
        (lambda: [_prune("synflow")], "trains nothing, so its criterion must look at data, got 'synflow'"),
    ],
)
def test_illegal_plans_say_why(stages: Callable[[], list[Stage]], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_plan(Plan(stages()), "mine")


@pytest.mark.parametrize(
    "stages",
    [
        lambda: [_prune("snip")],
        lambda: [_prune("random")],
        lambda: [_train(), _prune("obd_fisher"), _train()],
        lambda: [_train(), _prune(), SetWeights(policy="shuffle"), _train()],
        lambda: [_prune(), _train(hooks=(Regrows(),))],
    ],
)
def test_what_the_rules_allow(stages: Callable[[], list[Stage]]) -> None:
    plan = Plan(stages())
    assert check_plan(plan, "mine") is plan


def test_a_users_paradigm_is_held_to_the_rules_when_its_plan_is_made() -> None:
    import sys
    import types

    module = types.ModuleType("my_paradigm")
    module.mine = lambda recipe: Plan([recipe.prune(recipe.sparsity, criterion=registry.criterion.choose("magnitude"))])
    sys.modules["my_paradigm"] = module
    value = {**BASE, "paradigm": {"import": "my_paradigm:mine"}, "sparsity": 0.5, "allocator": "erk"}
    with pytest.raises(UserError, match="paradigm 'import:my_paradigm:mine' trains nothing"):
        Recipe.read(value).plan(10)


def test_every_entry_declares_what_the_rules_ask_for() -> None:
    for entry in registry.paradigm:
        assert entry.facts["branch"] and (entry.name == "dense" or all(entry.facts[key] for key in ("mask", "values", "after"))), entry.name
        assert set(entry.facts["granularities"]) <= set(registry.granularity.names()), entry.name
    for entry in registry.criterion:
        assert entry.facts["reduction"] in ("mean", "sum", "squared_sum", "first"), entry.name
