"""Soft filter pruning: filters are zeroed while the network trains, and removed at the end."""

from typing import Annotated

from distprune.core.hooks.soft_filters import SoftFilters
from distprune.core.lengths import Length
from distprune.core.options import Choices
from distprune.core.paradigms.after_training import tuning
from distprune.core.plan import Plan, Stage
from distprune.core.recipe import Recipe
from distprune.core.registry import paradigm
from distprune.core.stages import Calibrate
from distprune.errors import UserError


@paradigm(
    "soft_filters",
    paper="He et al. 2018, arXiv:1808.06866",
    uses=("sparsity", "allocator", "granularity"),
    branch="while training",
    mask="while training",
    values="inherited",
    after="nothing",
    granularities=("filter", "channel", "kernel"),
    scores=True,
)
def soft_filters(
    recipe: Recipe,
    *,
    every: Annotated[Length, Choices("1ep", "2ep")] = "1ep",
    tune: Annotated[Length, Choices("0%", "25%")] = "0%",
    batches: int = 5,
) -> Plan:
    """Train, setting the filters of the smallest L2 norm to zero every `every`, from where they may grow back; remove them at the end.

    Formula:
        w_f <- 0  for the filters f of the smallest ||w_f||, each `every`
        m = top(||w_f||)  at the end

    The paper's allocator is uniform and it does not fine-tune. A zeroed filter still sends the shift of its batch normalisation, which
    goes with its removal: statistics are estimated anew on `batches` batches, or the network is fine-tuned for `tune`.
    """
    if every < 1:
        raise UserError("paradigm.every must be at least one step, got 0. Write '1ep'.")
    if batches < 0:
        raise UserError(f"paradigm.batches must be at least 0, got {batches}. Write 5; 0 leaves batch normalisation as it is.")
    hook = SoftFilters(every=every, sparsity=recipe.sparsity, allocator=recipe.allocator, granularity=recipe.granularity)
    stages: list[Stage] = [recipe.training(until=recipe.train.length, hooks=(hook,))]
    if tune:
        stages.append(tuning(recipe, tune))
    elif batches:
        stages.append(Calibrate(batches=batches, batch_size=recipe.train.batch_size))
    return Plan(stages)
