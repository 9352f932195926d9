"""The loop: its numbers, its hook points, and that it never revives a weight."""

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from toys import finish, ready

from distprune.core import registry
from distprune.core.executor import execute
from distprune.core.hooks.hook import Hook
from distprune.core.loop import Diverged
from distprune.core.plan import Plan
from distprune.core.registry import Choice

LOG: list[str] = []


def test_equals_a_hand_written_loop() -> None:
    run = ready("dense", model={"name": "mlp", "hidden": [16]})
    by_hand = ready("dense", model={"name": "mlp", "hidden": [16]})
    model, task, config = by_hand.state.model, by_hand.env.task, by_hand.plan.stages[0].config
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4, nesterov=True, fused=True)
    for step in range(40):
        optimizer.param_groups[0]["lr"] = 0.05 * config.decay(step / 40)
        inputs, labels = task.batch(0, 0, step, 32)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(inputs), labels).backward()
        optimizer.step()
    finish(run)
    assert all(torch.equal(value, by_hand.state.values()[name]) for name, value in run.state.values().items())


def test_masked_training_equals_masking_the_weights_in_the_forward_pass() -> None:
    """Zero weights with masked gradients are the network whose forward pass multiplies by the mask."""
    run = ready("at_init", model={"name": "mlp", "hidden": [16]}, train={"length": "1ep"})
    by_hand = ready("at_init", model={"name": "mlp", "hidden": [16]})
    list(by_hand.plan.stages[0].run(by_hand.state, by_hand.env))
    masks, model, task = by_hand.state.masks, by_hand.state.model, by_hand.env.task
    parameters = {name: value.detach().clone().requires_grad_() for name, value in model.named_parameters()}
    optimizer = torch.optim.SGD(parameters.values(), lr=0.05, momentum=0.9, weight_decay=5e-4, nesterov=True, fused=True)
    config = run.plan.stages[1].config
    for step in range(10):
        optimizer.param_groups[0]["lr"] = 0.05 * config.decay(step / 10)
        inputs, labels = task.batch(0, 0, step, 32)
        optimizer.zero_grad()
        effective = {name: value * masks[name] if name in masks else value for name, value in parameters.items()}
        torch.nn.functional.cross_entropy(torch.func.functional_call(model, effective, (inputs,)), labels).backward()
        optimizer.step()
    finish(run)
    for name, value in run.state.model.named_parameters():
        torch.testing.assert_close(value, parameters[name] * masks[name] if name in masks else parameters[name])


@dataclass(frozen=True, kw_only=True)
class Spy(Hook):
    """Writes down when it is called, and looks through a view of ones."""

    ends_at: int = 0

    def start(self, memory: Any, state: Any, env: Any) -> None:
        LOG.append("start")

    def view(self, memory: Any, state: Any, env: Any, train: bool) -> dict[str, torch.Tensor]:
        LOG.append("view" if train else "look")
        return {name: torch.ones_like(weight) for name, weight in state.weights.items()}

    def grad(self, memory: Any, state: Any, env: Any) -> None:
        LOG.append("grad")
        assert not all(bool((weight == 1).all()) for weight in state.weights.values()), "the view is out again"

    def step(self, memory: Any, state: Any, env: Any) -> bool:
        LOG.append("step")
        return state.clock == self.ends_at

    def end(self, memory: Any, state: Any, env: Any) -> None:
        LOG.append("end")


def test_hook_points_and_their_order() -> None:
    LOG.clear()
    run = ready("dense", report_every="2it")
    (stage,) = run.plan.stages
    finish(replace(run, plan=Plan([replace(stage, until=4, hooks=(Spy(),))])))
    step = ["view", "grad", "step"]
    assert LOG == ["start", *step, *step, "look", *step, *step, "end"]


def test_a_hook_may_end_the_stage() -> None:
    run = ready("dense")
    (stage,) = run.plan.stages
    finish(replace(run, plan=Plan([replace(stage, hooks=(Spy(ends_at=3),))])))
    assert run.state.clock == 3


@pytest.mark.parametrize(("name", "expected"), [("l2", 0.5 * 3.0), ("l1", 0.5), ("growing_l2", 1.0 * 3.0)])
def test_penalty_gradients_by_hand(name: str, expected: float) -> None:
    options = {"growing_l2": {"step": 0.5, "every": 2, "ceiling": 1.0}}.get(name, {"strength": 0.5})
    hook = registry.regularizer.choose(name, **options)()
    run = ready("dense")
    memory: dict[str, Any] = {}
    hook.start(memory, run.state, run.env)
    for _ in range(7 if name == "growing_l2" else 1):  # strengths 0, 0, .5, .5, 1, 1, 1
        for weight in run.state.weights.values():
            weight.data.fill_(3.0)
            weight.grad = torch.zeros_like(weight)
        hook.grad(memory, run.state, run.env)
    assert all(torch.equal(weight.grad, torch.full_like(weight, expected)) for weight in run.state.weights.values())


def test_regularizers_shrink_weights() -> None:
    norms = {}
    for regularizer in ("none", {"name": "l2", "strength": 0.1}, {"name": "l1", "strength": 0.01}, {"name": "growing_l2", "step": 0.05}):
        run = ready("dense", regularizer=regularizer)
        finish(run)
        norms[str(regularizer)] = sum(weight.norm().item() for weight in run.state.weights.values())
    assert max(norms, key=lambda key: norms[key]) == "none", norms


def test_an_infinite_loss_ends_the_run_and_says_so() -> None:
    run = ready("dense", train={"optimizer": {"name": "sgd", "lr": 1e12}})
    with pytest.raises(Diverged, match="loss is not finite at step"):
        finish(run)


def test_an_optimizer_that_does_not_keep_zeros_is_masked_again() -> None:
    import sys
    import types

    class Noisy(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            super().step(closure)
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.data += 0.01

    module = types.ModuleType("noisy_optimizer")
    module.noisy = lambda parameters: Noisy(parameters, lr=0.01)
    sys.modules["noisy_optimizer"] = module
    run = ready("at_init", train={"optimizer": {"import": "noisy_optimizer:noisy"}})
    for _ in execute(run.plan, run.state, run.env):
        assert all(not run.state.weights[name][~mask].any() for name, mask in run.state.masks.items())


@pytest.mark.parametrize("steps", [300])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_no_weight_is_revived_in_many_steps(optimizer: str, steps: int) -> None:
    run = ready("finetune", train={"length": f"{steps}it", "optimizer": {"name": optimizer, "weight_decay": 0.05}}, report_every="50it")
    finish(run)
    for name, mask in run.state.masks.items():
        assert int(run.state.weights[name][~mask].count_nonzero()) == 0


def test_decays() -> None:
    cosine = Choice("decay", "cosine", {"floor": 0.0, "warmup": 0.1})
    assert [round(cosine(x), 6) for x in (0.0, 0.05, 0.1, 0.55, 1.0)] == [0.0, 0.5, 1.0, 0.5, 0.0]
    assert [round(registry.decay.choose("steps")(x), 6) for x in (0.0, 0.5, 0.75, 1.0)] == [1.0, 0.1, 0.01, 0.01]


def test_bf16_trains() -> None:
    run = ready("at_init", precision="bf16", sparsity=0.5, train={"length": "8ep"})
    assert finish(run)[-1].metrics["accuracy"] > 0.5
