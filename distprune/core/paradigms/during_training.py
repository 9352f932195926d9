"""Masks that change while the network trains."""

from typing import Annotated

from distprune.core.hooks.updates import Gradual
from distprune.core.lengths import Length
from distprune.core.options import Choices, Range
from distprune.core.plan import Plan
from distprune.core.recipe import Recipe
from distprune.core.registry import paradigm
from distprune.errors import UserError


def check_span(begin: int, end: int, length: int, updates: int) -> None:
    """Raise UserError unless `updates` changes of masks between `begin` and `end` fit into a training of `length` steps."""
    if updates < 1:
        raise UserError(f"paradigm.updates must be at least 1, got {updates}. Write 20.")
    if not begin < end <= length:
        raise UserError(
            f"paradigm.begin < paradigm.end <= train.length must hold, got steps {begin}, {end}, {length}. Write '10%' and '75%'."
        )


@paradigm(
    "gradual",
    paper="Zhu & Gupta 2017, arXiv:1710.01878; filters by criterion taylor: Molchanov et al. 2019, arXiv:1906.10771",
    branch="while training",
    mask="while training",
    values="inherited",
    after="training, interleaved",
)
def gradual(
    recipe: Recipe,
    *,
    begin: Annotated[Length, Choices("0%", "10%", "25%")] = "10%",
    end: Annotated[Length, Choices("50%", "75%")] = "75%",
    updates: Annotated[int, Range(5, 40)] = 20,
) -> Plan:
    """Train once while sparsity rises along a cubic, in `updates` steps between `begin` and `end`.

    Formula:
        s(t) = sparsity (1 - (1 - t)^3),   t = (clock - begin + e) / (end - begin + e),  e steps from one update to the next
        m   <- m * top(score(w)) of density 1 - s(t), at every update
    """
    length = recipe.train.length
    check_span(begin, end, length, updates)
    hook = Gradual(
        begin=max(begin, 1),
        end_at=end,
        every=-(-(end - begin) // updates),
        sparsity=recipe.sparsity,
        criterion=recipe.criterion,
        allocator=recipe.allocator,
        granularity=recipe.granularity,
        batch_size=recipe.train.batch_size,
    )
    return Plan([recipe.training(until=length, hooks=(hook,))])
