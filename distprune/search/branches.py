"""Optuna's samplers on a conditional space, each made anew for every proposal from a seed of its own."""

import copy
import math
from collections.abc import Sequence
from typing import Any

import optuna
import torch
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from distprune.search.enumeration import Grid
from distprune.search.space import Space


class BranchTPE(optuna.samplers.BaseSampler):
    """TPE that models together what always occurs together, and draws such a group when the first of it is asked for.

    The groups are those of Optuna's `group=True`, which draws from all of them for every trial, whatever its branch: of 100 parameters a
    recipe has some ten.
    """

    def __init__(self, seed: int, startup: int) -> None:
        self._tpe = optuna.samplers.TPESampler(multivariate=True, n_startup_trials=startup, seed=seed)
        self._startup = startup
        self._group_of: dict[str, dict[str, BaseDistribution]] | None = None  # parameter -> its group; empty before the model has enough
        self._drawn: dict[str, Any] = {}

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return {}  # all is drawn when it is asked for

    def sample_relative(self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]) -> dict[str, Any]:
        return {}

    def sample_independent(self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution) -> Any:
        if self._group_of is None:
            ended = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))
            self._group_of = _groups(ended) if len(ended) >= self._startup else {}
        if param_name not in self._drawn and param_name in self._group_of:
            self._drawn |= self._tpe.sample_relative(study, trial, self._group_of[param_name])
        if param_name not in self._drawn:
            self._drawn[param_name] = self._tpe.sample_independent(study, trial, param_name, param_distribution)
        return self._drawn[param_name]


def _groups(trials: Sequence[FrozenTrial]) -> dict[str, dict[str, BaseDistribution]]:
    """Parameter -> those, by name, that occur in exactly the trials that it occurs in."""
    occurs: dict[str, int] = {}  # a bit a trial
    distributions: dict[str, BaseDistribution] = {}
    for bit, trial in enumerate(trials):
        distributions |= trial.distributions
        for name in trial.distributions:
            occurs[name] = occurs.get(name, 0) | 1 << bit
    groups: dict[int, dict[str, BaseDistribution]] = {}
    for name in sorted(occurs):
        if not distributions[name].single():
            groups.setdefault(occurs[name], {})[name] = distributions[name]
    return {name: groups[occurs[name]] for group in groups.values() for name in group}


class Nsga2(optuna.samplers.NSGAIISampler):
    """NSGA-II whose parents are the elite of all earlier generations in the fit set: nothing outside of it has to be remembered."""

    def get_parent_population(self, study: Study, generation: int) -> list[FrozenTrial]:
        earlier = _earlier(study, generation, self._get_generation_key()) if generation else []
        return self._elite_population_selection_strategy(study, earlier) if earlier else []


class Nsga3(optuna.samplers.NSGAIIISampler):
    """NSGA-III, likewise."""

    def get_parent_population(self, study: Study, generation: int) -> list[FrozenTrial]:
        earlier = _earlier(study, generation, self._get_generation_key()) if generation else []
        return self._elite_population_selection_strategy(study, earlier) if earlier else []


def _earlier(study: Study, generation: int, key: str) -> list[FrozenTrial]:
    ended = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    return [trial for trial in ended if trial.system_attrs.get(key, -1) < generation]


class Cma(optuna.samplers.CmaEsSampler):
    """CMA-ES whose draws do not depend on where in the fit set a trial stands."""

    def sample_relative(self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]) -> dict[str, Any]:
        trial = copy.copy(trial)
        trial.number = 0  # Optuna adds it to the seed
        return super().sample_relative(study, trial, search_space)


class Placed(optuna.samplers.BaseSampler):
    """A sampler whose proposal is a function of the seed and of how many came before it. It lives as long as its proposer."""

    size: int | None = None  # proposals after which nothing is left to propose

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._values: dict[str, Any] = {}  # the latest proposal's

    def open(self, space: Space) -> None:
        """Get to know the space. Raises UserError for one that it cannot go through."""
        raise NotImplementedError

    def place(self, place: int) -> None:
        """Get ready for the proposal before which there were `place` others."""
        raise NotImplementedError

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return {}

    def sample_relative(self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]) -> dict[str, Any]:
        return {}

    def sample_independent(self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution) -> Any:
        return self._values[param_name]


class GridSampler(Placed):
    """Every combination once."""

    def open(self, space: Space) -> None:
        self._grid = Grid(space, seed=self._seed)
        self.size = self._grid.size

    def place(self, place: int) -> None:
        self._values = self._grid[place]


class SobolSampler(Placed):
    """A scrambled Sobol sequence with a coordinate for every parameter of the space; a recipe takes those that it has.

    Optuna's sampler has coordinates for the parameters of the first trial alone, which on a conditional space is one branch of it.
    """

    def open(self, space: Space) -> None:
        self._parameters = space.parameters()

    def place(self, place: int) -> None:
        engine = torch.quasirandom.SobolEngine(max(len(self._parameters), 1), scramble=True, seed=self._seed)  # type: ignore[no-untyped-call]
        engine.fast_forward(place)  # type: ignore[no-untyped-call]
        point = engine.draw(1, dtype=torch.double)[0].tolist()  # type: ignore[no-untyped-call]
        self._values = {name: at(value, where) for (name, where), value in zip(self._parameters.items(), point, strict=False)}


def at(share: float, where: BaseDistribution) -> Any:
    """The value of a distribution below which `share` of it lies, in [0, 1)."""
    if isinstance(where, CategoricalDistribution):
        return where.choices[int(share * len(where.choices))]
    assert isinstance(where, FloatDistribution | IntDistribution)
    low, high = (where.low - 0.5, where.high + 0.5) if isinstance(where, IntDistribution) else (where.low, where.high)
    value = low * (high / low) ** share if where.log else low + share * (high - low)
    if isinstance(where, IntDistribution):
        return min(max(math.floor(value + 0.5), where.low), where.high)
    return min(max(value, where.low), where.high)
