"""Initialization on the edge of chaos, and what brings a pruned network back to it (Hayou et al. 2021, arXiv:2002.08797).

Weights are N(0, sigma_w^2 / fan_in), biases N(0, sigma_b^2). From layer to layer the variance of what enters an activation phi goes to
q = sigma_w^2 E[phi(sqrt(q) Z)^2] + sigma_b^2, Z standard normal, and that of gradients changes by chi = sigma_w^2 E[phi'(sqrt(q) Z)^2].
On the edge of chaos chi = 1: no layer of a deep network has scores that are exponentially smaller than another's.
"""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from distprune.core.masks import PRUNABLE
from distprune.core.streams import global_stream, stream
from distprune.errors import UserError

if TYPE_CHECKING:
    from distprune.core.executor import Env
    from distprune.core.stages import SetWeights
    from distprune.core.state import State

Activation = Literal["relu", "tanh"]
_MOST = 2.0  # largest sigma_b
_NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)


def sigma_w(activation: Activation, sigma_b: float = 0.0) -> float:
    """The sigma_w with which weights are on the edge of chaos: sqrt(2) for ReLU, a curve through (sigma_w, sigma_b) = (1, 0) for tanh.

    The curve is known by q: chi = 1 gives sigma_w^2 = 1 / E[phi'^2], and then sigma_b^2 = q - sigma_w^2 E[phi^2], which grows with q.
    """
    if activation == "relu":
        if sigma_b:
            raise UserError(f"sigma_b must be 0 for relu, whose edge of chaos is the one point (sqrt(2), 0), got {sigma_b}. Leave it out.")
        return math.sqrt(2)
    if not 0 <= sigma_b <= _MOST:
        raise UserError(f"sigma_b must be in [0, {_MOST}], got {sigma_b}. Write 0.2.")

    def at(q: float) -> tuple[float, float]:
        """(sigma_w^2, sigma_b^2) of the edge at q."""
        square = mean_of(lambda z: torch.tanh(z * math.sqrt(q)).square())
        slope = mean_of(lambda z: (1 - torch.tanh(z * math.sqrt(q)).square()).square())
        return 1 / slope, q - square / slope

    low, high = 0.0, 10.0  # at 10, sigma_b is 2.3
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if at(middle)[1] < sigma_b**2 else (low, middle)
    return math.sqrt(at(low)[0])


def mean_of(function: Callable[[Tensor], Tensor]) -> float:
    """E[function(Z)] in float64, by the trapezoidal rule on [-10, 10], whose error falls exponentially for a smooth function."""
    z = torch.linspace(-10, 10, 2001, dtype=torch.float64)
    density = torch.exp(-0.5 * z.square())
    return float((density * function(z)).sum() / density.sum())


def fan_in(module: nn.Module, weight: Tensor) -> int:
    """How many products make one output of a layer, at stride 1."""
    return weight.numel() // int(module.out_channels) if getattr(module, "transposed", False) else weight[0].numel()  # type: ignore[arg-type]


@torch.no_grad()
def draw(stage: "SetWeights", state: "State", env: "Env") -> None:
    """Weights of linear layers and convolutions from N(0, sigma_w^2 / fan_in), their biases from N(0, sigma_b^2); the rest stays.

    What is not trained stays too: a readout that its model fixed, layers that a user froze.
    """
    generator = stream(env.seed, "draw", state.lap, state.clock)
    drawn: set[int] = set()  # tied weights are drawn once
    for module in state.model.modules():
        if not isinstance(module, PRUNABLE) or id(module.weight) in drawn:
            continue
        drawn.add(id(module.weight))
        normal = torch.randn(module.weight.shape, generator=generator)
        if module.weight.requires_grad:
            module.weight.copy_(normal * stage.sigma_w / math.sqrt(fan_in(module, module.weight)))
        if module.bias is not None:
            normal = torch.randn(module.bias.shape, generator=generator)
            if module.bias.requires_grad:
                module.bias.copy_(normal * stage.sigma_b)


@torch.no_grad()
def rescale(stage: "SetWeights", state: "State", env: "Env") -> None:
    """One factor a layer that makes up for what zeros have taken: the paper's rescaling trick, or with a snapshot the one measured on data.

    The paper's brings fan_in * mean(w^2) back to sigma_w^2, which is right where masks know nothing of signals. Those of SNIP do: what they
    keep leads from active neurons to active ones, up to four times the variance a layer with ReLU, and a deep network explodes. With `tag`
    a layer's products W x get the mean square that they had in that snapshot, on one batch. Layers whose output is normalised at once stay
    as they are: what they compute does not know of a factor.
    """
    normalised = before_norms(state.model, env.task.example())
    layers = {path: name for name in state.weights if (path := name.rpartition(".")[0]) not in normalised}
    if stage.tag:
        factors = _matching(stage, state, env, list(layers))
    else:
        energies = {path: fan_in(state.model.get_submodule(path), weight) * _mean_square(weight) for path, weight in _of(state, layers)}
        factors = {path: _factor(stage.sigma_w**2, energy, path) for path, energy in energies.items()}
    for path, weight in _of(state, layers):
        weight.mul_(factors.get(path, 1.0))


def _of(state: "State", layers: Mapping[str, str]) -> list[tuple[str, Tensor]]:
    return [(path, state.weights[name]) for path, name in layers.items()]


def _mean_square(values: Tensor) -> float:
    return float(values.double().square().mean())


def _factor(due: float, found: float, path: str) -> float:
    if not found:
        raise UserError(f"rescaling needs a signal in every layer, '{path}' passes none on. Lower the sparsity, or leave rescale out.")
    return math.sqrt(due / found)


def _matching(stage: "SetWeights", state: "State", env: "Env", paths: Sequence[str]) -> dict[str, float]:
    """The factor of each layer, found in the order in which they run: each sees what the layers before it make with theirs."""
    due: dict[str, float] = {}
    factors: dict[str, float] = {}

    def products(layer: nn.Module, x: Tensor, output: Tensor) -> float:
        return _mean_square(output - layer.forward(torch.zeros_like(x[:1])))  # less the bias

    def measure(path: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            due.setdefault(path, products(layer, inputs[0], output))

        return hook

    def match(path: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
        def hook(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            if path in factors:  # a layer that is called again
                return output
            factors[path] = _factor(due[path], products(layer, inputs[0], output), path)
            layer.get_parameter("weight").mul_(factors[path])
            result: Tensor = layer.forward(inputs[0])
            return result

        return hook

    batch = env.task.draw(stream(env.seed, "rescale", state.lap, state.clock), stage.batch_size)
    for values, hook in ((state.snapshots[stage.tag], measure), (state.values(), match)):
        scratch = copy.deepcopy(state.model).train()
        scratch.load_state_dict(values)
        for path in paths:
            if isinstance(layer := scratch.get_submodule(path), PRUNABLE):
                layer.register_forward_hook(hook(path), prepend=True)
        with global_stream(env.seed, "rescale", state.lap, state.clock):  # dropout
            env.task.outputs(scratch, batch)
    return factors


@torch.no_grad()
def before_norms(model: nn.Module, example: Tensor) -> set[str]:
    """Names of the modules whose output is what a normalization takes."""
    scratch = copy.deepcopy(model).eval()
    made: dict[int, tuple[str, Tensor]] = {}  # id of an output -> its module; held, so that no id is given twice
    found: set[str] = set()

    def made_by(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        return lambda module, inputs, output: made.update({id(output): (name, output)})

    def taken(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if id(inputs[0]) in made:
            found.add(made[id(inputs[0])][0])

    for name, module in scratch.named_modules():
        if isinstance(module, PRUNABLE):
            module.register_forward_hook(made_by(name))
        elif isinstance(module, _NORMS):
            module.register_forward_pre_hook(taken)
    scratch(example)
    return found
