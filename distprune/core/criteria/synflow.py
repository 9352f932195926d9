"""Synaptic flow."""

import torch
from torch import Tensor, nn

from distprune.core.registry import criterion
from distprune.core.scoring import Probe


@criterion("synflow", paper="Tanaka et al. 2020, arXiv:2006.05467, eq. 5 and algorithm 1", steps=100, reduction="sum")
def synflow(probe: Probe) -> dict[str, Tensor]:
    """|w dR/dw| with R the summed output of the network with absolute weights on an input of ones; no data, 100 steps.

    Formula:
        R = sum f_|w|(1),   s(w) = |w dR/dw|,   s(unit) = sum s(w)
        density after step t of 100 = (1 - sparsity)^(t / 100)

    In float64, as R overflows on deep networks, and in eval mode with absolute buffers, as the authors do. Batch norm that keeps no
    statistics has those of an untrained one: with a batch's own, it would subtract the whole signal.
    """
    model = probe.model.double().eval()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is None:
            line = next(iter(probe.weights.values())).new_zeros(module.num_features)
            module.running_mean, module.running_var = line, line + 1
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.abs_()
    flow = model(torch.ones_like(probe.task.example(), dtype=torch.double)).sum()
    gradients = torch.autograd.grad(flow, list(probe.weights.values()), materialize_grads=True)
    return {name: (weight * gradient).abs().detach() for (name, weight), gradient in zip(probe.weights.items(), gradients, strict=True)}
