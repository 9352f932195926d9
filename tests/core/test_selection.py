"""Masks learned over frozen weights: chain rules by hand, exact budgets, frozen values."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from toys import finish, ready, same, tensors

from distprune.core import registry
from distprune.core.budgets import allocate, kept_for, layers_of
from distprune.core.executor import execute
from distprune.core.hooks.hook import slot, viewed
from distprune.core.hooks.selection import Biprop, EdgePopup, Selection, Supermask, shift
from distprune.core.schedules import cubic
from distprune.core.state import State
from distprune.errors import UserError

NAMES = ["supermask", "edge_popup", "biprop"]
UNIFORM = registry.allocator.choose("uniform")
X, Y = torch.tensor([[1.0, -2.0, 0.5, 3.0], [0.3, 1.0, -1.0, 2.0]]), torch.tensor([[1.0, 0.0, -1.0], [0.5, 2.0, 0.0]])


def edge_popup(**changes: Any) -> EdgePopup:
    return EdgePopup(**{"sparsity": 0.5, "allocator": UNIFORM, "weights": "init", "scaled": False, **changes})


def biprop(**changes: Any) -> Biprop:
    return Biprop(**{"sparsity": 0.5, "allocator": UNIFORM, "weights": "init", "scaled": False, **changes})


def supermask(**changes: Any) -> Supermask:
    options = {"sparsity": 0.5, "allocator": UNIFORM, "signed": False, "rescale": False, "first": "half", "end_at": 100}
    return Supermask(**{**options, **changes})


def tiny(hook: Selection) -> tuple[State, Any]:
    """A linear layer of 12 weights under a hook."""
    state = State.new(lambda: nn.Linear(4, 3), seed=0, device=torch.device("cpu"))
    env: Any = SimpleNamespace(seed=0, task=SimpleNamespace(example=None))
    state.slots[slot(0, hook)] = {}
    hook.start(state.slots[slot(0, hook)], state, env)
    return state, env


def step(hook: Selection, state: State, env: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """(gradient of the effective weight, gradient of the score) of one pass."""
    with viewed((hook,), state, env, train=True):
        ((state.model(X) - Y) ** 2).sum().backward()
    dense = state.weights["weight"].grad
    assert dense is not None
    dense = dense.clone()
    hook.grad(state.slots[slot(0, hook)], state, env)
    slope = state.leaves["scores/weight"].grad
    assert slope is not None and state.weights["weight"].grad is None
    return dense, slope


@pytest.mark.parametrize("hook", [edge_popup(), edge_popup(weights="signed", scaled=True)])
def test_edge_popup_passes_the_gradient_straight_through_the_mask(hook: EdgePopup) -> None:
    state, env = tiny(hook)
    weight, score = state.weights["weight"].detach(), state.leaves["scores/weight"].detach().requires_grad_()
    assert (score < 0).any() and (score > 0).any()
    mask = torch.zeros(12).index_fill(0, score.abs().flatten().topk(6).indices, 1.0).view(3, 4)
    straight = mask + score.abs() - score.abs().detach()
    ((F.linear(X, weight * straight, state.model.bias) - Y) ** 2).sum().backward()  # type: ignore[arg-type]
    dense, slope = step(hook, state, env)
    torch.testing.assert_close(slope, score.grad)
    torch.testing.assert_close(slope, dense * weight * score.sign())


def test_biprop_has_one_gain_and_the_gradient_of_edge_popup() -> None:
    state, env = tiny(biprop())
    weight, score = state.weights["weight"].detach(), state.leaves["scores/weight"].detach()
    mask = torch.zeros(12).index_fill(0, score.abs().flatten().topk(6).indices, 1.0).view(3, 4)
    view = biprop().view(state.slots["0.Biprop"], state, env, train=True)["weight"]
    torch.testing.assert_close(view, weight[mask.bool()].abs().mean() * weight.sign() * mask)
    dense, slope = step(biprop(), state, env)
    # Through the sign of w, straight through the mask times |w|, through the sign of the score.
    torch.testing.assert_close(slope, dense * weight.sign() * weight.abs() * score.sign())


@pytest.mark.parametrize("rescale", [False, True])
def test_supermask_passes_the_gradient_straight_through_the_draw(rescale: bool) -> None:
    hook = supermask(rescale=rescale)
    state, env = tiny(hook)
    with torch.no_grad():
        state.leaves["scores/weight"].copy_(torch.linspace(-2, 2, 12).view(3, 4))
    weight, logit = state.weights["weight"].detach(), state.leaves["scores/weight"].detach().requires_grad_()
    draw = hook.training_masks({}, state, env)["weight"].float()
    straight = draw + logit.sigmoid() - logit.sigmoid().detach()
    effective = weight * straight * (12 / straight.sum() if rescale else 1.0)
    ((F.linear(X, effective, state.model.bias) - Y) ** 2).sum().backward()  # type: ignore[arg-type]
    torch.testing.assert_close(step(hook, state, env)[1], logit.grad)


def test_supermask_draws_with_the_probability_of_its_logits() -> None:
    state, env = tiny(supermask())
    with torch.no_grad():
        state.leaves["scores/weight"].copy_(torch.linspace(-2, 2, 12).view(3, 4))
    chance = state.leaves["scores/weight"].detach().sigmoid()
    total = torch.zeros(3, 4)
    for state.clock in range(4000):
        total += supermask().training_masks({}, state, env)["weight"]
    assert ((total / 4000 - chance).abs() < 4 * (chance * (1 - chance) / 4000).sqrt()).all()
    again = [supermask().training_masks({}, state, env)["weight"] for _ in range(2)]
    assert torch.equal(*again), "a draw is a function of seed, lap and clock"


def test_rescaling_divides_by_the_kept_share() -> None:
    weight, mask = torch.tensor([[1.0, -2.0], [3.0, 4.0]]), torch.tensor([[True, True], [True, False]])
    torch.testing.assert_close(supermask(rescale=True).effective(weight, mask), torch.tensor([[4 / 3, -8 / 3], [4.0, 0.0]]))
    assert supermask(rescale=True).effective(weight, torch.zeros_like(mask)).abs().sum() == 0


def test_supermask_starts_where_it_is_told_and_dense_layers_stay_finite() -> None:
    assert (tiny(supermask(sparsity=0.75))[0].leaves["scores/weight"] == 0).all()
    target = tiny(supermask(sparsity=0.75, first="target"))[0].leaves["scores/weight"].detach().sigmoid()
    torch.testing.assert_close(target, torch.full((3, 4), 0.25))
    dense = tiny(supermask(sparsity=0.0, first="target"))[0].leaves["scores/weight"].detach()
    torch.testing.assert_close(dense.sigmoid(), torch.full((3, 4), 1 - 0.5 / 12))


def test_a_shift_reaches_its_density_and_keeps_the_order() -> None:
    logits = [torch.linspace(-1, 5, 50), torch.linspace(-8, 0, 30)]
    before = [logit.clone() for logit in logits]
    for _ in range(20):
        shift(logits, 12.0)
    assert sum(float(logit.sigmoid().sum()) for logit in logits) == pytest.approx(12, abs=1e-3)
    moved = [logit - old for logit, old in zip(logits, before, strict=True)]
    torch.testing.assert_close(moved[0], torch.full((50,), float(moved[1][0])))


@pytest.mark.parametrize("allocator", ["erk", "global"])
def test_the_expected_density_follows_the_schedule(allocator: str) -> None:
    run = ready({"name": "supermask", "end": "75%"}, sparsity=0.8, allocator=allocator, train={"length": "15ep"})
    weights, total = run.state.weights, run.state.masks.total
    layers = layers_of({name: weight.shape for name, weight in weights.items()})
    kept = kept_for(0.8, layers)
    seen = []
    for report in execute(run.plan, run.state, run.env):
        if run.state.leaves:
            chances = {name: run.state.leaves[f"scores/{name}"].detach().sigmoid() for name in weights}
            progress = report.clock / (0.75 * 15 * 10)
            seen.append((sum(float(chance.sum()) for chance in chances.values()) / total, cubic(0.5, kept / total, progress)))
            if allocator == "erk" and progress >= 1.2:
                counts = allocate(run.recipe.allocator, layers, kept)
                assert all(abs(float(chance.sum()) - counts[name]) < 0.05 * chance.numel() for name, chance in chances.items())
    assert len(seen) == 14 and all(abs(is_ - due) < 0.05 for is_, due in seen), seen
    assert run.state.masks.kept == kept


@pytest.mark.parametrize(("name", "counts"), [("edge_popup", "uniform"), ("biprop", "erk")])
def test_every_step_keeps_exactly_the_allocators_counts(name: str, counts: str) -> None:
    run = ready(name, sparsity=0.7, allocator=counts)
    layers = layers_of({name: weight.shape for name, weight in run.state.weights.items()})
    due = allocate(run.recipe.allocator, layers, kept_for(0.7, layers))
    (hook,) = run.plan.stages[0].hooks  # type: ignore[attr-defined]
    moved = set()
    for _ in execute(run.plan, run.state, run.env):
        if run.state.leaves:
            view = hook.view(run.state.slots[slot(0, hook)], run.state, run.env, train=True)
            assert {name: int((weight != 0).sum()) for name, weight in view.items()} == due
            moved.add(tuple((view["6.weight"] != 0).flatten().tolist()))
            assert run.state.masks.sparsity == 0, "nothing is removed before the end"
    assert run.state.masks.counts == due and len(moved) > 1


@pytest.mark.parametrize("paradigm", NAMES)
def test_all_but_the_masks_is_frozen(paradigm: str) -> None:
    run = ready(paradigm, sparsity=0.8)
    before = run.state.values()
    finish(run)
    after = run.state.values()
    names = [name for name, _ in run.state.model.named_parameters() if name not in run.state.weights]
    assert names and all(torch.equal(after[name], before[name]) for name in names)
    assert not torch.equal(after["1.running_mean"], before["1.running_mean"]), "batch norm follows the data"
    assert not run.state.leaves and not any(owner.startswith("scores/") for owner in run.state.memory)
    for name, mask in run.state.masks.items():
        kept = after[name][mask]
        assert kept.abs().max() - kept.abs().min() <= 1e-6 * kept.abs().max(), "signed constants"
        if paradigm != "biprop":  # its default draws the weights anew
            assert torch.equal(kept.sign(), before[name][mask].sign())


def test_frozen_values_are_as_stated() -> None:
    init = State.new(lambda: nn.Linear(4, 3), seed=0, device=torch.device("cpu")).weights["weight"].detach()

    def start(hook: Selection) -> torch.Tensor:
        return tiny(hook)[0].weights["weight"].detach()

    assert torch.equal(start(edge_popup()), init)
    torch.testing.assert_close(start(edge_popup(scaled=True)), init * math.sqrt(2))  # half of the layer is kept
    torch.testing.assert_close(start(edge_popup(weights="signed")), init.sign() * math.sqrt(2 / 4))
    torch.testing.assert_close(start(supermask(signed=True)), init.sign() * init.std(correction=0))
    wide = State.new(lambda: nn.Linear(400, 300), seed=0, device=torch.device("cpu"))
    edge_popup(weights="kaiming").start({}, wide, SimpleNamespace(seed=0, task=SimpleNamespace(example=None)))  # type: ignore[arg-type]
    assert float(wide.weights["weight"].detach().std()) == pytest.approx(math.sqrt(2 / 400), rel=0.02)


@pytest.mark.parametrize("paradigm", NAMES)
def test_the_baked_network_computes_what_the_last_view_did(paradigm: str) -> None:
    run = ready(paradigm, sparsity=0.8)
    (stage,) = run.plan.stages
    stage.enter(run.state, run.env)
    list(stage.run(run.state, run.env))
    run.state.model.eval()
    images = run.env.task.example()
    with torch.no_grad(), stage.viewing(run.state, run.env):
        seen = run.state.model(images)
    stage.leave(run.state, run.env)
    with torch.no_grad():
        assert torch.equal(run.state.model(images), seen)
    layers = layers_of({name: weight.shape for name, weight in run.state.weights.items()})
    assert run.state.masks.kept == kept_for(0.8, layers)
    assert all(not run.state.weights[name][~mask].any() for name, mask in run.state.masks.items())


@pytest.mark.parametrize("paradigm", NAMES)
def test_masks_alone_learn(paradigm: str) -> None:
    run = ready(paradigm, sparsity=0.5, train={"length": "15ep"})
    assert finish(run)[-1].metrics["accuracy"] > 0.5, "chance is 0.1"


@pytest.mark.parametrize("paradigm", NAMES)
def test_optimizer_and_regularizer_are_about_weights_that_move(paradigm: str) -> None:
    one, two = ready(paradigm), ready(paradigm, regularizer="l2", train={"optimizer": {"name": "adamw", "lr": 1e-3}})
    assert one.plan.stages == two.plan.stages and one.key == two.key
    finish(one)
    finish(two)
    assert same(tensors(one), tensors(two))


@pytest.mark.parametrize("paradigm", ["edge_popup", "biprop"])
def test_counts_of_edge_popup_come_before_its_scores(paradigm: str) -> None:
    with pytest.raises(UserError, match="allocator 'global' ranks scores"):
        ready(paradigm, allocator="global")


def test_lengths_and_budgets_that_do_not_fit_are_refused() -> None:
    with pytest.raises(UserError, match="paradigm.end must be in the training of 40 steps, got step 50"):
        ready({"name": "supermask", "end": "50it"})
    for hook in (edge_popup(sparsity=0.99), supermask(sparsity=0.99)):
        with pytest.raises(UserError, match="at least one unit in each of 1 layers"):
            tiny(hook)
