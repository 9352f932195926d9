"""Pruning after a training whose penalty prepares it: slimming, group lasso, ADMM. Then the network is pruned and fine-tuned."""

from functools import partial
from typing import Annotated

from distprune.core import registry
from distprune.core.hooks.admm import Admm
from distprune.core.hooks.group_lasso import GroupLasso
from distprune.core.hooks.slimming import Slimming
from distprune.core.lengths import Length
from distprune.core.options import Choices, LogRange, Range
from distprune.core.paradigms.after_training import tuning
from distprune.core.plan import Plan
from distprune.core.recipe import Recipe
from distprune.errors import UserError

paradigm = partial(
    registry.paradigm,
    uses=("sparsity", "allocator", "granularity"),
    branch="after training",
    mask="trained",
    values="inherited",
    after="fine-tuning",
    scores=True,
)


@paradigm("slimming", paper="Liu et al. 2017, arXiv:1708.06519", granularities=("filter", "channel"))
def slimming(
    recipe: Recipe,
    *,
    strength: Annotated[float, LogRange(1e-5, 1e-2)] = 1e-4,
    scale: Annotated[float, Choices(0.5, 1.0)] = 0.5,
    tune: Annotated[Length, Choices("25%", "50%", "100%")] = "50%",
) -> Plan:
    """Train with an L1 penalty on the scales of batch normalisation, remove the channels of the smallest scales, fine-tune for `tune`.

    Formula:
        min L(w) + strength * sum |gamma|
        m = top(|gamma|)

    Scales start at `scale`; the paper's allocator is global.
    """
    _check(strength=strength)
    if scale <= 0:
        raise UserError(f"paradigm.scale must be above 0, got {scale}: a scale that starts at zero has no sign. Write 0.5.")
    hook = Slimming(strength=strength, scale=scale, granularity=recipe.granularity)
    prune = recipe.prune(recipe.sparsity, criterion=registry.criterion.choose("slimming"))
    return Plan([recipe.training(until=recipe.train.length, hooks=(hook,)), prune, tuning(recipe, tune)])


@paradigm("ssl", paper="Wen et al. 2016, arXiv:1608.03665", granularities=("filter", "channel", "kernel", "layer"))
def ssl(
    recipe: Recipe,
    *,
    strength: Annotated[float, LogRange(1e-5, 1e-2)] = 1e-4,
    tune: Annotated[Length, Choices("25%", "50%", "100%")] = "50%",
) -> Plan:
    """Train with a group lasso on the units of the granularity, remove the smallest by magnitude, fine-tune for `tune`.

    Formula:
        min L(w) + strength * sum over units sqrt(n) ||w_u||,  n the weights of unit u
        step:  w_u <- max(0, 1 - lr * strength * sqrt(n) / ||w_u||) w_u

    The penalty makes units exactly zero, as many as `strength` says; the budget is met by pruning. Before batch normalisation the loss does
    not know how large a filter is: all shrink, few stay at zero. The paper starts from a trained network.
    """
    _check(strength=strength)
    hook = GroupLasso(strength=strength, granularity=recipe.granularity, config=recipe.train)
    prune = recipe.prune(recipe.sparsity, criterion=registry.criterion.choose("magnitude"))
    return Plan([recipe.training(until=recipe.train.length, hooks=(hook,)), prune, tuning(recipe, tune)])


@paradigm("admm", paper="Zhang et al. 2018, arXiv:1804.03294")
def admm(
    recipe: Recipe,
    *,
    rho: Annotated[float, LogRange(1e-4, 1e-1)] = 1e-2,
    growth: Annotated[float, Choices(1.0, 10.0)] = 10.0,
    updates: Annotated[int, Range(5, 40)] = 10,
    solve: Annotated[Length, Choices("25%", "50%", "100%")] = "50%",
    tune: Annotated[Length, Choices("25%", "50%", "100%")] = "50%",
) -> Plan:
    """Train, train on for `solve` while ADMM draws weights towards the budget, remove the smallest by magnitude, fine-tune for `tune`.

    Formula:
        min L(w) + rho / 2 ||w - Z + U||^2
        Z <- the units of w + U with the largest norm,   U <- (U + w - Z) / g,   rho <- g rho,   g = growth^(1 / updates)

    Both take the last part of the learning-rate schedule that is as long. The projection is made `updates` times, while `rho` grows to
    `growth` times itself.
    """
    _check(rho=rho)
    length = recipe.train.length
    solve = min(solve, length)
    if growth < 1:
        raise UserError(f"paradigm.growth must be at least 1, got {growth}. Write 10; 1 keeps rho as it is.")
    if updates < 1:
        raise UserError(f"paradigm.updates must be at least 1, got {updates}. Write 10.")
    hook = Admm(
        rho=rho,
        growth=growth ** (1 / updates),
        every=-(-solve // updates),
        sparsity=recipe.sparsity,
        allocator=recipe.allocator,
        granularity=recipe.granularity,
    )
    prune = recipe.prune(recipe.sparsity, criterion=registry.criterion.choose("magnitude"))
    return Plan(
        [recipe.training(until=length), recipe.training(since=length - solve, until=length, hooks=(hook,)), prune, tuning(recipe, tune)]
    )


def _check(**strengths: float) -> None:
    for name, value in strengths.items():
        if value < 0:
            raise UserError(f"paradigm.{name} must be at least 0, got {value}: a negative penalty rewards. Write 1e-4.")
