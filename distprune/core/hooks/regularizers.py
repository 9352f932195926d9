"""Penalties on the prunable weights, added to their gradients."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import torch

from distprune.core.hooks.hook import Hook, Memory
from distprune.core.options import LogRange
from distprune.core.registry import regularizer
from distprune.errors import UserError

if TYPE_CHECKING:
    from distprune.core.executor import Env
    from distprune.core.state import State


def _add_penalty(state: "State", norm: int, strength: float) -> None:
    pairs = [(weight.grad, weight.detach()) for weight in state.weights.values() if weight.grad is not None]
    weights = [weight for _, weight in pairs]
    slope = torch._foreach_sign(weights) if norm == 1 else weights
    torch._foreach_add_([grad for grad, _ in pairs], slope, alpha=strength)


@dataclass(frozen=True, kw_only=True)
class Penalty(Hook):
    """strength * |w| (norm 1) or strength / 2 * w^2 (norm 2): the gradient is strength * sign(w) or strength * w."""

    norm: int
    strength: float

    def grad(self, memory: Memory, state: "State", env: "Env") -> None:
        _add_penalty(state, self.norm, self.strength)


@dataclass(frozen=True, kw_only=True)
class GrowingPenalty(Hook):
    """An L2 penalty whose strength grows by `step` every `every` steps up to `ceiling`."""

    step_size: float
    every: int
    ceiling: float

    def start(self, memory: Memory, state: "State", env: "Env") -> None:
        memory["steps"] = 0

    def grad(self, memory: Memory, state: "State", env: "Env") -> None:
        _add_penalty(state, 2, min(self.ceiling, self.step_size * (memory["steps"] // self.every)))
        memory["steps"] += 1


@regularizer("none")
def none() -> None:
    """No penalty besides the optimizer's weight decay.

    Formula:
        L(w)
    """


@regularizer("l2")
def l2(*, strength: Annotated[float, LogRange(1e-6, 1e-2)] = 1e-4) -> Hook:
    """strength / 2 * w^2 on the prunable weights.

    Formula:
        L(w) + strength / 2 * sum w^2
    """
    return Penalty(norm=2, strength=strength)


@regularizer("l1", paper="Tibshirani 1996; Han et al. 2015, arXiv:1506.02626")
def l1(*, strength: Annotated[float, LogRange(1e-6, 1e-3)] = 1e-5) -> Hook:
    """strength * |w| on the prunable weights.

    Formula:
        L(w) + strength * sum |w|
    """
    return Penalty(norm=1, strength=strength)


@regularizer("growing_l2", paper="Wang et al. 2021, arXiv:2012.09243: the growth, on all weights", grows=True)
def growing_l2(*, step: Annotated[float, LogRange(1e-6, 1e-4)] = 1e-5, every: int = 10, ceiling: float = 1.0) -> Hook:
    """An L2 penalty that grows by `step` every `every` steps up to `ceiling`.

    Formula:
        L(w) + lambda / 2 * sum w^2,   lambda = min(ceiling, step * floor(t / every))
    """
    if every < 1:
        raise UserError(f"regularizer.every must be at least 1, got {every}. Write 10.")
    return GrowingPenalty(step_size=step, every=every, ceiling=ceiling)
