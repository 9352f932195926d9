"""Laws that every paradigm keeps, and those of single ones."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from toys import PARADIGMS, SETTINGS, finish, ready, recipe, same, tensors

from distprune.core.executor import execute
from distprune.core.keys import keys
from distprune.core.stages import SetWeights, Train
from distprune.errors import UserError

OPTIMIZERS = [{"name": "sgd", "lr": 0.05, "weight_decay": 1e-2}, {"name": "adamw", "lr": 3e-3, "weight_decay": 0.1}]
each = pytest.mark.parametrize("paradigm", PARADIGMS)


@each
@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda value: value["name"])
def test_budget_zeros_and_bill(paradigm: str, optimizer: dict[str, Any]) -> None:
    run = ready(paradigm, regularizer="l2", train={"optimizer": optimizer})
    state = run.state
    reports = finish(run)
    due = round((1 - run.recipe.sparsity) * state.masks.total)
    assert reports[-1].final and not any(report.final for report in reports[:-1])
    assert state.masks.kept == due if run.recipe.granularity.name == "weight" else 0.5 * due < state.masks.kept <= due
    for name, mask in state.masks.items():
        assert not state.weights[name][~mask].any()
        assert all(not tensor[~mask].any() for tensor in state.memory.get(name, {}).values() if tensor.shape == mask.shape)
        if state.weights[name].grad is not None and paradigm != "dense":
            assert not state.weights[name].grad[~mask].any(), "gradients as the optimizer sees them"
    open_end = any(isinstance(stage, Train) and stage.may_end_early for stage in run.plan.stages)
    assert reports[-1].cost <= run.plan.cost if open_end else reports[-1].cost == run.plan.cost, "the bill is a pure function of the plan"
    assert [report.index for report in reports] == list(range(len(reports)))


@each
def test_learns(paradigm: str) -> None:
    run = ready(paradigm, None if "sparsity" in SETTINGS.get(paradigm, {}) else 0.8, train={"length": "15ep"})
    assert finish(run)[-1].metrics["accuracy"] > 0.6, "chance is 0.1"


@each
def test_same_seed_same_bits_other_seed_other_bits(paradigm: str) -> None:
    runs = [ready(paradigm, seed=seed) for seed in (0, 0, 1)]
    for run in runs:
        finish(run)
    assert same(tensors(runs[0]), tensors(runs[1])) and not same(tensors(runs[0]), tensors(runs[2]))


@each
def test_the_outer_random_generator_is_left_alone(paradigm: str) -> None:
    run = ready(paradigm)
    before = torch.get_rng_state()
    for _ in execute(run.plan, run.state, run.env):
        assert torch.equal(torch.get_rng_state(), before)


def test_lth_rewinds_to_the_snapshot_and_nests_its_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    run = ready({"name": "lth", "share": 0.5, "rewind_to": "25%"})
    masks, rewinds = [run.state.masks], []
    original = SetWeights.run

    def watched(self: SetWeights, state: Any, env: Any) -> Any:
        yield from original(self, state, env)
        masks.append(state.masks)
        rewinds.append(
            all(torch.equal(state.weights[name].detach(), state.snapshots["rewind"][name] * mask) for name, mask in state.masks.items())
        )

    monkeypatch.setattr(SetWeights, "run", watched)
    finish(run)
    assert rewinds == [True] * 4 and all(later.nested_in(earlier) for earlier, later in pairwise(masks))
    assert [round(mask.sparsity, 3) for mask in masks] == [0.0, 0.5, 0.75, 0.875, 0.9]


def test_lth_with_inherited_weights_rewinds_the_learning_rate_only() -> None:
    plan = ready({"name": "lth", "weights": "inherit", "share": 0.5}, sparsity=0.5).plan
    assert not any(isinstance(stage, SetWeights) for stage in plan.stages)
    assert [stage.since for stage in plan.stages if isinstance(stage, Train)] == [None, 0]


def test_late_rewinding_keeps_the_first_steps_of_the_dense_run() -> None:
    plan = ready({"name": "lth", "rewind_to": "25%", "share": 0.5}, sparsity=0.5).plan
    trains = [stage for stage in plan.stages if isinstance(stage, Train)]
    assert [(stage.since, stage.until) for stage in trains] == [(None, 10), (None, 40), (10, 40)]


def test_scratch_draws_new_weights() -> None:
    run = ready("scratch")
    stages, state = run.plan.stages, run.state
    for report in execute(run.plan, state, run.env):
        if report.stage == 1:
            break
    trained = state.values()
    list(stages[1].run(state, run.env))
    list(stages[2].run(state, run.env))
    mask = state.masks["6.weight"]
    assert not torch.equal(state.weights["6.weight"][mask], trained["6.weight"][mask]) and not state.weights["6.weight"][~mask].any()


def test_finetune_replays_the_end_of_the_schedule_or_stays_at_the_last_rate() -> None:
    replay = [s for s in ready({"name": "finetune", "tune": "50%"}).plan.stages if isinstance(s, Train)]
    last = [s for s in ready({"name": "finetune", "tune": "50%", "rate": "last"}).plan.stages if isinstance(s, Train)]
    assert [(s.since, s.until) for s in replay] == [(None, 40), (20, 40)]
    assert [(s.since, s.until) for s in last] == [(None, 40), (40, 60)]


def test_gradual_masks_are_nested_and_end_on_time() -> None:
    run = ready({"name": "gradual", "begin": "10%", "end": "75%", "updates": 5}, report_every="1it")
    masks = run.state.masks
    for report in execute(run.plan, run.state, run.env):
        assert run.state.masks.nested_in(masks)
        masks = run.state.masks
        assert (report.sparsity > 0) == (report.clock >= 4)
        assert report.clock < 30 or report.kept == round(0.1 * masks.total)


def test_lengths_that_do_not_fit_are_refused() -> None:
    with pytest.raises(UserError, match="rewind_to must be before the end of training at step 40, got step 50"):
        recipe({"name": "lth", "rewind_to": "50it"}).plan(10)
    with pytest.raises(UserError, match=r"paradigm.begin < paradigm.end <= train.length must hold, got steps 30, 20, 40"):
        recipe({"name": "gradual", "begin": "30it", "end": "20it"}).plan(10)


def test_every_plan_has_distinct_keys_but_for_snapshots() -> None:
    plan = ready("lth").plan
    found = keys("root", plan)
    assert len(set(found)) == len(found) - sum(stage.writes is not None for stage in plan.stages)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sparsity": 0.9999}, "The largest feasible sparsity is"),
        ({"granularity": "layer", "allocator": "global"}, "granularity 'layer' needs layers that a signal can go around"),
        ({"granularity": "filter", "criterion": "slimming", "sparsity": 0.3}, "those of '6.weight' go through none"),
    ],
)
def test_what_cannot_be_pruned_is_said_before_anything_is_trained(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ready("finetune", **changes)
