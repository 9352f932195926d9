"""Early-bird tickets: the mask comes from the first steps of a training."""

from typing import Annotated, Literal

from distprune.core import registry
from distprune.core.hooks.early_bird import EarlyBird
from distprune.core.hooks.hook import Hook
from distprune.core.hooks.slimming import Slimming
from distprune.core.lengths import Length
from distprune.core.options import Choices, Range
from distprune.core.plan import Plan
from distprune.core.recipe import Recipe
from distprune.core.registry import paradigm
from distprune.core.stages import SetWeights, Snapshot
from distprune.errors import UserError


@paradigm(
    "early_bird",
    paper="You et al. 2020, arXiv:1909.11957",
    uses=("sparsity", "allocator", "granularity"),
    branch="sparse training, static, post-selected",
    mask="early",
    values="rewound",
    after="training",
    scores=True,
)
def early_bird(
    recipe: Recipe,
    *,
    every: Annotated[Length, Choices("0.5ep", "1ep")] = "1ep",
    until: Annotated[Length, Choices("25%", "50%")] = "50%",
    near: Annotated[float, Range(0.05, 0.2)] = 0.1,
    window: int = 5,
    weights: Annotated[Literal["rewind", "inherit"], Choices()] = "rewind",
    by: Literal["magnitude", "slimming"] = "magnitude",
    strength: float = 1e-4,
) -> Plan:
    """Train until the masks drawn every `every` have settled, at most `until`; prune; rewind to the start and train in full.

    Formula:
        d(a, b) = |a xor b| / min(|a| + |b|, 2n - |a| - |b|),  |a| the kept of n weights
        stop when d(newest, each of the last window - 1 masks) <= near
        w* = train(m * w(0), 0..K)

    Settled: the newest of the last `window` masks is within `near` of the others, 0 for equal ones and 1 for the furthest possible.
    `weights: inherit` keeps the weights and trains on to the end of the schedule, as the paper does. Its masks are those of `by: slimming`
    at granularity filter with allocator global: channels by their batch-norm scales, under an L1 penalty of `strength` on these.
    """
    length = recipe.train.length
    _check(every, until, length, near, window, weights)
    if by == "slimming" and not recipe.granularity.entry.facts["channels"]:
        raise UserError(
            f"paradigm.by: slimming ranks channels, so granularity must be filter or channel, got '{recipe.granularity.name}'. "
            "Write granularity: filter, or by: magnitude."
        )
    criterion = registry.criterion.choose(by)
    penalty: tuple[Hook, ...] = (
        (Slimming(strength=strength, scale=0.5, granularity=recipe.granularity),) if by == "slimming" and strength else ()
    )
    watch = EarlyBird(
        every=every,
        window=window,
        near=near,
        sparsity=recipe.sparsity,
        criterion=criterion,
        allocator=recipe.allocator,
        granularity=recipe.granularity,
    )
    search, prune = recipe.training(until=until, hooks=(*penalty, watch)), recipe.prune(recipe.sparsity, criterion=criterion)
    if weights == "inherit":
        return Plan([search, prune, recipe.training(until=length)])
    return Plan([Snapshot(tag="init"), search, prune, SetWeights(policy="rewind", tag="init"), recipe.training(since=0, until=length)])


def _check(every: int, until: int, length: int, near: float, window: int, weights: str) -> None:
    if every < 1:
        raise UserError("paradigm.every must be at least one step, got 0. Write '1ep'.")
    most = length if weights == "rewind" else length - 1
    if not 1 <= until <= most:
        raise UserError(f"paradigm.until must be from step 1 to {most} of a training of {length} steps, got step {until}. Write '50%'.")
    if not 0 <= near <= 1:
        raise UserError(f"paradigm.near must be in [0, 1], got {near}. Write 0.1; 0 waits until masks are equal.")
    if window < 2:
        raise UserError(f"paradigm.window must be at least 2 masks, got {window}. Write 5.")
