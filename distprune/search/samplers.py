"""Samplers: who proposes the next trial. Each is made anew for every proposal from a seed of its own, so none has to be saved.

One that learns lives longer, and is taught again by a resumed driver (`budgeted.py`).
"""

import warnings
from typing import Literal

import optuna

from distprune.errors import UserError
from distprune.search.budgeted import BudgetSampler
from distprune.search.policy import Settings
from distprune.search.tables import sampler


@sampler("tpe", paper="Watanabe 2023, arXiv:2304.11127")
def tpe(seed: int, *, startup: int = 10) -> optuna.samplers.BaseSampler:
    """Tree-structured Parzen estimator, modelling the parameters of each branch of the space together; random for `startup` trials."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # group: the only way to model a conditional space jointly
        return optuna.samplers.TPESampler(multivariate=True, group=True, n_startup_trials=startup, seed=seed)


@sampler("random", paper="Bergstra & Bengio 2012")
def random(seed: int) -> optuna.samplers.BaseSampler:
    """Independent draws."""
    return optuna.samplers.RandomSampler(seed=seed)


@sampler("nsga2", paper="Deb et al. 2002", keeps_all=True)
def nsga2(seed: int, *, population: int = 20) -> optuna.samplers.BaseSampler:
    """Genetic algorithm with non-dominated sorting."""
    return optuna.samplers.NSGAIISampler(population_size=population, seed=seed)


@sampler("constrained_rl", paper="Malik et al. 2021, arXiv:2110.08558; He et al. 2018, arXiv:1802.03494", learns=True)
def constrained_rl(
    seed: int,
    *,
    base: Literal["tpe", "random"] = "tpe",
    batch: int = 16,
    spread: float = 1.0,
    multiplier: Literal["gradient", "pid"] = "gradient",
    wall: bool = False,
    learn: bool = True,
) -> BudgetSampler:
    """A policy proposes what every layer keeps under the search's budget, and `base` the rest. The last of limits.trials is the policy's end.

    It learns from every `batch` trials by PPO-Lagrangian; `wall` keeps each proposal within the budget; without `learn` it only explores.
    """
    if batch < 2 or not spread > 0:
        raise UserError(f"sampler.batch must be at least 2 and sampler.spread above 0, got {batch} and {spread}. Leave them out.")
    settings = Settings(batch=batch, spread=spread, multiplier=multiplier, wall=wall, learn=learn)
    return BudgetSampler(seed, sampler.choose(base), settings)
