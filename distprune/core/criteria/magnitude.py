"""Magnitude."""

from torch import Tensor

from distprune.core.registry import criterion
from distprune.core.scoring import Probe


@criterion("magnitude", paper="Han et al. 2015, arXiv:1506.02626; filters: Li et al. 2017, arXiv:1608.08710", reduction="mean")
def magnitude(probe: Probe) -> dict[str, Tensor]:
    """Absolute value |w|; of a unit the mean, which is the L1 norm whatever the size.

    Formula:
        s(w) = |w|,   s(unit) = mean |w|
    """
    return {name: value.abs() for name, value in probe.values.items()}
