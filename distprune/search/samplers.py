"""Samplers: who proposes the next trial. Each is made anew for every proposal from a seed of its own, so none has to be saved."""

import warnings

import optuna

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
