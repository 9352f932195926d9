"""The network without the channels and heads that masks have removed as a whole."""

import ast
import inspect
import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file
from torch import nn

from distprune.core.edits import resize
from distprune.export.source import Source, Written
from distprune.export.tables import format

if TYPE_CHECKING:
    from distprune.export.reading import Export

VALUES, STRUCTURE, CODE = "slim.safetensors", "slim.json", "slim.py"


def _network(export: "Export", device: torch.device) -> nn.Module:
    from distprune.export.reading import fill

    shapes = json.loads((export.path / STRUCTURE).read_text())["shapes"]
    network = resize.resized(export.build(), shapes)
    fill(network, export.tensors(VALUES), export.path / VALUES)
    return network.to(device).eval()


@format("slim", packages=("torch_pruning",), network=_network)
def slim(source: Source, folder: Path) -> Written:
    """The network with its removed channels and heads taken out: shapes (JSON), values (safetensors) and code that builds it.

    The code needs torch alone. Coupled channels are found through torch-pruning. Single weights that are removed in what is left stay zero.
    """
    network = source.slim.network
    values = {name: tensor.detach().clone().contiguous() for name, tensor in network.state_dict().items()}
    save_file(values, str(folder / VALUES), metadata={"format": "distprune.slim/1"})
    before, after = resize.tensors_of(source.network), resize.tensors_of(network)
    shapes = {name: list(tensor.shape) for name, tensor in after.items() if tensor.shape != before[name].shape}
    (folder / STRUCTURE).write_text(json.dumps({"format": "distprune.slim/1", "shapes": shapes}, indent=2) + "\n")
    (folder / CODE).write_text(_code())
    kept = sum(parameter.numel() for parameter in network.parameters())
    return Written(files=(VALUES, STRUCTURE, CODE), notes=(source.slim.note,), facts={"parameters": kept})


def _code() -> str:
    """A module with `build()`: the file that knows how shapes are changed, which is plain torch, and a few lines."""
    source = inspect.getsource(resize)
    after = ast.parse(source).body[0].end_lineno  # the docstring, in whose place is this module's
    return HEAD + "\n".join(source.split("\n")[after:]) + BUILD


HEAD = '''"""The slim network of this export, with torch alone.

    network = build()
    network.load_state_dict(safetensors.torch.load_file("slim.safetensors"))
"""

import json
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

folder = Path(__file__).resolve().parent
places = sys.path
sys.path = ["", *(place for place in places if Path(place).resolve() != folder)]  # a network of your own is imported from where you are
try:
    model = SimpleNamespace(**runpy.run_path(str(folder / "model.py")))
finally:
    sys.path = places

'''
BUILD = '''

def build() -> nn.Module:
    """The network that slim.safetensors fits."""
    structure = json.loads((folder / "slim.json").read_text())
    return resized(model.build(), structure["shapes"])
'''
