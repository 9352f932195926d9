"""Random scores: the control that every criterion has to beat."""

import torch
from torch import Tensor

from distprune.core.registry import criterion
from distprune.core.scoring import Probe


@criterion("random", paper="Liu et al. 2022, arXiv:2202.02643", reduction="first")
def random(probe: Probe) -> dict[str, Tensor]:
    """Independent uniform scores; a unit has that of its first weight, so that units are uniform too.

    Formula:
        s ~ U(0, 1)
    """
    return {name: torch.rand(value.shape, generator=probe.generator).to(value.device) for name, value in probe.values.items()}
