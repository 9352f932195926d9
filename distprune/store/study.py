"""`study.journal`: the truth about trials, an Optuna journal that `optuna` and optuna-dashboard open as it is.

Written by one driver. A trial is born with one record and its end is told with its last, so that a kill leaves no half-written trial.
"""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.storages import BaseStorage, JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from distprune.store import files

_SYNC_EVERY_S = 1.0


class _Journal(JournalFileBackend):
    """Optuna's journal file, written by the store's own means. The run's lock makes Optuna's needless.

    A record survives the death of the driver as soon as it is written; one of the machine, when it is synced: at most once a second,
    as a thousand short trials would wait longer for the disk than for anything else.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(str(path))
        self._path, self._synced = path, 0.0

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        lines = "".join(json.dumps(log, separators=(",", ":")) + "\n" for log in logs)
        due = time.monotonic() - self._synced >= _SYNC_EVERY_S
        files.append(self._path, lines.encode(), sync=due)
        if due:
            self._synced = time.monotonic()

    def sync(self) -> None:
        """Have all records survive the death of the machine."""
        files.append(self._path, b"", sync=True)
        self._synced = time.monotonic()


def step_of(rung: int) -> int:
    """Where Optuna keeps the value of a PRUNED trial: at its rung, or at the first if it came to none."""
    return max(rung, 0)


def read_directions(names: Sequence[str]) -> list[StudyDirection]:
    """As Optuna has them."""
    return [StudyDirection[name.upper()] for name in names]


class Truth:
    """What is known of the trials of a study."""

    def __init__(self, storage: BaseStorage, study_id: int, ids: dict[int, int], sync: Callable[[], None]) -> None:
        self._storage, self._study, self._ids, self._sync = storage, study_id, ids, sync

    def __len__(self) -> int:
        """How many trials were born."""
        return len(self._ids)

    @classmethod
    def open(cls, path: str | Path, name: str, directions: Sequence[str]) -> "Truth":
        """Open or begin the journal at `path`; the caller holds the run's lock. A torn last record is cut, a dead driver's lock removed.

        `name` is for a new journal. One that has a study keeps it under its own name, so that a run folder can be renamed.
        """
        path = Path(path)
        if path.exists():
            data = path.read_bytes()
            if (whole := data.rfind(b"\n") + 1) < len(data):  # Optuna would refuse the journal for ever
                files.cut(path, whole)
        for stale in path.parent.glob(f"{path.name}.lock*"):
            stale.unlink()
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        journal = _Journal(path)
        storage = JournalStorage(journal)
        studies = storage.get_all_studies()
        study_id = studies[0]._study_id if studies else storage.create_new_study(read_directions(directions), name)
        ids = {trial.number: trial._trial_id for trial in storage.get_all_trials(study_id, deepcopy=False)}
        return cls(storage, study_id, ids, journal.sync)

    def born(
        self,
        number: int,
        params: Mapping[str, Any],
        distributions: Mapping[str, BaseDistribution],
        attrs: Mapping[str, Any],
        system_attrs: Mapping[str, Any] | None = None,
    ) -> None:
        """Record trial `number` as running, at once or not at all."""
        assert number == len(self._ids), f"the next trial is {len(self._ids)}, not {number}"
        trial = FrozenTrial(
            number=number,
            trial_id=-1,
            state=TrialState.RUNNING,
            value=None,
            params=dict(params),
            distributions=dict(distributions),
            user_attrs=dict(attrs),
            system_attrs=dict(system_attrs or {}),
            intermediate_values={},
            datetime_start=datetime.now(UTC),
            datetime_complete=None,
        )
        self._ids[number] = self._create(trial)

    def _create(self, trial: FrozenTrial) -> int:
        trial_id = self._storage.create_new_trial(self._study, trial)
        given = self._storage.get_trial(trial_id).number
        assert given == trial.number, f"the study gave number {given} to trial {trial.number}: another process writes it"
        return trial_id

    def tell(
        self, number: int, state: TrialState, values: Sequence[float] | None, constraints: Mapping[str, float], attrs: Mapping[str, Any]
    ) -> bool:
        """Record how a trial ended; the state comes last and commits the rest. False if it was told before, which changes nothing.

        The value of a PRUNED trial is the one at the rung that `attrs` names.
        """
        trial_id = self._ids[number]
        if self._storage.get_trial(trial_id).state.is_finished():
            return False
        self._end(trial_id, state, values, constraints, attrs)
        return True

    def _end(
        self, trial_id: int, state: TrialState, values: Sequence[float] | None, constraints: Mapping[str, float], attrs: Mapping[str, Any]
    ) -> None:
        self._storage.set_trial_user_attr(trial_id, "end", dict(attrs))
        for key, value in constraints.items():
            self._storage.set_trial_system_attr(trial_id, f"constraints:{key}", float(value))  # as optuna.Trial.set_constraint stores it
        if state == TrialState.PRUNED and values:
            self._storage.set_trial_intermediate_value(trial_id, step_of(attrs["rung"]), values[0])
        self._storage.set_trial_state_values(trial_id, state, values)

    def sync(self) -> None:
        """Have all that was told survive the death of the machine."""
        self._sync()

    def hurry(self) -> None:
        """Wait no longer for what does not answer: the search was interrupted, and the next driver tells what this one cannot."""

    def parameters(self, number: int) -> tuple[dict[str, Any], dict[str, BaseDistribution]]:
        """What trial `number` was proposed with."""
        trial = self._storage.get_trial(self._ids[number])
        return trial.params, trial.distributions

    def trials(self) -> list[FrozenTrial]:
        """All trials, by number."""
        return self._storage.get_all_trials(self._study)
