"""Residual branches, scaled by L^(-1/2) for L of them (Stable ResNet, Hayou et al. 2021, arXiv:2002.08797, section 4).

y^l = y^(l-1) + L^(-1/2) F(y^(l-1)) keeps signals and gradients bounded whatever the depth. The scale is an edit while the network is
trained, and is folded into the last affine parameters of each branch at the end, so that what is exported is a plain network.
"""

import operator
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import TYPE_CHECKING, Literal

import torch
from torch import fx, nn

from distprune.core.edits.structure import foldable
from distprune.core.plan import Stage
from distprune.errors import UserError

if TYPE_CHECKING:
    from distprune.core.executor import Env
    from distprune.core.state import State

Branches = Literal["auto", "none"] | tuple[str, ...]  # found, none, or shell patterns over the names of the modules that end them
_ADD = {operator.add, operator.iadd, torch.add, "add", "add_"}
_MODULES_PASSED = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
_FUNCTIONS_PASSED = {"dropout", "stochastic_depth"}  # a scale before one of them is a scale after it
_WAY_OUT = "Name the last module of each branch, as in branches: ['*.bn2'], or write branches: none."


@dataclass(frozen=True, kw_only=True)
class ScaleBranches(Stage):
    """Multiply what residual branches return by L^(-1/2); a network without any stays as it is."""

    branches: Branches = "auto"

    @property
    def is_empty(self) -> bool:
        return self.branches == "none"

    def run(self, state: "State", env: "Env") -> Iterator[None]:
        ends = branch_ends(state.model, self.branches)
        if ends:
            state.edit({"kind": "scale", "modules": ends, "factor": len(ends) ** -0.5})
        yield from ()

    def describe(self) -> str:
        return "scale the L residual branches by L^(-1/2)"


@dataclass(frozen=True, kw_only=True)
class Fold(Stage):
    """Write scales into the parameters before them: the same function, by a network without edits."""

    def run(self, state: "State", env: "Env") -> Iterator[None]:
        state.fold()
        yield from ()

    def describe(self) -> str:
        return "fold the scales into weights"


def branch_ends(model: nn.Module, branches: Branches = "auto") -> list[str]:
    """Names of the last modules of the residual branches, in order. Raises UserError where they cannot be found or a pattern fits none."""
    if branches == "none":
        return []
    if branches == "auto":
        return _found(model)
    named = [name for name, _ in model.named_modules() if name]
    for pattern in branches:
        if not any(fnmatch(name, pattern) for name in named):
            raise UserError(f"branches must be patterns of module names, '{pattern}' fits none. The model has: {', '.join(named)}.")
    return [name for name in named if any(fnmatch(name, pattern) for pattern in branches)]


def _found(model: nn.Module) -> list[str]:
    """An addition of two values with an ancestor in common joins a shortcut and a branch: the one that runs through more layers."""
    modules = dict(model.named_modules())
    if any(isinstance(module, nn.TransformerEncoderLayer | nn.TransformerDecoderLayer) for module in modules.values()):
        raise UserError(f"residual branches inside torch's transformer layers cannot be scaled. {_WAY_OUT}")
    try:
        graph = fx.Tracer().trace(model)
    except Exception as error:  # the forward method is the user's, and may do anything
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"residual branches were not found, as torch.fx cannot trace {type(model).__name__}: {reason} {_WAY_OUT}"
        ) from error

    def layers(nodes: set[fx.Node]) -> int:
        return sum(node.op == "call_module" and any(True for _ in modules[str(node.target)].parameters()) for node in nodes)

    before: dict[fx.Node, set[fx.Node]] = {}  # a value -> itself and all that it is made of
    ends: list[str] = []
    for node in graph.nodes:
        before[node] = {node}.union(*(before[source] for source in node.all_input_nodes))
        sources = node.args[:2]
        if node.target not in _ADD or len(sources) < 2 or not all(isinstance(source, fx.Node) for source in sources):
            continue
        common = before[sources[0]] & before[sources[1]]
        shorter, longer = sorted(sources, key=lambda source: layers(before[source] - common))
        if common and layers(before[longer] - common) > layers(before[shorter] - common):
            ends.append(_end(longer, common, modules))
    calls = Counter(str(node.target) for node in graph.nodes if node.op == "call_module")
    if shared := [end for end, count in Counter(ends).items() if calls[end] != count or count > 1]:
        raise UserError(f"module '{shared[0]}' is called more than once, so what it returns cannot be scaled in one place. {_WAY_OUT}")
    return ends


def _end(node: fx.Node, common: set[fx.Node], modules: Mapping[str, nn.Module]) -> str:
    """The last module of a branch into which a scale can be folded."""
    last = node
    while node not in common:
        module = modules[str(node.target)] if node.op == "call_module" else None
        if module is not None and foldable(module):
            return str(node.target)
        if not isinstance(module, _MODULES_PASSED) and getattr(node.target, "__name__", "") not in _FUNCTIONS_PASSED:
            break
        node = node.all_input_nodes[0]
    raise UserError(f"a residual branch ends in '{last.name}', which has no weights that a scale can be folded into. {_WAY_OUT}")
