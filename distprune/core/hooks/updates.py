"""Masks that change while the network trains."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from distprune.core.hooks.hook import Hook, Memory
from distprune.core.masks import Masks
from distprune.core.registry import Choice
from distprune.core.schedules import cubic
from distprune.core.scoring import choose_masks, scoring_samples
from distprune.core.streams import stream

if TYPE_CHECKING:
    from distprune.core.executor import Env
    from distprune.core.state import State


@dataclass(frozen=True, kw_only=True)
class Update(Hook):
    """A change of masks every `every` steps, from clock `begin` to `end`, both included."""

    begin: int
    end_at: int
    every: int

    def due(self, clock: int) -> bool:
        """Whether masks change when the clock has reached `clock`."""
        return self.begin <= clock <= self.end_at and ((clock - self.begin) % self.every == 0 or clock == self.end_at)


@dataclass(frozen=True, kw_only=True)
class Gradual(Update):
    """Prune to the cubic schedule's sparsity at every update, to the target at the last; removed weights stay removed."""

    sparsity: float
    criterion: Choice
    allocator: Choice
    batch_size: int

    def step(self, memory: Memory, state: "State", env: "Env") -> bool:
        if self.due(state.clock):
            # The first update is one interval into the schedule, so that it already prunes.
            progress = (state.clock - self.begin + self.every) / (self.end_at - self.begin + self.every)
            masks = choose_masks(
                state.model,
                env.task,
                state.masks,
                sparsity=cubic(0.0, self.sparsity, progress),
                criterion=self.criterion,
                allocator=self.allocator,
                seed=env.seed,
                draw=(state.lap, state.clock),
                batch_size=self.batch_size,
            )
            state.ledger.scoring += self.samples_per_update
            state.set_masks(masks)
        return False

    @property
    def samples_per_update(self) -> int:
        """Samples that one scoring bills."""
        return scoring_samples(self.criterion, 1, self.batch_size)


@dataclass(frozen=True, kw_only=True)
class Regrow(Update):
    """Drop the smallest weights of each layer and grow as many elsewhere: at random (SET) or where the gradient is largest (RigL).

    The dropped share of a layer's kept weights is share / 2 * (1 + cos(pi * clock / end)). Grown weights start at zero, and so does
    what the optimizer remembers of them. A weight dropped in the same update may grow again; it keeps its value, as in RigL's code.
    """

    growth: Literal["random", "gradient"]
    share: float

    def grad(self, memory: Memory, state: "State", env: "Env") -> None:
        if self.growth == "gradient" and self.due(state.clock + 1):
            for name, weight in state.weights.items():
                assert weight.grad is not None
                memory[name] = weight.grad.abs()  # dense here; masked a moment later

    def step(self, memory: Memory, state: "State", env: "Env") -> bool:
        if self.due(state.clock):
            share = self.share / 2 * (1 + math.cos(math.pi * state.clock / self.end_at))
            generator = stream(env.seed, "regrow", state.lap, state.clock)
            masks = {}
            for name, mask in state.masks.items():
                growth = memory.pop(name) if self.growth == "gradient" else torch.rand(mask.shape, generator=generator).to(mask.device)
                masks[name] = regrown(mask, state.weights[name].detach().abs(), growth, share)
            state.set_masks(Masks(masks))
        return False


def regrown(mask: Tensor, magnitude: Tensor, growth: Tensor, share: float) -> Tensor:
    """A mask with as many weights as `mask`: its largest by magnitude but for a `share`, and the rest by `growth`."""
    kept = int(mask.sum())
    free = mask.numel() - kept
    dropped = min(int(share * kept + 0.5), free)
    stay = _top(magnitude, kept - dropped, mask)
    return stay | _top(growth, dropped, ~stay)


def _top(scores: Tensor, count: int, among: Tensor) -> Tensor:
    flat = scores.flatten().double().masked_fill(~among.flatten(), -math.inf)
    chosen = torch.zeros(flat.numel(), dtype=torch.bool, device=flat.device)
    chosen[torch.sort(flat, descending=True, stable=True).indices[:count]] = True
    return chosen.view(scores.shape)
