"""The sampler whose policy is trained: it proposes the keep ratios of all layers together, a base sampler everything else.

The policy lives here, in the driver, and nowhere else. An episode is written with the trial that it made, so that a resumed driver
gives the policy the same bits by telling it the same trials in the same order; the network is not asked again.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from distprune.core.registry import Choice
from distprune.search.episodes import Budgets
from distprune.search.policy import Episode, Policy, Settings

ALLOCATOR = "constrained_rl"
_PREFIX = f"{ALLOCATOR}/keep/"  # of the parameters that are the policy's
_EPISODE = "distprune:episode"  # system attribute of a trial


class BudgetSampler(optuna.samplers.BaseSampler):
    """Lives as long as its proposer, unlike others: `begin` comes before each proposal, `learn` after each told trial."""

    def __init__(self, seed: int, base: Choice, settings: Settings) -> None:
        self._seed, self._base_choice, self._settings = seed, base, settings

    def open(self, budgets: Budgets) -> None:
        """Start with an untrained policy."""
        self._policy = Policy(budgets, seed=self._seed, settings=self._settings)
        self._best: tuple[tuple[bool, float], dict[str, Any]] | None = None

    def begin(self, number: int, seed: int) -> None:
        """Get ready to propose trial `number`."""
        self._number, self._base = number, self._base_choice(seed)
        self._keep: dict[str, float] | None = None

    def learn(self, trial: FrozenTrial) -> None:
        """Take in how a trial ended. Failed ones and those without a result teach nothing."""
        text = trial.system_attrs.get(_EPISODE)
        if text is None or trial.state != TrialState.COMPLETE:
            return
        episode = Episode.read(json.loads(text))
        budgets, violation = self._policy.budgets, trial.constraints.get("budget")
        measured = budgets.most * (1 + violation) if budgets.measured and violation is not None else None
        self._policy.tell(episode, trial.values[0], measured)
        if "unfinished" not in trial.constraints:
            within = measured if measured is not None else budgets.cost(budgets.counts(self._ratios(episode)))
            rank = (within <= budgets.most, trial.values[0])
            if self._best is None or rank > self._best[0]:
                self._best = rank, {name: value for name, value in trial.params.items() if not name.startswith(_PREFIX)}

    def last(self) -> dict[str, Any] | None:
        """Parameters of the trial that closes a search: the policy's end, with the best episode's choices; None before there is one."""
        if self._best is None:
            return None
        return self._best[1] | {_PREFIX + name: keep for name, keep in self._policy.end().items()}

    def _ratios(self, episode: Episode) -> dict[str, float]:
        return {layer.name: keep for layer, keep in zip(self._policy.budgets.layers, episode.keep, strict=True)}

    # What Optuna asks.

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        self._base.before_trial(study, trial)

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return dict(self._base.infer_relative_search_space(study, trial))

    def sample_relative(self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]) -> dict[str, Any]:
        found: Mapping[str, Any] = self._base.sample_relative(study, trial, search_space)
        return {name: value for name, value in found.items() if not name.startswith(_PREFIX)}

    def sample_independent(self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution) -> Any:
        if not param_name.startswith(_PREFIX):
            return self._base.sample_independent(study, trial, param_name, param_distribution)
        if self._keep is None:  # the first layer of this trial: the policy acts once, for all of them
            episode = self._policy.ask(self._number)
            self._keep = self._ratios(episode)
            study._storage.set_trial_system_attr(trial._trial_id, _EPISODE, json.dumps(asdict(episode)))
        return self._keep[param_name.removeprefix(_PREFIX)]

    def after_trial(self, study: Study, trial: FrozenTrial, state: TrialState, values: Any) -> None:
        """Nothing: `learn` is told with constraints, which come from the journal as well."""
