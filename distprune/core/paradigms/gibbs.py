"""Gibbs pruning: one training under masks that are drawn anew at each step, until their distribution has frozen."""

from dataclasses import replace
from typing import Annotated, Literal

from distprune.core.hooks.gibbs import Gibbs
from distprune.core.lengths import Length
from distprune.core.options import Choices
from distprune.core.plan import Plan, Stage
from distprune.core.recipe import Recipe
from distprune.core.registry import paradigm
from distprune.core.stages import Calibrate
from distprune.errors import UserError

# (temperature, granularity) -> beta at the start and at the end, coupling. Of the paper where absolute. In units of the median of w^2
# they begin where the paper's do for a ResNet-20 as it is drawn, a median of 0.003, and go on further: weights that sink to the threshold
# stay there, without a gradient, and toss coins unless beta is higher than the spread of the others asks for.
_DEFAULTS: dict[tuple[str, str], tuple[float, float, float]] = {
    ("absolute", "weight"): (1.0, 1e4, 0.0),
    ("absolute", "kernel"): (1.0, 1e4, 0.01),
    ("absolute", "filter"): (10**-2.5, 1.0, 1.0),
    ("median", "weight"): (3e-3, 1e3, 0.0),
    ("median", "kernel"): (3e-3, 1e3, 3.0),
    ("median", "filter"): (10**-2.5, 10.0, 1.0),
}


@paradigm(
    "gibbs",
    paper="Labach & Valaee 2020, arXiv:2006.04981",
    uses=("sparsity", "allocator", "granularity"),
    branch="while training",
    mask="while training",
    values="inherited",
    after="nothing",
    granularities=("weight", "kernel", "filter", "channel"),
    scores=True,
)
def gibbs(
    recipe: Recipe,
    *,
    anneal: Annotated[Length, Choices("50%", "64%", "75%")] = "64%",
    temperature: Annotated[Literal["absolute", "median"], Choices("median")] = "absolute",
    beta_start: float | None = None,
    beta_end: float | None = None,
    coupling: float | None = None,
    mcmc_steps: int = 50,
    batches: int = 5,
) -> Plan:
    """Train once, each step under a mask drawn from exp(-beta H), while beta rises over `anneal`; keep the best of the budget at the end.

    Formula:
        beta(t) = beta_start (beta_end / beta_start)^(t / anneal)
        P(kept) = sigmoid(beta (w^2 - Q))                        weights; Q the quantile of w^2 that the budget cuts at
        p(x) ~ exp(beta (sum_i (w_i^2 - Q) x_i + coupling sum_(i != j) x_i x_j)),  x = +1 kept, -1 removed       kernels
        P(kept) = sigmoid(beta (w^2 - Q + coupling sum of x over the other half of the filter)),  in turn       filters

    beta and `coupling` are the paper's for the granularity, in 1/w^2 and w^2. Whether masks freeze by then depends on the scale of the
    weights, so searches take `temperature: median`, where both are in units of the median w^2 of each layer. The paper's allocator is
    uniform, and it keeps first and last layer dense: exclude them. Filters are drawn by `mcmc_steps` sweeps. Statistics of batch
    normalisation are estimated anew on `batches` batches.
    """
    kind = "filter" if recipe.granularity.name == "channel" else recipe.granularity.name
    given = (beta_start, beta_end, coupling)
    start, end, strength = (mine if mine is not None else his for mine, his in zip(given, _DEFAULTS[temperature, kind], strict=True))
    _check(anneal, recipe.train.length, start, end, strength, mcmc_steps, batches)
    hook = Gibbs(
        sparsity=recipe.sparsity,
        allocator=recipe.allocator,
        granularity=recipe.granularity,
        beta_start=start,
        beta_end=end,
        anneal=anneal,
        coupling=0.0 if kind == "weight" else strength,  # what does not matter is no part of the key
        temperature=temperature,
        sweeps=mcmc_steps if kind == "filter" else 0,
    )
    training = recipe.training(until=recipe.train.length)
    # It masks the gradient of the loss before a regularizer adds its own, which acts on masked weights too.
    stages: list[Stage] = [replace(training, hooks=(hook, *training.hooks))]
    if batches:
        stages.append(Calibrate(batches=batches, batch_size=recipe.train.batch_size))
    return Plan(stages)


def _check(anneal: int, length: int, start: float, end: float, coupling: float, mcmc_steps: int, batches: int) -> None:
    if not 0 < anneal <= length:
        raise UserError(f"paradigm.anneal must be in the training of {length} steps, got step {anneal}. Write '64%'.")
    if not 0 < start <= end:
        raise UserError(
            f"0 < paradigm.beta_start <= paradigm.beta_end must hold, got {start:g} and {end:g}. Leave them out for the paper's."
        )
    if coupling < 0:
        raise UserError(f"paradigm.coupling must be at least 0, got {coupling}: a negative one parts what belongs together. Leave it out.")
    if mcmc_steps < 1:
        raise UserError(f"paradigm.mcmc_steps must be at least 1, got {mcmc_steps}. Write 50.")
    if batches < 0:
        raise UserError(f"paradigm.batches must be at least 0, got {batches}. Write 5; 0 leaves batch normalisation as it is.")
