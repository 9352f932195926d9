"""Normalised gradient descent."""

from collections.abc import Iterable
from typing import Annotated, Any

import torch
from torch import nn

from distprune.core.options import LogRange
from distprune.core.registry import optimizer


@optimizer("normalised_gd", paper="Nesterov 1984; Hazan et al. 2015, arXiv:1507.02030, algorithm 1", keeps_zeros=True)
def normalised_gd(parameters: Iterable[nn.Parameter], *, lr: Annotated[float, LogRange(1e-2, 1e-1)] = 0.03) -> torch.optim.Optimizer:
    """Steps of length `lr` along the gradient over all parameters: the path of gradient flow, without its plateaus.

    Formula:
        w <- w - lr g / ||g||

    Made for full batches, train.batch_size being the number of training points. Where the gradient is zero it stands still.
    """
    return NormalisedGD(parameters, {"lr": lr})


class NormalisedGD(torch.optim.Optimizer):
    """w <- w - lr g / ||g||."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        gradients = [parameter.grad for group in self.param_groups for parameter in group["params"] if parameter.grad is not None]
        # In float64, as squares of the gradients of a small loss are zero in float32 long before the gradients are.
        norms = [torch.linalg.vector_norm(gradient, dtype=torch.float64) for gradient in gradients]
        norm = torch.linalg.vector_norm(torch.stack(norms))
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    direction = parameter.grad / torch.where(norm > 0, norm, torch.inf).to(parameter.dtype)
                    parameter.sub_(direction, alpha=group["lr"])
