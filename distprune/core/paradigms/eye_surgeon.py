"""Optimal Eye Surgeon: learn the mask of the untrained network, then train what it keeps."""

from dataclasses import replace
from typing import Annotated

from distprune.core import registry
from distprune.core.hooks.eye_surgeon import EyeSurgeon
from distprune.core.lengths import Length
from distprune.core.options import Choices, LogRange
from distprune.core.plan import Plan
from distprune.core.recipe import Recipe
from distprune.core.registry import paradigm
from distprune.core.stages import Train
from distprune.errors import UserError


@paradigm(
    "eye_surgeon",
    paper="Ghosh et al. 2024, Optimal Eye Surgeon: Finding Image Priors through Sparse Generators at Initialization",
    uses=("sparsity", "allocator"),
    branch="sparse training, static, pre-selected",
    mask="learned scores",
    values="init",
    after="training",
    granularities=("weight",),
    scores=True,
)
def eye_surgeon(
    recipe: Recipe,
    *,
    learn: Annotated[Length, Choices("50%", "100%", "150%")] = "150%",
    rate: Annotated[float, LogRange(1e-2, 1e-1)] = 1e-2,
    temperature: float = 0.2,
    strength: Annotated[float, LogRange(1e-9, 1e-5)] = 1e-9,
) -> Plan:
    """Learn by Adam a keeping probability for each frozen weight of the untrained network, keep the likeliest, then train them.

    Formula:
        min over p of  E L(w(0) * m) + strength * sum KL(Bern(sigmoid p) || Bern(1 - sparsity))
        m = sigmoid((p + logistic noise) / temperature)
        w* = train(top(p) * w(0), 0..K)

    `learn` steps at the constant `rate` come before the recipe's training and are billed besides. `strength` weighs the KL divergence of
    the probabilities from the budget's, summed over weights.
    """
    if learn < 1 or not rate > 0 or not temperature > 0 or strength < 0:
        raise UserError(
            "paradigm.learn must be at least one step, rate and temperature above 0 and strength at least 0, "
            f"got {learn}, {rate}, {temperature} and {strength}. Leave them out for the paper's."
        )
    hook = EyeSurgeon(sparsity=recipe.sparsity, allocator=recipe.allocator, temperature=temperature, strength=strength)
    adam = registry.optimizer.choose("adamw", lr=rate, weight_decay=0.0)
    config = replace(recipe.train, length=learn, optimizer=adam, decay=registry.decay.choose("constant"))
    return Plan([Train(config=config, until=learn, hooks=(hook,), train="scores"), recipe.training(since=0, until=recipe.train.length)])
