"""ADMM: weights are drawn towards the nearest network of the budget while they train."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from distprune.core.hooks.group_lasso import norms
from distprune.core.hooks.hook import Hook, Memory
from distprune.core.registry import Choice

if TYPE_CHECKING:
    from distprune.core.executor import Env
    from distprune.core.state import State


@dataclass(frozen=True, kw_only=True)
class Admm(Hook):
    """min L(W) + rho / 2 ||W - Z + U||^2 with Z of the budget's sparsity (Zhang et al. 2018, arXiv:1804.03294, section 3).

    Every `every` steps Z becomes W + U projected onto the budget, the units of the largest norm, and U grows by W - Z. Then rho grows by
    the factor `growth`; U, which is the multiplier divided by rho, shrinks by it.
    """

    rho: float
    growth: float
    every: int
    sparsity: float
    allocator: Choice
    granularity: Choice

    @torch.no_grad()
    def start(self, memory: Memory, state: "State", env: "Env") -> None:
        memory["steps"], memory["rho"] = 0, self.rho
        for name, tensor in self._project(state, env, state.weights).items():
            memory[_z(name)], memory[_u(name)] = tensor, torch.zeros_like(tensor)

    @torch.no_grad()
    def grad(self, memory: Memory, state: "State", env: "Env") -> None:
        for name, weight in state.weights.items():
            if weight.grad is not None:
                weight.grad.add_(weight - memory[_z(name)] + memory[_u(name)], alpha=memory["rho"])

    @torch.no_grad()
    def step(self, memory: Memory, state: "State", env: "Env") -> bool:
        memory["steps"] += 1
        if memory["steps"] % self.every == 0:
            sums = {name: weight + memory[_u(name)] for name, weight in state.weights.items()}
            for name, tensor in self._project(state, env, sums).items():
                memory[_z(name)] = tensor
                memory[_u(name)] = (sums[name] - tensor) / self.growth
            memory["rho"] *= self.growth
        return False

    def _project(self, state: "State", env: "Env", values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The nearest values of the budget, given what the allocator leaves each layer."""
        units = state.units(self.granularity, env.task.example)
        masks = units.choose(norms(units, values), self.sparsity, self.allocator, None)
        return {name: value.detach() * masks[name] for name, value in values.items()}


def _z(name: str) -> str:
    return f"z:{name}"


def _u(name: str) -> str:
    return f"u:{name}"
