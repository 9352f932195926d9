"""Costs that a budget can be set on: what a pruned network costs as a share of the dense one.

Each is a black box that only needs to be evaluated. Most are functions of how many weights are kept, so a search knows them before
anything is trained; those with the fact `measured` are measured on networks, where the trial runs.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from distprune.core.latency import compare
from distprune.core.registry import cost


@dataclass(frozen=True)
class Subject:
    """What a cost may look at. `networks()` gives the dense network, the one that is really smaller, and an input of one sample."""

    kept: int  # prunable weights
    total: int  # of the network as it was built
    flops: float = 0.0  # of one sample in the prunable layers, zeros skipped; 0 where they cannot be counted
    dense_flops: float = 0.0
    networks: Callable[[], tuple[nn.Module, nn.Module, torch.Tensor]] | None = None

    @classmethod
    def of(cls, kept: Mapping[str, int], sizes: Mapping[str, int], dense: Mapping[str, int]) -> "Subject":
        """Of a network that keeps `kept[name]` of the `sizes[name]` weights of each layer, whose dense FLOPs are `dense[name]`."""
        sparse = sum(count * kept[name] / sizes[name] for name, count in dense.items())
        return cls(sum(kept.values()), sum(sizes.values()), sparse, float(sum(dense.values())))


@cost("params")
def params(subject: Subject) -> float | None:
    """Prunable weights that are kept."""
    return subject.kept / subject.total


@cost("flops")
def flops(subject: Subject) -> float | None:
    """FLOPs of a forward pass in the prunable layers with zeros skipped; None where they cannot be counted."""
    return subject.flops / subject.dense_flops if subject.dense_flops else None


@cost("latency", measured=True)
def latency(subject: Subject, *, batch: int = 1, spread: float = 0.1, attempts: int = 3) -> float | None:
    """Time of a forward pass of `batch` samples through the smaller network, measured in turn with the dense one.

    None where the ratio's interquartile range stays above `spread` of its median in each of `attempts`.
    """
    assert subject.networks is not None, "a measured cost needs networks"
    dense, small, example = subject.networks()
    inputs = example[:1].expand(batch, *example.shape[1:]).contiguous()
    return compare(dense, small, inputs, spread=spread, attempts=attempts)
