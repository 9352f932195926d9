"""Connection sensitivity."""

from typing import Annotated, Any, Literal

from torch import Tensor, nn

from distprune.core.options import Range
from distprune.core.registry import criterion
from distprune.core.scoring import Probe

Loss = Literal["task", "nll_logits"]  # what is differentiated: the task's own loss, or minus the logit of the label


@criterion("snip", paper="Lee et al. 2019, arXiv:1810.02340, eq. 3", passes=1, reduction="sum")
def snip(probe: Probe, *, batches: Annotated[int, Range(1, 4)] = 1, loss: Loss = "task") -> dict[str, Tensor]:
    """Connection sensitivity |w dL/dw|, the gradient taken under the masks and averaged over batches.

    Formula:
        s(w) = |w dL/dw|,   s(unit) = sum s(w)

    `loss: nll_logits` is what FORCE's authors differentiate: minus the logit of the label, though they train with cross-entropy.
    """

    def minus_logit(model: nn.Module, batch: Any) -> Tensor:
        return probe.task.nll_of(probe.task.outputs(model, batch), batch)

    gradients = probe.gradients(batches, minus_logit if loss == "nll_logits" else None)
    return {name: (value * gradients[name]).abs() for name, value in probe.values.items()}
