"""Pruning and generalisation: data of known law, a network summed by hand, metrics by hand, and masks that decide what is learnt."""

import math
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from toys import blobs, finish

from distprune.core import registry
from distprune.core.budgets import budget
from distprune.core.data.dataset import Dataset
from distprune.core.executor import execute
from distprune.core.masks import Masks
from distprune.core.models.repu import RePU, repu
from distprune.core.recipe import Recipe
from distprune.core.run import Run, prepare
from distprune.core.scoring import choose_masks
from distprune.core.tasks.signal_noise import SignalNoise
from distprune.errors import UserError

SMALL = {"dimension": 400, "train": 20, "test": 500}
TRAIN = {"length": "450it", "batch_size": 20, "optimizer": {"name": "normalised_gd", "lr": 0.1}, "decay": "constant"}
SEEDS = range(4)


def drawn(**options: Any) -> Dataset:
    dataset: Dataset = registry.data.choose("signal_noise", **options)()
    return dataset


def ready(sparsity: float = 0.0, *, seed: int = 0, train: dict[str, Any] | None = None, **changes: Any) -> Run:
    """A network of 10 filters a class on 20 points of 400 dimensions, with random masks."""
    value = {
        "model": {"name": "repu", "filters": 10},
        "data": {"name": "signal_noise", **SMALL, "seed": seed},
        "task": "signal_noise",
        "paradigm": "at_init" if sparsity else "dense",
        "sparsity": sparsity,
        "criterion": "random",
        "allocator": "uniform",
        "train": {**TRAIN, **(train or {})},
        "seed": seed,
    }
    return prepare(Recipe.read({**value, **changes}), report_every="1000it")


# The data.


def test_points_are_the_signal_of_their_class_and_noise_in_random_order() -> None:
    dataset = drawn(dimension=300, train=600, classes=3, signal=2.0, test=900)
    for split, n in ((dataset.train, 600), (dataset.validation, 900), (dataset.test, 900)):
        assert split.inputs.shape == (n, 1, 2, 300) and split.inputs.dtype == torch.float32
        first = 0
        for (patches,), label in zip(split.inputs, split.labels.tolist(), strict=True):
            at = next(i for i in (0, 1) if int(patches[i].count_nonzero()) == 1)
            assert patches[at, label] == 2.0 and int(patches[1 - at].count_nonzero()) == 300, "noise lies on the signal's coordinates too"
            first += at == 0
        assert abs(first / n - 1 / 2) < 4 * math.sqrt(1 / 4 / n), "either order is as likely"
        shares = split.labels.bincount(minlength=3) / n
        assert bool((abs(shares - 1 / 3) < 4 * math.sqrt(2 / 9 / n)).all()), "classes are as likely"


@pytest.mark.parametrize(("ratio", "classes", "signal"), [(1.5, 2, 1.0), (3.0, 2, 1.0), (0.5, 5, 2.0)])
def test_noise_is_normal_and_as_strong_as_the_ratio_says(ratio: float, classes: int, signal: float) -> None:
    dataset = drawn(ratio=ratio, classes=classes, signal=signal, dimension=500, train=50, test=2000)
    noise = torch.stack([max(patches, key=lambda patch: int(patch.count_nonzero())) for (patches,) in dataset.test.inputs]).double()
    n, d = 50, 500  # the number of training points decides, whatever split is looked at
    snr = signal / (noise.std() * math.sqrt(d))
    assert n * snr**2 / classes == pytest.approx(ratio, rel=0.01)
    size = float(noise.std())
    assert abs(noise.mean()) < 4 * size / math.sqrt(noise.numel())
    assert (noise / size).pow(4).mean() == pytest.approx(3, rel=0.02)
    apart = torch.corrcoef(noise[:, : classes + 3].T) - torch.eye(classes + 3)
    assert apart.abs().max() < 5 / math.sqrt(2000) and noise.std(0) == pytest.approx([size] * d, rel=0.1)


def test_the_seed_draws_the_points_and_the_ratio_scales_the_noise() -> None:
    before = torch.get_rng_state()
    one, again, other, louder = (drawn(**SMALL, **options) for options in ({}, {}, {"seed": 1}, {"ratio": 1.5 / 4}))
    assert torch.equal(before, torch.get_rng_state())
    for split in ("train", "validation", "test"):
        a, b, c, d = (getattr(dataset, split) for dataset in (one, again, other, louder))
        assert torch.equal(a.inputs, b.inputs) and not torch.equal(a.inputs, c.inputs)
        assert torch.equal(a.labels, d.labels)
        signal = a.inputs == 1.0
        torch.testing.assert_close(d.inputs[~signal], 2 * a.inputs[~signal])
        assert bool((d.inputs[signal] == 1.0).all())
    assert not torch.equal(one.validation.inputs, one.test.inputs)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dimension": 2, "classes": 3}, "signal_noise.dimension must be at least 3, got 2"),
        ({"classes": 1}, "signal_noise.classes must be at least 2, got 1"),
        ({"train": 0}, "signal_noise.train must be at least 1, got 0"),
        ({"ratio": 0.0}, "signal_noise.ratio must be above 0 and finite, got 0.0. Write 1.5."),
        ({"signal": 0.0}, "signal_noise.signal must be above 0 and finite, got 0.0"),
        ({"signal": math.inf}, "data.signal must be a number, got inf"),
    ],
)
def test_points_that_cannot_be_drawn(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        drawn(**options)


# The network.


@pytest.mark.parametrize("power", [1, 2, 3, 4])
def test_outputs_are_the_sum_over_filters_and_patches(power: int) -> None:
    torch.manual_seed(0)
    model = repu((1, 2, 5), 3, filters=4, power=power, std=1.0)
    inputs = torch.randn(6, 1, 2, 5)
    weight = model.hidden.weight.detach()
    assert weight.shape == (12, 5) and [name for name, _ in model.named_parameters()] == ["hidden.weight"], "no second layer, no bias"
    outputs = torch.zeros(6, 3)
    for i, j, r, p in product(range(6), range(3), range(4), range(2)):
        outputs[i, j] += max(0.0, float(weight[4 * j + r] @ inputs[i, 0, p])) ** power
    torch.testing.assert_close(model(inputs), outputs)
    torch.testing.assert_close(model(inputs.flip(2)), model(inputs))


def test_gradients_are_those_of_the_formula() -> None:
    """dF_j/dw_jr = sum_p q max(0, <w_jr, x_p>)^(q - 1) x_p, and nothing of other classes."""
    torch.manual_seed(0)
    model = repu((1, 2, 5), 2, filters=3, power=3, std=1.0).double()
    inputs, weight = torch.randn(1, 1, 2, 5, dtype=torch.double), model.hidden.weight
    (gradient,) = torch.autograd.grad(model(inputs)[0, 1], weight)
    assert not gradient[:3].any()
    for r in range(3, 6):
        torch.testing.assert_close(gradient[r], sum(3 * torch.relu(weight[r] @ x) ** 2 * x for x in inputs[0, 0]))


def test_weights_are_drawn_with_the_width_asked_for() -> None:
    torch.manual_seed(0)
    model = repu((1, 2, 1000), 2, std=0.03)
    assert isinstance(model, RePU) and model.filters.shape == (2, 20, 1000)
    weight = model.filters.detach()
    assert float(weight.std()) == pytest.approx(0.03, rel=0.02) and abs(float(weight.mean())) < 0.001
    for options, words in (({"filters": 0}, "at least 1, got 0 and 3"), ({"power": 0}, "20 and 0"), ({"std": 0.0}, "above 0, got 0.0")):
        with pytest.raises(ValueError, match=words):
            repu((1, 2, 5), 2, **options)


# The optimizer.


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1e10])
def test_a_step_has_the_same_length_whatever_the_gradient(scale: float) -> None:
    weights = [torch.nn.Parameter(torch.zeros(3)), torch.nn.Parameter(torch.zeros(2, 2)), torch.nn.Parameter(torch.ones(2))]
    optimizer = registry.optimizer.choose("normalised_gd", lr=0.5)(weights)
    weights[0].grad, weights[1].grad = scale * torch.tensor([3.0, 0, 0]), scale * torch.tensor([[0.0, 4.0], [0, 0]])
    optimizer.step()
    assert weights[0].tolist() == pytest.approx([-0.3, 0, 0]), "of length 0.5 over all parameters, 3/5 of it along the first"
    assert weights[1].flatten().tolist() == pytest.approx([0, -0.4, 0, 0]) and weights[2].tolist() == [1, 1]


def test_it_stands_still_where_the_gradient_is_zero() -> None:
    weight = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    optimizer = registry.optimizer.choose("normalised_gd")([weight])
    weight.grad = torch.zeros(2)
    optimizer.step()
    assert weight.tolist() == [1, -2]


def test_a_run_is_descent_on_all_points_with_the_gradient_of_kept_weights() -> None:
    run, by_hand = ready(0.8, train={"length": "30it"}), ready(0.8, train={"length": "30it"})
    list(by_hand.plan.stages[0].run(by_hand.state, by_hand.env))
    ((name, weight),) = by_hand.state.weights.items()
    mask, train = by_hand.state.masks[name], by_hand.env.task.dataset.train
    assert int(mask.sum()) == budget(0.8, 2 * 10 * 400)
    for _ in range(30):
        loss = torch.nn.functional.cross_entropy(by_hand.state.model(train.inputs), train.labels)
        (gradient,) = torch.autograd.grad(loss, weight)
        with torch.no_grad():
            weight -= 0.1 * (gradient * mask) / (gradient * mask).norm()
    finish(run)
    torch.testing.assert_close(run.state.weights[name], weight, rtol=1e-4, atol=1e-6)
    assert not run.state.weights[name][~mask].any()


@pytest.mark.parametrize("size", [20, 64])
def test_a_batch_at_least_as_large_as_the_training_points_holds_each_once(size: int) -> None:
    task = SignalNoise(drawn(**SMALL))
    assert task.steps_per_epoch(size) == 1
    for clock in (0, 1, 7):
        inputs, labels = task.batch(0, 0, clock, size)
        assert labels.bincount().tolist() == task.dataset.train.labels.bincount().tolist()
        assert {point.numpy().tobytes() for point in inputs} == {point.numpy().tobytes() for point in task.dataset.train.inputs}


# The metrics.


def test_metrics_by_hand() -> None:
    task = SignalNoise(drawn(dimension=7, train=5, test=40, classes=3, signal=2.0, seed=3))
    torch.manual_seed(1)
    model = repu(task.shape, 3, filters=4, std=1.0)
    with torch.no_grad():
        model.filters[1, 2, 1] = model.filters[2, 0, 2] = 0.0
        model.filters[0, 0, 1] = 0.0  # the coordinate of another class
    weight, train = model.filters.detach(), task.dataset.train
    noise = [next(patch for patch in patches if patch.count_nonzero() > 1) for (patches,) in train.inputs]
    pairs = list(zip(noise, train.labels.tolist(), strict=True))
    found = {split: task.metrics(model, split) for split in ("train", "validation", "test")}
    for split, metrics in found.items():
        points = getattr(task.dataset, split)
        wrong = (model(points.inputs).argmax(1) != points.labels).double().mean().item()
        assert metrics["test_err"] == pytest.approx(wrong) and metrics["accuracy"] == pytest.approx(1 - wrong)
        assert metrics["train_loss"] == pytest.approx(found["train"]["loss"])
        strongest = [max(2.0 * float(weight[j, r, j]) for r in range(4)) for j in range(3)]
        assert metrics["signal_strength"] == pytest.approx(sum(strongest) / 3)
        assert metrics["noise_memorisation"] == pytest.approx(max(float(weight[y, r] @ xi) for xi, y in pairs for r in range(4)))
        assert metrics["live_signal_weights"] == 3 * 4 - 2
    assert found["test"]["loss"] != found["validation"]["loss"] and task.objective in found["test"]


def test_other_data_and_other_networks_are_refused_and_say_why() -> None:
    with pytest.raises(UserError, match="one signal and one noise patch, and this data has others. Take data: signal_noise."):
        SignalNoise(blobs())
    dataset = drawn(**SMALL)
    moved = replace(dataset, train=replace(dataset.train, labels=1 - dataset.train.labels))
    with pytest.raises(UserError, match="Take data: signal_noise."):
        SignalNoise(moved)
    run = ready(model={"name": "mlp", "hidden": [4]})
    with pytest.raises(UserError, match="Sequential does not say what they are. Take model: repu, or give yours a property `filters`"):
        finish(run)
    assert run.state.clock == 0


# What masks decide.


def test_a_random_mask_keeps_exactly_its_budget_and_misses_the_signal_as_often_as_independent_draws() -> None:
    """P(no filter sees its signal) = C(N - Km, k) / C(N, k) for exactly k kept of N, which is (1 - k/N)^(Km) but for terms of k/N^2."""
    classes, filters, dimension, draws = 2, 5, 80, 300
    model = repu((1, 2, dimension), classes, filters=filters)
    total, own = classes * filters * dimension, classes * filters
    kept = budget(0.9, total)
    missed = 0
    for seed in range(draws):
        masks = choose_masks(
            model,
            None,
            Masks.ones({"hidden.weight": model.hidden.weight}),
            sparsity=0.9,
            criterion=registry.criterion.choose("random"),
            allocator=registry.allocator.choose("global"),
            seed=seed,
        )
        assert masks.kept == kept
        missed += not masks["hidden.weight"].view(classes, filters, dimension).diagonal(dim1=0, dim2=2).any()
    exact = math.comb(total - own, kept) / math.comb(total, kept)
    assert exact == pytest.approx(0.9**own, rel=0.03)
    assert abs(missed / draws - exact) < 4 * math.sqrt(exact * (1 - exact) / draws)


def live(run: Run) -> torch.Tensor:
    """Whether each filter's weight on the signal of its class is kept, [filters, classes]."""
    (mask,) = run.state.masks.values()
    return mask.unflatten(0, (2, -1)).diagonal(dim1=0, dim2=2)


def trained(run: Run) -> dict[str, float]:
    """Metrics of the test split after training, and the error on the training points."""
    finish(run)
    return {**run.env.task.metrics(run.state.model, "test"), "train_err": run.env.task.metrics(run.state.model, "train")["test_err"]}


def mean(runs: list[dict[str, float]], name: str) -> float:
    return sum(run[name] for run in runs) / len(runs)


def test_mild_pruning_generalises_better_than_the_dense_network_and_over_pruning_memorises() -> None:
    dense, mild, over = ([trained(ready(sparsity, seed=seed)) for seed in SEEDS] for sparsity in (0.0, 0.8, 0.95))
    for run in (*dense, *mild, *over):
        assert run["train_err"] == 0 and run["train_loss"] < 1e-3 and all(math.isfinite(value) for value in run.values())
    assert mean(mild, "test_err") < mean(dense, "test_err") / 2 < mean(over, "test_err") / 3
    assert all(run["live_signal_weights"] == 20 for run in dense) and mean(mild, "live_signal_weights") == pytest.approx(20 * 0.2, rel=0.5)
    blind = [run for run in over if not run["live_signal_weights"]]
    assert len(blind) >= 2
    for run in blind:
        assert run["test_err"] == pytest.approx(1 / 2, abs=0.05) and run["signal_strength"] == 0
        assert run["loss"] > math.log(2), "it is sure of itself and wrong: worse than guessing"
        assert run["noise_memorisation"] > mean(dense, "noise_memorisation")


def test_the_weights_on_the_signal_make_the_difference_and_not_how_many_are_kept() -> None:
    """Without 20 of 8,000 weights the network can but memorise; with those 20 among 5 % it learns the signal."""
    for seed in SEEDS[:2]:
        blind, sees, chosen = ready(seed=seed), ready(seed=seed), ready(0.95, seed=seed)
        list(chosen.plan.stages[0].run(chosen.state, chosen.env))
        live(blind)[:], live(chosen)[:] = False, True
        blind.state.set_masks(Masks(dict(blind.state.masks.items())))
        sees.state.set_masks(chosen.state.masks)
        guessing, knowing = trained(blind), trained(sees)
        assert blind.state.masks.kept == 7980 and sees.state.masks.kept <= 420
        assert guessing["train_err"] == knowing["train_err"] == 0
        assert guessing["test_err"] == pytest.approx(1 / 2, abs=0.05) and knowing["test_err"] < 0.1
        assert (guessing["live_signal_weights"], knowing["live_signal_weights"]) == (0, 20)


def test_a_run_whose_loss_has_vanished_stands_still() -> None:
    run = ready()
    env = replace(run.env, report_every=20)
    seen = [(report.metrics["train_loss"], run.state.values()["hidden.weight"]) for report in execute(run.plan, run.state, env)]
    (_, first), (_, second), *_, (_, before), (loss, last) = seen
    assert loss == 0 and torch.equal(before, last) and not torch.equal(first, second)


def test_snip_keeps_the_signal_more_often_than_chance() -> None:
    chance = 2 * 20 * 0.02  # of 40 signal weights at 98 %
    kept = {}
    for criterion in ("random", "snip"):
        data = {"name": "signal_noise", "test": 10}
        runs = [ready(0.98, model="repu", data={**data, "seed": seed}, seed=seed, criterion=criterion) for seed in SEEDS]
        for run in runs:
            list(run.plan.stages[0].run(run.state, run.env))
        kept[criterion] = sum(int(live(run).sum()) for run in runs) / len(runs)
    assert kept["random"] < 2 * chance and kept["snip"] > 3 * chance
