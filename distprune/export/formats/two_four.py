"""Linear layers that keep 2 of every 4 inputs, for the sparse matrix units of GPUs (Mishra et al. 2021, arXiv:2104.08378)."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from distprune.core.masks import Masks
from distprune.errors import UserError
from distprune.export.source import Source, Written
from distprune.export.tables import format

if TYPE_CHECKING:
    from distprune.export.reading import Export

FILE = "two_four.safetensors"
PLACES = ".places"
_ROWS, _COLUMNS = 32, 64  # multiples that every library wants of a half-precision matrix, [out, in]


@format("2:4", device="cuda", network=lambda export, device: _network(export, device))
def two_four(source: Source, folder: Path) -> Written:
    """The network with packed linear layers (safetensors): the 2 kept values of every 4 inputs, and their places in 2 bits each.

    The layout that a GPU's library computes with differs between libraries, so torchao makes it when the network is read.
    Raises UserError for masks that keep more than 2 of 4 in every linear layer.
    """
    linear = [f"{name}.weight" for name, module in source.network.named_modules() if isinstance(module, nn.Linear)]
    names = [name for name in linear if name in source.masks and is_two_four(source.masks[name])]
    if not names:
        raise UserError(
            f"Format 2:4 needs a linear layer that keeps at most 2 of every 4 inputs, {_why(source.masks, linear)} Take granularity: n_m."
        )
    values = source.values()
    packed = dict(values)
    for name in names:
        packed[name], packed[f"{name}{PLACES}"] = pack(values[name], source.masks[name])
    save_file(packed, str(folder / FILE), metadata={"format": "distprune.2_4/1", "layers": json.dumps(names)})
    found = read(folder / FILE)
    if found.keys() != values.keys() or any(not torch.equal(found[name], value) for name, value in values.items()):
        raise RuntimeError(f"{FILE} does not unpack to the weights that were packed.")
    note = f"{len(names)} of {len(linear)} linear layers are packed; other layers are stored whole."
    return Written(files=(FILE,), notes=(note,), facts={"exact": True, "layers": names})


def is_two_four(mask: Tensor) -> bool:
    """Whether a mask, [out, in], keeps at most 2 of every 4 consecutive inputs, and fewer than all."""
    if mask.dim() != 2 or mask.shape[1] % 4:
        return False
    return bool((mask.view(len(mask), -1, 4).sum(2) <= 2).all())


def pack(weight: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Values [out, in / 2] and places, uint8 [out, ceil(in / 8)]: 2 bits a value, the first in the lowest bits."""
    rows, columns = weight.shape
    groups = mask.view(rows, columns // 4, 4)
    # The kept ones first, and zeros where fewer than two are; then both in their order.
    two = (~groups).to(torch.uint8).sort(dim=2, stable=True).indices[..., :2].sort(dim=2).values
    values = (weight * mask).view(rows, columns // 4, 4).gather(2, two).view(rows, columns // 2)
    bits = two.view(rows, columns // 2)
    bits = nn.functional.pad(bits, (0, -bits.shape[1] % 4)).view(rows, -1, 4)
    return values.contiguous(), (bits << torch.tensor([0, 2, 4, 6])).sum(2).to(torch.uint8)


def unpack(values: Tensor, places: Tensor) -> Tensor:
    """The weight, [out, in], of what `pack` made of it."""
    rows, half = values.shape
    bits = (places[..., None].long() >> torch.tensor([0, 2, 4, 6])) & 3
    two = bits.view(rows, -1)[:, :half].view(rows, half // 2, 2)
    return torch.zeros(rows, half // 2, 4, dtype=values.dtype).scatter_(2, two, values.view(rows, half // 2, 2)).view(rows, 2 * half)


def read(file: Path) -> dict[str, Tensor]:
    """Parameters and buffers, whole, of a file with packed layers."""
    found = load_file(file)
    for name in _layers(file):
        found[name] = unpack(found[name], found.pop(f"{name}{PLACES}"))
    return found


def half(network: nn.Module) -> Callable[[Tensor], Tensor]:
    """A network in half precision that takes and gives floats."""
    network = network.half()

    def forward(inputs: Tensor) -> Tensor:
        outputs: Tensor = network(inputs.half())
        return outputs.float()

    return forward


def check_hardware(device: torch.device) -> None:
    """Raise UserError where no sparse matrix unit can be used."""
    rule = "Packed 2:4 layers run on NVIDIA GPUs of compute capability 8.0 or higher"
    if device.type != "cuda" or not torch.cuda.is_available():
        raise UserError(f"{rule}, and there is none here. Take the file to one, or the masked network.")
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        raise UserError(f"{rule}, and {torch.cuda.get_device_name(device)} has {major}.{minor}. Take the masked network.")


def _network(export: "Export", device: torch.device) -> Callable[[Tensor], Tensor]:
    from distprune.export.reading import fill

    check_hardware(device)
    try:
        from torchao.sparsity import semi_sparse_weight, sparsify_
    except ImportError as error:
        raise UserError('Packed 2:4 layers need torchao, which is not installed. pip install "distprune[two_four]".') from error
    network, file = export.build(), export.path / FILE
    fill(network, read(file), file)
    packed = set(_layers(file))
    forward = half(network.to(device).eval())

    def fits(module: nn.Module, name: str) -> bool:
        if not isinstance(module, nn.Linear) or f"{name}.weight" not in packed:
            return False
        return module.out_features % _ROWS == 0 and module.in_features % _COLUMNS == 0

    sparsify_(network, semi_sparse_weight(), fits)
    return forward


def _layers(file: Path) -> list[str]:
    with safe_open(str(file), framework="pt") as opened:
        return list(json.loads(opened.metadata()["layers"]))


def _why(masks: Masks, linear: list[str]) -> str:
    if not linear:
        return "and the network has no linear layer."
    first = next((name for name in linear if name in masks), None)
    if first is None:
        return "and no linear layer is prunable."
    if masks[first].shape[1] % 4:
        return f"got {masks[first].shape[1]} inputs in '{first}'."
    most = int(masks[first].view(len(masks[first]), -1, 4).sum(2).max())
    return f"got {most} of 4 in '{first}'."
