"""Optimal Eye Surgeon: the chain rule of its relaxed mask, what is frozen, and what a learned mask is worth."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributions import Bernoulli, kl_divergence
from torch.nn import functional as F
from toys import finish, same, tensors

from distprune.core import registry
from distprune.core.executor import execute
from distprune.core.hooks.eye_surgeon import EyeSurgeon
from distprune.core.hooks.hook import slot, viewed
from distprune.core.masks import Masks
from distprune.core.recipe import Recipe
from distprune.core.run import Run, prepare
from distprune.core.stages import Train
from distprune.core.state import State
from distprune.errors import UserError

X, Y = torch.tensor([[1.0, -2.0, 0.5, 3.0], [0.3, 1.0, -1.0, 2.0]]), torch.tensor([[1.0, 0.0, -1.0], [0.5, 2.0, 0.0]])
ADAM = {"name": "adamw", "lr": 1e-2, "weight_decay": 0.0}


def surgeon(**changes: Any) -> EyeSurgeon:
    options = {"sparsity": 0.75, "allocator": registry.allocator.choose("global"), "temperature": 0.2, "strength": 0.03}
    return EyeSurgeon(**{**options, **changes})


def tiny(hook: EyeSurgeon) -> tuple[State, Any]:
    """A linear layer of 12 weights under the hook, its logits spread out."""
    state = State.new(lambda: nn.Linear(4, 3), seed=0, device=torch.device("cpu"))
    env: Any = SimpleNamespace(seed=0, task=SimpleNamespace(example=None))
    state.slots[slot(0, hook)] = {}
    hook.start(state.slots[slot(0, hook)], state, env)
    assert not state.leaves["scores/weight"].any(), "every weight is kept with probability 1/2 at the start"
    with torch.no_grad():
        state.leaves["scores/weight"].copy_(torch.linspace(-1, 1, 12).view(3, 4))
    return state, env


def ready(paradigm: Any = "eye_surgeon", *, report_every: str = "1ep", **changes: Any) -> Run:
    value = {
        "model": {"name": "hourglass", "widths": [6, 8]},
        "data": {"name": "image", "side": 16},
        "task": {"name": "inverse", "noise": 0.1, "latent": 4, "epoch": 10},
        "paradigm": paradigm,
        "sparsity": 0.7,
        **changes,
        "train": {"length": "40it", "batch_size": 1, "optimizer": ADAM, **changes.get("train", {})},
    }
    return prepare(Recipe.read(value), report_every=report_every)


def test_the_gradient_of_the_logits_is_that_of_the_relaxed_loss_and_the_divergence() -> None:
    hook = surgeon()
    state, env = tiny(hook)
    mask, weight = hook.relaxed(state, env)["weight"].double(), state.weights["weight"].detach().double()
    logit = state.leaves["scores/weight"].detach().double().requires_grad_()
    noise = 0.2 * torch.logit(mask) - logit.detach()  # the draw, whatever it was
    relaxed = torch.sigmoid((logit + noise) / 0.2)
    made = F.linear(X.double(), weight * relaxed, state.model.bias.double())  # type: ignore[operator, union-attr]
    divergence = kl_divergence(Bernoulli(logits=logit), Bernoulli(probs=torch.tensor(0.25, dtype=torch.double))).sum()
    (((made - Y) ** 2).sum() + 0.03 * divergence).backward()
    with viewed((hook,), state, env, train=True):
        ((state.model(X) - Y) ** 2).sum().backward()
    hook.grad(state.slots[slot(0, hook)], state, env)
    slope = state.leaves["scores/weight"].grad
    assert slope is not None and logit.grad is not None and state.weights["weight"].grad is None
    torch.testing.assert_close(slope.double(), logit.grad, rtol=1e-3, atol=1e-5)


def test_draws_are_binary_concrete() -> None:
    hook = surgeon()
    state, env = tiny(hook)
    logit = state.leaves["scores/weight"].detach()
    seen = []
    for state.clock in range(4000):
        seen.append(hook.relaxed(state, env)["weight"])
    draws, chance = torch.stack(seen), torch.sigmoid(logit)
    assert (((draws > 0.5).float().mean(0) - chance).abs() < 4 * (chance * (1 - chance) / 4000).sqrt()).all()
    # P(m < x) = sigmoid(temperature * logit(x) - p): the cold end of it is far from a coin and from a uniform draw.
    for x in (0.05, 0.95):
        due = torch.sigmoid(0.2 * math.log(x / (1 - x)) - logit)
        assert (((draws < x).float().mean(0) - due).abs() < 4 * (due * (1 - due) / 4000).sqrt()).all()
    assert torch.equal(hook.relaxed(state, env)["weight"], draws[-1]), "a draw is a function of seed, lap and clock"


def test_weights_wait_as_drawn_until_the_mask_is_learned_and_start_from_there() -> None:
    run = ready({"name": "eye_surgeon", "learn": "30it"}, train={"optimizer": {"name": "sgd", "lr": 0.05}})
    learn, train = run.plan.stages
    assert isinstance(learn, Train) and isinstance(train, Train)
    before, state = run.state.values(), run.state
    learn.enter(state, run.env)
    list(learn.run(state, run.env))
    assert all(torch.equal(value, before[name]) for name, value in state.values().items()), "biases and norms too"
    logits = {name: state.leaves[f"scores/{name}"].detach().clone() for name in state.weights}
    learn.leave(state, run.env)
    kept = state.masks.kept
    assert kept == round(0.3 * state.total) and not state.leaves
    flat = torch.cat([logit.flatten() for logit in logits.values()])
    chosen = torch.cat([mask.flatten() for mask in state.masks.values()])
    assert float(flat[chosen].min()) >= float(flat[~chosen].max()), "one ranking over all layers"
    for name, mask in state.masks.items():
        assert torch.equal(state.weights[name].detach(), before[name] * mask)
    state.stage, state.entered = 1, False
    list(execute(run.plan, state, run.env))
    assert (state.clock, state.lap) == (40, 1) and state.masks.kept == kept
    assert any(not torch.equal(value, before[name] * state.masks[name]) for name, value in state.weights.items())


def test_the_mask_does_not_depend_on_how_weights_are_trained_afterwards() -> None:
    runs = [ready(train={"optimizer": optimizer, "decay": decay}) for optimizer, decay in ((ADAM, "cosine"), ("sgd", "constant"))]
    first = [run.plan.stages[0] for run in runs]
    assert first[0] == first[1] and isinstance(first[0], Train) and (first[0].until, first[0].train) == (60, "scores")
    assert first[0].config.optimizer.plain() == {"name": "adamw", "lr": 0.01, "weight_decay": 0.0}, "Adam at the paper's rate"
    for run in runs:
        finish(run)
    assert runs[0].state.masks.equal(runs[1].state.masks)
    assert runs[0].plan.cost == runs[0].state.ledger.cost == 60 + 40


def test_the_divergence_draws_the_expected_density_to_the_budget() -> None:
    def density(strength: float) -> float:
        run = ready({"name": "eye_surgeon", "learn": "400it", "strength": strength, "rate": 0.03}, sparsity=0.9)
        learn = run.plan.stages[0]
        learn.enter(run.state, run.env)
        list(learn.run(run.state, run.env))
        chances = torch.cat([leaf.detach().sigmoid().flatten() for leaf in run.state.leaves.values()])
        return float(chances.mean())

    assert density(1.0) == pytest.approx(0.1, abs=0.02) and density(0.0) > 0.3


def test_a_learned_mask_makes_an_image_of_an_untrained_network_and_random_ones_do_not() -> None:
    model = {"name": "hourglass", "widths": [16, 16]}
    run = ready({"name": "eye_surgeon", "learn": "300it", "rate": 0.05}, sparsity=0.5, model=model)
    learn = run.plan.stages[0]
    learn.enter(run.state, run.env)
    list(learn.run(run.state, run.env))
    learn.leave(run.state, run.env)
    others = []
    for seed in range(5):
        plain, generator = ready("dense", sparsity=0.0, model=model).state, torch.Generator().manual_seed(seed)
        masks = {}
        for name, mask in run.state.masks.items():  # the same counts in every layer
            masks[name] = torch.randperm(mask.numel(), generator=generator).view(mask.shape) < mask.sum()
        plain.set_masks(Masks(masks))
        others.append(run.env.task.metrics(plain.model, "validation")["fit"])
    learned = run.env.task.metrics(run.state.model, "validation")["fit"]
    assert learned > max(others) + 3, (learned, others)  # dB; no weight was trained


def test_from_every_report_with_the_same_bits(tmp_path: Any) -> None:
    whole = ready(report_every="17it")
    reports = []
    for report in execute(whole.plan, whole.state, whole.env):
        reports.append(report)
        whole.state.save(tmp_path / f"{report.index}.safetensors")
    assert [report.stage for report in reports] == [0, 0, 0, 1, 1, 1, 2]
    for index in range(len(reports)):
        again = ready(report_every="17it")
        again.state.load(tmp_path / f"{index}.safetensors")
        assert finish(again) == reports[index + 1 :] and same(tensors(again), tensors(whole))


@pytest.mark.parametrize("options", [{"learn": "0it"}, {"rate": 0.0}, {"temperature": 0.0}, {"strength": -1e-9}])
def test_options_that_make_no_sense_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="paradigm.learn must be at least one step, rate and temperature above 0"):
        ready({"name": "eye_surgeon", **options})


def test_what_it_keeps_fits_less_of_the_noise_than_the_dense_generator() -> None:
    changes: dict[str, Any] = {
        "model": {"name": "hourglass", "widths": [8, 16]},
        "data": {"name": "image", "side": 32},
        "task": {"name": "inverse", "noise": 0.1, "epoch": 50},
        "train": {"length": "500it", "decay": "constant"},
    }
    ends = {}
    surgery = {"name": "eye_surgeon", "learn": "200it", "rate": 0.1, "strength": 1e-5}
    for name, paradigm, sparsity in (("dense", "dense", 0.0), ("pruned", surgery, 0.95)):
        run = ready(paradigm, sparsity=sparsity, **changes)
        lap = len(run.plan.stages) - 1  # in which weights are trained
        curve = [run.env.task.metrics(run.state.model, "test") for report in execute(run.plan, run.state, run.env) if report.lap == lap]
        ends[name] = (max(point["psnr"] for point in curve), curve[-1]["psnr"], curve[-1]["fit"])
    (best, last, fit), (kept_best, kept_last, kept_fit) = ends["dense"], ends["pruned"]
    assert fit > kept_fit + 5, "dB"
    assert last < best - 3.5 and kept_last > kept_best - 2.5 and kept_last > last + 1
