"""Movement pruning: scores by hand, the schedule, and what is left at the end."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from toys import finish, ready

from distprune.core import registry
from distprune.core.budgets import budget
from distprune.core.executor import execute
from distprune.core.hooks.movement import Movement
from distprune.core.schedules import cubic
from distprune.core.stages import Train
from distprune.core.state import State
from distprune.errors import UserError

ENV: Any = SimpleNamespace(seed=0, task=SimpleNamespace(example=None))


def movement(**changes: Any) -> Movement:
    options = {"kind": "hard", "sparsity": 0.75, "allocator": registry.allocator.choose("uniform"), "begin": 0, "end_at": 4}
    return Movement(**{**options, "rate": 0.1, "threshold": 0.0, "strength": 0.0, **changes})


def tiny(hook: Movement, weights: list[list[float]]) -> tuple[State, dict[str, Any]]:
    """A linear layer with these weights, under a hook."""
    state = State.new(lambda: nn.Linear(len(weights[0]), len(weights)), seed=0, device=torch.device("cpu"))
    with torch.no_grad():
        state.weights["weight"].copy_(torch.tensor(weights))
    memory: dict[str, Any] = {}
    hook.start(memory, state, ENV)
    return state, memory


def test_three_steps_by_hand() -> None:
    hook = movement()
    state, memory = tiny(hook, [[1.0, -1.0, 2.0, 0.5]])
    weight = state.weights["weight"]
    gradients = [[-1.0, -2.0, 1.0, 3.0], [1.0, -1.0, -1.0, 2.0], [1.0, 1.0, -3.0, 0.0]]
    values = [[1.0, -1.0, 2.0, 0.5], [1.0, -2.0, 2.0, 0.5], [1.0, -2.0, 1.0, 0.5]]
    # The cubic removes .75 * (1 - .75^3) = .434 after one step of four, .656 after two, .738 after three: 2, 1 and 1 of 4 are left.
    scores = [[0.1, -0.2, -0.2, -0.15], [0.0, -0.4, 0.0, -0.25], [-0.1, -0.2, 0.3, -0.25]]
    masks = [[1.0, 0.0, 0.0, 1.0], [1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0]]  # a tie goes to the lower index; a masked one comes back
    mask = [1.0] * 4
    for i in range(3):
        with torch.no_grad():
            weight.copy_(torch.tensor([values[i]]))
        view = hook.view(memory, state, ENV, train=True)["weight"]
        assert torch.equal(view, weight.detach() * torch.tensor([mask]))
        weight.grad = torch.tensor([gradients[i]])
        hook.grad(memory, state, ENV)
        assert torch.equal(weight.grad, torch.tensor([gradients[i]]) * torch.tensor([mask])), "masked weights get no gradient"
        state.clock += 1
        hook.step(memory, state, ENV)
        mask = masks[i]
        assert memory["score.weight"][0].tolist() == pytest.approx(scores[i], abs=1e-6)
        assert memory["mask.weight"][0].tolist() == [bool(kept) for kept in mask]


def test_soft_scores_have_a_penalty_and_masks_a_threshold() -> None:
    hook = movement(kind="soft", sparsity=0.5, end_at=2, rate=1.0, threshold=0.4, strength=0.8)
    state, memory = tiny(hook, [[1.0, 1.0, 1.0, 1.0, 1.0, 1.0]])
    weight, state.clock = state.weights["weight"], 1
    score = torch.tensor([[3.0, 1.0, -0.5, -1.0, -2.0, -3.0]])
    memory["score.weight"] = score.clone()
    weight.grad = torch.full((1, 6), 0.1)
    hook.grad(memory, state, ENV)
    chance = score.sigmoid()
    ramp = cubic(0.0, 1.0, 0.5)
    torch.testing.assert_close(memory["score.weight"], score - 0.1 - 0.8 * ramp * chance * (1 - chance))
    # Half way the schedule allows round(6 * (1 - .4375)) = 3 and the budget is 3; with a looser budget the threshold .35 decides.
    loose = movement(kind="soft", sparsity=5 / 6, end_at=2, threshold=0.4)
    memory["score.weight"] = score
    loose.step(memory, state, ENV)
    assert ramp * 0.4 == pytest.approx(0.35) and int(score.sigmoid().gt(0.35).sum()) == 3
    assert memory["mask.weight"].sum() == min(3, budget(cubic(0.0, 5 / 6, 0.5), 6)) == 2
    memory["score.weight"] = torch.tensor([[-3.0, -1.0, -5.0, -1.0, -2.0, -3.0]])
    loose.step(memory, state, ENV)
    assert memory["mask.weight"].tolist() == [[False, True, False, False, False, False]], "never less than the budget"


@pytest.mark.parametrize("kind", ["hard", "soft"])
@pytest.mark.parametrize("allocator", ["uniform", "global"])
def test_masks_follow_the_schedule_to_the_budget(kind: str, allocator: str) -> None:
    run = ready({"name": "movement", "kind": kind, "tune": "50%", "settle": 0.25}, allocator=allocator, report_every="1it")
    dense, move, settle = run.plan.stages
    assert isinstance(dense, Train) and isinstance(move, Train) and isinstance(settle, Train)
    assert [(s.since, s.until) for s in (dense, move, settle)] == [(None, 40), (20, 35), (None, 40)]
    total, back = run.state.masks.total, 0
    masks: dict[str, torch.Tensor] = {}
    for report in execute(run.plan, run.state, run.env):
        if run.state.stage == 1 and run.state.entered:
            memory = run.state.slots["0.Movement"]
            kept = {name: memory[f"mask.{name}"] for name in run.state.weights}
            count, most = sum(int(mask.sum()) for mask in kept.values()), budget(cubic(0.0, 0.9, (report.clock - 20) / 15), total)
            assert count == most if kind == "hard" else budget(0.9, total) <= count <= most
            assert report.sparsity == 0, "nothing is removed before the end"
            back += sum(int((mask & ~masks[name]).sum()) for name, mask in kept.items() if masks)
            masks = kept
        elif run.state.stage == 2:
            assert report.kept == budget(0.9, total)
    assert back, "masked weights come back"
    assert run.state.masks.kept == budget(0.9, total)
    assert all(not run.state.weights[name][~mask].any() for name, mask in run.state.masks.items())


@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_the_hardened_network_computes_what_the_last_view_did(kind: str) -> None:
    run = ready({"name": "movement", "kind": kind})
    dense, move, _ = run.plan.stages
    for stage in (dense, move):
        stage.enter(run.state, run.env)
        list(stage.run(run.state, run.env))
        if stage is dense:
            stage.leave(run.state, run.env)
    run.state.model.eval()
    images = run.env.task.example()
    with torch.no_grad(), move.viewing(run.state, run.env):
        seen = run.state.model(images)
    move.leave(run.state, run.env)
    with torch.no_grad():
        assert torch.equal(run.state.model(images), seen)


def test_soft_movement_learns() -> None:
    run = ready({"name": "movement", "kind": "soft"}, sparsity=0.8, train={"length": "15ep"})
    assert finish(run)[-1].metrics["accuracy"] > 0.6, "chance is 0.1"


def test_scores_see_the_loss_alone_and_hard_masks_no_rate() -> None:
    stage = ready("movement", regularizer="l2").plan.stages[1]
    assert isinstance(stage, Train) and isinstance(stage.hooks[0], Movement) and len(stage.hooks) == 2
    hard = [ready({"name": "movement", "rate": rate}).key for rate in (1.0, 100.0)]
    soft = [ready({"name": "movement", "kind": "soft", "rate": rate}).key for rate in (1.0, 100.0)]
    assert hard[0] == hard[1] and soft[0] != soft[1]


def test_without_settling_the_masks_are_the_end() -> None:
    run = ready({"name": "movement", "settle": 0.0, "tune": "50it"})
    assert [stage.since for stage in run.plan.stages if isinstance(stage, Train)] == [None, 0]
    assert finish(run)[-1].kept == budget(0.9, run.state.masks.total)
    assert all(weight.grad is None for weight in run.state.weights.values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tune": "0%"}, "paradigm.tune must be at least one step, got 0"),
        ({"settle": 1.0}, r"paradigm.settle must be in \[0, 1\), got 1.0"),
        ({"rate": 0.0}, "paradigm.rate must be above 0, got 0.0"),
        ({"threshold": 0.5}, r"paradigm.threshold must be in \(0, 0.5\), as scores start at a probability of 0.5, got 0.5"),
        ({"strength": -1.0}, "paradigm.strength must be at least 0, got -1.0"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ready({"name": "movement", **options})
