"""Costs: what a pruned network takes as a share of the dense one. Objectives and budgets of a search, and what `sparsity` is a share of.

Each is a black box that only needs to be evaluated. Most are functions of how many weights are kept, so a search knows them before
anything is trained, and allocators can aim at them; those with the fact `measured` are measured on networks, where the trial runs.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from distprune.core import registry
from distprune.core.latency import compare
from distprune.core.metrics import Profile
from distprune.core.registry import Choice, cost
from distprune.core.units import Price
from distprune.errors import UserError

if TYPE_CHECKING:
    from distprune.core.executor import Env
    from distprune.core.recipe import Recipe
    from distprune.core.state import State


@dataclass(frozen=True)
class Subject:
    """What a cost may look at. `networks()` gives the dense network, the one that is really smaller, and an input of one sample."""

    kept: Mapping[str, int]  # prunable weights of each layer
    layers: Profile  # of the network's layers, dense
    dense: Profile  # of the network as it was built: other layers where some were fused
    shapes: Mapping[str, tuple[int, ...]] | None = None  # of the weights without their removed channels, where these are taken out
    networks: Callable[[], tuple[nn.Module, nn.Module, torch.Tensor]] | None = None


@cost("params")
def params(subject: Subject) -> float | None:
    """Prunable weights that are kept.

    Formula:
        kept / n
    """
    return sum(subject.kept.values()) / subject.dense.total


@cost("flops")
def flops(subject: Subject) -> float | None:
    """FLOPs of a forward pass in the prunable layers with zeros skipped; None where they cannot be counted.

    Formula:
        sum_l (F_l kept_l / n_l) / sum_l F_l,  F_l the dense FLOPs of layer l
    """
    dense = sum(subject.dense.flops.values())
    layers = subject.layers
    if not dense or not layers.flops:
        return None
    return sum(count * subject.kept[name] / math.prod(layers.shapes[name]) for name, count in layers.flops.items()) / dense


@cost("memory")
def memory(subject: Subject) -> float | None:
    """Bytes that inference of one sample needs: prunable weights as they are best stored, plus the largest layer's activations.

    Formula:
        (sum_l min(w n_l, n_l / 8 + w kept_l) + max_l activations_l) / the same of the dense network

    A weight tensor of n numbers, k of them kept, w bytes each, takes min(w n, n / 8 + w k), dense or as a bitmap with values. A layer's
    activations are what the operation on its weights reads and writes besides parameters, w bytes a number. Both are those of the network
    without its removed channels where the granularity takes channels out. Biases, normalisations and buffers are left out, like what the
    operations need to work; None where the network does not run under the counter.
    """
    if not subject.dense.outputs or not subject.layers.outputs:
        return None
    whole = {name: math.prod(shape) for name, shape in subject.dense.shapes.items()}
    return subject.layers.memory(subject.kept, subject.shapes) / subject.dense.memory(whole)


@cost("latency", measured=True)
def latency(subject: Subject, *, batch: int = 1, spread: float = 0.1, attempts: int = 3) -> float | None:
    """Time of a forward pass of `batch` samples through the smaller network, measured in turn with the dense one.

    Formula:
        median over rounds of time(small) / time(dense)

    None where the ratio's interquartile range stays above `spread` of its median in each of `attempts`.
    """
    assert subject.networks is not None, "a measured cost needs networks"
    dense, small, example = subject.networks()
    inputs = example[:1].expand(batch, *example.shape[1:]).contiguous()
    return compare(dense, small, inputs, spread=spread, attempts=attempts)


def label(choice: Choice) -> str:
    """What a cost is called in reports and constraints: its name, with the options that are not their defaults."""
    options = ", ".join(f"{name}={value}" for name, value in choice.options.items())
    return f"{choice.name}({options})" if options else choice.name


def is_measured(choice: Choice) -> bool:
    """Whether a cost is measured where the trial runs."""
    return bool(choice.entry.facts["measured"])


def subject_of(state: "State", recipe: "Recipe", env: "Env") -> Subject:
    """A run's network as it is now, without `networks`."""
    example, shapes = env.task.example, None
    if "sparsity" in recipe.paradigm.entry.facts["uses"] and recipe.granularity.entry.facts["channels"]:
        units = state.units(recipe.granularity, example)
        shapes = units.left({name: int(alive.sum()) for name, alive in units.alive(state.masks).items()})
    return Subject(state.masks.counts, state.profile(example), env.profile, shapes)


def counted(subject: Subject, more: tuple[Choice, ...] = ()) -> dict[str, float | None]:
    """Costs that are functions of the masks, by label: those of the table and what `more` has of them."""
    every = {label(choice): choice for choice in (*(registry.cost.choose(entry.name) for entry in registry.cost), *more)}
    return {name: choice(subject) for name, choice in every.items() if not is_measured(choice)}


def price(choice: Choice, dense: Profile) -> Price:
    """What units cost by `choice` in a network, for allocators to aim at."""

    def share(kept: Mapping[str, int], shapes: Mapping[str, tuple[int, ...]]) -> float:
        found = choice(Subject(kept, dense, dense, shapes))
        if found is None:
            raise UserError(f"sparsity_of '{choice.name}' cannot be counted on this network. Write sparsity_of: params.")
        return float(found)

    return Price(label(choice), share)
