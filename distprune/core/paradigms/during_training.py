"""Masks that change while the network trains."""

from typing import Annotated, Literal

from distprune.core import registry
from distprune.core.hooks.updates import Gradual, Regrow
from distprune.core.lengths import Length
from distprune.core.options import Choices, Range
from distprune.core.plan import Plan
from distprune.core.recipe import Recipe
from distprune.core.registry import paradigm
from distprune.errors import UserError


def _check_span(begin: int, end: int, length: int, updates: int) -> None:
    if updates < 1:
        raise UserError(f"paradigm.updates must be at least 1, got {updates}. Write 20.")
    if not begin < end <= length:
        raise UserError(
            f"paradigm.begin < paradigm.end <= train.length must hold, got steps {begin}, {end}, {length}. Write '10%' and '75%'."
        )


@paradigm("gradual", paper="Zhu & Gupta 2017, arXiv:1710.01878")
def gradual(
    recipe: Recipe,
    *,
    begin: Annotated[Length, Choices("0%", "10%", "25%")] = "10%",
    end: Annotated[Length, Choices("50%", "75%")] = "75%",
    updates: Annotated[int, Range(5, 40)] = 20,
) -> Plan:
    """Train once while sparsity rises along a cubic, in `updates` steps between `begin` and `end`."""
    length = recipe.train.length
    _check_span(begin, end, length, updates)
    hook = Gradual(
        begin=max(begin, 1),
        end_at=end,
        every=max((end - begin) // updates, 1),
        sparsity=recipe.sparsity,
        criterion=recipe.criterion,
        allocator=recipe.allocator,
        batch_size=recipe.train.batch_size,
    )
    return Plan([recipe.training(until=length, hooks=(hook,))])


@paradigm(
    "dynamic", paper="SET: Mocanu et al. 2018, arXiv:1707.04780; RigL: Evci et al. 2020, arXiv:1911.11134", uses=("sparsity", "allocator")
)
def dynamic(
    recipe: Recipe,
    *,
    growth: Annotated[Literal["random", "gradient"], Choices()] = "gradient",
    share: Annotated[float, Range(0.1, 0.5)] = 0.3,
    end: Annotated[Length, Choices("75%")] = "75%",
    updates: Annotated[int, Range(5, 40)] = 20,
) -> Plan:
    """Train sparse from random masks; drop small weights and grow others, at random (SET) or by gradient (RigL), until `end`."""
    length = recipe.train.length
    _check_span(0, end, length, updates)
    every = max(end // updates, 1)
    hook = Regrow(begin=every, end_at=end - 1 if end == length else end, every=every, growth=growth, share=share)
    start = recipe.prune(recipe.sparsity, criterion=registry.criterion.choose("random"))
    return Plan([start, recipe.training(until=length, hooks=(hook,))])
