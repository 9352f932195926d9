"""Gaussian processes: what a network's functions are wished to look like before it has seen data."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

_JITTER = 1e-6  # of the variance, on the diagonal: inputs that nearly coincide leave the covariance singular


@dataclass(frozen=True, kw_only=True)
class GaussianProcess:
    """Mean 0 and covariance amplitude^2 exp(-sum_d (x_d - y_d)^2 / (2 l_d^2)) (Tran et al. 2022, arXiv:2011.12829, section 5).

    `lengthscale` is in units of sqrt(2 D) with D the inputs of a function, so 1 is the paper's. With `spread` above 0 the process is
    hierarchical: each function has a lengthscale of its own, log-normal around that one with this standard deviation of the logarithm, and
    with `ard` one for each input.
    """

    lengthscale: float = 1.0
    amplitude: float = 1.0
    spread: float = 0.0
    ard: bool = False

    def covariance(self, points: Tensor, scales: Tensor) -> Tensor:
        """[..., n, n] at `points` [n, D] for `scales` [..., 1] or [..., D], float64."""
        scaled = points.flatten(1).double() / scales.double().unsqueeze(-2)
        squared = torch.cdist(scaled, scaled, compute_mode="donot_use_mm_for_euclid_dist").square()
        return self.amplitude**2 * torch.exp(-0.5 * squared)

    def scales(self, inputs: int, functions: int, device: torch.device) -> Tensor:
        """Lengthscales: [1] for all functions, or [functions, 1 or inputs] drawn from the global generator."""
        center = self.lengthscale * math.sqrt(2 * inputs)
        if not self.spread:
            return torch.full((1,), center, device=device)
        return center * torch.exp(self.spread * torch.randn(functions, inputs if self.ard else 1, device=device))

    def draw(self, points: Tensor, functions: int, outputs: int) -> Tensor:
        """Values [functions, n, outputs] of functions at `points` [n, ...], drawn from the global generator; outputs are independent."""
        n, inputs = points.flatten(1).shape
        covariance = self.covariance(points, self.scales(inputs, functions, points.device))
        jitter = _JITTER * self.amplitude**2 * torch.eye(n, dtype=covariance.dtype, device=covariance.device)
        root = torch.linalg.cholesky(covariance + jitter)
        noise = torch.randn(functions, n, outputs, device=points.device)
        values: Tensor = root.float() @ noise
        return values
