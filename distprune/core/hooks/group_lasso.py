"""Group lasso: a penalty that makes whole units exactly zero."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from distprune.core.hooks.hook import Hook, Memory
from distprune.core.registry import Choice
from distprune.core.units import Units

if TYPE_CHECKING:
    from distprune.core.executor import Env
    from distprune.core.state import State


@dataclass(frozen=True, kw_only=True)
class GroupLasso(Hook):
    """strength * sum over units of sqrt(n) ||w||_2, n the weights of a unit (Wen et al. 2016, arXiv:1608.03665, eq. 3).

    Not a gradient, which only comes near zero, but the proximal step after that of the optimizer, at the same learning rate:
    w <- max(0, 1 - lr * strength * sqrt(n) / ||w||) w. An adaptive optimizer's own scaling of the rate is left out of it, as decoupled
    weight decay does.
    """

    strength: float
    granularity: Choice
    config: Any  # the stage's, for its learning rate

    def start(self, memory: Memory, state: "State", env: "Env") -> None:
        memory["lr"] = float(self.config.optimizer([nn.Parameter(torch.zeros(1))]).param_groups[0]["lr"])

    @torch.no_grad()
    def step(self, memory: Memory, state: "State", env: "Env") -> bool:
        clock = state.clock - 1  # of the step that was just made
        step = memory["lr"] * self.config.decay(min(clock / self.config.length, 1.0)) * self.strength
        units = state.units(self.granularity, env.task.example)
        # sqrt(n) / ||w|| is one over the root mean square.
        rms = {name: square.sqrt() for name, square in units.reduce(squares(state.weights), "mean").items()}
        shares = units.spread({name: torch.where(value > step, 1 - step / value, 0) for name, value in rms.items()})
        for name, weight in state.weights.items():
            weight.mul_(shares[name])
        return False


def squares(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """w^2 of each weight."""
    return {name: weight.detach().square() for name, weight in weights.items()}


def norms(units: Units, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """||w||_2 of each unit."""
    return {name: square.sqrt() for name, square in units.reduce(squares(weights), "sum").items()}
