"""Masks learned over frozen weights: what the optimizer trains is a score for each weight, a leaf of the state; the weights stay as drawn.

The chain rule is straight-through: a mask passes its gradient on as if it were the score that it was made of. After backward the gradient
of a parameter is that of its effective weight, dense, and from it and the frozen weight come the gradients of the scores.
"""

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from distprune.core.budgets import top_masks
from distprune.core.hooks.hook import Hook, Memory
from distprune.core.masks import Masks
from distprune.core.registry import WEIGHT, Choice
from distprune.core.schedules import cubic
from distprune.core.streams import stream

if TYPE_CHECKING:
    from distprune.core.executor import Env
    from distprune.core.state import State


_UNIFORM = Choice("allocator", "uniform")


@dataclass(frozen=True, kw_only=True)
class Selection(Hook):
    """Learn which weights to keep. The stage that it belongs to trains scores; biases and batch norm's scales stay frozen too."""

    sparsity: float
    allocator: Choice

    def view(self, memory: Memory, state: "State", env: "Env", train: bool) -> dict[str, Tensor]:
        masks = self.training_masks(memory, state, env) if train else self.masks(memory, state, env)
        return {name: self.effective(weight.detach(), masks[name]) for name, weight in state.weights.items()}

    @torch.no_grad()
    def grad(self, memory: Memory, state: "State", env: "Env") -> None:
        for name, slope in self.slopes(memory, state, env).items():
            leaves_of(state)[name].grad = slope
            state.weights[name].grad = None  # no one trains them

    @torch.no_grad()
    def end(self, memory: Memory, state: "State", env: "Env") -> None:
        masks = self.masks(memory, state, env)
        for name, weight in state.weights.items():
            weight.copy_(self.effective(weight.detach(), masks[name]))
            del state.leaves[leaf_of(name)]
            state.memory.pop(leaf_of(name), None)
        state.set_masks(masks)

    @abstractmethod
    def masks(self, memory: Memory, state: "State", env: "Env") -> Masks:
        """The masks of the budget that the scores stand for."""

    def training_masks(self, memory: Memory, state: "State", env: "Env") -> Masks:
        """The masks of a training step."""
        return self.masks(memory, state, env)

    def effective(self, weight: Tensor, mask: Tensor) -> Tensor:
        """What a layer computes with, from its frozen weight."""
        return weight * mask

    @abstractmethod
    def slopes(self, memory: Memory, state: "State", env: "Env") -> dict[str, Tensor]:
        """Gradients of the scores."""

    def counts(self, state: "State", env: "Env", scores: dict[str, Tensor] | None = None) -> dict[str, int]:
        """Kept weights of each layer. Raises UserError for a budget below one weight a layer."""
        return state.units(WEIGHT, env.task.example).counts(self.sparsity, self.allocator, scores)

    def kept(self, state: "State", env: "Env") -> int:
        """Kept weights of the network; where these are not the budget, as many as it has at one density for all layers."""
        return sum(state.units(WEIGHT, env.task.example).counts(self.sparsity, _UNIFORM).values())


def leaf_of(name: str) -> str:
    """The leaf that holds a weight's scores."""
    return f"scores/{name}"


def leaves_of(state: "State") -> dict[str, nn.Parameter]:
    """Name of the weight -> its scores."""
    return {name: state.leaves[leaf_of(name)] for name in state.weights}


def gradients_of(state: "State") -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """Name -> (gradient of the effective weight, frozen weight, score) of every weight that took part in the step."""
    rows = {name: (state.weights[name].grad, state.weights[name].detach(), leaf.detach()) for name, leaf in leaves_of(state).items()}
    return {name: (grad, weight, score) for name, (grad, weight, score) in rows.items() if grad is not None}


@dataclass(frozen=True, kw_only=True)
class EdgePopup(Selection):
    """Keep the weights of each layer whose scores are largest in absolute value (Ramanujan et al. 2020, arXiv:1911.13299, section 3).

    How many these are is decided before there are scores. `weights`: as the network draws them (init), a Kaiming normal draw, or the sign
    of the init times the standard deviation of that normal (signed). `scaled` divides by the root of a layer's density, so that the kept
    weights have the variance that the whole layer would have.
    """

    weights: Literal["init", "kaiming", "signed"]
    scaled: bool

    @torch.no_grad()
    def start(self, memory: Memory, state: "State", env: "Env") -> None:
        memory.update(self.counts(state, env))
        generator = stream(env.seed, "selection", state.lap, state.clock)
        for name, weight in state.weights.items():
            score = nn.init.kaiming_uniform_(torch.empty(weight.shape), a=math.sqrt(5), generator=generator)
            state.leaves[leaf_of(name)] = nn.Parameter(score.to(weight.device, weight.dtype))
            if self.weights == "kaiming":
                weight.copy_(nn.init.kaiming_normal_(torch.empty(weight.shape), generator=generator))
            elif self.weights == "signed":
                weight.copy_(weight.sign() * math.sqrt(2 / weight[0].numel()))
            if self.scaled:
                weight.mul_(math.sqrt(weight.numel() / memory[name]))

    def masks(self, memory: Memory, state: "State", env: "Env") -> Masks:
        return top_masks({name: leaf.detach().abs() for name, leaf in leaves_of(state).items()}, memory)

    def slopes(self, memory: Memory, state: "State", env: "Env") -> dict[str, Tensor]:
        # The mask is made of |score|, so the gradient of the mask, w dL/dw_eff, turns with the score's sign.
        return {name: grad * weight * score.sign() for name, (grad, weight, score) in gradients_of(state).items()}


@dataclass(frozen=True, kw_only=True)
class Biprop(EdgePopup):
    """Edge-popup whose kept weights are one number a layer and a sign (Diffenderfer & Kailkhura 2021, arXiv:2103.09377).

    The score's gradient stays that of edge-popup: straight-through, times |w| as the authors' code has it.
    """

    def effective(self, weight: Tensor, mask: Tensor) -> Tensor:
        gain = (weight.abs() * mask).sum() / mask.sum()
        return gain * weight.sign() * mask


@dataclass(frozen=True, kw_only=True)
class Supermask(Selection):
    """Scores are logits; each step draws its mask, kept with probability sigmoid(score) (Zhou et al. 2019, arXiv:1905.01067, section 5).

    An evaluation, and the end, keep the budget's largest logits. `signed` gives every weight the standard deviation of its layer's init
    under its own sign. `rescale` divides by the kept share of the layer's mask, and the gradient goes through that share, as in the
    authors' code.

    The paper has no budget: its logits start at probability 1/2 and go where the loss takes them. Here the expected density of each layer
    (where the allocator ranks scores, of the network) goes from `first` along the cubic schedule to the budget's, which it has from clock
    `end_at` on: after every step all logits of the layer are shifted by the same, which leaves their order to the loss.
    """

    signed: bool
    rescale: bool
    first: Literal["half", "target"]
    end_at: int

    @torch.no_grad()
    def start(self, memory: Memory, state: "State", env: "Env") -> None:
        whole = self.kept(state, env) / sum(weight.numel() for weight in state.weights.values())
        if not self.allocator.entry.facts["needs_scores"]:  # others can tell no counts before there are scores
            memory.update(self.counts(state, env))
        for name, weight in state.weights.items():
            density = memory[name] / weight.numel() if memory else whole
            least = 0.5 / weight.numel()  # a dense layer's logits are finite too
            chance = 0.5 if self.first == "half" else min(max(density, least), 1 - least)
            state.leaves[leaf_of(name)] = nn.Parameter(torch.full_like(weight, math.log(chance / (1 - chance))))
            if self.signed:
                weight.copy_(weight.sign() * weight.std(correction=0))

    @torch.no_grad()
    def step(self, memory: Memory, state: "State", env: "Env") -> bool:
        progress = state.clock / self.end_at if self.first == "half" else 1.0
        leaves = leaves_of(state)
        layers = [([leaf], memory[name]) for name, leaf in leaves.items()] if memory else [(list(leaves.values()), self.kept(state, env))]
        for logits, kept in layers:
            total = sum(logit.numel() for logit in logits)
            shift(logits, cubic(0.5 * total, min(kept, total - 0.5), progress))
        return False

    def masks(self, memory: Memory, state: "State", env: "Env") -> Masks:
        logits = {name: leaf.detach() for name, leaf in leaves_of(state).items()}
        return top_masks(logits, self.counts(state, env, logits))

    def training_masks(self, memory: Memory, state: "State", env: "Env") -> Masks:
        generators: dict[torch.device, torch.Generator] = {}
        masks = {}
        for name, leaf in leaves_of(state).items():
            if leaf.device not in generators:
                generators[leaf.device] = stream(env.seed, "supermask", state.lap, state.clock, device=leaf.device)
            draw = torch.rand(leaf.shape, generator=generators[leaf.device], device=leaf.device)
            masks[name] = draw < torch.sigmoid(leaf.detach())
        return Masks(masks)

    def effective(self, weight: Tensor, mask: Tensor) -> Tensor:
        return weight * mask * (mask.numel() / mask.sum().clamp(min=1)) if self.rescale else weight * mask

    def slopes(self, memory: Memory, state: "State", env: "Env") -> dict[str, Tensor]:
        masks = self.training_masks(memory, state, env)  # the same draw again: the clock has not moved
        slopes = {}
        for name, (grad, weight, logit) in gradients_of(state).items():
            slope = grad * weight
            if self.rescale:  # d/dm_i of sum_j g_j w_j m_j n / sum(m)
                kept = masks[name].sum().clamp(min=1)
                slope = (slope - (slope * masks[name]).sum() / kept) * (slope.numel() / kept)
            chance = torch.sigmoid(logit)
            slopes[name] = slope * chance * (1 - chance)
        return slopes


def shift(logits: Sequence[Tensor], expected: float) -> None:
    """Shift logits, all by the same, towards `expected` kept weights by one step of Newton's method, at most 1 long."""
    chances = [torch.sigmoid(logit) for logit in logits]
    kept = torch.stack([chance.sum() for chance in chances]).sum()
    slope = torch.stack([(chance * (1 - chance)).sum() for chance in chances]).sum()
    distance = ((expected - kept) / slope.clamp(min=1e-6)).clamp(-1, 1)
    for logit in logits:
        logit.add_(distance)
