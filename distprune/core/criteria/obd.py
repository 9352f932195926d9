"""Optimal brain damage: the diagonal of the second-order expansion of the loss around a minimum."""

from typing import Annotated, Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves, tree_map

from distprune.core.options import Range
from distprune.core.registry import criterion
from distprune.core.scoring import Probe
from distprune.errors import UserError


@criterion(
    "obd_fisher",
    paper="LeCun et al. 1989, Optimal brain damage; empirical Fisher: Theis et al. 2018, arXiv:1801.05787, eq. 6",
    passes=1,
    reduction="sum",
    converged=True,
)
def obd_fisher(probe: Probe, *, batches: Annotated[int, Range(1, 4)] = 1) -> dict[str, Tensor]:
    """h w^2 / 2 with h the mean of g^2 over samples, g the gradient of one sample's loss; in eval mode.

    Formula:
        s(w) = h w^2 / 2,   h = mean over samples x of (dL(x)/dw)^2,   s(unit) = sum s(w)

    Every sample has its own backward pass: the square of a batch's mean gradient is something else, and near a minimum next to nothing.
    """
    probe.model.eval()
    weights = list(probe.weights.values())
    total, count = [torch.zeros_like(weight) for weight in weights], 0
    for _ in range(batches):
        for sample in _samples(probe.batch()):
            gradients = torch.autograd.grad(probe.task.loss(probe.model, sample), weights, materialize_grads=True)
            torch._foreach_addcmul_(total, gradients, gradients)
            count += 1
    return {name: value.square() * (part / (2 * count)) for (name, value), part in zip(probe.values.items(), total, strict=True)}


def _samples(batch: Any) -> list[Any]:
    """The samples of a batch, each a batch of one: tensors are sliced along their first dimension."""

    def sliced(index: int) -> Any:
        return tree_map(lambda leaf: leaf[index : index + 1] if isinstance(leaf, Tensor) and leaf.dim() else leaf, batch)

    count = next(len(leaf) for leaf in tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.dim())
    return [sliced(index) for index in range(count)]


@criterion(
    "obd_hutchinson",
    paper="LeCun et al. 1989, Optimal brain damage; diagonal: Bekas et al. 2007, Applied Numerical Mathematics 57",
    passes=lambda choice: 1 + choice.option("probes"),
    reduction="sum",
    converged=True,
)
def obd_hutchinson(probe: Probe, *, batches: Annotated[int, Range(1, 4)] = 1, probes: int = 4) -> dict[str, Tensor]:
    """h w^2 / 2 with h the Hessian's diagonal, estimated as the mean of z * Hz over `probes` random signs z a batch; in eval mode.

    Formula:
        s(w) = h w^2 / 2,   h = max(0, mean of z (H z)),  z of random signs,   s(unit) = sum s(w)

    A negative estimate counts as 0: at a minimum, and in a ReLU network everywhere, the true diagonal is not negative.
    """
    if probes < 1:
        raise UserError(f"criterion.probes must be at least 1, got {probes}. Write 4.")
    probe.model.eval()
    weights = list(probe.weights.values())
    total = [torch.zeros_like(weight) for weight in weights]
    with sdpa_kernel(SDPBackend.MATH):  # the other implementations of attention have no second derivative
        for _ in range(batches):
            loss = probe.task.loss(probe.model, probe.batch())
            slopes = torch.autograd.grad(loss, weights, create_graph=True, materialize_grads=True)
            for _ in range(probes):
                signs = [_signs(weight, probe.generator) for weight in weights]
                inner = torch.stack([(slope * sign).sum() for slope, sign in zip(slopes, signs, strict=True)]).sum()
                product = torch.autograd.grad(inner, weights, retain_graph=True, materialize_grads=True)
                torch._foreach_addcmul_(total, signs, product, value=1 / (batches * probes))
    return {name: value.square() * part.clamp(min=0) / 2 for (name, value), part in zip(probe.values.items(), total, strict=True)}


def _signs(weight: Tensor, generator: torch.Generator) -> Tensor:
    """Random signs of the weight's shape, drawn on the host."""
    return (2 * torch.randint(2, weight.shape, generator=generator) - 1).to(weight)
