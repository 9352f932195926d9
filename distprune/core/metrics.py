"""What a sparse network costs: parameters, FLOPs, and whether a signal still gets through."""

import copy
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from distprune.core.masks import Masks


@dataclass(frozen=True)
class Profile:
    """What a dense network is made of, as far as costs are counted from it: by name of the weight, for one sample."""

    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    flops: Mapping[str, int] = field(default_factory=dict)  # empty where they cannot be counted, as are the activations
    inputs: Mapping[str, int] = field(default_factory=dict)  # numbers that the largest operation on the weight reads besides parameters
    outputs: Mapping[str, int] = field(default_factory=dict)  # and writes
    transposed: frozenset[str] = frozenset()  # weights of shape [in, out, ...]
    width: int = 4  # bytes of a number

    @property
    def total(self) -> int:
        """Weights."""
        return sum(map(math.prod, self.shapes.values()))

    def memory(self, kept: Mapping[str, int], shapes: Mapping[str, tuple[int, ...]] | None = None) -> float:
        """Bytes with `kept[name]` of each layer's weights; `shapes` are those of a network that is really smaller.

        Weights take the smaller of dense storage and one bit a weight plus the kept values; then come the inputs and outputs of the layer
        where both together are most. A layer of which nothing is kept is not run.
        """
        shapes, stored, most = shapes or self.shapes, 0, 0.0
        for name, count in kept.items():
            if not count:
                continue
            size = math.prod(shapes[name])
            stored += min(self.width * size, -(-size // 8) + self.width * count)
            whole, left = self.shapes[name], shapes[name]
            reads, writes = (0, 1) if name in self.transposed else (1, 0)
            out = left[writes] / whole[writes]
            # A depthwise convolution reads as many channels as it writes.
            into = left[reads] / whole[reads] if whole[reads] > 1 else out if name not in self.transposed else 1.0
            most = max(most, self.width * (self.inputs[name] * into + self.outputs[name] * out))
        return stored + most


class _ByWeight(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts by the parameter that an operation reads, whether its module calls it or hands it to a function, as attention does."""

    def __init__(self, names: Mapping[str, Tensor], parameters: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts = dict.fromkeys(names, 0)
        self.activations = dict.fromkeys(names, (0, 0))
        self.transposed: set[str] = set()
        self._owner = {weight.untyped_storage().data_ptr(): name for name, weight in names.items()}
        self._parameters = {parameter.untyped_storage().data_ptr() for parameter in parameters}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        if count := flop_registry.get(function._overloadpacket):
            tensors = {arg.untyped_storage().data_ptr(): arg for arg in args if isinstance(arg, Tensor)}
            if name := next(filter(None, map(self._owner.get, tensors)), None):
                self.counts[name] += count(*args, **(kwargs or {}), out_val=out)
                read = sum(tensor.numel() for place, tensor in tensors.items() if place not in self._parameters)
                self.activations[name] = max(self.activations[name], (read, out.numel()), key=sum)
                if function._overloadpacket is torch.ops.aten.convolution and args[6]:
                    self.transposed.add(name)
        return out


def layer_flops(model: nn.Module, example: Tensor, names: Mapping[str, Tensor]) -> dict[str, int]:
    """FLOPs (two a multiplication with addition) that a forward pass of one dense sample spends on each of the weights `names`."""
    return dict(profile(model, example, names).flops)


def profile(model: nn.Module, example: Tensor, names: Mapping[str, Tensor]) -> Profile:
    """What a forward pass of one dense sample takes in each of the weights `names`."""
    training, fast = model.training, torch.backends.mha.get_fastpath_enabled()
    model.eval()
    torch.backends.mha.set_fastpath_enabled(False)  # one opaque operation for a whole encoder layer
    counter = _ByWeight(names, model.parameters())
    try:
        with torch.no_grad(), counter:
            model(example)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        model.train(training)
    inputs, outputs = ({name: pair[side] for name, pair in counter.activations.items()} for side in (0, 1))
    width = max((weight.element_size() for weight in names.values()), default=4)
    return Profile(shapes_of(names), counter.counts, inputs, outputs, frozenset(counter.transposed), width)


def shapes_of(weights: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """The shape of each weight."""
    return {name: tuple(weight.shape) for name, weight in weights.items()}


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
