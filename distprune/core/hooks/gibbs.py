"""Gibbs pruning: every training step has a mask of its own, drawn from a distribution that freezes onto the largest weights."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from distprune.core.gibbs import Distribution, Filters, Independent, Kernels, Moments, fields, threshold, unit_of
from distprune.core.hooks.group_lasso import squares
from distprune.core.hooks.hook import Hook, Memory
from distprune.core.masks import Masks
from distprune.core.registry import Choice
from distprune.core.streams import stream
from distprune.core.units import Units

if TYPE_CHECKING:
    from distprune.core.executor import Env
    from distprune.core.granularity.coupling import Part
    from distprune.core.state import State

_EVERY = 10  # steps between looks at the scores by an allocator that ranks them: a ranking costs more than a draw


@dataclass(frozen=True, kw_only=True)
class Gibbs(Hook):
    """A fresh mask each step from exp(-beta H), with beta rising (Labach & Valaee 2020, arXiv:2006.04981).

    The Hamiltonian follows the granularity: independent weights, kernels, or filters, whose spins lie on the weights that score a channel;
    what else a removed channel takes goes at the end. beta rises from `beta_start` to `beta_end` by equal factors until clock `anneal`, and
    stays. How many units a layer keeps is the allocator's choice, at the start or, where it ranks scores, of every tenth step; the score of
    a unit is its mean w^2.

    The gradient goes through the mask as through any factor, so a masked weight has none; decay and momentum act on it all the same.
    Evaluations, and the end, have the mask that the distribution freezes onto: the best units of each layer, exactly as the budget says.
    """

    sparsity: float
    allocator: Choice
    granularity: Choice
    beta_start: float
    beta_end: float
    anneal: int
    coupling: float
    temperature: Literal["absolute", "median"]
    sweeps: int

    @torch.no_grad()
    def start(self, memory: Memory, state: "State", env: "Env") -> None:
        self._allocate(memory, state, env)

    @torch.no_grad()
    def view(self, memory: Memory, state: "State", env: "Env", train: bool) -> dict[str, Tensor]:
        masks: Mapping[str, Tensor] = self.draw(memory, state, env) if train else self._best(state, env)
        if train:
            memory.update({_mask(name): mask for name, mask in masks.items()})  # until this step's `grad`
        return {name: state.weights[name].detach() * mask for name, mask in masks.items()}

    @torch.no_grad()
    def grad(self, memory: Memory, state: "State", env: "Env") -> None:
        for name, weight in state.weights.items():
            mask = memory.pop(_mask(name), None)
            if mask is not None and weight.grad is not None:
                weight.grad.mul_(mask)

    @torch.no_grad()
    def step(self, memory: Memory, state: "State", env: "Env") -> bool:
        if self.allocator.entry.facts["needs_scores"] and state.clock % _EVERY == 0:
            self._allocate(memory, state, env)
        return False

    def end(self, memory: Memory, state: "State", env: "Env") -> None:
        for weight in state.weights.values():
            weight.grad = None  # of the last step, under a mask that was drawn
        state.set_masks(self._best(state, env))

    def beta(self, clock: int) -> float:
        """The inverse temperature of a step."""
        return float(self.beta_start * (self.beta_end / self.beta_start) ** min(clock / self.anneal, 1.0))

    @torch.no_grad()
    def draw(self, memory: Memory, state: "State", env: "Env") -> dict[str, Tensor]:
        """The masks of the step that comes next, of the weights that have any: a function of seed, lap, clock and weights."""
        masks: dict[str, Tensor] = {}
        generators = _generators(state, env)
        for name, distribution in self.distributions(memory, state, env):
            mask = distribution.draw(generators[state.weights[name].device])
            if parts := self._parts(state, env, name):
                _scatter(mask, parts, state, masks)
            else:
                masks[name] = mask.view(state.weights[name].shape)
        return masks

    @torch.no_grad()
    def moments(self, memory: Memory, state: "State", env: "Env") -> dict[str, Moments]:
        """How far each layer's distribution is from frozen: layer -> moments of the mask of the step that comes next."""
        generators = _generators(state, env)
        found = self.distributions(memory, state, env)
        return {name: distribution.moments(generators[state.weights[name].device]) for name, distribution in found}

    def distributions(self, memory: Memory, state: "State", env: "Env") -> Iterator[tuple[str, Distribution]]:
        """(layer, distribution of its mask) of each layer that does not keep all of its units."""
        units, energies = self._units(state, env), {name: square.float() for name, square in squares(state.weights).items()}
        for name, score in units.reduce(energies, "mean").items():
            if (kept := memory[_kept(name)]) < score.numel():
                yield name, self._distribution(energies, threshold(score, kept), state, env, name)

    def _distribution(self, energies: Mapping[str, Tensor], quantile: Tensor, state: "State", env: "Env", name: str) -> Distribution:
        parts, cut = self._parts(state, env, name), 0
        if parts:
            halves = [_gather(part, energies[part.name]) for part in parts]
            first, second = (torch.cat(half, dim=1) for half in zip(*halves, strict=True))
            energy, cut = torch.cat([first, second], dim=1), first.shape[1]
        else:
            energy = energies[name].reshape(*energies[name].shape[:2], -1).flatten(0, 1)
        beta = self.beta(state.clock)
        # In units of the median, energies and coupling are numbers that no scale of the weights changes.
        field = fields(energy, quantile, beta, unit_of(energy) if self.temperature == "median" else 1.0)
        if parts:
            return Filters(field, beta * self.coupling, cut, self.sweeps)
        return Kernels(field, beta * self.coupling) if self.granularity.name == "kernel" else Independent(field)

    def _units(self, state: "State", env: "Env") -> Units:
        return state.units(self.granularity, env.task.example)

    def _parts(self, state: "State", env: "Env", name: str) -> "list[Part]":
        """Where the spins of a layer of channels lie; none for weights and kernels."""
        role = "produces" if self.granularity.name == "filter" else "consumes"
        group = next((group for group in self._units(state, env).channels if group.name == name), None)
        weights = [] if group is None else [part for part in group.parts if part.role != "carries"]
        return [part for part in weights if part.role == role] or weights

    def _best(self, state: "State", env: "Env") -> Masks:
        units = self._units(state, env)
        return units.choose(units.reduce(squares(state.weights), "mean"), self.sparsity, self.allocator, None)

    def _allocate(self, memory: Memory, state: "State", env: "Env") -> None:
        kept = self._units(state, env).alive(self._best(state, env))
        memory.update({_kept(name): int(units.sum()) for name, units in kept.items()})


def _cut(part: "Part", shape: torch.Size) -> tuple[int, int]:
    """How many spins a unit has in a part, and how many of them in the first half: half of the channels on the part's other side.

    A kernel that has no other beside it is cut itself, where the authors' code leaves a half empty and couples nothing.
    """
    others = [part.index.shape[1], *(size for dim, size in enumerate(shape) if dim != part.dim)]
    n, channels = math.prod(others), others[0] * others[1]
    return n, channels // 2 * (n // channels) if channels > 1 else n // 2


def _gather(part: "Part", values: Tensor) -> tuple[Tensor, Tensor]:
    """Both halves of a part's weight values: [units, spins]."""
    _, cut = _cut(part, values.shape)
    found = values.movedim(part.dim, 0)[part.index].flatten(1)
    return found[:, :cut], found[:, cut:]


def _scatter(mask: Tensor, parts: "list[Part]", state: "State", masks: dict[str, Tensor]) -> None:
    """Put a mask of units, the first halves of all parts and then the second ones, where its weights are."""
    shapes = [state.weights[part.name].shape for part in parts]
    cuts = [_cut(part, shape) for part, shape in zip(parts, shapes, strict=True)]
    first, second = 0, sum(cut for _, cut in cuts)
    for part, shape, (n, cut) in zip(parts, shapes, cuts, strict=True):
        spins = torch.cat([mask[:, first : first + cut], mask[:, second : second + n - cut]], dim=1)
        whole = masks.setdefault(part.name, torch.ones(shape, dtype=torch.bool, device=mask.device)).movedim(part.dim, 0)
        whole[part.index] = spins.view(*part.index.shape, *whole.shape[1:])
        first, second = first + cut, second + n - cut


def _generators(state: "State", env: "Env") -> dict[torch.device, torch.Generator]:
    devices = {weight.device for weight in state.weights.values()}
    return {device: stream(env.seed, "gibbs", state.lap, state.clock, device=device) for device in devices}


def _kept(name: str) -> str:
    return f"kept.{name}"


def _mask(name: str) -> str:
    return f"mask.{name}"
