"""Families of priors over the weights and biases of a network's layers, drawn from in a way that passes gradients on to their parameters.

All draw weights scaled by one over the root of the fan-in, so that sigma = 1 gives units of variance about 1 at every width.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distprune.core.masks import prunable
from distprune.errors import UserError

Name = Literal["fixed", "fixed_h", "gpi_g", "gpi_h", "gpi_nf"]
_ONE = math.log(math.e - 1)  # softplus of it is 1
_FLOWS = 10  # planar layers
_MOST = 100_000  # weights and biases that a flow is made for: it has 2 * _FLOWS + 1 numbers for each
_MOMENTS = 256  # draws from a flow for its second moment


@dataclass(frozen=True)
class Layer:
    """A prunable weight and the bias that comes with it."""

    weight: str
    shape: torch.Size
    fan_in: int
    bias: str | None
    biases: int

    @property
    def size(self) -> int:
        """Weights and biases."""
        return self.shape.numel() + self.biases


def layers_of(model: nn.Module) -> list[Layer]:
    """The layers of a network that have a prior: those that can be pruned, whatever a recipe excludes."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    owners = {id(module.weight): module for module in model.modules() if isinstance(getattr(module, "weight", None), Tensor)}
    found = []
    for name, weight in prunable(model).items():
        module = owners.get(id(weight))  # packed projections of attention are no one's `weight`
        bias = getattr(module, "bias", None)
        out = weight.shape[0]
        if isinstance(module, nn.modules.conv._ConvTransposeNd):
            out = weight.shape[1] * module.groups
        biases = (None, 0) if bias is None else (names[id(bias)], bias.numel())
        found.append(Layer(name, weight.shape, weight.numel() // out, *biases))
    return found


class Family(ABC):
    """A prior over all layers. Draws are from the global generator."""

    def __init__(self, layers: Sequence[Layer], device: torch.device) -> None:
        self.layers, self.device = layers, device

    @property
    def parameters(self) -> list[Tensor]:
        """What is fitted; empty for a fixed prior."""
        return []

    def draw(self, networks: int) -> dict[str, Tensor]:
        """Parameter name -> values [networks, *shape]."""
        drawn = {}
        for index, layer in enumerate(self.layers):
            weight, bias = self._draw(index, layer, networks)
            drawn[layer.weight] = weight.view(networks, *layer.shape) / math.sqrt(layer.fan_in)
            if layer.bias is not None:
                drawn[layer.bias] = bias
        return drawn

    @abstractmethod
    def _draw(self, index: int, layer: Layer, networks: int) -> tuple[Tensor, Tensor]:
        """Scaled weights and biases of a layer, [networks, number of them] each."""

    @abstractmethod
    def precision(self, index: int) -> float:
        """E[1 / variance] of the scaled weights of a layer."""

    def penalties(self) -> dict[str, float]:
        """Weight name -> fan-in times precision: what multiplies |w|^2 / 2 in minus the logarithm of the prior."""
        return {layer.weight: layer.fan_in * self.precision(index) for index, layer in enumerate(self.layers)}

    def _noise(self, layer: Layer, networks: int) -> tuple[Tensor, Tensor]:
        return torch.randn(networks, layer.shape.numel(), device=self.device), torch.randn(networks, layer.biases, device=self.device)


class Gaussian(Family):
    """N(0, sigma^2) with one sigma for the weights and one for the biases of each layer (GPi-G; section 4.1 of the paper)."""

    def __init__(self, layers: Sequence[Layer], device: torch.device, *, fixed: bool = False) -> None:
        super().__init__(layers, device)
        self.rho = torch.full((len(layers), 2), _ONE, device=device, requires_grad=not fixed)  # sigma = softplus(rho), of weight and bias

    @property
    def parameters(self) -> list[Tensor]:
        return [self.rho] if self.rho.requires_grad else []

    def _draw(self, index: int, layer: Layer, networks: int) -> tuple[Tensor, Tensor]:
        sigma, (weight, bias) = F.softplus(self.rho[index]), self._noise(layer, networks)
        return sigma[0] * weight, sigma[1] * bias

    def precision(self, index: int) -> float:
        return float(F.softplus(self.rho[index, 0].detach().double())) ** -2


class Hierarchical(Family):
    """As Gaussian, with every variance drawn from an inverse gamma of its own shape and rate (GPi-H; section 4.2 of the paper).

    It starts at InvGamma(2, 1), whose mean is 1; fixed, it is the paper's InvGamma(1, 1).
    """

    def __init__(self, layers: Sequence[Layer], device: torch.device, *, fixed: bool = False) -> None:
        super().__init__(layers, device)
        start = torch.tensor([_ONE, _ONE] if fixed else [math.log(math.exp(2) - 1), _ONE], device=device)
        self.rho = start.expand(len(layers), 2, 2).clone().requires_grad_(not fixed)  # softplus of it is (shape, rate), of weight and bias

    @property
    def parameters(self) -> list[Tensor]:
        return [self.rho] if self.rho.requires_grad else []

    def _draw(self, index: int, layer: Layer, networks: int) -> tuple[Tensor, Tensor]:
        shape, rate = F.softplus(self.rho[index]).unbind(1)
        precision = torch.distributions.Gamma(shape, rate).rsample((networks,))  # [networks, 2]
        sigma, (weight, bias) = precision.clamp(min=1e-6).rsqrt(), self._noise(layer, networks)
        return sigma[:, :1] * weight, sigma[:, 1:] * bias

    def shape_and_rate(self, index: int) -> tuple[float, float]:
        """Of the variance of a layer's weights."""
        shape, rate = F.softplus(self.rho[index, 0].detach().double()).tolist()
        return shape, rate

    def precision(self, index: int) -> float:
        shape, rate = self.shape_and_rate(index)
        return shape / rate


class Flow(Family):
    """Planar flows over a factorised Gaussian, for the biases and weights of each layer as one vector (GPi-NF; section 4.3 of the paper).

    x <- x + u tanh(w'x + c), with u kept where the map can be inverted (Rezende & Mohamed 2015, arXiv:1505.05770, appendix A.1). As a
    penalty it is the Gaussian of the same second moment.
    """

    def __init__(self, layers: Sequence[Layer], device: torch.device) -> None:
        super().__init__(layers, device)
        if (size := sum(layer.size for layer in layers)) > _MOST:
            raise UserError(
                f"family 'gpi_nf' is for networks of at most {_MOST:,} weights, as it has {2 * _FLOWS + 1} numbers for each, got {size:,}. "
                "Write family: gpi_g."
            )
        self.flows = [PlanarFlow(layer.size, device) for layer in layers]

    @property
    def parameters(self) -> list[Tensor]:
        return [tensor for flow in self.flows for tensor in flow.parameters]

    def _draw(self, index: int, layer: Layer, networks: int) -> tuple[Tensor, Tensor]:
        drawn = self.flows[index].draw(networks)
        return drawn[:, layer.biases :], drawn[:, : layer.biases]

    @torch.no_grad()
    def precision(self, index: int) -> float:
        return 1 / float(self._draw(index, self.layers[index], _MOMENTS)[0].double().square().mean())


class PlanarFlow:
    """A density over vectors of `size` numbers."""

    def __init__(self, size: int, device: torch.device, *, flows: int = _FLOWS) -> None:
        self.rho = torch.full((size,), _ONE, device=device, requires_grad=True)  # the base is N(0, softplus(rho)^2)
        self.w = torch.randn(flows, size, device=device, requires_grad=True)  # both in units of 1 / sqrt(size)
        self.u = torch.randn(flows, size, device=device).mul_(0.1).requires_grad_()
        self.c = torch.zeros(flows, device=device, requires_grad=True)

    @property
    def parameters(self) -> list[Tensor]:
        """What is fitted."""
        return [self.rho, self.w, self.u, self.c]

    def _layers(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """(w, u, c) of each layer, with w'u above -1: it is softplus(w'u + log(e - 1)) - 1, which is 0 at 0."""
        w, u = (tensor / math.sqrt(len(self.rho)) for tensor in (self.w, self.u))
        inner = (w * u).sum(1, keepdim=True)
        u = u + (F.softplus(inner + _ONE) - 1 - inner) * w / w.square().sum(1, keepdim=True)
        return list(zip(w, u, self.c, strict=True))

    def draw(self, vectors: int) -> Tensor:
        """[vectors, size]."""
        x = F.softplus(self.rho) * torch.randn(vectors, len(self.rho), device=self.rho.device)
        for w, u, c in self._layers():
            x = x + torch.tanh(x @ w + c)[:, None] * u
        return x

    def log_density(self, x: Tensor) -> Tensor:
        """log p of vectors [n, size], with gradients: the base's at the inverse, less log |1 + w'u tanh'(w'z + c)| of each layer."""
        total = torch.zeros(len(x), device=x.device, dtype=x.dtype)
        for w, u, c in reversed(self._layers()):
            inner = w @ u
            along = _solve(x @ w, inner, c)
            x = x - torch.tanh(along + c)[:, None] * u
            total = total - torch.log1p(inner * (1 - torch.tanh(x @ w + c).square()))
        sigma = F.softplus(self.rho)
        return total - (0.5 * (x / sigma).square() + sigma.log() + 0.5 * math.log(2 * math.pi)).sum(1)


def _solve(goal: Tensor, inner: Tensor, c: Tensor) -> Tensor:
    """The a with a + inner tanh(a + c) = goal, which rises in a: by bisection, then one step of Newton, which carries the gradients."""
    with torch.no_grad():
        low, high = goal - inner.abs(), goal + inner.abs()
        for _ in range(60):
            middle = (low + high) / 2
            above = middle + inner * torch.tanh(middle + c) > goal
            low, high = torch.where(above, low, middle), torch.where(above, middle, high)
        a = (low + high) / 2
        slope = 1 + inner * (1 - torch.tanh(a + c).square())
    return a - (a + inner * torch.tanh(a + c) - goal) / slope


def family(name: Name, layers: Sequence[Layer], device: torch.device) -> Family:
    """The family called `name`: fixed and fixed_h are the paper's references FG and FH."""
    if name in ("fixed", "gpi_g"):
        return Gaussian(layers, device, fixed=name == "fixed")
    if name in ("fixed_h", "gpi_h"):
        return Hierarchical(layers, device, fixed=name == "fixed_h")
    return Flow(layers, device)
