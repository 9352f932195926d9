"""Pruning by signal-to-noise ratio: which weights a posterior is sure of."""

from dataclasses import replace
from typing import Annotated, Literal

from distprune.core import registry
from distprune.core.hooks.posterior import Posterior
from distprune.core.lengths import Length
from distprune.core.options import Choices, LogRange
from distprune.core.paradigms.after_training import tuning
from distprune.core.plan import Plan, Stage
from distprune.core.recipe import Recipe
from distprune.core.registry import paradigm
from distprune.core.stages import Calibrate
from distprune.errors import UserError


@paradigm(
    "posterior",
    paper="Graves 2011, NIPS 24; Blundell et al. 2015, arXiv:1505.05424, section 5.1; the chain: Tran et al. 2022, arXiv:2011.12829",
    uses=("sparsity", "allocator", "granularity"),
    branch="after training",
    mask="trained",
    values="posterior mean",
    after="fine-tuning",
    scores=True,
)
def posterior(
    recipe: Recipe,
    *,
    rate: Annotated[float, LogRange(1e-3, 5e-3)] = 5e-3,
    friction: float = 0.01,
    temperature: Annotated[float, LogRange(0.1, 1.0)] = 0.1,
    burn: Length = "25%",
    sample: Annotated[Length, Choices("50%", "100%")] = "50%",
    samples: int = 20,
    tune: Annotated[Length, Choices("0%", "25%")] = "25%",
    by: Literal["signal_to_noise", "magnitude"] = "signal_to_noise",
    batches: int = 5,
) -> Plan:
    """Train, draw `samples` networks from a chain around it, remove the weights of the smallest |mean| / std, fine-tune for `tune`.

    Formula:
        score(w) = |mean| / std  over the samples of the chain;  of a unit  sqrt(sum mean^2 / sum var)
        w* = train(m * mean, K - tune..K)

    The chain is adaptive SGHMC over `burn` and then `sample`; its prior is the optimizer's weight decay with the recipe's regularizer.
    `temperature` 1 is the posterior, and a chain this short finds its mean only under a narrow prior. What is kept has the mean of the
    samples. Not fine-tuned, statistics of batch normalisation are estimated anew on `batches` batches. `by: magnitude` removes the smallest
    |mean| of the same chain.
    """
    if samples < 2 or sample < 2:
        raise UserError(
            f"paradigm.samples and paradigm.sample (steps) must be at least 2, got {samples} and {sample}. Write sample: '50%'."
        )
    if batches < 0:
        raise UserError(f"paradigm.batches must be at least 0, got {batches}. Write 5; 0 leaves batch normalisation as it is.")
    train, length = recipe.train, recipe.train.length
    weight_decay = train.optimizer.option("weight_decay") if "weight_decay" in train.optimizer.entry.options else 0.0
    sampler = registry.optimizer.choose(
        "sghmc", lr=rate, friction=friction, burn=burn, temperature=temperature, weight_decay=float(weight_decay)
    )
    hook = Posterior(
        burn=burn,
        thin=max(1, sample // samples),
        by=by,
        sparsity=recipe.sparsity,
        allocator=recipe.allocator,
        granularity=recipe.granularity,
    )
    chain = recipe.training(since=length, until=length + burn + sample, hooks=(hook,))
    config = replace(train, optimizer=sampler, decay=registry.decay.choose("constant"))
    stages: list[Stage] = [recipe.training(until=length), replace(chain, config=config)]
    if tune:
        stages.append(tuning(recipe, tune))
    elif batches:
        stages.append(Calibrate(batches=batches, batch_size=train.batch_size))
    return Plan(stages)
