"""Network slimming: an L1 penalty on the scales of batch normalisation, one for each channel."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from distprune.core.hooks.hook import Hook, Memory
from distprune.core.registry import Choice

if TYPE_CHECKING:
    from distprune.core.executor import Env
    from distprune.core.state import State


@dataclass(frozen=True, kw_only=True)
class Slimming(Hook):
    """strength * |gamma| on the batch-norm scales of the removable channels (Liu et al. 2017, arXiv:1708.06519, eq. 1).

    The gradient is the subgradient strength * sign(gamma). Scales start at `scale`, without which they start at 1 and take longer to part.
    """

    strength: float
    scale: float
    granularity: Choice

    @torch.no_grad()
    def start(self, memory: Memory, state: "State", env: "Env") -> None:
        for gamma, index in self._scales(state, env):
            gamma[index] = self.scale

    @torch.no_grad()
    def grad(self, memory: Memory, state: "State", env: "Env") -> None:
        for gamma, index in self._scales(state, env):
            if gamma.grad is not None:
                gamma.grad[index] += self.strength * gamma[index].sign()

    def _scales(self, state: "State", env: "Env") -> list[tuple[nn.Parameter, Tensor]]:
        """Scale parameters, each with the places in it that belong to removable channels."""
        found = []
        for group in state.units(self.granularity, env.task.example).channels:
            for part in group.parts:
                module, _, name = part.name.rpartition(".")
                norm = state.model.get_submodule(module)
                if part.role == "carries" and name == "weight" and isinstance(norm, nn.modules.batchnorm._BatchNorm):
                    found.append((norm.weight, part.index.flatten()))
        return found
