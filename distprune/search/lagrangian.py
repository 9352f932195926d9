"""The formulas of PPO-Lagrangian: the objective, advantages, and the price of exceeding a budget.

The clipped objective is Schulman et al. 2017, arXiv:1707.06347, eq. 7; the multiplier by gradient ascent Ray et al. 2019, "Benchmarking
safe exploration in deep reinforcement learning"; by PID control Stooke et al. 2020, arXiv:2007.03964. Costs are in budgets (1 = all of
it), so that the multiplier means the same under every budget.
"""

import math
from typing import Protocol

import torch
from torch import Tensor, nn


def log_prob(actions: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """Log-density of a Gaussian."""
    return -0.5 * ((actions - mean) / log_std.exp()).square() - log_std - 0.5 * math.log(2 * math.pi)


def advantages(rewards: Tensor, values: Tensor, smoothing: float) -> Tensor:
    """Generalised advantage estimates without discount: [episodes, steps] from rewards and values of the same shape."""
    following = torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], dim=1)
    deltas = rewards + following - values
    found, carried = torch.zeros_like(deltas), torch.zeros_like(deltas[:, 0])
    for step in reversed(range(deltas.shape[1])):
        carried = deltas[:, step] + smoothing * carried
        found[:, step] = carried
    return found


def loss(ratio: Tensor, reward: Tensor, cost: Tensor, price: float, clip: float) -> Tensor:
    """[-mean(min(r A, clip(r) A)) + nu mean(r A_c)] / (1 + nu): the cost term is not clipped.

    `ratio` of new to old probabilities; `reward` are advantages, `cost` those of the cost.
    """
    gained = torch.minimum(ratio * reward, ratio.clamp(1 - clip, 1 + clip) * reward).mean()
    return (price * (ratio * cost).mean() - gained) / (1 + price)


def divergence(mean: Tensor, log_std: Tensor, other: Tensor, other_log_std: Tensor) -> Tensor:
    """KL of a Gaussian from another, the mean over states."""
    variance = (2 * (log_std - other_log_std)).exp() + ((mean - other) / other_log_std.exp()).square()
    return (0.5 * (variance - 1) + other_log_std - log_std).mean()


class Multiplier(Protocol):
    """The price of exceeding the budget."""

    @property
    def value(self) -> float:
        """nu."""

    def step(self, cost: float) -> None:
        """Move by the mean cost of a batch, in budgets."""


class Gradient:
    """nu = softplus(eta), eta by Adam at 0.1 uphill on nu * (cost - 1). It starts at 1 and has no floor but 0."""

    def __init__(self) -> None:
        self._eta = torch.tensor(math.log(math.e - 1), dtype=torch.double, requires_grad=True)
        self._adam = torch.optim.Adam([self._eta], lr=0.1)

    @property
    def value(self) -> float:
        return float(nn.functional.softplus(self._eta.detach()))

    def step(self, cost: float) -> None:
        self._adam.zero_grad()
        (-nn.functional.softplus(self._eta) * (cost - 1)).backward()  # type: ignore[no-untyped-call]
        self._adam.step()


class Pid:
    """nu = max(0, Kp * ema(delta) + I + Kd * max(0, ema(cost) - ema(cost) `delay` steps ago)), I += Ki * delta and never below 0."""

    def __init__(self, *, kp: float = 1.0, ki: float = 0.1, kd: float = 1.0, ema: float = 0.95, delay: int = 10) -> None:
        self._kp, self._ki, self._kd, self._ema, self._delay = kp, ki, kd, ema, delay
        self._integral = 1.0  # as the other one starts
        self._delta = 0.0
        self._costs: list[float] = []  # smoothed
        self._value = 1.0

    @property
    def value(self) -> float:
        return self._value

    def step(self, cost: float) -> None:
        delta = cost - 1
        self._integral = max(0.0, self._integral + self._ki * delta)
        self._delta = self._ema * self._delta + (1 - self._ema) * delta
        self._costs.append(self._ema * self._costs[-1] + (1 - self._ema) * cost if self._costs else cost)
        rise = self._costs[-1] - self._costs[max(len(self._costs) - 1 - self._delay, 0)]
        self._value = max(0.0, self._kp * self._delta + self._integral + self._kd * max(0.0, rise))
