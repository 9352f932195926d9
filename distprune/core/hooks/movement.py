"""Movement pruning: weights are trained, and what they do under training is the score by which they are kept."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from distprune.core.hooks.hook import Hook, Memory
from distprune.core.masks import Masks
from distprune.core.registry import WEIGHT, Choice
from distprune.core.schedules import cubic
from distprune.core.units import Units

if TYPE_CHECKING:
    from distprune.core.executor import Env
    from distprune.core.state import State


@dataclass(frozen=True, kw_only=True)
class Movement(Hook):
    """Keep what moves away from zero: S -= rate * w dL/dw_eff, for masked weights too (Sanh et al. 2020, arXiv:2005.07683, section 4).

    hard: the largest S are kept, fewer and fewer along the cubic schedule from clock `begin` to the budget at `end_at`.
    soft: of these, those with sigmoid(S) above a threshold, but never less than the budget; the score's loss has a penalty on the sum of
    sigmoid(S). The threshold rises along the cubic to `threshold` and the penalty to `strength`, as in the authors' code. The paper has
    no budget and no limit from above, so that its penalty alone decides what is left; here it decides how much sooner than hard.

    A masked weight gets no gradient, but what else its optimizer does, momentum and decay, goes on: it may come back. Scores start at
    zero and take plain SGD, so `rate` does not matter to hard.
    """

    kind: Literal["hard", "soft"]
    sparsity: float
    allocator: Choice
    begin: int
    end_at: int
    rate: float
    threshold: float
    strength: float

    def start(self, memory: Memory, state: "State", env: "Env") -> None:
        for name, weight in state.weights.items():
            memory[_score(name)] = torch.zeros_like(weight, requires_grad=False)
            memory[_mask(name)] = torch.ones_like(weight, dtype=torch.bool)

    def view(self, memory: Memory, state: "State", env: "Env", train: bool) -> dict[str, Tensor]:
        return {name: weight.detach() * memory[_mask(name)] for name, weight in state.weights.items()}

    @torch.no_grad()
    def grad(self, memory: Memory, state: "State", env: "Env") -> None:
        strength = cubic(0.0, self.strength, self._progress(state.clock)) if self.kind == "soft" else 0.0
        for name, weight in state.weights.items():
            if weight.grad is None:
                continue
            score = memory[_score(name)]
            slope = weight * weight.grad
            if strength:
                chance = torch.sigmoid(score)
                slope += strength * chance * (1 - chance)
            score.sub_(slope, alpha=self.rate)
            weight.grad.mul_(memory[_mask(name)])

    @torch.no_grad()
    def step(self, memory: Memory, state: "State", env: "Env") -> bool:
        progress = self._progress(state.clock)
        masks = self._best(memory, state, env, cubic(0.0, self.sparsity, progress))
        if self.kind == "soft":
            least, threshold = self._best(memory, state, env, self.sparsity), cubic(0.0, self.threshold, progress)
            masks = Masks({name: (mask & (torch.sigmoid(memory[_score(name)]) > threshold)) | least[name] for name, mask in masks.items()})
        for name, mask in masks.items():
            memory[_mask(name)] = mask
        return False

    def end(self, memory: Memory, state: "State", env: "Env") -> None:
        for weight in state.weights.values():
            weight.grad = None  # of the last step, under another mask
        state.set_masks(self._best(memory, state, env, self.sparsity))

    def _progress(self, clock: int) -> float:
        return (clock - self.begin) / (self.end_at - self.begin)

    def _best(self, memory: Memory, state: "State", env: "Env", sparsity: float) -> Masks:
        scores = {name: memory[_score(name)] for name in state.weights}
        units: Units = state.units(WEIGHT, env.task.example)
        return units.choose(scores, sparsity, self.allocator, None)


def _score(name: str) -> str:
    return f"score.{name}"


def _mask(name: str) -> str:
    return f"mask.{name}"
