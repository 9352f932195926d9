"""Gibbs pruning: samplers against enumeration, what the distributions freeze onto, and how a step goes through a mask."""

import itertools
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import optuna
import pytest
import torch
from torch import Tensor, nn
from toys import BASE, finish, ready, recipe, same, tensors

from distprune.core.executor import execute
from distprune.core.gibbs import Distribution, Filters, Independent, Kernels, threshold
from distprune.core.hooks.gibbs import Gibbs
from distprune.core.hooks.hook import viewed
from distprune.core.hooks.regularizers import Penalty
from distprune.core.stages import Calibrate, Train
from distprune.core.state import State
from distprune.errors import UserError
from distprune.search.space import Space

DRAWS = 100_000
SIGNIFICANCE = 1e-3  # of every chi-square test here; seeds are fixed, so that it is met once and for all


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def states(n: int) -> Tensor:
    """All spins of n, [2^n, n], in the order of the binary numbers."""
    return torch.tensor(list(itertools.product((-1.0, 1.0), repeat=n)), dtype=torch.float64)


def p_value(masks: Tensor, chances: Tensor) -> float:
    """Of Pearson's chi-square test of masks [draws, n] against the chances of all states; those expected less than 5 times are one."""
    n = masks.shape[1]
    number = (masks.long() * 2 ** torch.arange(n - 1, -1, -1)).sum(1)
    seen, due = torch.bincount(number, minlength=2**n).double(), chances * len(masks)
    rare = due < 5
    seen, due = (torch.cat([values[~rare], values[rare].sum()[None]]) for values in (seen, due))
    seen, due = seen[due > 0], due[due > 0]
    statistic = ((seen - due).square() / due).sum()
    return float(torch.special.gammaincc(torch.tensor((len(due) - 1) / 2, dtype=torch.float64), statistic / 2))


def drawn(distribution: Callable[[Tensor], Distribution], field: Tensor) -> Tensor:
    """Masks of as many equal rows."""
    return distribution(field.float().expand(DRAWS, -1)).draw(generator())


# Kernels


def by_enumeration(squares: Tensor, quantile: float, beta: float, c: float) -> Tensor:
    """exp(-beta H) of all states, normalised, with the paper's H = x^T A x + b^T x, A = -c off its diagonal and b = Q - w^2."""
    x, k = states(len(squares)), len(squares)
    pairs = -c * (torch.ones(k, k, dtype=torch.float64) - torch.eye(k, dtype=torch.float64))
    energy = torch.einsum("si,ij,sj->s", x, pairs, x) + x @ (quantile - squares.double())
    return torch.softmax(-beta * energy, dim=0)


KERNELS = [(1, 0.3), (2, 0.3), (4, 0.1), (9, 0.02)]  # size, coupling c


def kernel(k: int) -> tuple[Tensor, float, float]:
    """w^2 of a kernel, Q and beta."""
    return torch.randn(k, generator=generator(k)).square() * 0.5, 0.4, 1.3


@pytest.mark.parametrize(("k", "c"), KERNELS)
def test_kernels_are_drawn_as_by_enumeration(k: int, c: float) -> None:
    squares, quantile, beta = kernel(k)
    field, due = beta * (squares - quantile), by_enumeration(squares, quantile, beta, c)
    assert p_value(drawn(lambda rows: Kernels(rows, beta * c), field), due) > SIGNIFICANCE
    # The test tells look-alikes: another coupling, or weights one by one without the factor 2 of spins.
    if k > 1:
        assert p_value(drawn(lambda rows: Kernels(rows, 1.3 * beta * c), field), due) < 1e-6
    assert p_value(drawn(Independent, field), due) < 1e-6


@pytest.mark.parametrize(("k", "c"), KERNELS)
def test_moments_of_kernels_are_those_of_enumeration(k: int, c: float) -> None:
    squares, quantile, beta = kernel(k)
    chances, kept = by_enumeration(squares, quantile, beta, c), (states(k) > 0).double().sum(1)
    found = Kernels(beta * (squares - quantile)[None], beta * c).moments(generator())
    mean = float((chances * kept).sum())
    assert found.kept == pytest.approx(mean, abs=1e-6)
    assert found.variance == pytest.approx(float((chances * kept.square()).sum()) - mean**2, abs=1e-6)
    assert found.bits == pytest.approx(-float(torch.xlogy(chances, chances).sum()) / math.log(2), abs=1e-6)


def test_kernels_of_any_size_are_drawn_exactly() -> None:
    """Of 25 weights there are too many states to count, but their number has a closed form where all fields are one."""
    k, field, coupling = 25, 0.1, 0.01
    number = torch.arange(k + 1, dtype=torch.float64)
    spins = 2 * number - k
    binomial = torch.lgamma(torch.tensor(k + 1.0)) - torch.lgamma(number + 1) - torch.lgamma(k - number + 1)
    due = torch.softmax(binomial + field * spins + coupling * spins.square(), dim=0) * DRAWS
    masks = drawn(lambda rows: Kernels(rows, coupling), torch.full((k,), field))
    seen = torch.bincount(masks.sum(1), minlength=k + 1).double()
    common = due >= 5
    statistic = ((seen - due).square() / due)[common].sum()
    assert float(torch.special.gammaincc((common.sum() - 1).double() / 2, statistic / 2)) > SIGNIFICANCE
    shares = masks.double().mean(0)
    assert float((shares - shares.mean()).abs().max()) < 4 * 0.5 / DRAWS**0.5, "no place in a kernel is favoured"


def test_a_strong_coupling_keeps_or_removes_whole_kernels() -> None:
    masks = Kernels(torch.randn(500, 9, generator=generator()), 2.0).draw(generator())
    total = masks.sum(1)
    assert bool(((total == 0) | (total == 9)).all()) and 100 < int((total == 9).sum()) < 400


# Filters

FILTERS = [(2, 0.6), (3, 0.5), (4, 0.4)]  # input channels of a 1x1 kernel, coupling beta c


@pytest.mark.parametrize(("channels", "coupling"), FILTERS)
def test_filters_are_drawn_as_by_enumeration(channels: int, coupling: float) -> None:
    """A chance sigmoid(field + coupling * sum of the other half) for each spin is that of p ~ exp((field x + coupling S_A S_B) / 2)."""
    field, cut = 0.8 * torch.randn(channels, generator=generator(channels), dtype=torch.float64), channels // 2
    x = states(channels)
    due = torch.softmax((x @ field + coupling * x[:, :cut].sum(1) * x[:, cut:].sum(1)) / 2, dim=0)
    assert p_value(drawn(lambda rows: Filters(rows, coupling, cut, 50), field), due) > SIGNIFICANCE
    assert p_value(drawn(lambda rows: Filters(rows, coupling, cut, 1), field), due) < 1e-6, "one sweep remembers its start"
    assert p_value(drawn(lambda rows: Filters(rows, 0.8 * coupling, cut, 50), field), due) < 1e-6


@pytest.mark.parametrize("side", [-1.0, 1.0])
def test_the_chain_begins_on_the_side_of_the_mean_field(side: float) -> None:
    field, coupling = torch.tensor([0.2, -0.1, 0.3, 0.1]) * side, 0.5
    masks = drawn(lambda rows: Filters(rows, coupling, 2, 1), field)
    chances = torch.sigmoid(field[:2] + coupling * 2 * side)
    assert float((masks[:, :2].float().mean(0) - chances).abs().max()) < 4 * 0.5 / DRAWS**0.5


# What distributions freeze onto


@pytest.mark.parametrize(("n", "kept"), [(10, 1), (10, 9), (97, 13), (1000, 250)])
def test_the_threshold_is_the_interpolated_quantile_and_keeps_as_many_as_it_says(n: int, kept: int) -> None:
    scores = torch.randn(n, generator=generator(n), dtype=torch.float64).square()
    found = threshold(scores, kept)
    torch.testing.assert_close(found, torch.quantile(scores, 1 - kept / n))
    assert int((scores > found).sum()) == kept
    assert threshold(torch.zeros(n), kept) == 0, "ties are left as they are"


class Small(nn.Sequential):
    """Two convolutions whose filters can go, and a linear layer."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(1, 6, 3, padding=1),
            nn.BatchNorm2d(6),
            nn.ReLU(),
            nn.Conv2d(6, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Linear(32, 10),
        )


def small(shape: tuple[int, int, int], classes: int) -> nn.Module:
    return Small()


MODEL = {"import": "test_gibbs:small"}
PRUNED: dict[str, dict[str, Any]] = {
    "weight": {"granularity": "weight", "sparsity": 0.8},
    "kernel": {"granularity": "kernel", "sparsity": 0.6},
    "filter": {"granularity": "filter", "sparsity": 0.5},
    "channel": {"granularity": "channel", "sparsity": 0.5},
}
each = pytest.mark.parametrize("granularity", PRUNED)


def network(granularity: str, **changes: Any) -> tuple[Gibbs, State, Any, dict[str, Any]]:
    """(hook, state, env, memory) of the small network at the start of a training."""
    paradigm = {"name": "gibbs", **changes.pop("options", {})}
    run = ready(paradigm, **{"allocator": "uniform", "model": MODEL, **PRUNED[granularity], **changes})
    (hook,) = (hook for hook in run.plan.stages[0].hooks if isinstance(hook, Gibbs))  # type: ignore[attr-defined]
    run.state.slots["0.Gibbs"] = memory = {}
    hook.start(memory, run.state, run.env)
    return hook, run.state, run.env, memory


def scored(granularity: str, state: State) -> dict[str, Tensor]:
    """Layer -> mean w^2 of each of its units, worked out by hand for the small network."""
    first, second, last = (state.weights[name].detach().square() for name in ("0.weight", "3.weight", "8.weight"))
    return {
        "weight": {"0.weight": first, "3.weight": second, "8.weight": last},
        "kernel": {"0.weight": first.mean((2, 3)), "3.weight": second.mean((2, 3)), "8.weight": last},
        "filter": {"0.weight": first.mean((1, 2, 3)), "3.weight": second.mean((1, 2, 3))},
        "channel": {"0.weight": second.mean((0, 2, 3)), "3.weight": last.view(10, 8, 4).mean((0, 2))},
    }[granularity]


def units_kept(granularity: str, masks: dict[str, Tensor]) -> dict[str, Tensor]:
    """Layer -> share of the weights of each unit that a drawn mask keeps."""
    whole = {name: torch.ones(shape) for name, shape in (("0.weight", (6, 1, 3, 3)), ("3.weight", (8, 6, 3, 3)), ("8.weight", (10, 32)))}
    first, second, last = (mask.float() for mask in {**whole, **masks}.values())
    return {
        "weight": {"0.weight": first, "3.weight": second, "8.weight": last},
        "kernel": {"0.weight": first.mean((2, 3)), "3.weight": second.mean((2, 3)), "8.weight": last},
        "filter": {"0.weight": first.mean((1, 2, 3)), "3.weight": second.mean((1, 2, 3))},
        "channel": {"0.weight": second.mean((0, 2, 3)), "3.weight": last.view(10, 8, 4).mean((0, 2))},
    }[granularity]


@each
@pytest.mark.parametrize("temperature", ["absolute", "median"])
def test_at_infinite_beta_a_draw_is_the_exact_top(granularity: str, temperature: str) -> None:
    hook, state, env, memory = network(granularity, options={"temperature": temperature, "beta_end": 1e9})
    state.clock = hook.anneal
    scores, found = scored(granularity, state), units_kept(granularity, hook.draw(memory, state, env))
    assert scores.keys() == found.keys()
    for name, score in scores.items():
        kept = memory[f"kept.{name}"]
        top = torch.zeros(score.numel()).index_fill(0, score.flatten().topk(kept).indices, 1.0).view(score.shape)
        assert 0 < kept < score.numel() and torch.equal(found[name], top), "whole units, the best ones"


@each
def test_at_zero_beta_a_draw_is_coins(granularity: str) -> None:
    hook, state, env, memory = network(granularity, options={"beta_start": 1e-9})
    masks = hook.draw(memory, state, env)
    for name, moments in hook.moments(memory, state, env).items():
        assert moments.entropy == pytest.approx(1.0, abs=1e-4)
        assert abs(moments.sparsity - 0.5) < 3 * moments.spread + 1e-6, name
    assert all(0.2 < float(mask.float().mean()) < 0.9 for mask in masks.values())


def test_a_channel_is_drawn_on_the_weights_that_score_it_and_all_of_it_goes_at_the_end() -> None:
    hook, state, env, memory = network("filter")
    assert hook.draw(memory, state, env).keys() == {"0.weight", "3.weight"}, "no mask on the columns of the linear layer"
    hook.end(memory, state, env)
    gone = ~state.masks["3.weight"].flatten(1).any(1)
    assert 0 < int(gone.sum()) < 8 and not state.weights["8.weight"].detach().view(10, 8, 4)[:, gone].any()


def test_halves_are_those_of_the_input_channels() -> None:
    """One sweep from the start: what couples a spin of the first half to nothing else is the start, and the second half sees the first."""
    hook, state, env, memory = network("filter", options={"mcmc_steps": 1})
    found = dict(hook.distributions(memory, state, env))
    first, second = found["0.weight"], found["3.weight"]
    assert isinstance(first, Filters) and isinstance(second, Filters)
    assert (first.cut, second.cut) == (4, 27), "9 // 2 of a kernel that is alone, 3 of 6 channels of 9"
    energy = state.weights["3.weight"].detach().square().flatten(1)
    quantile = threshold(energy.mean(1), memory["kept.3.weight"])
    torch.testing.assert_close(second.fields, hook.beta(0) * (energy - quantile))


# Temperature


def test_beta_rises_by_equal_factors_and_stays() -> None:
    """The paper's: 10^0 to 10^4 over the first 128 of 200 epochs."""
    hook = recipe("gibbs", train={"length": "200ep"}).plan(10).stages[0].hooks[0]  # type: ignore[attr-defined]
    assert [hook.beta(10 * epoch) for epoch in (0, 32, 64, 96, 128, 199)] == pytest.approx([1.0, 10.0, 100.0, 1e3, 1e4, 1e4])


def test_defaults_are_the_papers() -> None:
    def found(granularity: str) -> Any:
        hook = recipe("gibbs", **{**PRUNED[granularity], "model": MODEL}).plan(10).stages[0].hooks[0]  # type: ignore[attr-defined]
        return hook.beta_start, hook.beta_end, hook.coupling, hook.sweeps, hook.temperature

    assert found("weight") == (1.0, 1e4, 0.0, 0, "absolute")
    assert found("kernel") == (1.0, 1e4, 0.01, 0, "absolute")
    assert found("filter") == (10**-2.5, 1.0, 1.0, 50, "absolute")


@each
def test_under_median_no_scale_of_the_weights_matters(granularity: str) -> None:
    hook, state, env, memory = network(granularity, options={"temperature": "median"})
    state.clock = hook.anneal // 2
    before, masks = hook.moments(memory, state, env), hook.draw(memory, state, env)
    with torch.no_grad():
        for weight in state.weights.values():
            weight.mul_(2.0**-8)  # exact
    assert hook.moments(memory, state, env) == before
    assert all(torch.equal(mask, masks[name]) for name, mask in hook.draw(memory, state, env).items())


def test_absolute_beta_freezes_weights_of_one_scale_only() -> None:
    """At beta = 10^4, spins with w^2 far below 10^-4 are coins for ever."""
    hook, state, env, memory = network("weight")
    state.clock = hook.anneal
    assert all(moments.entropy < 0.1 for moments in hook.moments(memory, state, env).values())
    with torch.no_grad():
        for weight in state.weights.values():
            weight.mul_(1e-3)
    assert all(moments.entropy > 0.99 for moments in hook.moments(memory, state, env).values())


@each
def test_while_it_anneals_entropy_falls_to_zero_and_sparsity_comes_to_the_budget(granularity: str) -> None:
    """Before hardening the drawn sparsity of each layer is within three standard deviations of the budget's, after it exactly that."""
    settings = {"allocator": "uniform", "model": MODEL, **PRUNED[granularity]}
    run = ready({"name": "gibbs", "temperature": "median", "anneal": "50%"}, train={"length": "10ep"}, **settings)
    (hook,) = run.plan.stages[0].hooks  # type: ignore[attr-defined]
    entropies: list[float] = []
    for report in execute(run.plan, run.state, run.env):
        if run.state.slots:
            memory = dict(run.state.slots["0.Gibbs"])
            moments = hook.moments(memory, run.state, run.env)
            entropies.append(sum(found.bits for found in moments.values()) / sum(found.spins for found in moments.values()))
            drawn, due = units_kept(granularity, hook.draw(memory, run.state, run.env)), scored(granularity, run.state)
            assert report.sparsity == 0, "State has no masks before the end"
    assert entropies[:5] == sorted(entropies[:5], reverse=True) and entropies[0] > 0.5, "bits a weight, after each epoch of annealing"
    assert entropies[4] < 0.01 and entropies[-1] < 0.02, "few weights have come near the threshold since"
    for name, score in due.items():
        realised, budget = 1 - float(drawn[name].mean()), 1 - memory[f"kept.{name}"] / score.numel()
        assert abs(realised - budget) <= 3 * moments[name].spread + 1e-6, name
    assert run.state.masks.kept <= round((1 - settings["sparsity"]) * run.state.masks.total)
    hardened = units_kept(granularity, dict(run.state.masks))
    assert {f"kept.{name}": int((hardened[name] > 0).sum()) for name in due} == {f"kept.{name}": memory[f"kept.{name}"] for name in due}


# A step


def test_each_step_has_a_mask_of_its_own_that_can_be_drawn_again() -> None:
    hook, state, env, memory = network("weight")
    seen = []
    for clock, lap, seed in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)):
        state.clock, state.lap = clock, lap
        at: Any = SimpleNamespace(seed=seed, task=env.task)
        mask = hook.draw(memory, state, at)["3.weight"]
        assert torch.equal(mask, hook.draw(memory, state, at)["3.weight"])
        seen.append(mask)
    assert all(0.3 < float((a != b).float().mean()) < 0.7 for a, b in itertools.combinations(seen, 2)), "independent coins at beta = 1"


def test_draws_come_up_as_often_as_their_chances_say() -> None:
    hook, state, env, memory = network("weight", options={"beta_start": 30.0})
    weight = state.weights["8.weight"].detach()
    kept = memory["kept.8.weight"]
    chance = torch.sigmoid(30.0 * (weight.square() - torch.quantile(weight.square(), 1 - kept / weight.numel())))
    total = torch.zeros_like(weight)
    env = SimpleNamespace(seed=0, task=env.task)
    for state.lap in range(1000):  # laps, as beta depends on the clock
        total += hook.draw(memory, state, env)["8.weight"]
    assert float(((total / 1000 - chance) / (chance * (1 - chance) / 1000).sqrt()).square().mean()) == pytest.approx(1.0, abs=0.3)


@pytest.mark.parametrize("granularity", ["weight", "filter"])
def test_masked_weights_get_no_gradient_of_the_loss_but_decay(granularity: str) -> None:
    """One step of SGD at rate lr: w - lr (dL/d(w m) m + decay w), with the gradient taken by hand through w m."""
    lr, decay, l2 = 0.1, 0.01, 0.02
    optimizer = {"name": "sgd", "lr": lr, "momentum": 0.0, "weight_decay": decay}
    settings = {"allocator": "uniform", "model": MODEL, **PRUNED[granularity]}
    run = ready("gibbs", regularizer={"name": "l2", "strength": l2}, train={"optimizer": optimizer}, report_every="1it", **settings)
    stage, state = run.plan.stages[0], run.state
    assert isinstance(stage, Train) and [type(hook) for hook in stage.hooks] == [Gibbs, Penalty]
    hook = stage.hooks[0]
    assert isinstance(hook, Gibbs)
    before = {name: value.clone().requires_grad_(name in state.weights) for name, value in state.values().items()}
    hook.start(memory := {}, state, run.env)
    masks = hook.draw(memory, state, run.env)
    state.model.train()
    effective = {name: value * masks[name] if name in masks else value for name, value in before.items()}
    inputs, labels = run.env.task.batch(0, 0, 0, 32)
    outputs = torch.func.functional_call(state.model, {name: value.clone() for name, value in effective.items()}, (inputs,))
    nn.functional.cross_entropy(outputs, labels).backward()
    next(iter(execute(run.plan, state, run.env)))
    assert masks and all(0 < int(mask.sum()) < mask.numel() for mask in masks.values())
    for name, weight in state.weights.items():
        slope = before[name].grad
        assert slope is not None
        torch.testing.assert_close(weight.detach(), before[name].detach() * (1 - lr * (decay + l2)) - lr * slope, atol=1e-6, rtol=1e-5)
        if name in masks:
            assert not slope[~masks[name]].any() and slope[masks[name]].any()
            gone = weight.detach()[~masks[name]]
            torch.testing.assert_close(gone, before[name].detach()[~masks[name]] * (1 - lr * (decay + l2)))


def test_an_evaluation_has_the_best_of_the_budget_and_leaves_no_trace() -> None:
    hook, state, env, memory = network("weight")
    before, kept = state.values(), dict(memory)
    with viewed((hook,), state, env, train=False):
        shown = {name: weight.detach().clone() for name, weight in state.weights.items()}
    assert sum(int((weight != 0).sum()) for weight in shown.values()) == round(0.2 * state.masks.total)
    for name, score in scored("weight", state).items():
        assert (shown[name] != 0).sum() == memory[f"kept.{name}"] and score[shown[name] != 0].min() > score[shown[name] == 0].max()
    assert all(torch.equal(value, before[name]) for name, value in state.values().items()) and memory == kept


def test_an_allocator_that_ranks_scores_looks_at_every_tenth_step() -> None:
    hook, state, env, memory = network("weight", allocator="global")
    with torch.no_grad():
        state.weights["3.weight"].mul_(1e-3)
    before = dict(memory)
    state.clock = 9
    hook.step(memory, state, env)
    assert memory == before
    state.clock = 10
    hook.step(memory, state, env)
    assert memory["kept.3.weight"] == 1 and sum(memory.values()) == round(0.2 * state.masks.total)
    hook, state, env, memory = network("weight", allocator="uniform")
    assert {name: count / score.numel() for (name, count), score in zip(memory.items(), scored("weight", state).values(), strict=True)} == {
        f"kept.{name}": pytest.approx(0.2, abs=0.01) for name in state.weights
    }


# The plan


@pytest.mark.parametrize(("granularity", "allocator"), [("kernel", "erk"), ("filter", "uniform"), ("channel", "global")])
def test_budget_bill_and_resume(granularity: str, allocator: str, tmp_path: Any) -> None:
    changes = {**PRUNED[granularity], "allocator": allocator, "model": MODEL, "report_every": "7it", "train": {"length": "2ep"}}
    run = ready("gibbs", **changes)
    reports = []
    for report in execute(run.plan, run.state, run.env):
        reports.append(report)
        run.state.save(tmp_path / f"{report.index}.safetensors")
    assert reports[-1].cost == run.plan.cost and reports[-1].sparsity >= PRUNED[granularity]["sparsity"]
    for index in range(len(reports)):
        again = ready("gibbs", **changes)
        again.state.load(tmp_path / f"{index}.safetensors")
        assert finish(again) == reports[index + 1 :] and same(tensors(again), tensors(run))


def test_it_ends_with_new_statistics_or_without() -> None:
    assert [type(stage) for stage in recipe("gibbs").plan(10).stages] == [Train, Calibrate]
    assert [type(stage) for stage in recipe({"name": "gibbs", "batches": 0}).plan(10).stages] == [Train]


def test_a_search_proposes_what_freezes_and_the_paper_where_it_is_asked_for() -> None:
    def seen(entry: Any) -> set[str]:
        space = Space({**BASE, "allocator": "erk"}, {"paradigm": [entry], "granularity": ["weight", "kernel"]}, seed=0)
        study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
        return {str(space.build(study.ask()).paradigm.option("temperature")) for _ in range(10)}

    assert seen("gibbs") == {"median"} and seen({"name": "gibbs", "temperature": "absolute"}) == {"absolute"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"anneal": "0%"}, "paradigm.anneal must be in the training of 40 steps, got step 0"),
        ({"anneal": "5ep"}, "paradigm.anneal must be in the training of 40 steps, got step 50"),
        ({"beta_start": 0.0}, "0 < paradigm.beta_start <= paradigm.beta_end must hold, got 0 and 10000"),
        ({"beta_end": 0.5}, "0 < paradigm.beta_start <= paradigm.beta_end must hold, got 1 and 0.5"),
        ({"coupling": -1.0}, "paradigm.coupling must be at least 0, got -1.0"),
        ({"mcmc_steps": 0}, "paradigm.mcmc_steps must be at least 1, got 0"),
        ({"batches": -1}, "paradigm.batches must be at least 0, got -1"),
    ],
    ids=str,
)
def test_options_that_make_no_sense_say_why(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        recipe({"name": "gibbs", **options}).plan(10)


def test_what_a_granularity_does_not_use_is_no_part_of_the_key() -> None:
    assert recipe("gibbs").plan(10).stages == recipe({"name": "gibbs", "mcmc_steps": 3, "coupling": 2.0}).plan(10).stages


@pytest.mark.parametrize("granularity", ["weight", "kernel"])
def test_a_layer_that_is_mostly_zero_has_masks_too(granularity: str) -> None:
    """Its median is zero, and so is its quantile: zeros toss coins, all else is kept."""
    hook, state, env, memory = network(granularity, options={"temperature": "median"})
    state.clock = hook.anneal
    with torch.no_grad():
        state.weights["3.weight"].zero_()[0, 0] = 1.0
    assert bool(hook.draw(memory, state, env)["3.weight"][0, 0].all())
    assert math.isfinite(hook.moments(memory, state, env)["3.weight"].entropy)
