"""Exports: what people take away from a trial, each checked after writing.

masks.safetensors     bool masks, with sparsity and the kept weights of each layer in the header
weights.safetensors   the pruned network's parameters and buffers
test.safetensors      what the network answers: predictions for test images, or the image that it makes out of its input
model.py              the network as plain torch code
check.py              loads the four with torch and safetensors alone and compares every answer
manifest.json         recipe, sparsity of each layer, validation and test metrics, versions, sizes and hashes
"""

import ast
import hashlib
import inspect
import json
import runpy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from distprune.core.edits.structure import Edit, source
from distprune.core.masks import Masks
from distprune.core.registry import Choice
from distprune.core.run import Run
from distprune.core.task import Task
from distprune.errors import UserError
from distprune.export.kinds import Kind, kind_of

FILES = ("masks.safetensors", "weights.safetensors", "test.safetensors", "model.py", "check.py")


def export(run: Run, to: str | Path, facts: dict[str, Any]) -> Path:
    """Write a trained run to the new folder `to` and check what was written. `facts` go into the manifest.

    Raises UserError if the folder is not empty, RuntimeError if the written files do not give the same network.
    """
    folder = Path(to)
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"The export folder must be empty, {folder} is not. Choose another with --to.")
    folder.mkdir(parents=True, exist_ok=True)
    state, task = run.state, run.env.task
    kind = kind_of(task, state.model)
    state.masks.save(folder / "masks.safetensors")
    values = {name: tensor.cpu().contiguous() for name, tensor in state.values().items()}
    save_file(values, str(folder / "weights.safetensors"), metadata={"format": "distprune.weights/1"})
    save_file({name: tensor.cpu().contiguous() for name, tensor in kind.rows.items()}, str(folder / "test.safetensors"))
    (folder / "model.py").write_text(model_source(run.recipe.model, task, state.edits, kind))
    (folder / "check.py").write_text(CHECK.replace("COMPARE\n", kind.compare))
    layers = {
        name: {"shape": list(mask.shape), "kept": kept, "sparsity": 1 - kept / mask.numel()}
        for (name, mask), kept in zip(state.masks.items(), state.masks.counts.values(), strict=True)
    }
    manifest = {
        "format": "distprune.export/1",
        **facts,
        "recipe": run.recipe.plain(),
        "sparsity": state.sparsity,
        "kept": state.masks.kept,
        "edits": list(state.edits),
        "layers": layers,
        "metrics": {
            "validation": task.metrics(state.model, "validation"),
            "test": dict(kind.metrics),
        },
        "files": {name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in _read(folder)},
    }
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
    _verify(folder, run, kind)
    return folder


def _read(folder: Path) -> list[tuple[str, bytes]]:
    return [(name, (folder / name).read_bytes()) for name in FILES]


def _verify(folder: Path, run: Run, kind: Kind) -> None:
    """Raise RuntimeError unless the files hold the run's masks and weights, removed weights are zero, and model.py predicts alike."""
    masks, values = Masks.load(folder / "masks.safetensors"), load_file(folder / "weights.safetensors")
    same = masks.equal(run.state.masks.to("cpu")) and all(
        torch.equal(values[name], value.cpu()) for name, value in run.state.values().items()
    )
    if not same or any(bool(values[name][~mask].any()) for name, mask in masks.items()):
        raise RuntimeError(f"The export in {folder} differs from the trial. This is a defect of distprune: please report it.")
    module = runpy.run_path(str(folder / "model.py"))
    test = load_file(folder / "test.safetensors")
    network = module["build"]().eval()
    network.load_state_dict(values)
    with torch.no_grad():
        same = kind.same(module, network, test)
    if not same:
        raise RuntimeError(f"{folder}/model.py does not predict as the trial does. This is a defect of distprune: please report it.")


def model_source(choice: Choice, task: Task, edits: Sequence[Edit], kind: Kind) -> str:
    """A Python module with `build()` for the network and the functions of its task; distprune's own lines are left out."""
    options = {name: value for name, value in choice.options.items() if name not in choice.entry.facts["values_only"]}
    arguments = f"{task.shape}, {task.classes}" + "".join(f", {name}={value!r}" for name, value in options.items())
    if choice.name.startswith("import:"):
        module, _, function = choice.name.removeprefix("import:").partition(":")
        body = f'"""The network of this export: your own `{module}:{function}`, which must be importable."""\n\n'
        body += f"import torch\n\nfrom {module} import {function} as network\n"
        function = "network"
    else:
        function = choice.entry.function.__name__
        body = standalone(inspect.getsource(inspect.getmodule(choice.entry.function)))  # type: ignore[arg-type]
        if "import torch\n" not in body:
            body = body.replace("from torch", "import torch\nfrom torch", 1) if "from torch" in body else "import torch\n" + body
    made = f"{function}({arguments})"
    changes = [line for edit in edits for line in source(edit)]
    lines = "".join(f"    {line}\n" for line in [f"network = {made}", *changes, "return network"] if changes) or f"    return {made}\n"
    return (
        f"{body.rstrip()}\n\n\n"
        "def build() -> torch.nn.Module:\n"
        '    """The network that weights.safetensors fits."""\n'
        f"{lines}\n\n"
        f"{kind.functions}"
    )


def standalone(source: str) -> str:
    """Source without imports from distprune and without decorators of top-level functions."""
    drop: set[int] = set()
    for node in ast.parse(source).body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("distprune"):
            drop |= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
        if isinstance(node, ast.FunctionDef):
            for decorator in node.decorator_list:
                drop |= set(range(decorator.lineno, (decorator.end_lineno or decorator.lineno) + 1))
    return "\n".join(line for number, line in enumerate(source.split("\n"), 1) if number not in drop)


CHECK = '''"""Checks this export with torch and safetensors alone: removed weights are zero, and every answer is the recorded one."""

import json
from pathlib import Path

import model
import torch
from safetensors.torch import load_file

folder = Path(__file__).parent
masks, weights, test = (load_file(folder / f"{name}.safetensors") for name in ("masks", "weights", "test"))
network = model.build().eval()
network.load_state_dict(weights)
assert not any(weights[name][~mask].any() for name, mask in masks.items()), "a removed weight is not zero"
with torch.no_grad():
COMPARE
manifest = json.loads((folder / "manifest.json").read_text())
kept = sum(int(mask.sum()) for mask in masks.values())
print(f"{line}, {kept} weights kept")
if differ or kept != manifest["kept"]:
    raise SystemExit("the export does not give the recorded results")
'''
