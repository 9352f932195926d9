"""The one training loop. What would want an `if` in it is a hook.

Where memory is short, the gradient of a step is summed over parts of its batch (`Task.micro_batch`) and is the mean over the batch all the
same, up to rounding; hooks see it once and whole. Only batch normalisation, which takes its statistics from what passes through it at
once, sees the parts, and dropout draws for each part anew. On several processes each has its share of the batch (`ranks.py`).
"""

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from distprune.core.allocation import fits
from distprune.core.hooks.hook import slot, viewed
from distprune.core.streams import stream_seed
from distprune.errors import UserError

if TYPE_CHECKING:
    from distprune.core.executor import Env
    from distprune.core.stages import Train
    from distprune.core.state import State

_CHECK_EVERY = 50  # steps between looks at the loss on an accelerator, where a look waits for the device


class Diverged(UserError):
    """The loss is no longer finite: NaN times a mask is NaN, so the run ends here."""


def train(stage: "Train", state: "State", env: "Env") -> Iterator[None]:
    """Run `stage` from the state's clock, yielding where reports are due."""
    task, config, model = env.task, stage.config, state.model
    weights = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    parameters = weights if stage.train == "weights" else state.leaves
    samples = (task.steps_per_epoch(1),) if config.optimizer.entry.facts["samples"] else ()
    optimizer = config.optimizer(list(parameters.values()), *samples)
    if state.optimizer != config.optimizer.name:
        state.optimizer, state.memory = config.optimizer.name, {}
    for name, parameter in parameters.items():  # the optimizer's memory lives in the state
        optimizer.state[parameter] = state.memory.setdefault(name, {})
    keeps_zeros = config.optimizer.entry.facts["keeps_zeros"]
    base = [group["lr"] for group in optimizer.param_groups]
    hooks = [(hook, state.slots[slot(index, hook)]) for index, hook in enumerate(stage.hooks)]
    device = next(iter(parameters.values())).device
    losses: list[torch.Tensor] = []

    model.train()
    while stage.goes_on(state):
        rate = config.decay(min(state.clock / stage.horizon(state), 1.0))
        for group, lr in zip(optimizer.param_groups, base, strict=True):
            group["lr"] = lr * rate
        env.seed_global(stream_seed(env.seed, "noise", state.lap, state.clock))
        batch = task.batch(env.seed, state.lap, state.clock, config.batch_size)

        model.zero_grad(set_to_none=True)
        with viewed(stage.hooks, state, env, train=True):
            losses.append(_backward(state, env, batch))
        if device.type == "cpu" or len(losses) == _CHECK_EVERY:
            _check_finite(losses, state)
        state.bill("training", task.samples(batch), task.example)

        for hook, memory in hooks:
            hook.grad(memory, state, env)
        state.mask_gradients()
        optimizer.step()
        if not keeps_zeros:
            state.zero_removed()
        state.clock += 1
        ends = any([hook.step(memory, state, env) for hook, memory in hooks])
        if stage.may_end_early:  # rank 0 says when
            ends = bool(task.ranks.tell(b"ends" if ends else b""))
        if ends:
            break
        if stage.reports_now(state, env):
            _check_finite(losses, state)
            yield
            model.train()
    _check_finite(losses, state)


def _backward(state: "State", env: "Env", batch: Any) -> torch.Tensor:
    """Add the gradient of the mean loss over a batch to the parameters' and return that loss, part by part where memory is short."""
    task, samples = env.task, env.task.samples(batch)
    losses = []
    with task.ranks.normalising(state.model):
        for index, part in task.share(batch):
            if index:
                env.seed_global(stream_seed(env.seed, "noise", state.lap, state.clock, index))
            size = task.samples(part)
            with fits(size):
                with env.autocast():
                    loss = task.loss(state.model, part)
                if size < samples:
                    loss = loss * (size / samples)
                loss.backward()  # type: ignore[no-untyped-call]
            losses.append(loss.detach())
    if task.ranks.size > 1:  # what is drawn from now on is drawn alike
        env.seed_global(stream_seed(env.seed, "noise", state.lap, state.clock))
    return task.ranks.total(state.model, losses[0] if len(losses) == 1 else torch.stack(losses).sum())


def _check_finite(losses: list[torch.Tensor], state: "State") -> None:
    finite = math.isfinite(losses[0].item()) if len(losses) == 1 else not losses or bool(torch.isfinite(torch.stack(losses)).all())
    if not finite:
        raise Diverged(f"The loss is not finite at step {state.clock} of lap {state.lap}. Lower the learning rate or the penalty.")
    losses.clear()
