"""Magnitude."""

from torch import Tensor

from distprune.core.registry import criterion
from distprune.core.scoring import Probe


@criterion("magnitude", paper="Han et al. 2015, arXiv:1506.02626")
def magnitude(probe: Probe) -> dict[str, Tensor]:
    """Absolute value |w|."""
    return {name: value.abs() for name, value in probe.values.items()}
