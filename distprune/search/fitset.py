"""The finished trials that a model is fitted to: the best and the latest, so that a proposal costs the same after 10,000 as after 200."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from optuna.distributions import BaseDistribution
from optuna.trial import FrozenTrial, TrialState

from distprune.store.study import step_of

FIT_SET = 200  # see benchmarks/suggestions.py for what a suggestion costs, and what a bound does


class Kept(FrozenTrial):
    """A trial of a fit set. Nothing in it is changed in place, so a copy need not be deep."""

    def __deepcopy__(self, memo: dict[int, Any]) -> "Kept":
        return copy.copy(self)

    @classmethod
    def of(
        cls, trial: FrozenTrial, params: Mapping[str, Any], distributions: Mapping[str, BaseDistribution], values: list[float] | None
    ) -> "Kept":
        """What a sampler wants to know of a trial."""
        return cls(
            number=trial.number,
            trial_id=-1,
            state=trial.state,
            value=None,
            values=values,
            params=dict(params),
            distributions=dict(distributions),
            user_attrs={},
            system_attrs=trial.system_attrs,
            intermediate_values=scores(trial),
            datetime_start=trial.datetime_start,
            datetime_complete=trial.datetime_complete,
        )


def scores(trial: FrozenTrial) -> dict[int, float]:
    """Rung -> value of a trial that was stopped with one objective, where a sampler looks for it."""
    if trial.state != TrialState.PRUNED or trial.intermediate_values or not trial.values:
        return trial.intermediate_values
    return {step_of(trial.user_attrs.get("end", {}).get("rung", -1)): trial.values[0]}


class FitSet:
    """At most `size` and a quarter more trials. A pure function of the trials in the order in which they were told."""

    def __init__(self, directions: Sequence[str], size: int) -> None:
        self._signs = np.array([1.0 if direction == "maximize" else -1.0 for direction in directions])
        self._size = size
        self._rows: list[tuple[int, FrozenTrial]] = []  # (number, trial), as they were told

    def __iter__(self) -> Iterator[tuple[int, FrozenTrial]]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, number: int, trial: FrozenTrial) -> bool:
        """Take a trial in that was told, and say whether others went. Failed ones teach nothing."""
        if trial.state == TrialState.FAIL:
            return False
        self._rows.append((number, trial))
        if len(self._rows) <= self._size + self._size // 4:
            return False
        half = self._size // 2
        older, latest = self._rows[:-half], self._rows[-half:]
        order = self._ranked([trial for _, trial in older])
        kept = set(order[: self._size - half])
        self._rows = [row for place, row in enumerate(older) if place in kept] + latest
        return True

    def _ranked(self, trials: Sequence[FrozenTrial]) -> list[int]:
        """Places from best to worst: what violates least, then what fewest others dominate, then what got furthest, then the oldest."""
        violations = [sum(max(value, 0.0) for value in trial.constraints.values()) for trial in trials]
        reached = [-max(trial.intermediate_values, default=0) for trial in trials]
        told = [bool(trial.values) and trial.state == TrialState.COMPLETE for trial in trials]
        worst = [-np.inf] * len(self._signs)
        values = np.array([self._signs * trial.values if ok else worst for trial, ok in zip(trials, told, strict=True)])
        better = (values[:, None] >= values[None]).all(-1) & (values[:, None] > values[None]).any(-1)  # [i, j]: i dominates j
        # Among equals in violation alone: a stopped trial's values are none that a finished one could be measured by.
        same = np.array(violations)[:, None] == np.array(violations)[None]
        beaten = (better & same).sum(0).tolist()
        return sorted(range(len(trials)), key=lambda i: (violations[i], not told[i], beaten[i], reached[i], i))
