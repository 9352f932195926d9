"""The proposer: parameters of the next trial, as a pure function of the seed, the trial's place and the fit set."""

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import optuna
from optuna.distributions import BaseDistribution
from optuna.storages import InMemoryStorage
from optuna.trial import FrozenTrial, TrialState

from distprune.core.recipe import Recipe
from distprune.core.registry import Choice
from distprune.core.streams import stream_seed
from distprune.errors import UserError
from distprune.search.branches import Placed
from distprune.search.budgeted import BudgetSampler
from distprune.search.covering import covering, spared
from distprune.search.episodes import Budgets
from distprune.search.fitset import FIT_SET, FitSet, Kept
from distprune.search.goals import logarithm
from distprune.search.space import Recorder, Space
from distprune.store.study import step_of

MOST_AHEAD = 4  # proposals that are prepared
_DRAWN = ":relative_params:"  # in what samplers note for other processes while they draw: emptied, as a trial may not have all of it
_IDLE = "distprune:idle"  # system attribute: what a flat sampler proposed for parameters that the recipe has not


@dataclass(frozen=True)
class Proposal:
    """What a sampler proposed for a trial."""

    recipe: Recipe
    params: Mapping[str, Any]
    distributions: Mapping[str, BaseDistribution]
    system_attrs: Mapping[str, Any]  # what the sampler itself wants to find again
    spared: bool = False  # whether no rung stops it: the usual recipe of a paradigm, or the end that a policy came to


class Proposer:
    """Optuna's samplers over a study in memory, never over the journal: it is small, and a proposal leaves no half-written trial.

    `prepare` makes proposals while the workers are busy. One is thrown away when more trials were told since than ran beside the one
    whose place it takes: those a proposal that was asked for in time would not have known either. With one worker nothing is prepared,
    and a search is the same as without.
    """

    def __init__(
        self,
        sampler: Choice,
        space: Space,
        *,
        directions: Sequence[Literal["maximize", "minimize"]],
        seed: int,
        budgets: Budgets | None = None,
        first: Sequence[Mapping[str, Any]] = (),
        learned: Sequence[FrozenTrial] = (),
        fit_set: int = FIT_SET,
    ) -> None:
        """`budgets` are for a sampler that learns; `learned` are trials of other searches, in parameters of this space.

        The first proposals have the parameters of `first`, the next those that cover the space.
        """
        self._sampler, self._space, self._directions, self._seed = sampler, space, list(directions), seed
        self._budgets, self._learned, self._fit_set = budgets, learned, fit_set
        facts = sampler.entry.facts
        covers = [] if facts["enumerates"] else covering(space)
        self._first = [*first, *covers]
        self._spared = range(len(first), len(first) + spared(space)) if covers else range(0)
        self._blind, self._same_constraint = facts["blind"], facts["same_constraint"]
        self._parameters = space.parameters() if facts["flat"] else None
        self._learner: BudgetSampler | None = sampler(seed) if facts["learns"] else None
        made = sampler(seed) if self._learner is None else None
        self._placed = made if isinstance(made, Placed) else None
        self._ready: dict[int, tuple[Proposal, int, int, int]] = {}  # number -> (proposal, place, trials told before it, those beside it)
        if self._placed is not None:
            self._placed.open(space)
        self.restore([])

    @property
    def size(self) -> int | None:
        """How many proposals there are in all; None if they never end."""
        if self._placed is None or self._placed.size is None:
            return None
        return len(self._first) + self._placed.size

    # Asking.

    def ask(self, number: int, *, place: int | None = None, last: bool = False) -> Proposal:
        """Propose trial `number`, before which `place` others were proposed, by default as many as its number.

        The `last` trial of a search is the end of what its sampler learned, if it learns. Raises UserError if a parameter that the trial
        is to have is not used or not legal.
        """
        place = number if place is None else place
        if number in self._ready:
            proposal, at, told, beside = self._ready[number]
            if at == place and self._told - told <= beside:
                del self._ready[number]
                return proposal
        self._throw_away()
        return self._propose(number, place, last)

    def prepare(self, number: int, *, place: int | None = None, beside: int) -> bool:
        """Make the proposal of trial `number` before it is asked for, where `beside` other trials run; say whether one was made."""
        if self._blind or self._learner is not None or beside < 1:
            return False
        place = number if place is None else place
        # A trial that nobody proposed takes a number and no place.
        if any(self._told - told > others or other - at != number - place for other, (_, at, told, others) in self._ready.items()):
            self._throw_away()
        if number in self._ready or len(self._ready) >= min(MOST_AHEAD, beside):
            return False
        self._ready[number] = self._propose(number, place, False), place, self._told, beside
        return True

    def _propose(self, number: int, place: int, last: bool) -> Proposal:
        seed = stream_seed(self._seed, "propose", place) % 2**32
        fixed = self._first[place] if place < len(self._first) else None
        closing = None
        if self._learner is not None:
            self._learner.begin(place, seed)
            self._study.sampler = self._learner
            closing = self._learner.last() if last else None
        elif self._placed is not None:
            if fixed is None:
                self._placed.place(place - len(self._first))
            self._study.sampler = self._placed if fixed is None else optuna.samplers.RandomSampler(seed=seed)
        else:
            self._study.sampler = self._sampler(seed)
        fixed = closing or fixed
        if fixed:
            self._study.enqueue_trial(dict(fixed))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # a fixed value outside its range is an error below, not a warning
            trial = self._study.ask(self._parameters)
            recorder = Recorder(trial.params) if self._parameters is not None else None
            recipe = self._space.build(recorder or trial)
        names = (recorder or trial).distributions.keys()
        for key in [key for key in self._storage.get_trial(trial._trial_id).system_attrs if _DRAWN in key]:
            self._storage.set_trial_system_attr(trial._trial_id, key, "")
        frozen = self._storage.get_trial(trial._trial_id)
        for name, value in (fixed or {}).items():
            if name not in names or trial.params.get(name) != value:
                raise UserError(
                    f"The trial {dict(fixed or {})} sets '{name}' to {value!r}, which the space does not have. Correct the space."
                )
        self._ids[number] = trial._trial_id
        self._running[number] = frozen
        system = {key: value for key, value in frozen.system_attrs.items() if key != "fixed_params" and _DRAWN not in key}
        if idle := {name: value for name, value in frozen.params.items() if name not in names}:
            system[_IDLE] = json.dumps(idle)
        params = {name: frozen.params[name] for name in names}
        return Proposal(
            recipe, params, {name: frozen.distributions[name] for name in names}, system, closing is not None or place in self._spared
        )

    def _throw_away(self) -> None:
        """Give up what was prepared; later ones were made beside the earlier."""
        for number in sorted(self._ready):
            self._give_up(number)
        self._ready = {}

    def _give_up(self, number: int) -> None:
        self._storage.set_trial_state_values(self._ids.pop(number), TrialState.FAIL)
        self._running.pop(number)

    # Telling.

    def tell(
        self, number: int, state: TrialState, values: Sequence[float] | None, constraints: Mapping[str, float], *, rung: int = -1
    ) -> None:
        """Let the sampler know how a trial ended; the values of a PRUNED one are those at its `rung`."""
        self._told += 1
        trial_id = self._ids.pop(number)
        self._running.pop(number)
        for key, value in self._constraints(constraints).items():
            self._storage.set_trial_system_attr(trial_id, f"constraints:{key}", float(value))
        if state == TrialState.PRUNED and values:
            self._storage.set_trial_intermediate_value(trial_id, step_of(rung), float(values[0]))
        self._storage.set_trial_state_values(trial_id, state, self._seen(values))
        trial = self._storage.get_trial(trial_id)
        if self._learner is not None:
            self._learner.learn(trial)
        trimmed = not self._blind and self._fitted.add(number, Kept.of(trial, trial.params, trial.distributions, trial.values))
        if trimmed or trial_id > self._most_ids:
            self._refresh()

    def _seen(self, values: Sequence[float] | None) -> list[float] | None:
        """What a sampler sees of a trial's values: costs are logarithms, as they are compared at rungs."""
        if values is None:
            return None
        found = zip(values, self._directions, strict=True)
        return [float(value) if direction == "maximize" else logarithm(value) for value, direction in found]

    def _constraints(self, constraints: Mapping[str, float]) -> Mapping[str, float]:
        if not self._same_constraint:
            return constraints
        violation = sum(max(value, 0.0) for value in constraints.values())
        return {"violation": violation or max(constraints.values(), default=0.0)}

    def restore(self, trials: Sequence[FrozenTrial]) -> None:
        """Start from the trials of a journal, running ones included."""
        self._ready = {}
        self._told = 0
        self._fitted = FitSet(self._directions, self._fit_set)
        if self._learner is not None:
            assert self._budgets is not None, "a sampler that learns has a budget"
            self._learner.open(self._budgets)
        for place, trial in enumerate(self._learned):
            self._fitted.add(place - len(self._learned), self._whole(trial))
        ended = [trial for trial in trials if trial.state.is_finished()]
        for trial in sorted(ended, key=lambda trial: trial.user_attrs["end"].get("turn", 0)):
            self._told += 1
            if self._learner is not None:
                self._learner.learn(trial)
            if not self._blind:
                self._fitted.add(trial.number, self._whole(trial))
        self._running = {trial.number: self._whole(trial) for trial in trials if not trial.state.is_finished()}
        self._refresh()

    def _whole(self, trial: FrozenTrial) -> FrozenTrial:
        """A trial as the sampler knew it when it was asked."""
        params, distributions = dict(trial.params), dict(trial.distributions)
        if self._parameters is not None:
            idle = json.loads(trial.system_attrs.get(_IDLE, "{}"))
            rest = optuna.samplers.RandomSampler(seed=stream_seed(self._seed, "idle", trial.number) % 2**32)
            for name, where in self._parameters.items():
                if name not in params:  # of another search's trial nothing was proposed
                    params[name] = idle[name] if name in idle else rest.sample_independent(None, trial, name, where)  # type: ignore[arg-type]
                    distributions[name] = where
        found = Kept.of(trial, params, distributions, self._seen(trial.values))
        if self._same_constraint and trial.state.is_finished():
            attrs = {key: value for key, value in trial.system_attrs.items() if not key.startswith("constraints:")}
            attrs |= {f"constraints:{key}": value for key, value in self._constraints(trial.constraints).items()}
            found._system_attrs = attrs
        return found

    def _refresh(self) -> None:
        """Rebuild the study with its trials in the order of their birth, which is the order in which a sampler saw them."""
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self._storage = InMemoryStorage()
        self._study = optuna.create_study(storage=self._storage, directions=self._directions)
        self._ids = {}
        rows = sorted([*self._fitted, *self._running.items()], key=lambda row: row[0])
        self._most_ids = len(rows) + self._fit_set  # failed trials, and those of a blind sampler, are of no use
        for number, trial in rows:
            trial_id = self._storage.create_new_trial(self._study._study_id, trial)
            if number in self._running:
                self._ids[number] = trial_id
