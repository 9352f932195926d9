"""What a sparse network costs: parameters, FLOPs, and whether a signal still gets through."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from distprune.core.masks import Masks


class _ByWeight(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts FLOPs by the parameter that an operation reads, whether its module calls it or hands it to a function, as attention does."""

    def __init__(self, names: Mapping[str, Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts = dict.fromkeys(names, 0)
        self._owner = {weight.untyped_storage().data_ptr(): name for name, weight in names.items()}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        if count := flop_registry.get(function._overloadpacket):
            owners = [self._owner.get(arg.untyped_storage().data_ptr()) for arg in args if isinstance(arg, Tensor)]
            if name := next(filter(None, owners), None):
                self.counts[name] += count(*args, **(kwargs or {}), out_val=out)
        return out


def layer_flops(model: nn.Module, example: Tensor, names: Mapping[str, Tensor]) -> dict[str, int]:
    """FLOPs (two a multiplication with addition) that a forward pass of one dense sample spends on each of the weights `names`."""
    training, fast = model.training, torch.backends.mha.get_fastpath_enabled()
    model.eval()
    torch.backends.mha.set_fastpath_enabled(False)  # one opaque operation for a whole encoder layer
    counter = _ByWeight(names)
    try:
        with torch.no_grad(), counter:
            model(example)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        model.train(training)
    return counter.counts


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
            value = masks[name].double() / fan_in if name in masks else torch.full_like(parameter, not name.endswith("bias"))
            parameter.copy_(value)
    for module in probe.modules():  # normalisation would take a constant signal away
        if isinstance(module, nn.modules.batchnorm._BatchNorm | nn.LayerNorm | nn.GroupNorm | nn.RMSNorm):
            module.forward = nn.Identity().forward  # type: ignore[method-assign]
    with torch.enable_grad():
        gradients = torch.autograd.grad(
            probe(torch.ones_like(example, dtype=torch.double)).sum(), list(weights.values()), allow_unused=True
        )
    return [
        name
        for (name, weight), gradient in zip(weights.items(), gradients, strict=True)
        if gradient is None or not bool((gradient * weight).any())
    ]
