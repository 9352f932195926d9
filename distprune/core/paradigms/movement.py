"""Movement pruning: the mask comes from how weights move while a trained network is fine-tuned."""

from dataclasses import replace
from typing import Annotated, Literal

from distprune.core.hooks.movement import Movement
from distprune.core.lengths import Length
from distprune.core.options import Choices, LogRange, Range
from distprune.core.plan import Plan, Stage
from distprune.core.recipe import Recipe
from distprune.core.registry import paradigm
from distprune.errors import UserError


@paradigm(
    "movement",
    paper="Sanh et al. 2020, arXiv:2005.07683",
    uses=("sparsity", "allocator"),
    branch="after training",
    mask="learned scores",
    values="inherited",
    after="fine-tuning",
    granularities=("weight",),
    scores=True,
)
def movement(
    recipe: Recipe,
    *,
    kind: Annotated[Literal["hard", "soft"], Choices()] = "hard",
    tune: Annotated[Length, Choices("25%", "50%", "100%")] = "50%",
    settle: Annotated[float, Range(0.1, 0.5)] = 0.25,
    rate: Annotated[float, LogRange(1.0, 300.0)] = 10.0,
    threshold: float = 0.1,
    strength: Annotated[float, LogRange(1e-3, 1e-1)] = 1e-2,
) -> Plan:
    """Train, then fine-tune for `tune` while weights that move towards zero are masked; the last share `settle` of it has fixed masks.

    Formula:
        S <- S - rate * w dL/dw_eff,  w_eff = m * w
        hard:  m = top(S), density along the cubic of `gradual`
        soft:  of these sigmoid(S) > threshold(t), never less than the budget;  L + strength(t) * sum sigmoid(S)

    Fine-tuning takes the last part of the learning-rate schedule that is as long. `rate` of the scores, `threshold` and `strength` of
    the penalty belong to `kind: soft`; hard masks depend on the order of scores alone.
    """
    length = recipe.train.length
    _check(tune, settle, rate, threshold, strength)
    tune = min(tune, length)
    since, moving = length - tune, max(int(tune * (1 - settle) + 0.5), 1)
    soft = kind == "soft"
    hook = Movement(
        kind=kind,
        sparsity=recipe.sparsity,
        allocator=recipe.allocator,
        begin=since,
        end_at=since + moving,
        rate=rate if soft else 1.0,  # what does not matter is no part of the key
        threshold=threshold if soft else 0.0,
        strength=strength if soft else 0.0,
    )
    stage = recipe.training(since=since, until=since + moving)
    stages: list[Stage] = [recipe.training(until=length), replace(stage, hooks=(hook, *stage.hooks))]  # scores see no regularizer
    if moving < tune:
        stages.append(recipe.training(until=length))
    return Plan(stages)


def _check(tune: int, settle: float, rate: float, threshold: float, strength: float) -> None:
    if tune < 1:
        raise UserError(f"paradigm.tune must be at least one step, got {tune}. Write '50%'.")
    if not 0 <= settle < 1:
        raise UserError(f"paradigm.settle must be in [0, 1), got {settle}. To fix the masks for the last quarter write 0.25.")
    if rate <= 0:
        raise UserError(f"paradigm.rate must be above 0, got {rate}. Write 10.0.")
    if not 0 < threshold < 0.5:
        raise UserError(f"paradigm.threshold must be in (0, 0.5), as scores start at a probability of 0.5, got {threshold}. Write 0.1.")
    if strength < 0:
        raise UserError(f"paradigm.strength must be at least 0, got {strength}. Write 0.01.")
