"""Gradient signal preservation."""

from typing import Annotated

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from distprune.core.criteria.snip import Loss
from distprune.core.options import Range
from distprune.core.registry import criterion
from distprune.core.scoring import Probe


@criterion("grasp", paper="Wang et al. 2020, arXiv:2002.07376, eq. 8", passes=2, reduction="sum")
def grasp(probe: Probe, *, batches: Annotated[int, Range(1, 4)] = 1, temperature: float = 200.0, loss: Loss = "task") -> dict[str, Tensor]:
    """w * Hg: how much the gradient's norm falls when the weight goes. The paper removes the largest -w * Hg, so this is kept largest.

    Formula:
        s(w) = w (H g),   g = dL(z / temperature)/dw,   H = d^2 L(z / temperature)/dw^2,   z the logits
        s(unit) = sum s(w)

    H is the Hessian and g the gradient of the loss at logits / temperature, summed over the same batches, as in the authors' code.
    """
    of = probe.task.loss_of if loss == "task" else probe.task.nll_of
    data = [probe.batch() for _ in range(batches)]
    weights = list(probe.weights.values())

    def gradient(batch: object, create_graph: bool) -> tuple[Tensor, ...]:
        value = of(probe.task.outputs(probe.model, batch) / temperature, batch)
        return torch.autograd.grad(value, weights, create_graph=create_graph, materialize_grads=True)

    total = [torch.zeros_like(weight) for weight in weights]
    for batch in data:
        torch._foreach_add_(total, gradient(batch, create_graph=False))
    product = [torch.zeros_like(weight) for weight in weights]
    with sdpa_kernel(SDPBackend.MATH):  # the other implementations of attention have no second derivative
        for batch in data:
            inner = torch.stack([(a * b).sum() for a, b in zip(gradient(batch, create_graph=True), total, strict=True)]).sum()
            torch._foreach_add_(product, torch.autograd.grad(inner, weights, materialize_grads=True))
    return {name: value * part for (name, value), part in zip(probe.values.items(), product, strict=True)}
