"""Samplers: who proposes the next trial. Each is made anew for every proposal from a seed of its own, so none has to be saved.

One that goes through the space in an order of its own lives longer, and knows its place by the trial's number (`branches.Placed`);
one that learns is taught again by a resumed driver (`budgeted.py`).
"""

import warnings
from typing import Literal

import optuna

from distprune.errors import UserError
from distprune.search.branches import BranchTPE, Cma, GridSampler, Nsga2, Nsga3, SobolSampler
from distprune.search.budgeted import BudgetSampler
from distprune.search.policy import Settings
from distprune.search.tables import sampler


@sampler("tpe", paper="Watanabe 2023, arXiv:2304.11127")
def tpe(seed: int, *, startup: int = 10) -> optuna.samplers.BaseSampler:
    """Tree-structured Parzen estimator, modelling the parameters of each branch of the space together; random for `startup` trials."""
    _check_startup(startup)
    return BranchTPE(seed, startup)


@sampler("random", paper="Bergstra & Bengio 2012", blind=True)
def random(seed: int) -> optuna.samplers.BaseSampler:
    """Independent draws."""
    return optuna.samplers.RandomSampler(seed=seed)


@sampler("grid", blind=True, enumerates=True)
def grid(seed: int) -> optuna.samplers.BaseSampler:
    """Every combination of a space of listed values, once each, in an order that spreads them; the search ends with the last."""
    return GridSampler(seed)


@sampler("qmc", paper="Sobol 1967; Bergstra & Bengio 2012, section 2.3", blind=True)
def qmc(seed: int) -> optuna.samplers.BaseSampler:
    """A scrambled Sobol sequence with a coordinate for every parameter, used or not: covers the space more evenly than random."""
    return SobolSampler(seed)


@sampler("nsga2", paper="Deb et al. 2002", flat=True)
def nsga2(seed: int, *, population: int = 20) -> optuna.samplers.BaseSampler:
    """Genetic algorithm with non-dominated sorting."""
    _check_population(population)
    return Nsga2(population_size=population, seed=seed)


@sampler("nsga3", paper="Deb & Jain 2014", flat=True)
def nsga3(seed: int, *, population: int = 20, divisions: int = 12) -> optuna.samplers.BaseSampler:
    """As nsga2, spread by reference points: `divisions` of each axis between the objectives. For three objectives and more."""
    _check_population(population)
    if not 1 <= divisions <= 30:  # more are more reference points than any population comes near to
        raise UserError(f"sampler.divisions must be in [1, 30], got {divisions}. Leave it out for 12.")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return Nsga3(population_size=population, dividing_parameter=divisions, seed=seed)


@sampler("cmaes", paper="Hansen 2016, arXiv:1604.00772", flat=True, objectives="one")
def cmaes(seed: int, *, startup: int = 1) -> optuna.samplers.BaseSampler:
    """Covariance matrix adaptation over all numbers of the space; what is chosen from a list is drawn independently."""
    _check_startup(startup)
    return Cma(n_startup_trials=startup, seed=seed, warn_independent_sampling=False)


@sampler("gp", paper="Optuna's GPSampler: expected (hypervolume) improvement", flat=True, same_constraint=True, most_trials=300)
def gp(seed: int, *, startup: int = 10) -> optuna.samplers.BaseSampler:
    """Gaussian process over the whole space, for few and expensive trials: its cost grows with the cube of their number."""
    _check_startup(startup)
    return optuna.samplers.GPSampler(seed=seed, n_startup_trials=startup, warn_independent_sampling=False)


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
    """A policy proposes what every layer keeps under the search's budget, and `base` the rest. The last trial is the policy's end.

    It learns from every `batch` trials by PPO-Lagrangian; `wall` keeps each proposal within the budget; without `learn` it only explores.
    """
    if batch < 2 or not 0 < spread <= 100:
        raise UserError(f"sampler.batch must be at least 2 and sampler.spread in (0, 100], got {batch} and {spread}. Leave them out.")
    settings = Settings(batch=batch, spread=spread, multiplier=multiplier, wall=wall, learn=learn)
    return BudgetSampler(seed, sampler.choose(base), settings)


def _check_startup(startup: int) -> None:
    if startup < 1:
        raise UserError(f"sampler.startup must be at least 1, got {startup}. Leave it out for its default.")


def _check_population(population: int) -> None:
    if not 2 <= population <= 60:  # the fit set has to hold a generation among its latest trials
        raise UserError(f"sampler.population must be in [2, 60], got {population}. Leave it out for 20.")
