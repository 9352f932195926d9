"""Edits: recorded changes of a network's structure, plain data that is replayed on the network as built before values are loaded.

    {"kind": "replace", "modules": {"conv2": [["Flatten"], ["Linear", 800, 10, False]], "relu2": [["Identity"]]}}
    {"kind": "scale", "modules": ["stage1.0.bn2", "stage1.1.bn2"], "factor": 0.7071}

`replace` puts a module of torch.nn, or a Sequential of several, in the place of each that it names: type and positional arguments, numbers,
booleans and lists of them only. `scale` multiplies what each of its modules returns, by a forward hook, so that no parameter gets another
name. Other keys are facts about an edit, which travel with it.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from distprune.errors import UserError

Edit = Mapping[str, Any]
_AFFINE = (nn.Linear, nn.modules.conv._ConvNd, nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)
_KINDS = {kind.__name__: kind for kind in (nn.Identity, nn.Flatten, nn.Linear, nn.Conv1d, nn.Conv2d)}


class Scale:
    """A forward hook that multiplies an output by `factor`."""

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return output * self.factor


def apply(model: nn.Module, edit: Edit) -> None:
    """Change the structure of `model` in place. New parameters hold what torch draws; on the device and in the type of the model's own."""
    if edit["kind"] == "scale":
        for path in edit["modules"]:
            module = model.get_submodule(path)
            if not foldable(module):
                raise UserError(f"'{path}' must have weights that a scale can be folded into, {type(module).__name__} has none.")
            module.register_forward_hook(Scale(float(edit["factor"])), prepend=True)
        return
    some = next(model.parameters())
    for path, layers in edit["modules"].items():
        made = [_KINDS[kind](*arguments) for kind, *arguments in layers]
        model.set_submodule(path, (made[0] if len(made) == 1 else nn.Sequential(*made)).to(some.device, some.dtype).train(model.training))


def foldable(module: nn.Module) -> bool:
    """Whether the module's output is linear in its own weight and bias taken together, so that they can take over a scale of it."""
    return isinstance(module, _AFFINE) and isinstance(module.weight, nn.Parameter)


def fold(model: nn.Module, edit: Edit) -> None:
    """Multiply the last affine parameters of the modules of a `scale` edit by its factor, and take its hooks away: the same function."""
    with torch.no_grad():
        for path in edit["modules"]:
            module = model.get_submodule(path)
            scales = [key for key, hook in module._forward_hooks.items() if isinstance(hook, Scale)]
            if not scales:  # the module was replaced since, by one that has taken the scale over
                continue
            for key in scales:
                del module._forward_hooks[key]
            for parameter in (module.weight, getattr(module, "bias", None)):
                if isinstance(parameter, Tensor):
                    parameter.mul_(edit["factor"])


def created(edit: Edit) -> set[str]:
    """Names of the prunable weights that an edit makes."""
    if edit["kind"] == "scale":
        return set()
    return {
        f"{path}.weight" if len(layers) == 1 else f"{path}.{position}.weight"
        for path, layers in edit["modules"].items()
        for position, (kind, *_) in enumerate(layers)
        if kind in ("Linear", "Conv1d", "Conv2d")
    }


def source(edit: Edit, network: str = "network") -> list[str]:
    """Lines of Python that do a `replace` to a variable `network`, with torch alone."""
    assert edit["kind"] == "replace", "scales are folded before an export"
    lines = []
    for path, layers in edit["modules"].items():
        made = [f"torch.nn.{kind}({', '.join(map(repr, arguments))})" for kind, *arguments in layers]
        module = made[0] if len(made) == 1 else f"torch.nn.Sequential({', '.join(made)})"
        lines.append(f"{network}.set_submodule({path!r}, {module})")
    return lines
