"""torch-pruning's dependency graph, read as groups. The only file that knows torch-pruning."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from distprune.core.granularity.law import leaves
from distprune.core.granularity.sides import IN, OUT, block_count, sides, tensors_along

if TYPE_CHECKING:
    from distprune.core.granularity.coupling import Group, Role

Channel = tuple[int, int, int]  # node, side, index


class _At(NamedTuple):
    """A channel on its way through torch-pruning's index mappings."""

    idx: int
    root_idx: int


class _Ties:
    """Union-find over channels. A forbidden channel takes all that are tied to it along."""

    def __init__(self) -> None:
        self._parent: dict[Any, Any] = {}
        self._forbidden: set[Any] = set()

    def find(self, a: Any) -> Any:
        parent = self._parent
        root = a
        while (above := parent.setdefault(root, root)) != root:
            root = above
        while (above := parent[a]) != root:
            parent[a], a = root, above
        return root

    def tie(self, a: Any, b: Any) -> None:
        a, b = self.find(a), self.find(b)
        if a != b:
            self._parent[b] = a
            if b in self._forbidden:
                self._forbidden.add(a)

    def forbid(self, a: Any) -> None:
        self._forbidden.add(self.find(a))

    def forbidden(self, a: Any) -> bool:
        return self.find(a) in self._forbidden


def propose(model: nn.Module, example: Tensor, path: str = "") -> "list[Group]":
    """Groups of the module at `path`, with names as the whole model gives them; its own input and output are the boundary.

    The module gets the input that it gets in a forward pass of the model on `example`. Changes the model (mode, requires_grad).
    Raises what torch-pruning raises on a network that it does not understand.
    """
    for tensor in model.parameters():
        tensor.requires_grad_(tensor.is_floating_point() or tensor.is_complex())
    model.eval()
    module = model.get_submodule(path)
    args, kwargs = _inputs(model, module, example) if path else ((example,), {})
    return _groups(model, *_channels(*_graph(module, args, kwargs)))


def _inputs(model: nn.Module, module: nn.Module, example: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
    caught: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def catch(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        caught.append((args, kwargs))

    with torch.no_grad(), module.register_forward_pre_hook(catch, with_kwargs=True):
        model(example)
    if not caught:
        raise RuntimeError("its forward method is not called")
    return caught[0]


def _graph(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, set[Any]]:
    """The graph, and the gradient functions of the marked inputs. The outputs end in nodes of type OUTPUT."""
    from torch_pruning import DependencyGraph

    marks = set()

    def mark(value: Any) -> Any:
        if isinstance(value, Tensor) and value.is_floating_point():
            value = value.detach().requires_grad_() * 1
            marks.add(value.grad_fn)
        elif isinstance(value, list | tuple) and not hasattr(value, "_fields"):
            value = type(value)(map(mark, value))
        return value

    def forward(module: nn.Module, inputs: Any) -> Any:
        args, kwargs = inputs
        return module(*map(mark, args), **{name: mark(value) for name, value in kwargs.items()})

    def ends(out: Any) -> list[Tensor]:
        return [leaf * 1 for leaf in leaves(out) if leaf.requires_grad]

    graph = DependencyGraph().build_dependency(module, (args, kwargs), forward_fn=forward, output_transform=ends, verbose=False)
    return graph, marks


def _channels(graph: Any, marks: set[Any]) -> tuple[_Ties, dict[Channel, nn.Module]]:
    """Tie the channels that must be removed together, starting from the outputs of all convolutions and linear layers.

    An own closure over torch-pruning's edges and index mappings: its get_pruning_group loses ties where several channels map to one, and
    does not end on networks (Swin) where a cycle of reshapes makes indices grow. Here an index beyond all channels is forbidden.
    Returns the ties and the module of each channel met.
    """
    from torch_pruning.ops import OPTYPE

    closed = {OPTYPE.OUTPUT, OPTYPE.PARAMETER, OPTYPE.LN, OPTYPE.EMBED, OPTYPE.MHA, OPTYPE.LSTM, OPTYPE.CUSTOMIZED}
    nodes = list(graph.module2node.values())
    number = {id(node): i for i, node in enumerate(nodes)}
    sizes = [sides(node.module) for node in nodes]
    widest = max((max(size) for size in sizes if size), default=0)
    functions = [(p.prune_out_channels, p.prune_in_channels) for p in (graph.get_pruner_of_module(node.module) for node in nodes)]
    ties, seen = _Ties(), defaultdict[tuple[int, int], set[int]](set)
    stack: list[tuple[int, int, list[int]]] = []

    def arrive(i: int, side: int, channels: Iterable[int]) -> None:
        if not (new := [c for c in dict.fromkeys(channels) if c not in seen[i, side]]):
            return
        seen[i, side].update(new)
        stack.append((i, side, new))
        size = sizes[i]
        shut = nodes[i].type in closed or nodes[i].grad_fn in marks or (nodes[i].type == OPTYPE.DEPTHWISE_CONV and size[IN] != size[OUT])
        for c in new:
            if shut or not 0 <= c < (size[side] if size else widest):
                ties.forbid((i, side, c))
        if blocks := block_count(nodes[i].module):  # channels that a grouped layer cannot part
            for block in {c * blocks // size[side] for c in new}:
                for to_side in {side, IN if functions[i][OUT] != functions[i][IN] else OUT, OUT}:
                    width = size[to_side] // blocks
                    members = range(block * width, (block + 1) * width)
                    for c in members:
                        ties.tie((i, side, block * (size[side] // blocks)), (i, to_side, c))
                    arrive(i, to_side, members)

    def follow(i: int, side: int, channels: list[int]) -> None:
        for edge in nodes[i].dependencies:
            if not edge.is_triggered_by(functions[i][side]):
                continue
            to = number[id(edge.target)]
            to_side = OUT if edge.handler == functions[to][OUT] else IN
            there: Sequence[Any] = [_At(c, c) for c in channels]
            for mapping in edge.index_mapping:
                there = mapping(there) if mapping is not None else there
            for c in there:
                if c.root_idx is None:  # a mapping that does not say which channel became which
                    ties.forbid((to, to_side, c.idx))
                else:
                    ties.tie((i, side, c.root_idx), (to, to_side, c.idx))
            arrive(to, to_side, [c.idx for c in there])

    for i, node in enumerate(nodes):
        if isinstance(node.module, nn.modules.conv._ConvNd | nn.Linear):
            arrive(i, OUT, range(sizes[i][OUT]))
        while stack:
            at, side, channels = stack.pop()
            if channels := [c for c in channels if not ties.forbidden((at, side, c))]:
                follow(at, side, channels)
    return ties, {(i, side, c): nodes[i].module for (i, side), channels in seen.items() if sizes[i] for c in channels}


def _groups(model: nn.Module, ties: _Ties, met: dict[Channel, nn.Module]) -> "list[Group]":
    """Sets of tied channels that lie in the same tensors in the same way are the units of one group."""
    from distprune.core.granularity.coupling import Group, Part

    tensors = [*model.named_parameters(), *model.named_buffers()]
    names = {id(tensor): name for name, tensor in tensors}
    order = {name: i for i, (name, _) in enumerate(tensors)}
    places = []
    for channel, module in met.items():
        for tensor, dim, role in tensors_along(module, channel[1]):
            if tensor is None:
                continue
            if id(tensor) not in names:  # computed from others, by a parametrization
                ties.forbid(channel)
                continue
            place = (names[id(tensor)], dim, channel[2])
            ties.tie(channel, place)  # two modules that share a tensor meet here
            places.append((place, role))
    units: dict[Any, dict[tuple[str, int, Role], set[int]]] = defaultdict(lambda: defaultdict(set))
    for (name, dim, index), role in places:
        if not ties.forbidden((name, dim, index)):
            units[ties.find((name, dim, index))][name, dim, role].add(index)
    alike: dict[Any, list[Any]] = defaultdict(list)
    for unit in units.values():
        keys = sorted(unit, key=lambda key: (order[key[0]], key[1]))
        alike[tuple((key, len(unit[key])) for key in keys)].append([sorted(unit[key]) for key in keys])
    found: dict[str, Group] = {}
    for signature, members in sorted(alike.items(), key=lambda item: -len(item[1])):
        roles = {role for (_, _, role), _ in signature}
        if len(members) < 2 or not {"produces", "consumes"} <= roles:
            continue
        members.sort()
        parts = tuple(
            Part(name, dim, torch.tensor([member[i] for member in members]), role) for i, ((name, dim, role), _) in enumerate(signature)
        )
        makers = [part.name for part in parts if part.role == "produces" and part.name not in found]
        if makers:  # two groups of one layer have a name each only if another layer gives the second one
            found[makers[0]] = Group(makers[0], parts)
    return sorted(found.values(), key=lambda group: order[group.name])
