"""RMSprop."""

from collections.abc import Iterable
from typing import Annotated

import torch
from torch import nn

from distprune.core.options import LogRange
from distprune.core.registry import optimizer


@optimizer("rmsprop", paper="Tieleman & Hinton 2012, Neural networks for machine learning, lecture 6.5", keeps_zeros=True)
def rmsprop(
    parameters: Iterable[nn.Parameter],
    *,
    lr: Annotated[float, LogRange(1e-4, 1e-2)] = 1e-3,
    alpha: float = 0.9,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
) -> torch.optim.Optimizer:
    """Gradients over the root of the mean of their squares, which forgets at the rate 1 - `alpha`.

    Formula:
        v <- alpha v + (1 - alpha) g^2,   w <- w - lr g / (sqrt(v) + 1e-8)      momentum on the step where it is above 0
    """
    return torch.optim.RMSprop(parameters, lr=lr, alpha=alpha, momentum=momentum, weight_decay=weight_decay)
