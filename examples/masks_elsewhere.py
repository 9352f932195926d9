"""Take masks and networks elsewhere: onto a plain torch network, into another process, without distprune.

python examples/masks_elsewhere.py
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch import nn

import distprune as dp

# What runs elsewhere: torch and safetensors are all that it needs. Masks are bool tensors, True = kept, named like the weights.
ELSEWHERE = """
import sys
from safetensors.torch import load_file
from torch import nn

model = nn.ModuleDict({"fc1": nn.Linear(64, 32), "fc2": nn.Linear(32, 10)})
masks = load_file("masks.safetensors")
for name, parameter in model.named_parameters():
    if name in masks:
        parameter.data *= masks[name]
kept = sum(int(mask.sum()) for mask in masks.values())
print(f"elsewhere: {kept} of {sum(mask.numel() for mask in masks.values())} weights kept, distprune imported: {'distprune' in sys.modules}")
"""

RECIPE = {
    "model": {"name": "mlp", "hidden": [32]},
    "data": "digits",
    "paradigm": "gradual",
    "sparsity": 0.9,
    "train": {"length": "8ep", "batch_size": 32, "optimizer": {"name": "sgd", "lr": 0.1}},
}


class Mine(nn.Module):
    """Your own network. Its layers are called as in the network that was pruned."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(64, 32), nn.Linear(32, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """[n, 1, 8, 8] to [n, 10]."""
        return self.fc2(self.fc1(images.flatten(1)).relu())


def main(folder: Path) -> None:
    """Train and prune one network, and use what comes out in four ways."""
    outcome = dp.run(RECIPE)  # or the best of a search: dp.search(...).best()
    print(outcome.summary())
    outcome.export(folder / "out")

    # 1. Masks on a network of your own, behind wrappers, too: names are matched without `module.` and `_orig_mod.`.
    masks = dp.Masks.load(folder / "out" / "masks.safetensors")
    network = nn.DataParallel(Mine())
    masks.apply_(network)
    print(f"a network of my own: {sum(int(weight.count_nonzero()) for weight in network.parameters() if weight.dim() > 1)} weights kept")

    # 2. Another process, without distprune.
    masks.save(folder / "masks.safetensors")
    done = subprocess.run([sys.executable, "-c", ELSEWHERE], cwd=folder, capture_output=True, text=True, check=True)
    print(done.stdout.strip())

    # 3. The export: every file is compared with its manifest first, and nothing in it is unpickled or run.
    export = dp.open_export(folder / "out")
    inputs = export.inputs(64)
    masked = export.network("masked")
    print(f"the export holds {', '.join(export.formats)}; it answers {masked(inputs).argmax(1)[:8].tolist()}")

    # 4. What was changed on the way is refused.
    path = folder / "out" / "weights.safetensors"
    damaged = bytearray(path.read_bytes())
    damaged[-1] ^= 1
    path.write_bytes(damaged)
    try:
        dp.open_export(folder / "out")
    except dp.UserError as error:
        print(f"refused: {str(error).replace(str(folder), 'FOLDER')}")


if __name__ == "__main__":
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as place:
        main(Path(place))
