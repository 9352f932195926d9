"""Pruning at initialization."""

from distprune.core.plan import Plan
from distprune.core.recipe import Recipe
from distprune.core.registry import paradigm


@paradigm(
    "at_init",
    paper="Lee et al. 2019, arXiv:1810.02340",
    branch="sparse training, static, pre-selected",
    mask="init",
    values="init",
    after="training",
)
def at_init(recipe: Recipe) -> Plan:
    """Prune the untrained network, then train under fixed masks: SNIP, GraSP, SynFlow, random and magnitude by their criterion.

    Formula:
        m  = top(score(w(0)))
        w* = train(m * w(0), 0..K)
    """
    return Plan([recipe.prune(recipe.sparsity), recipe.training(until=recipe.train.length)])
