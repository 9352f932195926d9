"""First-order Taylor expansion of the loss: what it would change if a weight, or a channel, went."""

from typing import TYPE_CHECKING, Annotated

import torch
from torch import Tensor, nn

from distprune.core.options import Range
from distprune.core.registry import criterion
from distprune.core.scoring import Probe

if TYPE_CHECKING:
    from distprune.core.granularity.coupling import Group

Term = tuple[nn.Parameter, int, Tensor]  # a parameter and where the units lie in it: dimension, index [units, width]


@criterion("taylor", paper="Molchanov et al. 2019, arXiv:1906.10771, eq. 6 and 9", passes=1, reduction="sum")
def taylor(probe: Probe, *, batches: Annotated[int, Range(1, 4)] = 1) -> dict[str, Tensor]:
    """(w dL/dw)^2, the mean over batches of the squares; a unit has the sum of its weights' scores.

    Formula:
        s(w) = mean over batches of (w dL/dw)^2,   s(unit) = sum s(w)

    The paper's other form (eq. 8), the square of the sum over a filter, says nothing where batch normalisation follows: the loss does not
    change with the scale of a filter, so that w dL/dw sums to zero over it. For that form take taylor_gates, whose gates come after it.
    """
    scores = {name: torch.zeros_like(value) for name, value in probe.values.items()}
    for _ in range(batches):
        for name, gradient in probe.gradients(1).items():
            scores[name] += (probe.values[name] * gradient).square() / batches
    return scores


@criterion("taylor_gates", paper="Molchanov et al. 2019, arXiv:1906.10771, eq. 10", passes=1, of_units=True)
def taylor_gates(probe: Probe, *, batches: Annotated[int, Range(1, 4)] = 1) -> dict[str, Tensor]:
    """(dL/dz)^2 of a gate z = 1 that multiplies a channel, the mean over batches of the squares.

    Formula:
        s(channel) = mean over batches of (dL/dz)^2 / n,   z = 1 the gate, in n places

    The gate stands after the batch norms of the channel; where there are none, on the outputs of the layers that make it, and for heads of
    attention on their values. A gate in n places is one: its square is divided by n, as the authors do for skip connections.
    """
    gates = {group.name: _gate(probe.model, group) for group in probe.units.channels}
    scores: dict[str, Tensor] = {}
    for _ in range(batches):
        probe.gradients(1)
        for name, (terms, places) in gates.items():
            slope = torch.stack([_slope(*term) for term in terms]).sum(0)
            scores[name] = scores.get(name, torch.zeros_like(slope)) + slope.square() / places / batches
    return scores


def _slope(parameter: nn.Parameter, dim: int, index: Tensor) -> Tensor:
    """dL/dz [units] of a z that multiplies the parameter where a unit lies."""
    if parameter.grad is None:  # the network has not used it
        return parameter.new_zeros(len(index))
    return (parameter.detach() * parameter.grad).movedim(dim, 0)[index].flatten(1).sum(1)


def _gate(model: nn.Module, group: "Group") -> tuple[list[Term], int]:
    """What a gate multiplies, as a product with a channel is one with the scale and shift that make it; and in how many places."""
    norms, makers = {}, {}
    for part in group.parts:
        path, _, name = part.name.rpartition(".")
        module = model.get_submodule(path)
        if part.role == "carries" and isinstance(module, nn.modules.batchnorm._NormBase):
            norms[path] = part.index
        elif part.role == "produces" and name not in ("q_proj_weight", "k_proj_weight"):
            makers[path] = (part.name, part.dim, _values(module, part.index))
    if norms:
        found = [(parameter, 0, index) for path, index in norms.items() for parameter in _affine(model.get_submodule(path))]
    else:
        parameters = dict(model.named_parameters())
        found = [(parameters[name], dim, index) for name, dim, index in makers.values()]
        for part in group.parts:
            path = part.name.rpartition(".")[0]
            if part.role == "carries" and path in makers and part.name in parameters:
                found.append((parameters[part.name], part.dim, _values(model.get_submodule(path), part.index)))
    for parameter, _, _ in found:
        parameter.requires_grad_()
    return found, len(norms or makers)


def _values(module: nn.Module, index: Tensor) -> Tensor:
    """Of the packed rows of attention those that make the values: heads are sums of them. The model is a scratch copy."""
    packed = isinstance(module, nn.MultiheadAttention) and index.shape[1] > module.head_dim
    return index[:, -(index.shape[1] // 3) :] if packed else index


def _affine(norm: nn.Module) -> list[nn.Parameter]:
    """Scale and shift of a normalisation; one without them gets 1 and 0, which changes nothing in what it computes."""
    if norm.weight is None:
        some = norm.running_mean
        assert isinstance(some, Tensor)
        norm.weight, norm.bias = nn.Parameter(torch.ones_like(some)), nn.Parameter(torch.zeros_like(some))
    return [parameter for parameter in (norm.weight, norm.bias) if isinstance(parameter, nn.Parameter)]
