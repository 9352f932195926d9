"""Masks that lose and regain weights while the network trains: dynamic sparse training.

Every update is drop, share out, grow. The survivors stay, each layer is told how many it may grow, and the best of its missing weights
by a score come back. The number of kept weights never changes. A weight that was missing starts at zero, and so does what the optimizer
remembers of it; a weight that is dropped and grown in the same update keeps both, as in RigL's code.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor

from distprune.core.hooks.hook import Memory
from distprune.core.hooks.updates import Update
from distprune.core.masks import Masks
from distprune.core.streams import stream

if TYPE_CHECKING:
    from distprune.core.executor import Env
    from distprune.core.state import State

_TOLERANCE = 0.1  # a threshold stays while it drops its target up to this share of it


@dataclass(frozen=True, kw_only=True)
class Regrow(Update):
    """Drop a share of each layer's smallest weights and grow as many in it: at random (SET), or where the gradient is largest (RigL).

    The share is constant, or falls along a cosine: share / 2 * (1 + cos(pi * clock / end)), which is zero at the last update.
    """

    version: ClassVar[int] = 2
    regrows: ClassVar[bool] = True
    growth: Literal["random", "gradient"]
    share: float
    decay: Literal["cosine", "constant"] = "cosine"

    def grad(self, memory: Memory, state: "State", env: "Env") -> None:
        if self.growth == "gradient" and self.due(state.clock + 1):
            memory |= {name: gradient.abs() for name, gradient in _gradients(state).items()}  # dense here; masked a moment later

    def step(self, memory: Memory, state: "State", env: "Env") -> bool:
        if self.due(state.clock):
            survivors = self.survivors(memory, state)
            counts = self.counts(memory, state, survivors)
            scores = self.scores(memory, state, env)
            grown = {name: survived | top(scores[name], counts[name], ~survived) for name, survived in survivors.items()}
            state.set_masks(Masks(grown))
        return False

    def survivors(self, memory: Memory, state: "State") -> dict[str, Tensor]:
        """Which kept weights are not dropped."""
        share = self.share if self.decay == "constant" else self.share / 2 * (1 + math.cos(math.pi * state.clock / self.end_at))
        return {
            name: top(state.weights[name].detach().abs(), kept - int(share * kept + 0.5), state.masks[name])
            for name, kept in state.masks.counts.items()
        }

    def counts(self, memory: Memory, state: "State", survivors: Mapping[str, Tensor]) -> dict[str, int]:
        """How many weights each layer grows; they sum to the number of dropped ones."""
        left = Masks(survivors).counts
        return {name: kept - left[name] for name, kept in state.masks.counts.items()}

    def scores(self, memory: Memory, state: "State", env: "Env") -> dict[str, Tensor]:
        """By which missing weights are grown, largest first."""
        if self.growth == "gradient":
            return {name: memory.pop(name) for name in state.masks}
        generator = stream(env.seed, "regrow", state.lap, state.clock)
        return {name: torch.rand(mask.shape, generator=generator).to(mask.device) for name, mask in state.masks.items()}


@dataclass(frozen=True, kw_only=True)
class RegrowByMomentum(Regrow):
    """As Regrow, by a smoothed gradient m = beta * m + (1 - beta) * g, which also says where the dropped number goes (SNFS).

    Layers get it in proportion to the mean |m| of the weights that they kept; at least one weight of a layer survives.
    m is dense and this hook's own: it starts at zero, which is one factor for all layers, and no optimizer knows of it.
    """

    version: ClassVar[int] = 1
    moves: ClassVar[bool] = True
    growth: Literal["random", "gradient"] = field(default="gradient", init=False)
    beta: float

    def start(self, memory: Memory, state: "State", env: "Env") -> None:
        memory |= {name: torch.zeros_like(weight) for name, weight in state.weights.items()}

    def grad(self, memory: Memory, state: "State", env: "Env") -> None:
        if state.clock < self.end_at:
            gradients = _gradients(state)
            torch._foreach_lerp_([memory[name] for name in gradients], list(gradients.values()), 1 - self.beta)

    def step(self, memory: Memory, state: "State", env: "Env") -> bool:
        super().step(memory, state, env)
        if state.clock >= self.end_at:
            memory.clear()  # as large as the network, and of no use any more
        return False

    def survivors(self, memory: Memory, state: "State") -> dict[str, Tensor]:
        found = super().survivors(memory, state)
        return {name: _at_least_one(survived, state, name) for name, survived in found.items()}

    def counts(self, memory: Memory, state: "State", survivors: Mapping[str, Tensor]) -> dict[str, int]:
        means = torch.stack([memory[name][mask].abs().mean() for name, mask in state.masks.items()])
        # Not finite: the loop looks at the loss every few steps only, and tells it better than an update would.
        return _shared_out(means.nan_to_num().tolist(), state, survivors)

    def scores(self, memory: Memory, state: "State", env: "Env") -> dict[str, Tensor]:
        return {name: memory[name].abs() for name in state.masks}


@dataclass(frozen=True, kw_only=True)
class RegrowByThreshold(Regrow):
    """Drop the weights below one threshold for all layers, and grow as many at random, in proportion to a layer's survivors (DSR).

    The threshold starts at `threshold`. After an update that dropped less than 0.9 of the target it doubles, after one that dropped
    more than 1.1 of it it halves; the target is `share` of all kept weights. At least one weight of a layer survives.
    """

    version: ClassVar[int] = 1
    moves: ClassVar[bool] = True
    growth: Literal["random", "gradient"] = field(default="random", init=False)
    decay: Literal["cosine", "constant"] = field(default="constant", init=False)
    threshold: float

    def start(self, memory: Memory, state: "State", env: "Env") -> None:
        memory["threshold"] = self.threshold

    def survivors(self, memory: Memory, state: "State") -> dict[str, Tensor]:
        found = {
            name: _at_least_one(mask & (state.weights[name].detach().abs() >= memory["threshold"]), state, name)
            for name, mask in state.masks.items()
        }
        kept = state.masks.kept
        memory["threshold"] = adapted(memory["threshold"], kept - Masks(found).kept, self.share * kept)
        return found

    def counts(self, memory: Memory, state: "State", survivors: Mapping[str, Tensor]) -> dict[str, int]:
        return _shared_out(list(Masks(survivors).counts.values()), state, survivors)


def adapted(threshold: float, dropped: int, target: float) -> float:
    """The next threshold: doubled if it dropped too few, halved if too many."""
    if dropped < (1 - _TOLERANCE) * target:
        return threshold * 2
    return threshold / 2 if dropped > (1 + _TOLERANCE) * target else threshold


def top(scores: Tensor, count: int, among: Tensor) -> Tensor:
    """A mask of the `count` largest scores among those in `among`; ties go to the lower index."""
    flat = scores.flatten().double().masked_fill(~among.flatten(), -math.inf)
    chosen = torch.zeros(flat.numel(), dtype=torch.bool, device=flat.device)
    chosen[torch.sort(flat, descending=True, stable=True).indices[:count]] = True
    return chosen.view(scores.shape)


def shared_out(count: int, wishes: Sequence[float], room: Sequence[int]) -> list[int]:
    """`count` in proportion to `wishes`, as integers by largest remainder, none above its `room`: what does not fit goes to the others."""
    wishes = [max(wish, 1e-30) for wish in wishes]
    open_, left, total = list(range(len(wishes))), count, sum(wishes)
    given = list(room)
    while full := {i for i in open_ if left * wishes[i] >= room[i] * total}:
        open_ = [i for i in open_ if i not in full]
        left -= sum(room[i] for i in full)
        total = sum(wishes[i] for i in open_)
    real = {i: left * wishes[i] / total for i in open_}
    for i in open_:
        given[i] = math.floor(real[i])
    missing = count - sum(given)
    for i in sorted(open_, key=lambda i: (given[i] - real[i], i))[:missing]:
        given[i] += 1
    assert sum(given) == count, (count, wishes, room)
    return given


def _shared_out(wishes: Sequence[float], state: "State", survivors: Mapping[str, Tensor]) -> dict[str, int]:
    left = Masks(survivors).counts
    room = [mask.numel() - left[name] for name, mask in survivors.items()]
    return dict(zip(survivors, shared_out(state.masks.kept - sum(left.values()), wishes, room), strict=True))


def _at_least_one(survived: Tensor, state: "State", name: str) -> Tensor:
    return survived if bool(survived.any()) else top(state.weights[name].detach().abs(), 1, state.masks[name])


def _gradients(state: "State") -> dict[str, Tensor]:
    # A weight that took no part in the loss has no gradient, which is a gradient of zero.
    return {name: torch.zeros_like(weight) if weight.grad is None else weight.grad for name, weight in state.weights.items()}
