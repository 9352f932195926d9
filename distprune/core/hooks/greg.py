"""Growing regularization: the units to be removed are pushed to zero by an L2 penalty that grows, before they are removed."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor

from distprune.core.hooks.hook import Hook, Memory
from distprune.core.registry import Choice
from distprune.core.units import Units, Weights

if TYPE_CHECKING:
    from distprune.core.executor import Env
    from distprune.core.state import State

_SMOOTH = 0.9  # of the old in the moving average of a ratio
_MOST = 1e9  # a ratio whose denominator is zero
_SHARE = 0.1  # of `delta`: by how much lambda grows in GReg-2 before the units are picked


@dataclass(frozen=True, kw_only=True)
class Greg(Hook):
    """lambda / 2 * w^2 on the weights of each unit to be removed, lambda growing by `delta` every `every` steps (Wang et al. 2021,
    arXiv:2012.09243, algorithms 1 and 2). The gradient is lambda * w, besides the optimizer's own weight decay.

    `greg1` picks the units of the smallest mean |w| at the start. `greg2` grows lambda on all units to `pick`, ten times as slowly, picks
    by what their sizes are then, and goes on with the picked; the kept ones get the constant `recover`, a little less decay than usual.
    A layer is finished when lambda is above `ceiling`, or, unless its units are single weights, when the moving average of mean |w| of the
    kept over that of the picked has come to `ratio`: in all layers (greg1), or in the layer itself (greg2), where lambda then stays.
    When all are, lambda stays as it is for `stabilise` more steps. At the end the picked units are removed.
    """

    may_end: ClassVar[bool] = True
    variant: Literal["greg1", "greg2"]
    delta: float
    every: int
    ceiling: float
    pick: float
    recover: float
    ratio: float
    stabilise: int
    sparsity: float
    allocator: Choice
    granularity: Choice

    @property
    def most(self) -> int:
        """Steps after which lambda is above the ceiling in every layer, at the latest."""
        picks, reached = 0, 0.0
        if self.variant == "greg2":
            while not self._is_at(reached, self.pick):
                picks, reached = picks + 1, reached + _SHARE * self.delta
        return self.every * (picks + int((self.ceiling - reached) / self.delta + 1e-6))

    def start(self, memory: Memory, state: "State", env: "Env") -> None:
        units, sizes = self._sizes(state, env)
        kept = self._choose(units, sizes)
        # Layers that will lose nothing are left alone; an allocator that ranks scores says which these are when the units are picked.
        known = self.variant == "greg1" or not self.allocator.entry.facts["needs_scores"]
        growing = [name for name, value in kept.items() if not known or not bool(value.all())]
        memory |= {"steps": 0, "finished": -1, "picked": False, "open": growing, "ratio": {}}
        memory |= {"lambda": dict.fromkeys(growing, 0.0), "rest": dict.fromkeys(growing, 0.0)}  # on the units to go, on the others
        if self.variant == "greg1":
            self._pick(memory, kept)

    @torch.no_grad()
    def grad(self, memory: Memory, state: "State", env: "Env") -> None:
        if memory["finished"] < 0 and memory["steps"] % self.every == 0:
            units, sizes = self._sizes(state, env)
            self._update(memory, units, sizes)
            for name, penalty in self._penalties(memory, units, sizes).items():
                memory[f"penalty:{name}"] = penalty
        for name, weight in state.weights.items():
            if weight.grad is not None:
                weight.grad.addcmul_(memory[f"penalty:{name}"], weight)
        memory["steps"] += 1

    def step(self, memory: Memory, state: "State", env: "Env") -> bool:
        return bool(memory["finished"] >= 0 and memory["steps"] - memory["finished"] >= self.stabilise)

    def end(self, memory: Memory, state: "State", env: "Env") -> None:
        units, sizes = self._sizes(state, env)
        if not memory["picked"]:  # a copy that is judged before its time
            self._pick(memory, self._choose(units, sizes))
        for weight in state.weights.values():
            weight.grad = None  # of the last step, without masks
        state.set_masks(units.expand({name: memory[f"kept:{name}"] for name in sizes}))

    def _sizes(self, state: "State", env: "Env") -> tuple[Units, dict[str, Tensor]]:
        """The units and the mean |w| of each."""
        units = state.units(self.granularity, env.task.example)
        return units, units.reduce({name: weight.detach().abs() for name, weight in state.weights.items()}, "mean")

    def _choose(self, units: Units, sizes: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Bool unit values: the largest units that the allocator leaves each layer."""
        return units.alive(units.choose(sizes, self.sparsity, self.allocator, None))

    def _pick(self, memory: Memory, kept: Mapping[str, Tensor]) -> None:
        memory["picked"] = True
        memory["open"] = [name for name in memory["open"] if not bool(kept[name].all())]
        for name, value in kept.items():
            memory[f"kept:{name}"] = value
            if name not in memory["open"]:
                memory["lambda"].pop(name, None), memory["rest"].pop(name, None)

    def _update(self, memory: Memory, units: Units, sizes: Mapping[str, Tensor]) -> None:
        """One round of the state machine: ratios, lambda, and what is finished by them."""
        lambdas, rest, ratios = memory["lambda"], memory["rest"], memory["ratio"]
        if not memory["picked"]:
            for name in memory["open"]:
                lambdas[name] = rest[name] = lambdas[name] + _SHARE * self.delta
            if all(self._is_at(lambdas[name], self.pick) for name in memory["open"]):
                self._pick(memory, self._choose(units, sizes))
        else:
            for name, value in self._ratios(memory, sizes).items():
                ratios[name] = _SMOOTH * ratios[name] + (1 - _SMOOTH) * value if name in ratios else value
            for name in memory["open"]:
                lambdas[name] += self.delta
                if self.variant == "greg2":
                    rest[name] = self.recover
            small = {name: ratios[name] >= self.ratio and not isinstance(units, Weights) for name in memory["open"]}
            if self.variant == "greg1" and not all(small.values()):
                small = dict.fromkeys(small, False)
            memory["open"] = [name for name in memory["open"] if not small[name] and lambdas[name] <= self.ceiling + 1e-6 * self.delta]
        if not memory["open"]:
            memory["finished"] = memory["steps"]

    def _ratios(self, memory: Memory, sizes: Mapping[str, Tensor]) -> dict[str, float]:
        """Mean |w| of the kept units over that of the picked ones, of each layer that is not finished."""
        means = []
        for name in memory["open"]:
            kept = memory[f"kept:{name}"]
            means += [sizes[name][kept].mean(), sizes[name][~kept].mean()]
        values = torch.stack(means).tolist() if means else []
        return {
            name: min(kept / picked, _MOST) if picked else _MOST
            for name, kept, picked in zip(memory["open"], values[::2], values[1::2], strict=True)
        }

    def _penalties(self, memory: Memory, units: Units, sizes: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """lambda of each weight, by name; zero where a weight is in no unit."""
        of_units = {name: torch.full_like(size, memory["lambda"].get(name, 0.0)) for name, size in sizes.items()}
        if memory["picked"]:
            of_units = {name: value.masked_fill(memory[f"kept:{name}"], memory["rest"].get(name, 0.0)) for name, value in of_units.items()}
        outside = units.spread({name: torch.zeros_like(size) for name, size in sizes.items()})
        return {name: torch.where(outside[name] == 0, value, 0.0) for name, value in units.spread(of_units).items()}

    def _is_at(self, value: float, level: float) -> bool:
        return value >= level - 1e-6 * _SHARE * self.delta
