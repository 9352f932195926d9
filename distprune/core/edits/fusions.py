"""What fusing each pair of a network would give and lose, measured on batches."""

import copy
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from distprune.core.edits import structure
from distprune.core.edits.linearise import curve, linear_map
from distprune.core.edits.pairs import Pair, find_pairs, window
from distprune.core.fusion import Affine, Moments, Sides, Window
from distprune.errors import UserError, unknown

Form = Literal["data", "per_channel", "gaussian", "random"]
_LARGEST = 8192  # inputs of a fused layer, or of a position of one: its second moments take half a gigabyte
_CHUNK = 2**24  # numbers that patches of a convolution may take at once
_HELD = 1024  # samples at most on which a map is judged that it was not fitted on


@dataclass(frozen=True)
class Fusion:
    """A pair, the layers in its place, their values, and what is lost: the mean square error over the variance, 0 if nothing."""

    pair: Pair
    layers: list[list[Any]]
    values: Affine
    residual: float

    @property
    def edit(self) -> structure.Edit:
        """The first layer's place holds the fused one; the second layer's and those between are empty."""
        empty = {path: [["Identity"]] for path in (*self.pair.between, self.pair.second)}
        modules = {self.pair.first: self.layers, **empty}
        return {"kind": "replace", "modules": modules, "fused": self.pair.name, "residual": self.residual}

    @torch.no_grad()
    def set_values(self, model: nn.Module) -> None:
        """Give the fused layer of an edited network its values."""
        place = model.get_submodule(self.pair.first)
        layer = place[-1] if isinstance(place, nn.Sequential) else place
        assert isinstance(layer, nn.Linear | nn.Conv2d) and layer.bias is not None
        layer.weight.copy_(self.values.weight.reshape(layer.weight.shape))
        layer.bias.copy_(self.values.bias)


class _Seen:
    """What a pair of a network does while batches go through it."""

    def __init__(self, pair: Pair, network: nn.Module, form: Form, kernel: int) -> None:
        self.pair, self.form, self.kernel = pair, form, kernel
        self.chain = [network.get_submodule(path) for path in (pair.first, *pair.between, pair.second)]
        self.first, self.second = self.chain[0], self.chain[-1]
        self.wrong = ""  # why the pair cannot be fused after all
        self.moments: Moments | None = None
        self.held: list[tuple[Tensor, Tensor]] = []
        self.window: Window | None = None
        self.example: Tensor | None = None
        self._inputs = torch.empty(0)
        self._curve: list[Tensor] = []  # count, sum and sum of squares of what goes into the activation
        self._handles = [self.first.register_forward_pre_hook(self._begin), self.second.register_forward_hook(self._end)]
        if form == "gaussian":
            try:
                activation = curve(self.chain[1:-1])
            except ValueError:
                self.wrong = "the closed form is for one elementwise activation, and for no max-pooling or normalisation but batch norm's"
            else:
                if activation is not None:
                    self._handles.append(activation.register_forward_pre_hook(self._count))

    def close(self) -> None:
        """The batches are through."""
        for handle in self._handles:
            handle.remove()

    def _begin(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        self._inputs = args[0]

    def _count(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        z = args[0].detach().double()
        if isinstance(self.first, nn.Linear):
            z = z.flatten(0, -2)
        if isinstance(self.second, nn.Conv2d):
            z = z.movedim(1, 3).flatten(0, 2)
        sums = [torch.tensor(float(len(z))), z.sum(0), z.square().sum(0)]
        self._curve = [old + new for old, new in zip(self._curve, sums, strict=True)] if self._curve else sums

    def _end(self, module: nn.Module, args: tuple[Tensor, ...], outputs: Tensor) -> None:
        inputs, outputs = self._inputs, outputs.detach()
        if self.wrong or self._misfit(inputs, outputs):
            return
        self.example = inputs[:1].clone()
        left = _HELD - sum(len(y) for _, y in self.held)
        apart = min(len(outputs) // 4, left)
        if apart:
            self.held.append((inputs[-apart:].clone(), outputs[-apart:].clone()))
        self.add(inputs[: len(inputs) - apart], outputs[: len(outputs) - apart])

    def _misfit(self, inputs: Tensor, outputs: Tensor) -> bool:
        width = inputs.shape[-1]
        if isinstance(self.first, nn.Linear):
            fits = inputs.shape[:-1] == outputs.shape[:-1]
        elif isinstance(self.second, nn.Linear):
            fits, width = inputs.dim() == 4 and outputs.dim() == 2 and len(inputs) == len(outputs), inputs[0].numel()
        else:
            sides: Sides = (inputs.shape[-2], inputs.shape[-1])
            whole = window(self.chain)
            assert whole is not None
            self.window = whole.cut(self.kernel, sides) if self.kernel else whole
            fits = inputs.dim() == 4 and self.window.positions(sides) == tuple(outputs.shape[2:])
            width = inputs.shape[1] * self.window.kernel[0] * self.window.kernel[1]
        if not fits:
            self.wrong = f"inputs of shape {tuple(inputs.shape)} and outputs of shape {tuple(outputs.shape)} are not in step"
        elif width > _LARGEST:
            self.wrong = f"a fused layer would have {width} inputs, more than {_LARGEST}"
        return bool(self.wrong)

    def rows(self, inputs: Tensor, outputs: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Rows of a linear regression, in parts that fit into memory."""
        if self.window is not None:
            size = outputs[0, 0].numel() * inputs.shape[1] * self.window.kernel[0] * self.window.kernel[1]
            parts = max(1, _CHUNK // size)
            for x, y in zip(torch.split(inputs, parts), torch.split(outputs, parts), strict=True):
                yield self.window.rows(x), y.flatten(2).mT.flatten(0, 1)
        elif isinstance(self.first, nn.Linear):
            yield inputs.reshape(-1, inputs.shape[-1]), outputs.reshape(-1, outputs.shape[-1])
        else:
            yield inputs.flatten(1), outputs

    def add(self, inputs: Tensor, outputs: Tensor) -> None:
        """Take rows into the moments."""
        for x, y in self.rows(inputs, outputs):
            if self.moments is None:
                self.moments = Moments(x.shape[1], y.shape[1], x.device)
            self.moments.add(x, y)

    def _fit(self, ridge: float) -> Affine:
        assert self.moments is not None and self.example is not None
        if self.form == "gaussian":
            if not self._curve:
                return linear_map(self.chain, self.example, window=self.window)
            count, total, squares = self._curve
            mean = total / count
            std = (squares / count - mean.square()).clamp(min=0).sqrt()
            if self.window is not None:
                mean, std = mean[:, None, None], std[:, None, None]
            return linear_map(self.chain, self.example, mean, std, window=self.window)
        per_channel = self.form == "per_channel" and isinstance(self.first, nn.Conv2d)
        return self.moments.best(ridge=ridge, blocks=self.example.shape[1] if per_channel else 1)

    def fusion(self, ridge: float) -> Fusion:
        """The map fitted on all samples, with its error on those that were held back from a first fit."""
        tried = self._fit(ridge)
        held = (rows for inputs, outputs in self.held for rows in self.rows(inputs, outputs))
        residual = tried.error(held) if self.held else 1.0  # batches of fewer than four samples have none to spare
        for inputs, outputs in self.held:
            self.add(inputs, outputs)
        values = self._fit(ridge)
        made, width = values.weight.shape
        if self.window is not None:
            assert self.example is not None
            sides = [list(pair) for pair in (self.window.kernel, self.window.stride, self.window.padding)]
            layers: list[list[Any]] = [["Conv2d", self.example.shape[1], made, *sides]]
        else:
            layers = [["Linear", width, made]]
            if isinstance(self.first, nn.Conv2d):
                layers = [["Flatten"], *layers]
        return Fusion(self.pair, layers, values, residual)


def fusions(
    model: nn.Module,
    feed: Callable[[nn.Module], None],
    *,
    pick: str = "smallest",
    weights: Collection[str] | None = None,
    form: Form = "data",
    ridge: float = 1e-4,
    kernel: int = 0,
) -> list[Fusion]:
    """The fusions that `pick` allows, best first: all, that of the `last` pair, or that of a pair named 'first+second'.

    `feed` runs batches through the network that it is given, a copy in eval mode. Raises UserError where there is no pair.
    """
    if kernel and form == "gaussian":
        raise UserError(f"The closed form is for all that two convolutions see, so kernel must be 0, got {kernel}. Write form: data.")
    pairs = find_pairs(model, weights)
    if not pairs:
        raise UserError(
            f"fusion needs neighbouring Linear or Conv2d layers with modules of torch.nn between them, {type(model).__name__} has none. "
            "Write its activations as modules, or take plain_conv, lenet5, vgg_cifar or mlp."
        )
    named = {pair.name: pair for pair in pairs}
    if pick not in ("smallest", "last", *named):
        raise unknown("pair to fuse", pick, ("smallest", "last", *named))
    chosen = pairs if pick == "smallest" else [pairs[-1] if pick == "last" else named[pick]]
    network = copy.deepcopy(model).eval()
    seen = [_Seen(pair, network, form, kernel) for pair in chosen]
    with torch.no_grad():
        feed(network)
        for one in seen:
            one.close()
        fitting = [one for one in seen if one.moments is not None and not one.wrong]
        if not fitting:
            reasons = "; ".join(f"'{one.pair.name}': {one.wrong or 'it was not run'}" for one in seen)
            raise UserError(f"No pair of {type(model).__name__} can be fused: {reasons}. Choose another pair, form or kernel.")
        return sorted((one.fusion(ridge) for one in fitting), key=lambda fusion: fusion.residual)
