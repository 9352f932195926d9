"""Sparsity as a function of progress: one-shot, geometric rounds, cubic and exponential."""

import math

from distprune.errors import UserError


def rounds(sparsity: float, *, share: float) -> list[float]:
    """Sparsity after each round when every round removes `share` of what is left; the last is clipped to the target.

    Formula:
        s_i = min(1 - (1 - share)^i, sparsity),   i = 1, 2, ...

    Geometric rounds (Han et al. 2015; Frankle & Carbin 2019). Two targets share their rounds up to the nearer one.

    >>> rounds(0.5, share=0.2)
    [0.2, 0.36, 0.488, 0.5]
    """
    if not 0 < share <= 1:
        raise UserError(f"share must be in (0, 1], got {share}. To remove a fifth of what is left in every round write 0.2.")
    steps = []
    density = 1.0
    while density * (1 - share) > (1 - sparsity) * (1 + 1e-9):
        density *= 1 - share
        steps.append(round(1 - density, 12))
    return [*steps, sparsity] if sparsity else steps


def cubic(initial: float, final: float, progress: float) -> float:
    """Fast at first, when there is much to remove (Zhu & Gupta 2017, arXiv:1710.01878, eq. 1).

    Formula:
        s(t) = final + (initial - final) (1 - t)^3,   t the progress in [0, 1]
    """
    return final + (initial - final) * (1 - min(max(progress, 0.0), 1.0)) ** 3


def exponential(initial: float, final: float, progress: float) -> float:
    """Density falls by the same factor at every step (Tanaka et al. 2020, arXiv:2006.05467, algorithm 1; de Jorge et al. 2021).

    Formula:
        1 - s(t) = (1 - initial)^(1 - t) (1 - final)^t,   t the progress in [0, 1]
    """
    if progress >= 1:
        return final
    return 1 - (1 - initial) * math.exp(progress * math.log((1 - final) / (1 - initial)))
