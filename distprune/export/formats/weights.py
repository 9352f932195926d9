"""The pruned network's values."""

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from distprune.export.source import Source, Written
from distprune.export.tables import format

if TYPE_CHECKING:
    from distprune.export.reading import Export

FILE = "weights.safetensors"


def _network(export: "Export", device: torch.device) -> nn.Module:
    return export.masked().to(device).eval()


@format("weights", always=True, loaded=_network)
def weights(source: Source, folder: Path) -> Written:
    """Parameters and buffers of the network, removed weights zero (safetensors): what its load_state_dict takes."""
    values = source.values()
    save_file(values, str(folder / FILE), metadata={"format": "distprune.weights/1"})
    found = load_file(folder / FILE)
    if any(not torch.equal(found[name], value) for name, value in values.items()):
        raise RuntimeError(f"{FILE} holds other values than the trial.")
    if revived := [name for name, mask in source.masks.items() if bool(found[name][~mask].any())]:
        raise RuntimeError(f"Removed weights of '{revived[0]}' are not zero in {FILE}.")
    return Written(files=(FILE,))
