"""The posterior paradigm: moments of a chain, scores and masks by hand, and its plan."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from toys import finish, ready, recipe, same, tensors

from distprune.core import registry
from distprune.core.executor import execute
from distprune.core.hooks.functional_prior import FunctionalPrior
from distprune.core.hooks.hook import slot
from distprune.core.hooks.posterior import Posterior, magnitudes, signal_to_noise
from distprune.core.stages import Calibrate, Train
from distprune.core.state import State
from distprune.errors import UserError

ENV: Any = SimpleNamespace(seed=0, task=SimpleNamespace(example=lambda: torch.ones(1, 4)))
SHORT = {"name": "posterior", "burn": "25%", "sample": "50%", "samples": 5}


def _hook(**changes: Any) -> Posterior:
    fields: dict[str, Any] = {
        "burn": 2,
        "thin": 1,
        "by": "signal_to_noise",
        "sparsity": 0.5,
        "allocator": registry.allocator.choose("global"),
    }
    return Posterior(**{**fields, "granularity": registry.granularity.choose("weight"), **changes})


def _row(*values: float) -> State:
    layer = nn.Linear(len(values), 1)
    layer.weight.data = torch.tensor([values])
    return State.new(lambda: layer, seed=0, device=torch.device("cpu"))


def _chain(state: State, hook: Posterior, samples: torch.Tensor) -> dict[str, Any]:
    hook.start(memory := {}, state, ENV)
    for sample in samples:
        state.weights["weight"].data = sample[None].clone()
        state.model.bias.data = sample[:1].clone()
        hook.step(memory, state, ENV)
    return memory


def test_moments_are_those_of_the_kept_samples_alone() -> None:
    torch.manual_seed(0)
    samples = 1e3 + torch.randn(30, 4).double()  # a large mean, for which sums of squares would lose the variance
    state = _row(0.0, 0.0, 0.0, 0.0)
    state.model.double()
    memory = _chain(state, _hook(burn=6, thin=4), samples)
    kept = samples[[9, 13, 17, 21, 25, 29]]
    assert memory["count"] == 6
    torch.testing.assert_close(memory["mean:weight"][0], kept.mean(0))
    torch.testing.assert_close(memory["squares:weight"][0] / 5, kept.var(0), rtol=1e-9, atol=0)


def test_masks_and_means_by_hand() -> None:
    """Means 1, 4, -0.5, 2 with deviations 0.1, 4, 0.1, 0.5: ratios 10, 1, 5, 4."""
    mean, deviation = torch.tensor([1.0, 4.0, -0.5, 2.0]), torch.tensor([0.1, 4.0, 0.1, 0.5])
    samples = torch.stack([mean, mean, mean - deviation, mean, mean + deviation])  # the first two are burn-in
    for by, kept in (("signal_to_noise", [True, False, True, False]), ("magnitude", [False, True, False, True])):
        state, hook = _row(9.0, 9.0, 9.0, 9.0), _hook(by=by)
        memory = _chain(state, hook, samples)
        hook.end(memory, state, ENV)
        assert state.masks["weight"].tolist() == [kept]
        torch.testing.assert_close(state.weights["weight"].detach()[0], mean * torch.tensor(kept), msg="the mean, not the last sample")
        torch.testing.assert_close(state.model.bias.detach(), mean[:1], msg="what is not pruned has its mean too")


def test_a_unit_has_the_root_of_its_summed_ratio() -> None:
    layer = nn.Conv2d(2, 1, (1, 2), bias=False)
    state = State.new(lambda: layer, seed=0, device=torch.device("cpu"))
    units = state.units(registry.granularity.choose("kernel"), lambda: torch.ones(1, 2, 1, 2))
    means = {"weight": torch.tensor([[[[3.0, 4.0]], [[-1.0, 1.0]]]])}
    variances = {"weight": torch.tensor([[[[4.0, 0.0]], [[0.25, 0.25]]]])}
    assert signal_to_noise(units, means, variances)["weight"].flatten().tolist() == pytest.approx([2.5, 2.0])  # sqrt(25 / 4), sqrt(2 / 0.5)
    assert magnitudes(units, means)["weight"].flatten().tolist() == [3.5, 1.0]


def test_a_weight_that_never_moved_is_kept_and_its_score_is_finite() -> None:
    state, hook = _row(0.0, 0.0), _hook(burn=0)
    memory = _chain(state, hook, torch.tensor([[0.5, 3.0], [0.5, 5.0]]))
    hook.end(memory, state, ENV)
    assert state.masks["weight"].tolist() == [[True, False]]


def test_a_chain_that_is_ended_before_it_has_samples_is_pruned_as_it_stands() -> None:
    """What a rung does to a copy."""
    state, hook = _row(0.0, 0.0), _hook(burn=10)
    memory = _chain(state, hook, torch.tensor([[0.5, -3.0]]))
    hook.end(memory, state, ENV)
    assert state.weights["weight"].tolist() == [[0.0, -3.0]] and state.model.bias.item() == 0.5


def test_the_plan_trains_samples_at_a_constant_rate_and_tunes() -> None:
    train, chain, tune = recipe({**SHORT, "rate": 4e-3, "temperature": 0.5}, regularizer="l2").plan(10).stages
    assert isinstance(train, Train) and isinstance(chain, Train) and isinstance(tune, Train)
    assert (train.until, chain.since, chain.until, tune.since, tune.until) == (40, 40, 70, 30, 40)
    optimizer = chain.config.optimizer
    assert (optimizer.name, optimizer.option("lr"), optimizer.option("burn"), optimizer.option("temperature")) == ("sghmc", 4e-3, 10, 0.5)
    assert optimizer.option("weight_decay") == 5e-4 and chain.config.decay.name == "constant", "the prior is that of the recipe"
    assert [type(hook).__name__ for hook in chain.hooks] == ["Penalty", "Posterior"] and train.config == tune.config
    hook = chain.hooks[1]
    assert isinstance(hook, Posterior) and (hook.burn, hook.thin) == (10, 4)
    *_, last = recipe({**SHORT, "tune": "0%"}).plan(10).stages
    assert isinstance(last, Calibrate) and len(recipe({**SHORT, "tune": "0%", "batches": 0}).plan(10).stages) == 2


def test_the_two_rules_see_the_same_chain() -> None:
    found: dict[str, Any] = {}
    for by in ("signal_to_noise", "magnitude"):
        run = ready({**SHORT, "by": by}, report_every="7it")
        for report in execute(run.plan, run.state, run.env):
            if report.stage == 1 and 40 < report.clock < 70:
                memory = run.state.slots[slot(0, run.plan.stages[1].hooks[0])]
                found.setdefault(by, []).append({key: value.clone() for key, value in memory.items() if isinstance(value, torch.Tensor)})
        found[by, "masks"] = run.state.masks
    assert len(found["magnitude"]) == 4
    for one, other in zip(found["signal_to_noise"], found["magnitude"], strict=True):
        assert all(torch.equal(value, other[key]) for key, value in one.items())
    assert not found["signal_to_noise", "masks"].equal(found["magnitude", "masks"])


@pytest.mark.parametrize(("granularity", "sparsity"), [("weight", 0.9), ("kernel", 0.5), ("filter", 0.5)])
def test_every_granularity_with_a_functional_prior_and_resumed(granularity: str, sparsity: float, tmp_path: Path) -> None:
    prior = {"name": "functional_prior", "iterations": 2, "functions": 4, "points": 4, "critic_steps": 2, "hidden": 8}
    changes: dict[str, Any] = {"granularity": granularity, "sparsity": sparsity, "regularizer": prior, "report_every": "13it"}
    whole = ready(SHORT, **changes)
    assert [type(hook) for hook in whole.plan.stages[1].hooks] == [FunctionalPrior, Posterior]
    reports = []
    for report in execute(whole.plan, whole.state, whole.env):
        reports.append(report)
        whole.state.save(tmp_path / f"{report.index}.safetensors")
    assert reports[-1].sparsity >= sparsity - 1e-3 and reports[-1].cost == whole.plan.cost
    for index in range(len(reports)):
        again = ready(SHORT, **changes)
        again.state.load(tmp_path / f"{index}.safetensors")
        assert finish(again) == reports[index + 1 :] and same(tensors(again), tensors(whole))


def test_the_mean_is_better_than_its_samples() -> None:
    """On the toys at temperature 1: noise of the weights costs accuracy, and the mean has less of it."""
    run = ready(
        {**SHORT, "burn": "100%", "sample": "100%", "samples": 20, "temperature": 1.0, "rate": 1e-2, "tune": "0%"},
        0.01,
        train={"length": "10ep"},
    )
    sampled = []
    for report in execute(run.plan, run.state, run.env):
        if report.stage == 1 and 200 < report.clock < 300:
            sampled.append(report.metrics["loss"])
    assert len(sampled) == 9 and report.metrics["loss"] < sum(sampled) / 9


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples": 1}, r"paradigm.samples and paradigm.sample \(steps\) must be at least 2, got 1 and 20"),
        ({"sample": "1it"}, r"must be at least 2, got 5 and 1. Write sample: '50%'"),
        ({"batches": -1}, "paradigm.batches must be at least 0, got -1"),
    ],
    ids=str,
)
def test_options_that_make_no_sense_say_why(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        recipe({**SHORT, **options}).plan(10)


def test_a_chain_without_temperature_is_refused_before_anything_is_trained() -> None:
    with pytest.raises(UserError, match="optimizer.friction and optimizer.temperature must be above 0, got 0.01 and 0.0"):
        ready({**SHORT, "temperature": 0.0})
