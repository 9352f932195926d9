"""The state of a network that torch.nn.utils.prune has pruned."""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn.utils import prune

from distprune.export.source import Source, Written
from distprune.export.tables import format

if TYPE_CHECKING:
    from distprune.export.reading import Export

FILE = "torch.safetensors"


def _network(export: "Export", device: torch.device) -> nn.Module:
    from distprune.export.reading import fill

    network = pruned(export.build(), export.masks)
    fill(network, export.tensors(FILE), export.path / FILE)
    return network.to(device).eval()


def pruned(network: nn.Module, names: Iterable[str]) -> nn.Module:
    """`network` with torch's pruning, as yet of nothing, on its weights of these names."""
    for name in names:
        module, _, weight = name.rpartition(".")
        prune.identity(network.get_submodule(module), weight)  # type: ignore[no-untyped-call]
    return network


@format("torch", plain=True, loaded=_network)
def torch_prune(source: Source, folder: Path) -> Written:
    """A state_dict as torch.nn.utils.prune makes it (safetensors): `x.weight_orig` and a bool `x.weight_mask` for each prunable weight.

    It fits a network on which `prune.identity(x, "weight")` or `prune.custom_from_mask` was called for each of them. A network that reads
    a layer's weight without calling the layer, as some attention does, cannot have it.
    """
    values = source.values()
    for name, mask in source.masks.items():
        values[f"{name}_orig"], values[f"{name}_mask"] = values.pop(name), mask.contiguous()
    save_file(values, str(folder / FILE), metadata={"format": "pt"})
    note = (
        "torch.nn.utils.prune keeps masks beside whole weights and multiplies them in each pass: larger and slower than the dense network."
    )
    return Written(files=(FILE,), notes=(note,))
