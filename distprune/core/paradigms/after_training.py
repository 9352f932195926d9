"""Pruning after training: the mask comes from a trained network."""

from typing import Annotated, Literal

from distprune.core.lengths import Length
from distprune.core.options import Choices, Range
from distprune.core.plan import Plan, Stage
from distprune.core.recipe import Recipe
from distprune.core.registry import paradigm
from distprune.core.schedules import rounds
from distprune.core.stages import SetWeights, Snapshot, Train
from distprune.errors import UserError


def tuning(recipe: Recipe, tune: int, rate: Literal["replay", "last"] = "replay") -> Train:
    """Fine-tuning of `tune` steps: over the last part of the learning-rate schedule that is as long (at most all), or at its last rate."""
    length = recipe.train.length
    if rate == "last":
        return recipe.training(since=length, until=length + tune)
    return recipe.training(since=max(length - tune, 0), until=length)


@paradigm(
    "finetune",
    paper="Han et al. 2015, arXiv:1506.02626; learning-rate rewinding: Renda et al. 2020, arXiv:2003.02389",
    branch="after training",
    mask="trained",
    values="inherited",
    after="fine-tuning",
)
def finetune(
    recipe: Recipe,
    *,
    share: Annotated[float, Range(0.5, 1.0)] = 1.0,
    tune: Annotated[Length, Choices("25%", "50%", "100%")] = "50%",
    rate: Annotated[Literal["replay", "last"], Choices()] = "replay",
    weights: Annotated[Literal["inherit", "compensate"], Choices()] = "inherit",
    batches: int = 4,
) -> Plan:
    """Train, then remove a share of what is left and fine-tune for `tune`, until the target; share 1 is one-shot.

    Formula:
        density after round i = max((1 - share)^i, 1 - sparsity)
        m  = top(score(w)),  w = w(K) in the first round
        w* = train(m * w, K - tune..K)        rate: last is train(m * w, K..K + tune) at the rate of step K

    `rate: replay` fine-tunes with the last part of the learning-rate schedule that is as long as `tune`; `last` stays at the last rate.
    `weights: compensate` first fits what is kept to what each layer computed before, on `batches` batches.
    """
    if batches < 1:
        raise UserError(f"paradigm.batches must be at least 1, got {batches}. Write 4, or weights: inherit.")
    stages: list[Stage] = [recipe.training(until=recipe.train.length)]
    for sparsity in rounds(recipe.sparsity, share=share):
        if weights == "compensate":
            policy = SetWeights(policy="compensate", tag="unpruned", batches=batches, batch_size=recipe.train.batch_size)
            stages += [Snapshot(tag="unpruned"), recipe.prune(sparsity), policy]
        else:
            stages.append(recipe.prune(sparsity))
        stages.append(tuning(recipe, tune, rate))
    return Plan(stages)


@paradigm(
    "scratch",
    paper="Liu et al. 2019, arXiv:1810.05270",
    branch="sparse training, static, post-selected",
    mask="trained",
    values="fresh",
    after="training",
)
def scratch(recipe: Recipe) -> Plan:
    """Train, prune, draw the kept weights anew, train again: does the structure alone do it?

    Formula:
        m  = top(score(w(K)))
        w* = train(m * w', 0..K),  w' a fresh draw of the network
    """
    length = recipe.train.length
    return Plan(
        [recipe.training(until=length), recipe.prune(recipe.sparsity), SetWeights(policy="reinit"), recipe.training(since=0, until=length)]
    )
