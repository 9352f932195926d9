"""The two sides of a layer: the channels that it makes and those that it reads, and the tensors along them."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

if TYPE_CHECKING:
    from distprune.core.granularity.coupling import Role

OUT, IN = 0, 1


def sides(module: nn.Module) -> Any:
    """(channels out, channels in) of a module that has tensors along them."""
    match module:
        case nn.modules.conv._ConvNd():
            return module.out_channels, module.in_channels
        case nn.Linear():
            return module.out_features, module.in_features
        case nn.modules.batchnorm._NormBase():
            return module.num_features, module.num_features
        case nn.GroupNorm():
            return module.num_channels, module.num_channels
        case nn.PReLU() if module.num_parameters > 1:
            return module.num_parameters, module.num_parameters
    return None


def block_count(module: nn.Module) -> int:
    """Into how many blocks of channels a layer is cut, 0 if into none. A block is removed as a whole, and so stays the layer's rule."""
    if isinstance(module, nn.modules.conv._ConvNd):
        return int(module.groups) if module.groups > 1 else 0
    return int(module.num_groups) if isinstance(module, nn.GroupNorm) else 0


def tensors_along(module: Any, side: int) -> "Iterator[tuple[Tensor | None, int, Role]]":
    """The tensors of a module along the channels of one side: (tensor, dim, role)."""
    if isinstance(module, nn.modules.conv._ConvNd | nn.Linear):
        grouped, transposed = block_count(module) > 0, getattr(module, "transposed", False)
        if not grouped:
            yield module.weight, int((side == IN) != transposed), "produces" if side == OUT else "consumes"
        elif side == (IN if transposed and module.groups != module.out_channels else OUT):  # the other dim is a block's width, it stays
            yield module.weight, 0, "produces"
        if side == OUT:
            yield module.bias, 0, "carries"
    else:
        for name in ("weight", "bias", "running_mean", "running_var"):
            yield getattr(module, name, None), 0, "carries"
