"""Connection sensitivity."""

from typing import Annotated

from torch import Tensor

from distprune.core.options import Range
from distprune.core.registry import criterion
from distprune.core.scoring import Probe


@criterion("snip", paper="Lee et al. 2019, arXiv:1810.02340, eq. 3", passes=1, reduction="sum")
def snip(probe: Probe, *, batches: Annotated[int, Range(1, 4)] = 1) -> dict[str, Tensor]:
    """Connection sensitivity |w dL/dw|, the gradient taken under the masks and averaged over batches."""
    gradients = probe.gradients(batches)
    return {name: (value * gradients[name]).abs() for name, value in probe.values.items()}
