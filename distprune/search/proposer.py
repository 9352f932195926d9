"""The proposer: parameters of the next trial, as a pure function of the seed, the trial's number and the fit set."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import optuna
from optuna.distributions import BaseDistribution
from optuna.trial import FrozenTrial, TrialState

from distprune.core.recipe import Recipe
from distprune.core.registry import Choice
from distprune.core.streams import stream_seed
from distprune.errors import UserError
from distprune.search.budgeted import BudgetSampler
from distprune.search.episodes import Budgets

FIT_SET = 200  # finished trials that a model is fitted to: a suggestion costs the same after 200 trials and after 10,000


@dataclass(frozen=True)
class Proposal:
    """What a sampler proposed for a trial."""

    recipe: Recipe
    params: Mapping[str, Any]
    distributions: Mapping[str, BaseDistribution]
    system_attrs: Mapping[str, Any]  # what the sampler itself wants to find again
    closes: bool = False  # whether it is the end that a policy came to


class Proposer:
    """Optuna's samplers over a study in memory, never over the journal: it is small, and a proposal leaves no half-written trial."""

    def __init__(
        self,
        sampler: Choice,
        build: Callable[[optuna.Trial], Recipe],
        *,
        directions: Sequence[Literal["maximize", "minimize"]],
        seed: int,
        budgets: Budgets | None = None,
    ) -> None:
        """`budgets` are for a sampler that learns."""
        self._sampler, self._build, self._directions, self._seed = sampler, build, list(directions), seed
        self._keeps_all = sampler.entry.facts["keeps_all"]
        self._finished: list[tuple[int, FrozenTrial]] = []
        self._running: dict[int, FrozenTrial] = {}
        self._budgets = budgets
        self._learner: BudgetSampler | None = sampler(seed) if sampler.entry.facts["learns"] else None
        self._open()
        self._refresh()

    def _open(self) -> None:
        if self._learner is not None:
            assert self._budgets is not None, "a sampler that learns has a budget"
            self._learner.open(self._budgets)

    def ask(self, number: int, fixed: Mapping[str, Any] | None = None, *, last: bool = False) -> Proposal:
        """Propose trial `number`; `fixed` parameters are taken as given. Raises UserError if one of them is not used or not legal.

        The `last` trial of a search is the end of what its sampler learned, if it learns.
        """
        seed = stream_seed(self._seed, "propose", number) % 2**32
        closing = None
        if self._learner is None:
            self._study.sampler = self._sampler(seed)
        else:
            self._learner.begin(number, seed)
            self._study.sampler = self._learner
            closing = self._learner.last() if last else None
        fixed = closing or fixed
        if fixed:
            self._study.enqueue_trial(dict(fixed))
        trial = self._study.ask()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # a fixed value outside its range is an error below, not a warning
            recipe = self._build(trial)
        for name, value in (fixed or {}).items():
            if trial.params.get(name) != value:
                raise UserError(
                    f"The trial {dict(fixed or {})} sets '{name}' to {value!r}, which the space does not have. Correct the space."
                )
        frozen = self._study._storage.get_trial(trial._trial_id)
        self._ids[number] = trial._trial_id
        self._running[number] = frozen
        system = {key: value for key, value in frozen.system_attrs.items() if key != "fixed_params"}
        return Proposal(recipe, dict(trial.params), dict(trial.distributions), system, closing is not None)

    def tell(self, number: int, state: TrialState, values: Sequence[float] | None, constraints: Mapping[str, float]) -> None:
        """Let the sampler know how a trial ended."""
        trial = optuna.Trial(self._study, self._ids.pop(number))
        known = self._study._storage.get_trial(trial._trial_id).constraints  # of a trial whose end was half told by a dead driver
        for key in constraints.keys() - known.keys():
            trial.set_constraint(key, constraints[key])
        told = self._study.tell(trial, values, state=state)
        self._running.pop(number)
        self._finished.append((number, told))
        if self._learner is not None:
            self._learner.learn(told)
        if not self._keeps_all and len(self._finished) >= 2 * FIT_SET:
            self._finished = self._best_and_latest()
            self._refresh()

    def restore(self, trials: Sequence[FrozenTrial]) -> None:
        """Start from the trials of a journal, running ones included."""
        self._running = {trial.number: trial for trial in trials if not trial.state.is_finished()}
        self._finished = []
        self._open()
        if self._learner is not None:
            ended = [trial for trial in trials if trial.state.is_finished()]
            for trial in sorted(ended, key=lambda trial: trial.user_attrs["end"]["turn"]):
                self._learner.learn(trial)
        for trial in trials:
            if trial.state.is_finished():
                self._finished.append((trial.number, trial))
                if not self._keeps_all and len(self._finished) >= 2 * FIT_SET:
                    self._finished = self._best_and_latest()
        self._refresh()

    def _best_and_latest(self) -> list[tuple[int, FrozenTrial]]:
        by_birth = sorted(self._finished, key=lambda row: row[0])
        latest, rest = by_birth[-FIT_SET // 2 :], by_birth[: -FIT_SET // 2]
        signs = [1 if direction == "maximize" else -1 for direction in self._directions]

        def worth(row: tuple[int, FrozenTrial]) -> tuple[bool, int]:
            values = row[1].values
            if not values or row[1].state != TrialState.COMPLETE:
                return (True, 0)
            beaten = sum(
                all(s * o >= s * v for s, o, v in zip(signs, other.values, values, strict=True)) and list(other.values) != list(values)
                for _, other in rest
                if other.values
            )
            return (False, beaten)

        best = sorted(rest, key=worth)[: FIT_SET // 2]
        return sorted(best, key=lambda row: row[0]) + latest

    def _refresh(self) -> None:
        """Rebuild the study with its trials in the order of their birth, which is the order in which a sampler saw them."""
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self._study = optuna.create_study(directions=self._directions)
        storage, study_id = self._study._storage, self._study._study_id
        self._ids = {}
        for number, trial in sorted([*self._finished, *self._running.items()], key=lambda row: row[0]):
            trial_id = storage.create_new_trial(study_id, trial)
            if number in self._running:
                self._ids[number] = trial_id
