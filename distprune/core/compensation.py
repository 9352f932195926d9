"""The weights policy `compensate`: what is kept of a layer takes over, by least squares, what the removed inputs did."""

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distprune.core.masks import Masks
from distprune.core.streams import global_stream, stream

if TYPE_CHECKING:
    from distprune.core.executor import Env
    from distprune.core.stages import SetWeights
    from distprune.core.state import State

_RIDGE = 1e-4  # times the mean of the diagonal
_LARGEST = 8192  # inputs of a row: a layer's matrix takes half a gigabyte
_CHUNK = 2**24  # numbers that patches of a convolution may take at once


@torch.no_grad()
def compensate(stage: "SetWeights", state: "State", env: "Env") -> None:
    """Weights and biases that best keep what each layer computed in the snapshot (He et al. 2017, arXiv:1707.06168, section 3.1).

    Each layer is fitted for itself on the inputs that it has in the network of the snapshot. Linear and two-dimensional convolutions of
    at most 8192 inputs a row take part; others, and those whose weights are used elsewhere than in their own forward pass, stay.
    """
    network = copy.deepcopy(state.model)
    network.load_state_dict(state.snapshots[stage.tag])
    network.eval()
    layers = _layers(network, state.masks)
    seen = {name: _Inputs(layer) for name, layer in layers.items()}
    handles = [layer.register_forward_pre_hook(seen[name].see, with_kwargs=True) for name, layer in layers.items()]
    generator = stream(env.seed, "compensate", state.lap, state.clock)
    with global_stream(env.seed, "compensate", state.lap, state.clock), env.autocast():
        for _ in range(stage.batches):
            env.task.outputs(network, env.task.draw(generator, stage.batch_size))
    for handle in handles:
        handle.remove()
    for name, layer in layers.items():
        if seen[name].count:  # others are not called as modules: attention uses the weights of its last layer itself
            _fit(state.model.get_submodule(name.rpartition(".")[0]), layer, state.masks[name], seen[name])


def _layers(network: nn.Module, masks: Masks) -> dict[str, nn.Linear | nn.Conv2d]:
    """Layers of which a part is removed and that compute what their type says, by the names of their weights."""
    found = {}
    users = [id(parameter) for module in network.modules() for parameter in module.parameters(recurse=False)]
    for name, mask in masks.items():
        path, _, attribute = name.rpartition(".")
        layer = network.get_submodule(path)
        if (
            isinstance(layer, nn.Linear | nn.Conv2d)
            and type(layer).forward in (nn.Linear.forward, nn.Conv2d.forward)
            and attribute == "weight"
            and users.count(id(layer.weight)) == 1
            and mask[0].numel() <= _LARGEST
            and not bool(mask.all())
        ):
            found[name] = layer
    return found


class _Inputs:
    """First and second moments of a layer's inputs: one row for each group of a convolution, of the inputs that a kernel sees."""

    def __init__(self, layer: nn.Linear | nn.Conv2d) -> None:
        self.groups = layer.groups if isinstance(layer, nn.Conv2d) else 1
        width = layer.weight[0].numel()
        self.count = 0
        self.total = layer.weight.new_zeros(self.groups, width, dtype=torch.double)
        self.square = layer.weight.new_zeros(self.groups, width, width, dtype=torch.double)

    def see(self, layer: nn.Module, args: tuple[Tensor, ...], kwargs: Mapping[str, Tensor]) -> None:
        """The hook."""
        inputs = args[0] if args else kwargs["input"]
        if isinstance(layer, nn.Linear):
            self._add(inputs.reshape(1, -1, layer.in_features).mT)
            return
        assert isinstance(layer, nn.Conv2d)
        inputs = inputs if inputs.dim() == 4 else inputs[None]
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        inputs = F.pad(inputs, layer._reversed_padding_repeated_twice, mode=mode)  # also of padding="same", which may be uneven
        size = inputs[0].numel() * layer.kernel_size[0] * layer.kernel_size[1]
        for part in torch.split(inputs, max(1, _CHUNK // size)):
            patches = F.unfold(part, layer.kernel_size, layer.dilation, stride=layer.stride)  # [n, inputs, positions]
            self._add(patches.view(len(part), self.groups, -1, patches.shape[2]).permute(1, 2, 0, 3).flatten(2))

    def _add(self, columns: Tensor) -> None:
        """[groups, inputs, columns]."""
        columns = columns.double()
        self.count += columns.shape[2]
        self.total += columns.sum(2)
        self.square.baddbmm_(columns, columns.mT)


def _fit(target: nn.Module, layer: nn.Linear | nn.Conv2d, mask: Tensor, seen: _Inputs) -> None:
    """Set weight and bias of `target` to the best ones for `layer` under the mask."""
    dense = layer.weight.double().reshape(seen.groups, -1, seen.total.shape[1])
    kept = mask.reshape(dense.shape)
    mean = seen.total / seen.count
    gram = seen.square / seen.count
    if layer.bias is not None:  # it takes the mean over, so the weights need not
        gram = gram - mean[:, :, None] * mean[:, None, :]
    fitted = torch.stack([least_squares(*group, ridge=_RIDGE) for group in zip(gram, dense, kept, strict=True)])
    assert isinstance(target, nn.Linear | nn.Conv2d)
    target.weight.copy_(fitted.reshape(layer.weight.shape))
    if layer.bias is not None and target.bias is not None:
        lost = (dense - fitted) @ mean[:, :, None]
        target.bias.copy_(layer.bias.double() + lost.flatten())


def least_squares(gram: Tensor, weight: Tensor, mask: Tensor, *, ridge: float) -> Tensor:
    """Rows under `mask` [rows, inputs] whose products with the inputs are next to those of `weight`; `gram` is [inputs, inputs].

    w_K + (G_KK + r I)^-1 G_KR w_R with K the kept inputs of a row, R the removed ones and r `ridge` times the mean of G's diagonal. The
    ridge draws towards the weights as they are, and not towards zero, so the error is never above that of w_K. Rows of one pattern are
    solved together.
    """
    fitted = weight * mask
    damping = ridge * gram.diagonal().mean()
    if not bool(damping > 0):  # the inputs never vary
        return fitted
    patterns, pattern_of = torch.unique(mask, dim=0, return_inverse=True)
    for number, pattern in enumerate(patterns):
        kept = pattern.nonzero().flatten()
        if 0 < len(kept) < len(pattern):
            rows = (pattern_of == number).nonzero().flatten()
            some = gram[kept]
            matrix = some[:, kept]
            matrix.diagonal().add_(damping)
            change = torch.cholesky_solve(some @ (weight[rows] * ~pattern).T, torch.linalg.cholesky(matrix))
            fitted[rows[:, None], kept] += change.T
    return fitted
