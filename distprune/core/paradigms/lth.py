"""Lottery tickets."""

from typing import Annotated, Literal

from distprune.core.lengths import Length
from distprune.core.options import Choices, Range
from distprune.core.plan import Plan
from distprune.core.recipe import Recipe
from distprune.core.registry import paradigm
from distprune.core.schedules import rounds
from distprune.core.stages import SetWeights, Snapshot
from distprune.errors import UserError


@paradigm("lth", paper="Frankle & Carbin 2019, arXiv:1803.03635; late rewinding arXiv:1903.01611; learning-rate rewinding arXiv:2003.02389")
def lth(
    recipe: Recipe,
    *,
    share: Annotated[float, Range(0.2, 0.8)] = 0.2,
    rewind_to: Annotated[Length, Choices("0%", "5%", "10%")] = "0%",
    weights: Annotated[Literal["rewind", "inherit"], Choices()] = "rewind",
) -> Plan:
    """Train, remove a share of what is left, rewind, repeat until the target; the last round is clipped to it.

    `weights: inherit` rewinds the learning rate only.
    """
    length = recipe.train.length
    if rewind_to >= length:
        raise UserError(f"paradigm.rewind_to must be before the end of training at step {length}, got step {rewind_to}. Write '5%'.")
    stages = [recipe.training(until=rewind_to), Snapshot(tag="rewind"), recipe.training(until=length)]
    for sparsity in rounds(recipe.sparsity, share=share):
        stages.append(recipe.prune(sparsity))
        if weights == "rewind":
            stages.append(SetWeights(policy="rewind", tag="rewind"))
        stages.append(recipe.training(since=rewind_to, until=length))
    return Plan(stages)
