"""Bringing a prior over weights to a prior over functions: the 1-Wasserstein distance between what both say at measurement points."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, vmap

from distprune.core.priors.families import Family
from distprune.core.priors.gaussian_process import GaussianProcess
from distprune.core.streams import global_stream
from distprune.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Matching:
    """Sizes of the matching; the defaults are the paper's (Tran et al. 2022, arXiv:2011.12829, algorithm 1)."""

    iterations: int = 200
    functions: int = 128  # drawn from each side in an iteration
    critic_steps: int = 200
    hidden: int = 200  # units of each of the critic's two hidden layers
    critic_rate: float = 0.02
    rate: float = 0.05
    penalty: float = 10.0
    one_sided: bool = False  # whether only slopes above 1 are punished
    stop: float = 0.1  # the critic is done when the norm of its gradient falls below
    outputs: int = 10  # of a network with more, as many are looked at in an iteration, drawn anew

    def match(
        self,
        family: Family,
        process: GaussianProcess,
        network: nn.Module,
        points: Callable[[], Tensor],
        *,
        seed: int,
        purpose: str = "functional prior",
    ) -> list[float]:
        """Fit the parameters of `family` in place and return the distance of each iteration, as its critic estimates it.

        `points` draws measurement points [n, ...] from the global generator. An iteration draws functions of both sides at the same points,
        trains a critic from scratch to tell them apart, and makes one step of RMSprop against it. Outputs share the critic, and
        their distances are added up.
        """
        optimizer = torch.optim.RMSprop(family.parameters, lr=self.rate) if family.parameters else None
        distances = []
        for iteration in range(self.iterations):
            with global_stream(seed, purpose, iteration), torch.enable_grad():
                inputs = points()
                drawn = functions_of(network, family, inputs, self.functions)  # [functions, n, outputs]
                if drawn.shape[2] > self.outputs:
                    drawn = drawn[:, :, torch.randperm(drawn.shape[2], device="cpu")[: self.outputs].to(drawn.device)]
                wished = process.draw(inputs, *drawn.shape[::2])
                ours, theirs = (bag.transpose(1, 2).flatten(0, 1) for bag in (drawn, wished))  # [functions * outputs, n]
                critic = Critic(len(inputs), self.hidden, inputs.device)
                self._train(critic, ours.detach(), theirs)
                distance = (critic(ours).mean() - critic(theirs).mean()) * drawn.shape[2]
                distances.append(float(distance.detach()))
                if optimizer is not None:
                    optimizer.zero_grad()
                    distance.backward()  # type: ignore[no-untyped-call]
                    optimizer.step()
        return distances

    def _train(self, critic: "Critic", ours: Tensor, theirs: Tensor) -> None:
        optimizer = torch.optim.Adagrad(critic.parameters, lr=self.critic_rate)
        for _ in range(self.critic_steps):
            share = torch.rand(len(ours), 1, device=ours.device)
            norm = torch.linalg.vector_norm(critic.slope(share * ours + (1 - share) * theirs), dim=1)
            excess = (norm - 1).clamp(min=0) if self.one_sided else norm - 1
            loss = critic(theirs).mean() - critic(ours).mean() + self.penalty * excess.square().mean()
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            if torch.linalg.vector_norm(torch.stack([p.grad.norm() for p in critic.parameters if p.grad is not None])) < self.stop:
                break
            optimizer.step()


class Critic:
    """A network n - hidden - hidden - 1 with softplus between, and its slope in closed form, which spares a second backward pass."""

    def __init__(self, inputs: int, hidden: int, device: torch.device) -> None:
        self.weights = [
            nn.init.xavier_uniform_(torch.empty(b, a, device=device)) for a, b in ((inputs, hidden), (hidden, hidden), (hidden, 1))
        ]
        self.biases = [torch.randn(len(weight), device=device) for weight in self.weights]
        self.parameters = [tensor.requires_grad_() for tensor in (*self.weights, *self.biases)]

    def __call__(self, values: Tensor) -> Tensor:
        """[m] of function values [m, n]."""
        first = F.softplus(F.linear(values, self.weights[0], self.biases[0]))
        second = F.softplus(F.linear(first, self.weights[1], self.biases[1]))
        return F.linear(second, self.weights[2], self.biases[2])[:, 0]

    def slope(self, values: Tensor) -> Tensor:
        """d critic / d values, [m, n]."""
        first = F.linear(values, self.weights[0], self.biases[0])
        second = F.linear(F.softplus(first), self.weights[1], self.biases[1])
        inner = (torch.sigmoid(second) * self.weights[2]) @ self.weights[1]
        return (torch.sigmoid(first) * inner) @ self.weights[0]


def functions_of(network: nn.Module, family: Family, inputs: Tensor, functions: int) -> Tensor:
    """Values [functions, n, outputs] at `inputs` [n, ...] of networks drawn from a prior. The network itself is left as it is."""

    def values(parameters: dict[str, Tensor]) -> Tensor:
        outputs: Tensor = functional_call(network, parameters, (inputs,))
        return outputs.float().flatten(1)

    try:
        drawn: Tensor = vmap(values, randomness="different")(family.draw(functions))
        return drawn
    except UserError:
        raise
    except Exception as error:  # the forward pass is the user's
        raise UserError(
            f"regularizer 'functional_prior' cannot draw functions of this network: {type(error).__name__}: {str(error).splitlines()[0]} "
            "Choose l2 or none."
        ) from error


def mixed(inputs: Tensor, n: int, share: float = 0.7) -> Tensor:
    """[n, ...]: a share of rows of `inputs`, the rest uniform in the box that they fill; from the global generator."""
    seen = inputs[torch.randint(len(inputs), (math.ceil(share * n),)).to(inputs.device)]
    low, high = inputs.amin(0), inputs.amax(0)
    return torch.cat([seen, low + (high - low) * torch.rand(n - len(seen), *inputs.shape[1:], device=inputs.device)])
