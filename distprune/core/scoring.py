"""From scores to masks: what a criterion may look at, and how its scores and a budget become masks."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from distprune.core.allocation import fits
from distprune.core.masks import Masks
from distprune.core.registry import Choice
from distprune.core.schedules import exponential
from distprune.core.streams import global_stream, stream
from distprune.core.task import Task
from distprune.core.units import Units, Weights
from distprune.errors import UserError


class Probe:
    """What a criterion sees: a scratch copy of the network that it may do anything to, data and a random stream.

    `model` has the masks applied; `values` holds the weights as they were before (name -> tensor), so that a criterion can also score
    weights that are masked now; `weights` are the parameters of `model` under the same names. `units` says what is removed as one.
    """

    def __init__(
        self,
        model: nn.Module,
        task: Task | None,
        masks: Masks,
        *,
        seed: int,
        draw: tuple[int, ...],
        batch_size: int,
        units: Units | None = None,
    ) -> None:
        self.model = copy.deepcopy(model).train()
        for parameter in self.model.parameters():
            parameter.grad = None
        parameters = dict(self.model.named_parameters())
        self.weights = {name: parameters[name] for name in masks}
        self.values = {name: weight.detach().clone() for name, weight in self.weights.items()}
        masks.apply_(self.model)
        self.masks = masks
        self.units = units or Weights(self.values)
        self.generator = stream(seed, "score", *draw)
        self._task, self._batch_size = task, batch_size

    @property
    def task(self) -> Task:
        """The task. Raises UserError where there is none: `distprune.prune` without batches."""
        if self._task is None:
            raise UserError(
                "This criterion runs the network: pass batches=..., or choose one that looks at weights alone: magnitude or random."
            )
        return self._task

    def batch(self) -> Any:
        """A random training batch, not augmented; where memory is short its first part, for criteria that need a batch as one whole."""
        return self.task.parts(self.task.draw(self.generator, self._batch_size))[0]

    def gradients(self, batches: int, loss: Callable[[nn.Module, Any], Tensor] | None = None) -> dict[str, Tensor]:
        """dL/dw of the prunable weights, the mean over `batches`; name -> shape of the weight."""
        self.model.zero_grad(set_to_none=True)
        for _ in range(batches):
            batch = self.task.draw(self.generator, self._batch_size)
            for part in self.task.parts(batch):
                share = self.task.samples(part) / self.task.samples(batch)
                ((loss or self.task.loss)(self.model, part) * share / batches).backward()  # type: ignore[no-untyped-call]
        return {name: weight.grad if weight.grad is not None else torch.zeros_like(weight) for name, weight in self.weights.items()}


def choose_masks(
    model: nn.Module,
    task: Task | None,
    masks: Masks,
    *,
    sparsity: float,
    criterion: Choice,
    allocator: Choice,
    units: Units | None = None,
    steps: int = 1,
    nested: bool = True,
    seed: int = 0,
    draw: tuple[int, ...] = (),
    batch_size: int = 128,
) -> Masks:
    """Masks of `sparsity`, reached from `masks` in `steps` exponential steps with new scores at each; `units` are weights by default.

    `nested` keeps removed units removed. `draw` (lap, clock) tells the scoring passes of a run apart: each sees its own batches.
    The network, its gradients and the global generator are left as they were.
    Raises UserError for an infeasible budget or scores that are not finite.
    """
    units = units or Weights(masks)
    start = units.sparsity(masks) if nested else 0.0
    units.check(sparsity)  # an infeasible target fails before any scoring
    for step in range(1, steps + 1):
        probe = Probe(model, task, masks, seed=seed, draw=(*draw, step), batch_size=batch_size, units=units)
        limit = (task and task.micro_batch) or batch_size
        with global_stream(seed, "scoring", *draw, step), torch.enable_grad(), fits(min(limit, batch_size)):
            scores = unit_scores(probe, criterion)
        masks = units.choose(scores, max(exponential(start, sparsity, step / steps), 0.0), allocator, masks if nested else None)
    return masks


def unit_scores(probe: Probe, criterion: Choice) -> dict[str, Tensor]:
    """The scores of a criterion for the probe's units. Raises UserError where they are not one for each."""
    facts = criterion.entry.facts
    scores: dict[str, Tensor] = criterion(probe)
    due: dict[str, tuple[int, ...]]
    if facts["of_units"]:
        due = {layer.name: (layer.units,) for layer in probe.units.layers()}
    else:
        due = {name: tuple(value.shape) for name, value in probe.values.items()}
    got = {key: tuple(value.shape) for key, value in scores.items()}
    wrong = next((key for key in [*due, *got] if got.get(key) != due.get(key)), None)
    if wrong is not None:
        what = "unit" if facts["of_units"] else "weight"
        raise UserError(
            f"criterion '{criterion.name}' must return one score a {what}: '{wrong}' has shape {due.get(wrong, 'none')}, "
            f"its scores {got.get(wrong, 'none')}."
        )
    return scores if facts["of_units"] else probe.units.reduce(scores, facts["reduction"])


def scoring_samples(criterion: Choice, steps: int, batch_size: int) -> int:
    """Samples that scoring bills: passes over `batches` batches in each of `steps` steps."""
    passes = criterion.entry.facts["passes"]
    count: int = passes(criterion) if callable(passes) else passes
    return count and count * criterion.option("batches") * batch_size * steps
