"""Slimming, group lasso, ADMM and soft filters: their steps by hand, and where they lead when the optimum is known."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from toys import finish, ready, recipe, same, tensors

from distprune.core import registry
from distprune.core.executor import Env, execute
from distprune.core.hooks.admm import Admm
from distprune.core.hooks.group_lasso import GroupLasso
from distprune.core.hooks.hook import Hook
from distprune.core.hooks.slimming import Slimming
from distprune.core.hooks.soft_filters import SoftFilters
from distprune.core.keys import keys
from distprune.core.plan import Plan
from distprune.core.recipe import TrainConfig
from distprune.core.stages import Calibrate, Prune, SetWeights, Snapshot, Train
from distprune.core.state import State
from distprune.core.tasks.given import GivenBatches
from distprune.errors import UserError

UNIFORM = registry.allocator.choose("uniform")
ENV: Any = SimpleNamespace(seed=0, task=SimpleNamespace(example=lambda: torch.ones(1, 1, 8, 8)))


def convolutions(shape: tuple[int, int, int], classes: int, *, norm: bool = True) -> nn.Module:
    """Two convolutions whose channels go through batch normalisation, and a linear layer."""
    return nn.Sequential(
        nn.Conv2d(shape[0], 6, 3, padding=1),
        nn.BatchNorm2d(6) if norm else nn.Identity(),
        nn.ReLU(),
        nn.Conv2d(6, 8, 3, padding=1),
        nn.BatchNorm2d(8) if norm else nn.Identity(),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(32, classes),
    )


MODEL = {"import": "test_penalties:convolutions"}
CHANNELS: dict[str, Any] = {"model": MODEL, "granularity": "filter", "allocator": "uniform", "sparsity": 0.5}


class Free(nn.Module):
    """A network that computes its own weights, so that a loss can be any function of them."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        weight: torch.Tensor = self.layer.weight
        return weight


def descend(layer: nn.Module, target: torch.Tensor, steps: int, lr: float, *hooks: Hook, decay: str = "constant") -> State:
    """The state after gradient descent on |w - target|^2 / 2 under hooks."""
    optimizer = registry.optimizer.choose("sgd", lr=lr, momentum=0.0, weight_decay=0.0)
    config = TrainConfig(length=steps, batch_size=1, optimizer=optimizer, decay=registry.decay.choose(decay))
    filled = tuple(replace(hook, config=config) if isinstance(hook, GroupLasso) else hook for hook in hooks)
    task = GivenBatches([(target, target)], lambda outputs, targets: 0.5 * (outputs - targets).square().sum())
    state = State.new(lambda: Free(layer), seed=0, device=torch.device("cpu"))
    env = Env(task=task, build=lambda: Free(layer), seed=0, device=torch.device("cpu"), report_every=10**9)
    list(execute(Plan([Train(config=config, until=steps, hooks=filled)]), state, env))
    return state


def row(*values: float) -> State:
    """One linear layer with these weights."""
    layer = nn.Linear(len(values), 1, bias=False)
    layer.weight.data = torch.tensor([values])
    return State.new(lambda: Free(layer), seed=0, device=torch.device("cpu"))


# Slimming


def _slimming_state() -> State:
    torch.manual_seed(0)
    return State.new(lambda: convolutions((1, 8, 8), 10), seed=0, device=torch.device("cpu"))


def test_slimming_adds_the_sign_of_each_scale_to_its_gradient() -> None:
    state, hook = _slimming_state(), Slimming(strength=0.25, scale=0.5, granularity=registry.granularity.choose("filter"))
    hook.start(memory := {}, state, ENV)
    gamma, others = state.model[1].weight, state.values()
    assert gamma.tolist() == [0.5] * 6 and state.model[4].weight.tolist() == [0.5] * 8, "where the paper starts them"
    gamma.data = torch.tensor([2.0, -2.0, 0.0, 1.0, -1.0, 3.0])
    for parameter in state.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    hook.grad(memory, state, ENV)
    assert gamma.grad.tolist() == [1.25, 0.75, 1.0, 1.25, 0.75, 1.25]
    assert state.model[4].weight.grad.tolist() == [1.25] * 8
    assert state.model[1].bias.grad.tolist() == [1.0] * 6 and bool((state.model[0].weight.grad == 1).all()), "scales alone"
    assert not hook.step(memory, state, ENV) and torch.equal(state.values()["0.weight"], others["0.weight"])


def test_slimming_ends_where_the_lasso_does() -> None:
    """On |gamma - a|^2 / 2 + strength |gamma| the optimum is a, shrunk by strength and not below zero."""
    state, hook = _slimming_state(), Slimming(strength=0.3, scale=0.5, granularity=registry.granularity.choose("filter"))
    hook.start({}, state, ENV)
    gamma, target, lr = state.model[1].weight, torch.tensor([2.0, -1.0, 0.2, -0.1, 0.0, 0.4]), 0.01
    for _ in range(2000):
        gamma.grad = gamma.detach() - target
        hook.grad({}, state, ENV)
        gamma.data -= lr * gamma.grad
    optimum = target.sign() * (target.abs() - 0.3).clamp(min=0)
    torch.testing.assert_close(gamma.detach(), optimum, atol=2 * lr * 0.3, rtol=0)  # a subgradient jumps around zero


def test_slimming_removes_the_channels_of_the_smallest_scales() -> None:
    run = ready({"name": "slimming", "strength": 1e-2}, **CHANNELS)
    scales: list[torch.Tensor] = []
    for report in execute(run.plan, run.state, run.env):
        if not report.sparsity:
            scales = [run.state.model[index].weight.detach().abs().clone() for index in (1, 4)]
    kept = [run.state.masks["0.weight"].flatten(1).any(1), run.state.masks["8.weight"].view(10, 8, 4).any(2).any(0)]
    for scale, keep in zip(scales, kept, strict=True):
        assert 0 < int(keep.sum()) < len(keep) and scale[keep].min() >= scale[~keep].max()


def test_slimming_without_batch_normalisation_is_refused() -> None:
    with pytest.raises(UserError, match="those of '.*' go through none. Choose taylor_gates .* ssl"):
        finish(ready("slimming", **{**CHANNELS, "model": {**MODEL, "norm": False}}))


def test_slimming_is_about_channels() -> None:
    with pytest.raises(UserError, match="paradigm 'slimming' works on granularity filter or channel, got 'weight'"):
        recipe("slimming", 0.5, granularity="weight")


# Group lasso


def test_group_lasso_shrinks_whole_kernels_by_hand() -> None:
    """Norms 5 and 1 of 4 weights each at lr 0.1 and strength 10: the threshold is 0.1 * 10 * sqrt(4) = 2."""
    layer = nn.Conv2d(2, 1, 2, bias=False)
    layer.weight.data = torch.tensor([[[[3.0, 4.0], [0.0, 0.0]], [[1.0, 0.0], [0.0, 0.0]]]])
    state = State.new(lambda: Free(layer), seed=0, device=torch.device("cpu"))
    config = TrainConfig(length=10, optimizer=registry.optimizer.choose("sgd", lr=0.1), decay=registry.decay.choose("constant"))
    hook = GroupLasso(strength=10.0, granularity=registry.granularity.choose("kernel"), config=config)
    hook.start(memory := {}, state, ENV)
    state.clock = 1
    hook.step(memory, state, ENV)
    torch.testing.assert_close(layer.weight.detach()[0, 0], torch.tensor([[3.0, 4.0], [0.0, 0.0]]) * (1 - 2 / 5))
    assert layer.weight[0, 1].tolist() == [[0.0, 0.0], [0.0, 0.0]], "exactly zero"


def test_group_lasso_follows_the_learning_rate() -> None:
    state = row(8.0)
    config = TrainConfig(
        length=100, optimizer=registry.optimizer.choose("adamw", lr=0.5), decay=registry.decay.choose("steps", milestones=[0.5])
    )
    hook = GroupLasso(strength=1.0, granularity=registry.granularity.choose("kernel"), config=config)
    hook.start(memory := {}, state, ENV)
    seen = []
    for clock in (50, 51, 101):  # after step 49, which is the last at the full rate, and after two at a tenth of it
        state.clock = clock
        hook.step(memory, state, ENV)
        seen.append(round(state.weights["layer.weight"].item(), 5))
    assert seen == [7.5, 7.45, 7.4]


def test_group_lasso_ends_where_the_optimum_is() -> None:
    """On |w - a|^2 / 2 + strength sqrt(n) |w| it is max(0, 1 - strength sqrt(n) / |a|) a for each unit."""
    torch.manual_seed(0)
    target = torch.randn(4, 3, 2, 2)
    target[:, 1] *= 0.1
    hook = GroupLasso(strength=0.4, granularity=registry.granularity.choose("kernel"), config=None)
    state = descend(nn.Conv2d(3, 4, 2, bias=False), target, 300, 0.1, hook)
    norm = target.flatten(2).norm(dim=2)
    optimum = target * (1 - 0.4 * 2 / norm).clamp(min=0)[..., None, None]
    weight = state.weights["layer.weight"].detach()
    torch.testing.assert_close(weight, optimum, atol=1e-5, rtol=1e-5)
    zero = norm <= 0.8
    assert 4 <= int(zero.sum()) < 12 and not weight[zero].any(), "exact zeros"


def test_ssl_trains_with_it_prunes_and_fine_tunes() -> None:
    run = ready({"name": "ssl", "strength": 0.1}, **{**CHANNELS, "model": {**MODEL, "norm": False}})
    train, prune, tune = run.plan.stages
    assert isinstance(train, Train) and isinstance(prune, Prune) and isinstance(tune, Train)
    assert [type(hook) for hook in train.hooks] == [GroupLasso] and not tune.hooks
    assert (prune.criterion.name, prune.granularity.name, tune.since) == ("magnitude", "filter", 20)
    for report in execute(run.plan, run.state, run.env):
        if not report.sparsity:
            zero = [~weight.detach().flatten(1).any(1) for name, weight in run.state.weights.items() if name != "8.weight"]
    assert any(bool(filters.any()) for filters in zero), "a strong penalty empties filters"


# ADMM


def _admm(**changes: Any) -> Admm:
    fields: dict[str, Any] = {"rho": 0.5, "growth": 1.0, "every": 1, "sparsity": 0.5, "allocator": UNIFORM}
    return Admm(**{**fields, "granularity": registry.granularity.choose("weight"), **changes})


def test_admm_updates_by_hand() -> None:
    state, hook = row(3.0, 1.0, -2.0, 0.5), _admm(growth=2.0)
    weight = state.weights["layer.weight"]
    hook.start(memory := {}, state, ENV)
    assert memory["z:layer.weight"].tolist() == [[3.0, 0.0, -2.0, 0.0]] and not memory["u:layer.weight"].any()
    weight.grad = torch.zeros(1, 4)
    hook.grad(memory, state, ENV)
    assert weight.grad.tolist() == [[0.0, 0.5, 0.0, 0.25]], "rho (w - z + u)"
    weight.data = torch.tensor([[3.0, 4.0, -2.0, 0.5]])
    hook.step(memory, state, ENV)
    assert memory["z:layer.weight"].tolist() == [[3.0, 4.0, 0.0, 0.0]], "the largest of w + u"
    assert memory["u:layer.weight"].tolist() == [[0.0, 0.0, -1.0, 0.25]], "w - z, halved as rho doubles"
    assert memory["rho"] == 1.0
    weight.grad = torch.zeros(1, 4)
    hook.grad(memory, state, ENV)
    assert weight.grad.tolist() == [[0.0, 0.0, -3.0, 0.75]]
    assert state.is_dense, "nothing is masked"


def test_admm_projects_every_so_many_steps() -> None:
    state, hook = row(3.0, 1.0), _admm(every=3)
    hook.start(memory := {}, state, ENV)
    changed = []
    for _ in range(6):
        before = memory["u:layer.weight"]
        hook.step(memory, state, ENV)
        changed.append(memory["u:layer.weight"] is not before)
    assert changed == [False, False, True, False, False, True]


@pytest.mark.parametrize("seed", range(4))
def test_admm_finds_the_best_sparse_weights(seed: int) -> None:
    """The k-sparse w nearest to a is a's k largest entries, wherever the descent starts."""
    torch.manual_seed(seed)
    target = torch.randn(1, 20)
    best = target * (target.abs() >= target.abs().flatten().sort().values[10])
    state = descend(nn.Linear(20, 1, bias=False), target, 4000, 0.1, _admm(rho=1.0, every=20))
    torch.testing.assert_close(state.weights["layer.weight"].detach(), best, atol=1e-3, rtol=0)


def test_admm_projects_onto_whole_kernels() -> None:
    target = torch.tensor([[3.0, 0.0], [1.0, 1.0]]).view(1, 2, 1, 2) * torch.ones(1, 2, 2, 2)
    best = target * torch.tensor([1.0, 0.0]).view(1, 2, 1, 1)
    hook = _admm(rho=1.0, every=20, granularity=registry.granularity.choose("kernel"))
    state = descend(nn.Conv2d(2, 1, 2, bias=False), target, 2000, 0.1, hook)
    torch.testing.assert_close(state.weights["layer.weight"].detach(), best, atol=1e-3, rtol=0)


def test_admm_leaves_less_to_prune_than_training_on() -> None:
    """What the hard prune takes from the norm of the weights."""

    def taken(rho: float) -> float:
        run = ready({"name": "admm", "rho": rho, "growth": 10.0, "updates": 10, "solve": "100%"}, train={"length": "10ep"})
        for report in execute(run.plan, run.state, run.env):
            if not report.sparsity:
                whole = {name: weight.detach().clone() for name, weight in run.state.weights.items()}
        masks = run.state.masks
        lost = sum(float(weight[~masks[name]].square().sum()) for name, weight in whole.items())
        return lost / sum(float(weight.square().sum()) for weight in whole.values())

    assert taken(0.1) < 0.5 * taken(0.0)


def test_admm_grows_rho_by_the_factor_over_all_updates() -> None:
    _, solve, *_ = recipe({"name": "admm", "rho": 0.1, "growth": 10.0, "updates": 5, "solve": "50%"}).plan(10).stages
    assert isinstance(solve, Train) and (solve.since, solve.until) == (20, 40)
    (hook,) = solve.hooks
    assert isinstance(hook, Admm) and hook.every == 4 and hook.rho * hook.growth**5 == pytest.approx(1.0)


def test_admm_takes_every_granularity() -> None:
    for granularity, allocator, sparsity in (
        ("weight", "erk", 0.9),
        ("kernel", "erk", 0.5),
        ("filter", "global", 0.5),
        ("n_m", "uniform", 0.5),
    ):
        run = ready("admm", **{**CHANNELS, "granularity": granularity, "allocator": allocator, "sparsity": sparsity})
        assert finish(run)[-1].sparsity >= sparsity - 0.01


# Soft filters


def _soft(**changes: Any) -> SoftFilters:
    fields: dict[str, Any] = {"every": 10, "sparsity": 0.5, "allocator": UNIFORM, "granularity": registry.granularity.choose("filter")}
    return SoftFilters(**{**fields, **changes})


def _empty(state: State) -> list[list[bool]]:
    return [(~state.weights[name].detach().flatten(1).any(1)).tolist() for name in ("0.weight", "3.weight")]


def test_soft_filters_zeroes_the_smallest_and_masks_nothing() -> None:
    state, hook = _slimming_state(), _soft(sparsity=0.6)
    with torch.no_grad():
        for name, sizes in (("0.weight", [1, 6, 2, 5, 3, 4]), ("3.weight", [8, 1, 7, 2, 6, 3, 5, 4])):
            state.weights[name].copy_(torch.tensor(sizes).float().view(-1, 1, 1, 1).expand(state.weights[name].shape))
    before = state.values()
    state.clock = 9
    hook.step({}, state, ENV)
    assert not any(map(any, _empty(state))), "not yet"
    state.clock = 10
    hook.step({}, state, ENV)
    assert state.is_dense
    for name, empty in zip(("0.weight", "3.weight"), _empty(state), strict=True):
        sizes = before[name].flatten(1)[:, 0]
        assert any(empty) and sizes[torch.tensor(empty)].max() < sizes[~torch.tensor(empty)].min()
        kept = ~torch.tensor(empty)
        assert torch.equal(state.values()[name][kept], before[name][kept]), "those that read a zeroed filter are left"
    assert torch.equal(state.values()["8.weight"], before["8.weight"])


def test_soft_filters_come_back_and_are_removed_at_the_end() -> None:
    run = ready({"name": "soft_filters", "batches": 0}, report_every="5it", **CHANNELS)
    seen = []
    for report in execute(run.plan, run.state, run.env):
        seen.append((report.clock, report.sparsity, sum(map(sum, _empty(run.state)))))
    assert [clock for clock, _, empty in seen if empty] == [10, 20, 30, 40], "zero after an epoch, not zero five steps later"
    assert [sparsity for _, sparsity, _ in seen[:-1]] == [0.0] * (len(seen) - 1) and seen[-1][1] >= 0.5
    masks = run.state.masks
    assert [(~masks[name].flatten(1).any(1)).tolist() for name in ("0.weight", "3.weight")] == _empty(run.state)


def test_soft_filters_estimates_statistics_or_fine_tunes() -> None:
    def ends(**options: Any) -> Any:
        return ready({"name": "soft_filters", **options}, **CHANNELS).plan.stages[1:]

    assert [type(stage) for stage in ends()] == [Calibrate] and not ends(batches=0)
    (tune,) = ends(tune="25%")
    assert isinstance(tune, Train) and (tune.since, tune.until) == (30, 40)


# What they share

FULL: list[Any] = [
    {"name": "slimming", "strength": 1e-3},
    {"name": "ssl", "strength": 1e-2},
    {"name": "admm", "updates": 5},
    "soft_filters",
    {"name": "soft_filters", "tune": "25%"},
]


@pytest.mark.parametrize("paradigm", FULL, ids=str)
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_budget_bill_and_resume(paradigm: Any, optimizer: str, tmp_path: Any) -> None:
    changes: dict[str, Any] = {**CHANNELS, "report_every": "7it", "train": {"optimizer": optimizer}}
    run = ready(paradigm, **changes)
    reports = []
    for report in execute(run.plan, run.state, run.env):
        reports.append(report)
        run.state.save(tmp_path / f"{report.index}.safetensors")
    assert reports[-1].cost == run.plan.cost and reports[-1].sparsity >= 0.5
    assert all(not run.state.weights[name][~mask].any() for name, mask in run.state.masks.items())
    assert len(set(found := keys("root", run.plan))) == len(found)
    for index in range(len(reports)):
        again = ready(paradigm, **changes)
        again.state.load(tmp_path / f"{index}.safetensors")
        assert finish(again) == reports[index + 1 :]
        assert same(tensors(again), tensors(run)) and again.state.ledger == run.state.ledger


@pytest.mark.parametrize(
    ("paradigm", "message"),
    [
        ({"name": "slimming", "strength": -1.0}, "paradigm.strength must be at least 0, got -1.0"),
        ({"name": "slimming", "scale": 0.0}, "paradigm.scale must be above 0, got 0.0"),
        ({"name": "ssl", "strength": -1.0}, "paradigm.strength must be at least 0, got -1.0"),
        ({"name": "admm", "rho": -1.0}, "paradigm.rho must be at least 0, got -1.0"),
        ({"name": "admm", "growth": 0.5}, "paradigm.growth must be at least 1, got 0.5"),
        ({"name": "admm", "updates": 0}, "paradigm.updates must be at least 1, got 0"),
        ({"name": "soft_filters", "every": "0it"}, "paradigm.every must be at least one step, got 0"),
        ({"name": "soft_filters", "batches": -1}, "paradigm.batches must be at least 0, got -1"),
    ],
    ids=str,
)
def test_options_that_make_no_sense_say_why(paradigm: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        recipe(paradigm, **CHANNELS).plan(10)


def test_a_fixed_criterion_gives_the_allocator_its_scores() -> None:
    for name in ("slimming", "ssl", "admm", "soft_filters"):
        recipe(name, **{**CHANNELS, "allocator": "global"})


# Fine-tuning after compensation


def test_finetune_compensates_after_every_prune() -> None:
    run = recipe({"name": "finetune", "share": 0.7, "weights": "compensate", "batches": 3}, train={"batch_size": 16})
    stages = run.plan(10).stages
    assert [type(stage) for stage in stages] == [Train, *[Snapshot, Prune, SetWeights, Train] * 2]
    policies = [stage for stage in stages if isinstance(stage, SetWeights)]
    assert [(s.policy, s.tag, s.batches, s.batch_size) for s in policies] == [("compensate", "unpruned", 3, 16)] * 2
    assert stages[3].reads == stages[1].writes
    found = keys("root", Plan(stages))
    assert len(set(found)) == len(found) - 2, "the same name for two snapshots tells them apart by what they hold"
    with pytest.raises(UserError, match="paradigm.batches must be at least 1, got 0"):
        recipe({"name": "finetune", "batches": 0}).plan(10)
