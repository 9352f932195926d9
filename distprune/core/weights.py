"""Weights policies: which values the kept weights start from (f2 of the survey, arXiv 2103.06460). Removed ones are zeroed afterwards."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from distprune.core.compensation import compensate
from distprune.core.initialization import draw, rescale
from distprune.core.streams import global_stream, stream

if TYPE_CHECKING:
    from distprune.core.executor import Env
    from distprune.core.stages import SetWeights
    from distprune.core.state import State


def rewind(stage: "SetWeights", state: "State", env: "Env") -> None:
    """Parameters and buffers of a snapshot (Frankle & Carbin 2019, arXiv:1803.03635)."""
    state.model.load_state_dict(state.snapshots[stage.tag])


def reinit(stage: "SetWeights", state: "State", env: "Env") -> None:
    """A fresh network (Liu et al. 2019, arXiv:1810.05270)."""
    with global_stream(env.seed, "reinit", state.lap, state.clock):
        state.model.load_state_dict(env.build().state_dict())


@torch.no_grad()
def shuffle(stage: "SetWeights", state: "State", env: "Env") -> None:
    """The kept weights of each layer in random order (Frankle et al. 2021, arXiv:2009.08576, section 5)."""
    generator = stream(env.seed, "shuffle", state.lap, state.clock)
    for name, mask in state.masks.items():
        kept = state.weights[name].detach()[mask]
        state.weights[name][mask] = kept[torch.randperm(len(kept), generator=generator).to(kept.device)]


@torch.no_grad()
def sign(stage: "SetWeights", state: "State", env: "Env") -> None:
    """The sign of a snapshot's weight times the standard deviation of its layer (Zhou et al. 2019, arXiv:1905.01067, section 4)."""
    rewind(stage, state, env)
    for weight in state.weights.values():
        weight.copy_(weight.sign() * weight.std(correction=0))


POLICIES: dict[str, Callable[["SetWeights", "State", "Env"], None]] = {
    "rewind": rewind,
    "reinit": reinit,
    "shuffle": shuffle,
    "sign": sign,
    "compensate": compensate,
    "draw": draw,
    "rescale": rescale,
}
