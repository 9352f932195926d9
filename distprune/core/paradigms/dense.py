"""The reference: no pruning."""

from distprune.core.plan import Plan
from distprune.core.recipe import Recipe
from distprune.core.registry import paradigm


@paradigm("dense", uses=(), branch="none", mask="none", values="init", after="training")
def dense(recipe: Recipe) -> Plan:
    """Train, prune nothing.

    Formula:
        w* = train(w(0), 0..K)
    """
    return Plan([recipe.training(until=recipe.train.length)])
