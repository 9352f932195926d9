"""Stochastic-gradient Hamiltonian Monte Carlo: an optimizer that does not end, but wanders over the posterior."""

from collections.abc import Iterable
from typing import Annotated, Any

import torch
from torch import nn

from distprune.core.options import LogRange
from distprune.core.registry import optimizer
from distprune.errors import UserError


@optimizer("sghmc", paper="Chen et al. 2014, arXiv:1402.4102; adaptive: Springenberg et al. 2016, section 4", samples=True)
def sghmc(
    parameters: Iterable[nn.Parameter],
    samples: int = 1,
    *,
    lr: Annotated[float, LogRange(1e-3, 1e-2)] = 5e-3,
    friction: float = 0.01,
    burn: int = 2000,
    temperature: float = 1.0,
    weight_decay: float = 5e-4,
) -> torch.optim.Optimizer:
    """Samples of exp(-U / temperature), U the number of training samples times the loss, with `weight_decay` the precision of the prior.

    Formula:
        p <- (1 - friction) p - lr^2 M^-1 dU/dw / temperature + N(0, 2 lr^2 friction M^-1 - lr^4),   w <- w + p
        M = sqrt(moving mean of the squared gradients)

    Preconditioned in each weight by a moving average of squared gradients, adapted in the first `burn` steps. A prior of variance s^2 is a
    weight decay of 1 / (samples s^2). Decay `constant` keeps it sampling. A chain that diverges
    needs a lower `lr`, or a longer `burn`: what is adapted while gradients are small fits ill where they are large.
    """
    if friction <= 0 or temperature <= 0:
        raise UserError(f"optimizer.friction and optimizer.temperature must be above 0, got {friction} and {temperature}. Leave them out.")
    return SGHMC(parameters, scale=samples / temperature, lr=lr, friction=friction, burn=burn, weight_decay=weight_decay)


class SGHMC(torch.optim.Optimizer):
    """The loss is a mean over the batch, and `scale` what makes it minus a log-density. Noise is drawn from the global generator."""

    def __init__(
        self, parameters: Iterable[nn.Parameter], *, scale: float, lr: float, friction: float, burn: int, weight_decay: float
    ) -> None:
        super().__init__(parameters, {"scale": scale, "lr": lr, "friction": friction, "burn": burn, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step(parameter, self.state[parameter], **{key: value for key, value in group.items() if key != "params"})

    def _step(
        self, theta: nn.Parameter, memory: dict[str, Any], *, scale: float, lr: float, friction: float, burn: int, weight_decay: float
    ) -> None:
        assert theta.grad is not None
        gradient = theta.grad.add(theta, alpha=weight_decay).mul_(scale)  # of U / temperature
        if not memory:
            # The averages start at the size that gradients have, where the authors' code starts at 1: from there a sum over many samples,
            # or at a low temperature, would kick the weights before the first average is known. mean^2 <= square holds now, and so always.
            typical = gradient.square().mean()
            square = gradient.square() + torch.where(typical > 0, typical, 1.0)
            memory |= {"steps": 0, "window": torch.ones_like(theta), "mean": gradient.clone(), "square": square}
            memory["momentum"] = torch.zeros_like(theta)
        window, mean, square, momentum = (memory[key] for key in ("window", "mean", "square", "momentum"))
        if memory["steps"] < burn:
            share = 1 / (window + 1)
            window.add_(1 - window * mean.square() / square.clamp(min=1e-16))
            mean.lerp_(gradient, share)
            square.lerp_(gradient.square(), share)
        memory["steps"] += 1
        inverse_mass = square.clamp(min=1e-16).rsqrt()
        # What the friction asks for, less what the noise of the gradients brings already: lr^4 M^-1 V M^-1 = lr^4.
        variance = (2 * lr**2 * friction * inverse_mass).sub_(lr**4).clamp_(min=1e-16)
        momentum.mul_(1 - friction).addcmul_(inverse_mass, gradient, value=-(lr**2)).add_(torch.randn_like(theta).mul_(variance.sqrt_()))
        theta.add_(momentum)
