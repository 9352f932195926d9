"""Dynamic sparse training: the network is sparse all the time, and its masks move while it trains."""

from functools import partial
from typing import Annotated, Literal, TypedDict

from distprune.core import registry
from distprune.core.hooks.regrow import Regrow, RegrowByMomentum, RegrowByThreshold
from distprune.core.hooks.updates import Gradual, Update
from distprune.core.lengths import Length
from distprune.core.options import Choices, LogRange, Range
from distprune.core.paradigms.during_training import check_span
from distprune.core.plan import Plan, Stage
from distprune.core.recipe import Recipe
from distprune.errors import UserError

paradigm = partial(
    registry.paradigm,
    uses=("sparsity", "allocator"),
    branch="sparse training, dynamic",
    mask="while training",
    values="inherited, grown from 0",
    after="training, interleaved",
    granularities=("weight",),
)


@paradigm("set", paper="Mocanu et al. 2018, arXiv:1707.04780, algorithm 2")
def set_(
    recipe: Recipe,
    *,
    share: Annotated[float, Range(0.1, 0.5)] = 0.3,
    decay: Annotated[Literal["constant", "cosine"], Choices()] = "constant",
    end: Annotated[Length, Choices("75%")] = "75%",
    updates: Annotated[int, Range(5, 40)] = 20,
) -> Plan:
    """Train sparse from random masks; drop a share of each layer's smallest weights and grow as many at random, until `end`.

    Formula:
        drop  the round(share n) smallest |w| of a layer's n kept weights
        grow  as many of its missing weights, at random
        decay: cosine has share / 2 (1 + cos(pi clock / end)) in the place of share

    Grown weights start at zero; the paper draws them anew.
    """
    hook = Regrow(**_span(recipe, share, end, updates), growth="random", share=share, decay=decay)
    return _from_random(recipe, recipe.sparsity, hook)


@paradigm("rigl", paper="Evci et al. 2020, arXiv:1911.11134, algorithm 1")
def rigl(
    recipe: Recipe,
    *,
    share: Annotated[float, Range(0.1, 0.5)] = 0.3,
    end: Annotated[Length, Choices("75%")] = "75%",
    updates: Annotated[int, Range(5, 40)] = 20,
) -> Plan:
    """Train sparse from random masks; drop a share of each layer's smallest weights and grow as many where the gradient is largest.

    Formula:
        share(t) = share / 2 (1 + cos(pi t / end))
        drop  the round(share(t) n) smallest |w| of a layer's n kept weights
        grow  as many with the largest |dL/dw| of its missing weights, the gradient taken dense

    The share falls along a cosine until `end`.
    """
    return _from_random(recipe, recipe.sparsity, Regrow(**_span(recipe, share, end, updates), growth="gradient", share=share))


@paradigm("snfs", paper="Dettmers & Zettlemoyer 2019, arXiv:1907.04840, section 3", moves=True)
def snfs(
    recipe: Recipe,
    *,
    share: Annotated[float, Range(0.1, 0.5)] = 0.5,
    beta: Annotated[float, Choices(0.9, 0.99)] = 0.9,
    end: Annotated[Length, Choices("75%")] = "75%",
    updates: Annotated[int, Range(5, 40)] = 20,
) -> Plan:
    """As RigL with a smoothed gradient, which also moves weights to the layers where it is large.

    Formula:
        M  <- beta M + (1 - beta) dL/dw
        drop  as RigL does
        grow  in layer l  dropped * mean|M_l| / sum_k mean|M_k|  (means over kept weights), those of the largest |M|
    """
    if not 0 <= beta < 1:
        raise UserError(f"paradigm.beta must be in [0, 1), got {beta}. Write 0.9; 0 takes the gradient as it is.")
    return _from_random(recipe, recipe.sparsity, RegrowByMomentum(**_span(recipe, share, end, updates), share=share, beta=beta))


@paradigm("dsr", paper="Mostafa & Wang 2019, arXiv:1902.05967, algorithm 1", moves=True)
def dsr(
    recipe: Recipe,
    *,
    share: Annotated[float, LogRange(0.02, 0.3)] = 0.1,
    threshold: Annotated[float, LogRange(1e-3, 1e-1)] = 1e-3,
    end: Annotated[Length, Choices("75%")] = "75%",
    updates: Annotated[int, Range(5, 40)] = 20,
) -> Plan:
    """Train sparse from random masks; drop weights below one threshold for all layers, grow as many at random where most survive.

    Formula:
        drop  |w| < theta
        grow  in layer l  dropped * survivors_l / survivors,  at random
        theta <- 2 theta  if dropped < 0.9 share kept,   theta / 2  if dropped > 1.1 share kept

    The threshold doubles or halves towards dropping `share` of the kept weights at every update.
    """
    if threshold <= 0:
        raise UserError(f"paradigm.threshold must be above 0, got {threshold}. Write 1e-3; it is doubled or halved after every update.")
    return _from_random(recipe, recipe.sparsity, RegrowByThreshold(**_span(recipe, share, end, updates), share=share, threshold=threshold))


@paradigm("granet", paper="Liu et al. 2021, arXiv:2106.10404, algorithm 1")
def granet(
    recipe: Recipe,
    *,
    initial: Annotated[float, Choices(0.0, 0.5)] = 0.5,
    share: Annotated[float, Range(0.1, 0.5)] = 0.5,
    end: Annotated[Length, Choices("50%", "75%")] = "50%",
    updates: Annotated[int, Range(5, 40)] = 20,
) -> Plan:
    """Gradual pruning by global magnitude, from `initial` sparsity in random masks; after every step a share is regrown as in RigL.

    Formula:
        s(t) = sparsity + (initial - sparsity) (1 - t)^3      pruned by |w| over all layers
        share(t) = share / 2 (1 + cos(pi t / end))           then dropped by |w| and regrown by |dL/dw| in each layer

    `initial: 0` starts dense, without a use for the allocator. An `initial` above the target is the target.
    """
    if not 0 <= initial < 1:
        raise UserError(f"paradigm.initial must be in [0, 1), got {initial}. Write 0.5, or 0 to start dense.")
    initial = min(initial, recipe.sparsity)
    span = _span(recipe, share, end, updates)
    prune = Gradual(
        **span,
        initial=initial,
        sparsity=recipe.sparsity,
        criterion=registry.criterion.choose("magnitude"),
        allocator=registry.allocator.choose("global"),
        granularity=recipe.granularity,
        batch_size=recipe.train.batch_size,
    )
    return _from_random(recipe, initial, prune, Regrow(**span, growth="gradient", share=share))


class _Span(TypedDict):
    begin: int
    end_at: int
    every: int


def _span(recipe: Recipe, share: float, end: int, updates: int) -> _Span:
    """When masks move: `updates` times until `end`, the first time one interval after the start."""
    check_span(0, end, recipe.train.length, updates)
    if not 0 < share < 1:
        raise UserError(f"paradigm.share must be in (0, 1), got {share}. To move a third of the kept weights write 0.3.")
    every = -(-end // updates)  # at most that many
    end_at = max(end - (end == recipe.train.length), 1)  # what is grown last is trained for a step at least
    return {"begin": min(every, end_at), "end_at": end_at, "every": every}


def _from_random(recipe: Recipe, sparsity: float, *hooks: Update) -> Plan:
    """One training from random masks of `sparsity`; dense where that is 0."""
    start: list[Stage] = [recipe.prune(sparsity, criterion=registry.criterion.choose("random"))] if sparsity else []
    return Plan([*start, recipe.training(until=recipe.train.length, hooks=hooks)])
