"""Growing regularization after training: GReg-1 and GReg-2."""

from dataclasses import replace
from typing import Annotated, Literal

from distprune.core import registry
from distprune.core.hooks.greg import Greg
from distprune.core.lengths import Length
from distprune.core.options import Choices, LogRange
from distprune.core.paradigms.after_training import tuning
from distprune.core.plan import Plan
from distprune.core.recipe import Recipe, TrainConfig
from distprune.core.registry import paradigm
from distprune.errors import UserError


@paradigm(
    "greg",
    paper="Wang et al. 2021, arXiv:2012.09243",
    uses=("sparsity", "allocator", "granularity"),
    branch="after training",
    mask="trained",
    values="inherited",
    after="fine-tuning",
    granularities=("weight", "filter", "channel", "kernel"),
    scores=True,
    grows=True,
)
def greg(
    recipe: Recipe,
    *,
    variant: Annotated[Literal["greg1", "greg2"], Choices()] = "greg1",
    grow: Annotated[Length, Choices("25%", "50%", "100%")] = "50%",
    stabilise: Length = "5%",
    tune: Annotated[Length, Choices("25%", "50%", "100%")] = "50%",
    ceiling: Annotated[float, LogRange(1.0, 30.0)] = 10.0,
    lr: Annotated[float, LogRange(1e-3, 3e-2)] = 1e-2,
    every: int = 10,
    pick: float = 0.01,
    recover: float = -1e-4,
    ratio: float = 1000.0,
) -> Plan:
    """Train; grow an L2 penalty on the units to be removed, at the fixed rate `lr`, until these are near zero; remove them, fine-tune.

    Formula:
        dL/dw + lambda w  on the units to go
        lambda <- lambda + ceiling every / grow,  each `every` steps
        stop when mean |w| of the kept / mean |w| of those to go >= ratio, or lambda > ceiling

    The penalty's coefficient grows every `every` steps and would be at `ceiling` after `grow`; with units of more than one weight it stops
    earlier, when those kept are `ratio` times as large as those to go. Then it stays for `stabilise` steps. `greg1` picks the units of the
    smallest mean |w| after training; `greg2` first lets the coefficient grow on all, ten times as slowly, to the share `pick` of the
    ceiling, and picks then; the coefficient of the kept becomes `recover`. The paper grows for 100,000 steps to 1, at a rate of 0.001.
    """
    _check(grow, every, ceiling, lr, pick, ratio)
    length = recipe.train.length
    every = min(every, grow)
    hook = Greg(
        variant=variant,
        delta=ceiling * every / grow,
        every=every,
        ceiling=ceiling,
        pick=pick * ceiling,
        recover=recover,
        ratio=ratio,
        stabilise=stabilise,
        sparsity=recipe.sparsity,
        allocator=recipe.allocator,
        granularity=recipe.granularity,
    )
    growth = replace(recipe.training(since=length, until=length + hook.most + stabilise, hooks=(hook,)), config=_at_rate(recipe.train, lr))
    return Plan([recipe.training(until=length), growth, tuning(recipe, tune)])


def _at_rate(train: TrainConfig, lr: float) -> TrainConfig:
    """The same training at a fixed learning rate."""
    optimizer = train.optimizer
    if "lr" not in optimizer.entry.options:
        raise UserError(f"paradigm 'greg' grows its penalty at a fixed rate, and optimizer '{optimizer.name}' has no option lr. Take sgd.")
    fixed = registry.optimizer.choose(optimizer.name, **{**optimizer.options, "lr": lr})
    return replace(train, optimizer=fixed, decay=registry.decay.choose("constant"))


def _check(grow: int, every: int, ceiling: float, lr: float, pick: float, ratio: float) -> None:
    if grow < 1:
        raise UserError("paradigm.grow must be at least one step, got 0. Write '50%'.")
    if every < 1:
        raise UserError(f"paradigm.every must be at least 1, got {every}. Write 10.")
    for name, value in {"ceiling": ceiling, "lr": lr}.items():
        if value <= 0:
            raise UserError(
                f"paradigm.{name} must be above 0, got {value}: the penalty would move nothing. Write ceiling: 10 and lr: 0.01."
            )
    if lr * ceiling > 1:
        raise UserError(f"paradigm.lr * ceiling must be at most 1, got {lr} * {ceiling}: a step would go beyond zero. Lower the ceiling.")
    if not 0 < pick < 1:
        raise UserError(f"paradigm.pick must be in (0, 1), got {pick}: a share of the ceiling. Write 0.01.")
    if ratio <= 1:
        raise UserError(f"paradigm.ratio must be above 1, got {ratio}: kept units are larger from the start. Write 1000.")
