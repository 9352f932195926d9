"""Masks that change while the network trains."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from distprune.core.hooks.hook import Hook, Memory
from distprune.core.registry import WEIGHT, Choice
from distprune.core.schedules import cubic
from distprune.core.scoring import choose_masks, scoring_samples

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
    """Prune to the cubic schedule's sparsity at every update, to the target at the last; it removes weights only."""

    sparsity: float
    initial: float = 0.0
    criterion: Choice
    allocator: Choice
    granularity: Choice = WEIGHT
    batch_size: int

    def step(self, memory: Memory, state: "State", env: "Env") -> bool:
        if self.due(state.clock):
            # The first update is one interval into the schedule, so that it already prunes.
            progress = (state.clock - self.begin + self.every) / (self.end_at - self.begin + self.every)
            masks = choose_masks(
                state.model,
                env.task,
                state.masks,
                sparsity=cubic(self.initial, self.sparsity, progress),
                criterion=self.criterion,
                allocator=self.allocator,
                units=state.units(self.granularity, env.task.example),
                seed=env.seed,
                draw=(state.lap, state.clock),
                batch_size=self.batch_size,
            )
            state.bill("scoring", self.samples_per_update, env.task.example)
            state.set_masks(masks)
        return False

    @property
    def samples_per_update(self) -> int:
        """Samples that one scoring bills."""
        return scoring_samples(self.criterion, 1, self.batch_size)
