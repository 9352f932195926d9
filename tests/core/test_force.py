"""Progressive skeletonization, against its algorithm written out in plain torch."""

import copy
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from toys import blobs, ready

from distprune.core import registry
from distprune.core.masks import Masks
from distprune.core.run import Run
from distprune.core.schedules import exponential
from distprune.core.scoring import choose_masks
from distprune.core.stages import Prune
from distprune.core.streams import stream
from distprune.core.tasks.classification import Classification
from distprune.core.tasks.given import GivenBatches
from distprune.errors import UserError

MODEL = {"name": "mlp", "hidden": [24, 16]}


def _run(sparsity: float = 0.9, **options: Any) -> Run:
    return ready({"name": "force", **options}, sparsity, allocator="global", model=MODEL)


def _prune(run: Run) -> Prune:
    return next(stage for stage in run.plan.stages if isinstance(stage, Prune))


def _trajectory(run: Run) -> list[Masks]:
    """The masks after each step: the first steps on the way to the target are the steps on the way to the density of the last of them."""
    stage, state = _prune(run), run.state
    masks = []
    for step in range(1, stage.steps + 1):
        at = exponential(0.0, stage.sparsity, step / stage.steps)
        masks.append(
            choose_masks(
                state.model, run.env.task, state.masks, sparsity=at, criterion=stage.criterion, allocator=stage.allocator, steps=step,
                nested=stage.nested, draw=(0, 0), batch_size=stage.batch_size,
            )
        )  # fmt: skip
    return masks


def _by_hand(run: Run, *, nested: bool, nll: bool) -> list[Masks]:
    """The algorithm as the authors' code has it: density p^(t/T), gradients at theta * c for all weights, top-k of |theta dL/dw|.

    Iterative SNIP gives removed weights a saliency below every other one.
    """
    stage, task = _prune(run), run.env.task
    theta = {name: weight.detach().clone() for name, weight in run.state.weights.items()}
    mask = {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in theta.items()}
    total = sum(weight.numel() for weight in theta.values())
    trajectory = []
    for step in range(1, stage.steps + 1):
        model = copy.deepcopy(run.state.model)
        parameters = dict(model.named_parameters())
        with torch.no_grad():
            for name, weight in theta.items():
                parameters[name].copy_(weight * mask[name])
        generator = stream(0, "score", 0, 0, step)
        for _ in range(stage.criterion.option("batches")):
            inputs, labels = task.draw(generator, stage.batch_size)
            logits = model(inputs)
            loss = -logits.gather(1, labels[:, None]).mean() if nll else torch.nn.functional.cross_entropy(logits, labels)
            loss.backward()
        saliency = torch.cat([(weight * parameters[name].grad).abs().flatten() for name, weight in theta.items()])
        if nested:
            saliency[~torch.cat([part.flatten() for part in mask.values()])] = -1.0
        kept = torch.zeros(total, dtype=torch.bool)
        kept[saliency.topk(round(total * (1 - stage.sparsity) ** (step / stage.steps))).indices] = True
        parts = kept.split([weight.numel() for weight in theta.values()])
        mask = {name: part.view(theta[name].shape) for name, part in zip(theta, parts, strict=True)}
        trajectory.append(Masks(mask))
    return trajectory


@pytest.mark.parametrize("loss", ["task", "nll_logits"])
@pytest.mark.parametrize("variant", ["force", "iterative_snip"])
def test_the_algorithm_written_out(variant: str, loss: str) -> None:
    run = _run(variant=variant, loss=loss, steps=6, batches=2)
    found, due = _trajectory(run), _by_hand(run, nested=variant == "iterative_snip", nll=loss == "nll_logits")
    assert all(a.equal(b) for a, b in zip(found, due, strict=True))
    list(_prune(run).run(run.state, run.env))
    assert run.state.masks.equal(due[-1])


@pytest.mark.parametrize("loss", ["task", "nll_logits"])
@pytest.mark.parametrize("variant", ["force", "iterative_snip"])
def test_one_step_is_snip_to_the_bit(variant: str, loss: str) -> None:
    one = _run(variant=variant, loss=loss, steps=1)
    snip = ready("at_init", allocator="global", model=MODEL, criterion={"name": "snip", "loss": loss})
    for run in (one, snip):
        list(_prune(run).run(run.state, run.env))
    assert one.state.masks.equal(snip.state.masks) and one.plan.cost == snip.plan.cost
    many = _run(variant=variant, loss=loss, steps=5)
    list(_prune(many).run(many.state, many.env))
    assert not many.state.masks.equal(snip.state.masks), "the steps matter"


def test_iterative_snip_is_nested_and_force_resurrects() -> None:
    nested, free = (_trajectory(_run(0.95, variant=variant, steps=12)) for variant in ("iterative_snip", "force"))
    assert all(later.nested_in(earlier) for earlier, later in pairwise(nested))
    returned = [sum(int((later[name] & ~earlier[name]).sum()) for name in later) for earlier, later in pairwise(free)]
    assert sum(count > 0 for count in returned) >= 3, returned
    for masks in (nested, free):
        total = masks[0].total
        assert [mask.kept for mask in masks] == [round(total * 0.05 ** (step / 12)) for step in range(1, 13)], "exponential"


def test_what_is_trained_has_its_first_values_also_where_it_was_gone_for_a_while() -> None:
    run = _run(steps=8)
    before = {name: weight.detach().clone() for name, weight in run.state.weights.items()}
    list(_prune(run).run(run.state, run.env))
    assert all(torch.equal(weight, before[name] * run.state.masks[name]) for name, weight in run.state.weights.items())


def test_a_removed_weight_of_zero_scores_stays_removed() -> None:
    # Inputs that are always zero give every weight of theirs the score zero: ties, which a threshold of zero would let in again.
    batches = [(torch.tensor([[1.0, 0.0, 0.0, 0.0]]), torch.tensor([0]))]
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 8)
    start = Masks({"weight": torch.rand(8, 4) < 0.7})
    masks = choose_masks(
        model, GivenBatches(batches, torch.nn.functional.cross_entropy), start, sparsity=0.5, criterion=registry.criterion.choose("snip"),
        allocator=registry.allocator.choose("global"), steps=3,
    )  # fmt: skip
    assert masks.nested_in(start) and masks.kept == 16


def test_nll_logits_is_minus_the_logit_of_the_label_and_not_cross_entropy() -> None:
    # dL/dW of -z_y for one sample is -x in the row of its label and zero elsewhere, whatever the other logits are.
    task = Classification(replace(blobs(train=8), augment="none"))
    weight = torch.randn(10, 64, requires_grad=True)
    inputs, labels = task.draw(stream(0, "test"), 1)
    task.nll_of(inputs.flatten(1) @ weight.T, (inputs, labels)).backward()
    expected = torch.zeros(10, 64)
    expected[labels[0]] = -inputs.flatten()
    torch.testing.assert_close(weight.grad, expected)
    with pytest.raises(UserError, match=r"loss 'nll_logits' .* this task has no labels. Write loss: task"):
        GivenBatches([(inputs, labels)], torch.nn.functional.cross_entropy).nll_of(inputs, (inputs, labels))


def test_kaiming_draws_every_layer_from_its_fan_in() -> None:
    run = ready({"name": "force", "init": "kaiming", "steps": 1}, 0.5, allocator="global", model={"name": "lenet5"})
    list(run.plan.stages[0].run(run.state, run.env))
    for name, weight in run.state.weights.items():
        due = (2 / weight[0].numel()) ** 0.5
        assert float(weight.detach().std()) == pytest.approx(due, rel=6 / weight.numel() ** 0.5), name
    assert not any(bool(value.any()) for name, value in run.state.values().items() if name.endswith("bias"))


@pytest.mark.parametrize("option", ["steps", "batches"])
def test_nothing_is_refused(option: str) -> None:
    with pytest.raises(UserError, match=f"paradigm.{option} must be at least 1, got 0"):
        _run(**{option: 0})
