"""The network of an export as code that stands alone, and the script that checks an export with torch and safetensors."""

import ast
import inspect
from collections.abc import Sequence

from distprune.core.edits.structure import Edit, source
from distprune.core.registry import Choice
from distprune.core.task import Task
from distprune.export.kinds import Kind


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
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors.torch import load_file

folder = Path(__file__).parent
sys.path[0] = ""  # a network of your own is imported from where you are
model = SimpleNamespace(**runpy.run_path(str(folder / "model.py")))
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
