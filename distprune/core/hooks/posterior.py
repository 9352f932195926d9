"""Samples of a chain: mean and spread of every weight, and masks from the ratio of the two."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from distprune.core.hooks.hook import Hook, Memory
from distprune.core.registry import Choice
from distprune.core.units import Units

if TYPE_CHECKING:
    from distprune.core.executor import Env
    from distprune.core.state import State


@dataclass(frozen=True, kw_only=True)
class Posterior(Hook):
    """After `burn` steps keeps a sample every `thin` steps; at the end removes units of the smallest |mean| / std.

    Graves 2011, Practical variational inference for neural networks; Blundell et al. 2015, arXiv:1505.05424, section 5.1. A unit of several
    weights has the root of sum mean^2 / sum variance. `by: magnitude` ranks by |mean| on the same chain. What is kept has the mean of the
    samples, as have the other parameters: all are of one chain, so of one mode, and the last sample carries the chain's noise.
    """

    burn: int
    thin: int
    by: Literal["signal_to_noise", "magnitude"]
    sparsity: float
    allocator: Choice
    granularity: Choice

    def start(self, memory: Memory, state: "State", env: "Env") -> None:
        memory["steps"], memory["count"] = 0, 0
        for name, parameter in state.model.named_parameters():
            if parameter.requires_grad:
                memory[_mean(name)] = torch.zeros_like(parameter)
        for name, weight in state.weights.items():
            memory[_squares(name)] = torch.zeros_like(weight)

    @torch.no_grad()
    def step(self, memory: Memory, state: "State", env: "Env") -> bool:
        memory["steps"] += 1
        after = memory["steps"] - self.burn
        if after > 0 and after % self.thin == 0:
            memory["count"] += 1
            for name, parameter in state.model.named_parameters():
                if parameter.requires_grad:
                    mean = memory[_mean(name)]
                    before = parameter - mean
                    mean.add_(before, alpha=1 / memory["count"])
                    if name in state.weights:
                        memory[_squares(name)].addcmul_(before, parameter - mean)
        return False

    @torch.no_grad()
    def end(self, memory: Memory, state: "State", env: "Env") -> None:
        known = memory["count"] > 1  # else a copy is ended early, to be measured: it has its weights, and no idea of their spread
        for name, parameter in state.model.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(memory[_mean(name)] if known else parameter)
                parameter.grad = None  # of the last step, without masks
        means = {name: weight.detach() for name, weight in state.weights.items()}
        variances = {name: memory[_squares(name)] / (memory["count"] - 1) if known else torch.ones_like(means[name]) for name in means}
        units = state.units(self.granularity, env.task.example)
        scores = signal_to_noise(units, means, variances) if self.by == "signal_to_noise" else magnitudes(units, means)
        state.set_masks(units.choose(scores, self.sparsity, self.allocator, None))


def signal_to_noise(units: Units, means: dict[str, Tensor], variances: dict[str, Tensor]) -> dict[str, Tensor]:
    """sqrt(sum mean^2 / sum variance) of each unit."""
    signal = units.reduce({name: mean.square() for name, mean in means.items()}, "sum")
    noise = units.reduce(variances, "sum")
    return {name: (value / noise[name].clamp(min=torch.finfo(value.dtype).tiny)).sqrt() for name, value in signal.items()}


def magnitudes(units: Units, means: dict[str, Tensor]) -> dict[str, Tensor]:
    """Mean |mean| of each unit, as the criterion of this name has it."""
    return units.reduce({name: mean.abs() for name, mean in means.items()}, "mean")


def _mean(name: str) -> str:
    return f"mean:{name}"


def _squares(name: str) -> str:
    return f"squares:{name}"
