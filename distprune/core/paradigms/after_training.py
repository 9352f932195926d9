"""Pruning after training: the mask comes from a trained network."""

from typing import Annotated, Literal

from distprune.core.lengths import Length
from distprune.core.options import Choices, Range
from distprune.core.plan import Plan, Stage
from distprune.core.recipe import Recipe
from distprune.core.registry import paradigm
from distprune.core.schedules import rounds
from distprune.core.stages import SetWeights


@paradigm("finetune", paper="Han et al. 2015, arXiv:1506.02626; learning-rate rewinding: Renda et al. 2020, arXiv:2003.02389")
def finetune(
    recipe: Recipe,
    *,
    share: Annotated[float, Range(0.5, 1.0)] = 1.0,
    tune: Annotated[Length, Choices("25%", "50%", "100%")] = "50%",
    rate: Annotated[Literal["replay", "last"], Choices()] = "replay",
) -> Plan:
    """Train, then remove a share of what is left and fine-tune for `tune`, until the target; share 1 is one-shot.

    `rate: replay` fine-tunes with the last part of the learning-rate schedule that is as long as `tune`; `last` stays at the last rate.
    """
    length = recipe.train.length
    since = max(length - tune, 0) if rate == "replay" else length
    stages: list[Stage] = [recipe.training(until=length)]
    for sparsity in rounds(recipe.sparsity, share=share):
        stages += [
            recipe.prune(sparsity),
            recipe.training(since=since, until=since + min(tune, length) if rate == "replay" else since + tune),
        ]
    return Plan(stages)


@paradigm("scratch", paper="Liu et al. 2019, arXiv:1810.05270")
def scratch(recipe: Recipe) -> Plan:
    """Train, prune, draw the kept weights anew, train again: does the structure alone do it?"""
    length = recipe.train.length
    return Plan(
        [recipe.training(until=length), recipe.prune(recipe.sparsity), SetWeights(policy="reinit"), recipe.training(since=0, until=length)]
    )
