"""Learning rate over a training: a factor as a function of progress, 0 at the start and 1 at `train.length` and beyond."""

import math

from distprune.core.registry import decay


@decay("cosine", paper="Loshchilov & Hutter 2017, arXiv:1608.03983, one period")
def cosine(progress: float, *, floor: float = 0.01, warmup: float = 0.0) -> float:
    """From 1 to `floor` along half a cosine, after a linear warm-up over the share `warmup`.

    Formula:
        lr(t) / lr = floor + (1 - floor) / 2 * (1 + cos(pi (t - warmup) / (1 - warmup))),   t / warmup  before
    """
    if progress < warmup:
        return progress / warmup
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup)))


@decay("steps", paper="He et al. 2015, arXiv:1512.03385, section 4.2")
def steps(progress: float, *, milestones: tuple[float, ...] = (0.5, 0.75), factor: float = 0.1) -> float:
    """Multiplied by `factor` at each milestone, a share of the training.

    Formula:
        lr(t) / lr = factor^(milestones passed)
    """
    return factor ** sum(progress >= milestone for milestone in milestones)


@decay("constant")
def constant(progress: float) -> float:
    """The same rate throughout.

    Formula:
        lr(t) / lr = 1
    """
    return 1.0
