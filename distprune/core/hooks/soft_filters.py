"""Soft filter pruning: the smallest filters are set to zero again and again, and may grow back."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from distprune.core.hooks.group_lasso import norms
from distprune.core.hooks.hook import Hook, Memory
from distprune.core.masks import Masks
from distprune.core.registry import Choice
from distprune.core.units import Units

if TYPE_CHECKING:
    from distprune.core.executor import Env
    from distprune.core.state import State


@dataclass(frozen=True, kw_only=True)
class SoftFilters(Hook):
    """Every `every` steps the units of the smallest L2 norm become zero, not masked (He et al. 2018, arXiv:1808.06866, algorithm 1).

    Zeroed are the weights that make a channel, as in the authors' code; those that read it train on. At the end both are removed.
    """

    every: int
    sparsity: float
    allocator: Choice
    granularity: Choice

    @torch.no_grad()
    def step(self, memory: Memory, state: "State", env: "Env") -> bool:
        if state.clock % self.every == 0:
            units = state.units(self.granularity, env.task.example)
            alive = units.alive(self._smallest_out(units, state))
            kept = units.spread({name: value.float() for name, value in alive.items()})
            for name, weight in state.weights.items():
                weight.mul_(kept[name])
        return False

    def end(self, memory: Memory, state: "State", env: "Env") -> None:
        for weight in state.weights.values():
            weight.grad = None  # of the last step, without masks
        state.set_masks(self._smallest_out(state.units(self.granularity, env.task.example), state))

    def _smallest_out(self, units: Units, state: "State") -> Masks:
        return units.choose(norms(units, state.weights), self.sparsity, self.allocator, None)
