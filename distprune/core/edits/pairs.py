"""Which layers of a network can be fused: neighbours that modules of torch.nn connect, and nothing else."""

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from distprune.core.fusion import Sides, Window

ELEMENTWISE = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Softplus, nn.Softsign, nn.Tanh, nn.Tanhshrink,
    nn.Softshrink, nn.Sigmoid, nn.LogSigmoid, nn.Hardtanh, nn.Hardsigmoid, nn.Hardswish,
)  # fmt: skip
DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.AlphaDropout, nn.FeatureAlphaDropout)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.LayerNorm, nn.GroupNorm, nn.InstanceNorm2d, nn.LocalResponseNorm)
_JUMPS = (nn.Hardshrink, nn.Threshold)
_EVERYWHERE = (*ELEMENTWISE, *_JUMPS, *DROPOUTS, *_NORMS, nn.PReLU, nn.RReLU, nn.Identity)
_WINDOWS = (nn.MaxPool2d, nn.AvgPool2d, nn.LPPool2d)
_TO_DENSE = (nn.Flatten, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, *_WINDOWS)


@dataclass(frozen=True)
class Pair:
    """Two layers by their paths, with the modules between them in order."""

    first: str
    second: str
    between: tuple[str, ...]

    @property
    def name(self) -> str:
        """As options write it."""
        return f"{self.first}+{self.second}"


def find_pairs(model: nn.Module, weights: Collection[str] | None = None) -> list[Pair]:
    """The pairs of a network in the order of its forward pass, of layers whose weights are among the names `weights` (None: all).

    Left out are layers with tied weights or a forward pass of their own, modules that are used more than once, outputs that go
    elsewhere too, and what is connected by functions that cannot be taken away. A network that torch.fx cannot follow has no pairs.
    """
    try:
        graph = fx.Tracer().trace(model)
    except Exception:  # control flow that depends on data, or whatever a user's forward pass does
        return []
    calls = Counter(node.target for node in graph.nodes if node.op == "call_module")
    users = Counter(id(parameter) for module in model.modules() for parameter in module.parameters(recurse=False))
    modules = dict(model.named_modules())

    def is_layer(node: Any) -> bool:
        module = modules.get(str(node.target)) if node.op == "call_module" else None
        return (
            module is not None
            and type(module) in (nn.Linear, nn.Conv2d)
            and calls[node.target] == 1
            and all(users[id(parameter)] == 1 for parameter in module.parameters())
            and (weights is None or f"{node.target}.weight" in weights)
        )

    found = []
    for start in filter(is_layer, graph.nodes):
        between: list[str] = []
        node = start
        while len(node.users) == 1:
            before, node = node, next(iter(node.users))
            if node.args[:1] != (before,):
                break
            if is_layer(node):
                if _fits([modules[start.target], *(modules[path] for path in between), modules[node.target]]):
                    found.append(Pair(start.target, node.target, tuple(between)))
                break
            if node.op == "call_module" and calls[node.target] == 1 and len(node.args) == 1 and not node.kwargs:
                between.append(str(node.target))
            elif not _is_flatten(node):
                break
    return found


def _is_flatten(node: Any) -> bool:
    """A function that joins all dimensions but the first: it may stay, as it does nothing to rows."""
    named = (node.op == "call_method" and node.target == "flatten") or getattr(node.target, "__name__", "") == "flatten"
    return bool(named and node.args[1:] == (1,) and not node.kwargs)


def _fits(chain: list[nn.Module]) -> bool:
    first, *between, second = chain
    if isinstance(first, nn.Linear):
        return isinstance(second, nn.Linear) and all(isinstance(module, (*_EVERYWHERE, nn.Flatten)) for module in between)
    if isinstance(second, nn.Linear):
        return all(isinstance(module, (*_EVERYWHERE, *_TO_DENSE)) for module in between)
    return all(isinstance(module, (*_EVERYWHERE, *_WINDOWS)) for module in between) and window(chain) is not None


def window(chain: list[nn.Module]) -> Window | None:
    """What an output position of a chain from convolution to convolution sees; None where it is no window with even borders."""
    seen = Window()
    for module in chain:
        if isinstance(module, nn.Conv2d):
            kernel, stride, dilation = _sides(module.kernel_size), _sides(module.stride), _sides(module.dilation)
            if module.padding_mode != "zeros":
                return None
            padding = module.padding
            if padding == "same":
                wide = [(k - 1) * d for k, d in zip(kernel, dilation, strict=True)]
                if any(side % 2 for side in wide):
                    return None
                padding = (wide[0] // 2, wide[1] // 2)
            seen = seen.then(kernel, stride, (0, 0) if isinstance(padding, str) else _sides(padding), dilation)
        elif isinstance(module, _WINDOWS):
            if module.ceil_mode:
                return None
            dilation = _sides(getattr(module, "dilation", 1))
            stride = _sides(module.kernel_size if module.stride is None else module.stride)
            seen = seen.then(_sides(module.kernel_size), stride, _sides(getattr(module, "padding", 0)), dilation)
    return seen


def _sides(value: Any) -> Sides:
    return (value, value) if isinstance(value, int) else (value[0], value[1])
