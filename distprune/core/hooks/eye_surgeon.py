"""Optimal Eye Surgeon: the mask of an untrained generator, learned as the mean of relaxed Bernoulli draws."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from distprune.core.budgets import top_masks
from distprune.core.hooks.hook import Memory
from distprune.core.hooks.selection import Selection, gradients_of, leaf_of, leaves_of
from distprune.core.masks import Masks
from distprune.core.streams import stream

if TYPE_CHECKING:
    from distprune.core.executor import Env
    from distprune.core.state import State


@dataclass(frozen=True, kw_only=True)
class EyeSurgeon(Selection):
    """A logit p for each frozen weight, loss(w * m) + strength * sum KL(Bern(sigmoid p) || Bern(1 - sparsity)) (Ghosh et al. 2024).

    m = sigmoid((p + logistic noise) / temperature), the binary Gumbel-softmax, drawn at each step; all p start at 0, a probability of
    1/2. An evaluation, and the end, keep the budget's largest p.
    """

    temperature: float
    strength: float

    @torch.no_grad()
    def start(self, memory: Memory, state: "State", env: "Env") -> None:
        for name, weight in state.weights.items():
            state.leaves[leaf_of(name)] = nn.Parameter(torch.zeros_like(weight))

    def view(self, memory: Memory, state: "State", env: "Env", train: bool) -> dict[str, Tensor]:
        masks = self.relaxed(state, env) if train else self.masks(memory, state, env)
        return {name: weight.detach() * masks[name] for name, weight in state.weights.items()}

    def masks(self, memory: Memory, state: "State", env: "Env") -> Masks:
        logits = {name: leaf.detach() for name, leaf in leaves_of(state).items()}
        return top_masks(logits, self.counts(state, env, logits))

    @torch.no_grad()
    def relaxed(self, state: "State", env: "Env") -> dict[str, Tensor]:
        """The masks of a training step, in (0, 1)."""
        generators: dict[torch.device, torch.Generator] = {}
        masks = {}
        for name, leaf in leaves_of(state).items():
            if leaf.device not in generators:
                generators[leaf.device] = stream(env.seed, "eye_surgeon", state.lap, state.clock, device=leaf.device)
            draw = torch.rand(leaf.shape, generator=generators[leaf.device], device=leaf.device)
            noise = torch.logit(draw, eps=1e-6)
            masks[name] = torch.sigmoid((leaf + noise) / self.temperature)
        return masks

    def slopes(self, memory: Memory, state: "State", env: "Env") -> dict[str, Tensor]:
        masks = self.relaxed(state, env)  # the same draw again: the clock has not moved
        aim = math.log((1 - self.sparsity) / self.sparsity)
        slopes = {}
        for name, (grad, weight, logit) in gradients_of(state).items():
            mask, chance = masks[name], torch.sigmoid(logit)
            # dm/dp = m (1 - m) / temperature; dKL/dp = sigmoid'(p) (p - logit of the prior)
            slopes[name] = grad * weight * mask * (1 - mask) / self.temperature
            slopes[name] += self.strength * chance * (1 - chance) * (logit - aim)
        return slopes
