"""Progressive skeletonization: masks by the connection sensitivity that is left after pruning."""

from dataclasses import replace
from typing import Annotated, Literal

from distprune.core import registry
from distprune.core.criteria.snip import Loss
from distprune.core.initialization import sigma_w
from distprune.core.options import Choices, LogRange, Range
from distprune.core.plan import Plan, Stage
from distprune.core.recipe import Recipe
from distprune.core.registry import paradigm
from distprune.core.stages import SetWeights
from distprune.errors import UserError


@paradigm(
    "force",
    paper="de Jorge et al. 2021, arXiv:2006.09081",
    uses=("sparsity", "allocator", "granularity"),
    branch="sparse training, static, pre-selected",
    mask="init",
    values="init",
    after="training",
    scores=True,
)
def force(
    recipe: Recipe,
    *,
    variant: Annotated[Literal["force", "iterative_snip"], Choices()] = "force",
    steps: Annotated[int, LogRange(5, 100)] = 60,
    batches: Annotated[int, Range(1, 4)] = 1,
    loss: Annotated[Loss, Choices()] = "task",
    init: Annotated[Literal["model", "kaiming"], Choices()] = "model",
) -> Plan:
    """Prune the untrained network to an exponentially falling density by SNIP's scores, taken anew under the mask of the step before.

    Formula:
        density after step t = (1 - sparsity)^(t / steps)
        m_(t+1) = top(|w dL/dw|, with dL/dw at m_t * w)
        w* = train(m * w(0), 0..K)

    `variant: force` ranks all weights by |w dL/dw| with the gradient at the masked network, so that a removed one may return;
    `iterative_snip` only those that are left. One step is SNIP. Then train under the mask. The paper's allocator is global; its weights are
    drawn with `init: kaiming`, N(0, 2 / fan_in), and its code differentiates `loss: nll_logits`.
    """
    for name, value in (("steps", steps), ("batches", batches)):
        if value < 1:
            raise UserError(f"paradigm.{name} must be at least 1, got {value}. Write {60 if name == 'steps' else 1}.")
    stages: list[Stage] = [SetWeights(policy="draw", sigma_w=sigma_w("relu"))] if init == "kaiming" else []
    prune = recipe.prune(recipe.sparsity, criterion=registry.criterion.choose("snip", batches=batches, loss=loss))
    stages.append(replace(prune, steps=steps, nested=variant == "iterative_snip"))
    return Plan([*stages, recipe.training(until=recipe.train.length)])
