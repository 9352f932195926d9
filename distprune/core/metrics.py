"""What a sparse network costs: parameters, FLOPs, and whether a signal still gets through."""

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from distprune.core.masks import Masks


def layer_flops(model: nn.Module, example: Tensor, names: Mapping[str, Tensor]) -> dict[str, int]:
    """FLOPs (two a multiplication with addition) of a forward pass of one dense sample in the layer of each weight name."""
    training = model.training
    model.eval()
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        model(example)
    model.train(training)
    counts = counter.get_flop_counts()
    root = type(model).__name__
    owners = {name: ".".join(filter(None, [root, name.rpartition(".")[0]])) for name in names}
    return {name: sum(counts.get(owner, {}).values()) for name, owner in owners.items()}


def flops(dense: Mapping[str, int], masks: Masks) -> float:
    """Ideal sparse FLOPs: each layer's dense FLOPs times its density."""
    counts = masks.counts
    return sum(count * counts[name] / masks[name].numel() for name, count in dense.items())


def collapsed(model: nn.Module, masks: Masks, example: Tensor) -> list[str]:
    """Layers of a masked network through which no signal passes from input to output, whatever the weights' signs.

    A layer is dead if no kept weight of it lies on a path of kept weights: the gradient of the summed outputs with respect to the
    weights is zero when all weights are one and activations are positive (Tanaka et al. 2020, arXiv:2006.05467, section 3).
    """
    probe = copy.deepcopy(model).double().eval()
    weights = {name: parameter for name, parameter in probe.named_parameters() if name in masks}
    with torch.no_grad():
        for name, parameter in probe.named_parameters():
            fan_in = max(parameter[0].numel(), 1) if parameter.dim() > 1 else 1
            parameter.copy_(masks[name].double() / fan_in if name in masks else torch.ones_like(parameter) * (parameter.dim() > 1))
        for module in probe.modules():  # batch norm passes the signal on as it is
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.reset_running_stats()
                if module.weight is not None:
                    module.weight.fill_(1.0)
    with torch.enable_grad():
        gradients = torch.autograd.grad(
            probe(torch.ones_like(example, dtype=torch.double)).sum(), list(weights.values()), allow_unused=True
        )
    return [
        name
        for (name, weight), gradient in zip(weights.items(), gradients, strict=True)
        if gradient is None or not bool((gradient * weight).any())
    ]
