"""Early-bird tickets: training ends when the mask that it would be pruned to has settled."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from distprune.core.hooks.hook import Hook, Memory
from distprune.core.masks import Masks
from distprune.core.registry import Choice
from distprune.core.scoring import choose_masks

if TYPE_CHECKING:
    from distprune.core.executor import Env
    from distprune.core.state import State


@dataclass(frozen=True, kw_only=True)
class EarlyBird(Hook):
    """Draw a mask every `every` steps; end the stage when the newest is within `near` of the `window - 1` before it.

    You et al. 2020, arXiv:1909.11957, section 3.2. Nothing is pruned; the criterion must not look at data, which would be billed.
    """

    may_end: ClassVar[bool] = True
    every: int
    window: int
    near: float
    sparsity: float
    criterion: Choice
    allocator: Choice
    granularity: Choice

    def start(self, memory: Memory, state: "State", env: "Env") -> None:
        memory["drawn"] = 0

    def step(self, memory: Memory, state: "State", env: "Env") -> bool:
        if state.clock % self.every:
            return False
        newest = self._draw(state, env)
        # A ring: draw i lies at i modulo window, over the oldest.
        for name, mask in newest.items():
            memory[_key(memory["drawn"] % self.window, name)] = mask
        memory["drawn"] += 1
        if memory["drawn"] < self.window:
            return False
        masks = [Masks({name: memory[_key(place, name)] for name in newest}) for place in range(self.window)]
        return all(distance(newest, mask) <= self.near for mask in masks)

    def _draw(self, state: "State", env: "Env") -> Masks:
        return choose_masks(
            state.model,
            env.task,
            state.masks,
            sparsity=self.sparsity,
            criterion=self.criterion,
            allocator=self.allocator,
            units=state.units(self.granularity, env.task.example),
            seed=env.seed,
            draw=(state.lap, state.clock),
        )


def distance(a: Masks, b: Masks) -> float:
    """Hamming distance between masks of a network, from 0 for equal ones to 1 for the furthest that two of their sparsities can be.

    The paper divides by all weights, which is the same where half are kept. At sparsity 0.95 any two masks are within 0.1 of that.
    """
    differing = sum(int((mask != b[name]).sum()) for name, mask in a.items())
    both = a.kept + b.kept
    return differing / max(min(both, a.total + b.total - both), 1)


def _key(place: int, name: str) -> str:
    return f"{place}:{name}"
