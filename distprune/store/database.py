"""The truth about trials in a database: a study in Optuna's own tables, which `optuna` and optuna-dashboard open as it is.

A birth is one transaction, and so is an end. Each begins by looking, under a lock, whether the study is still this driver's: it belongs to
the one that opened it last. So a driver that was cut off and comes back writes nothing, and whoever opens the study waits for what is
under way. While the database does not answer, the driver waits for it and says so.

Optuna makes the study and its tables and reads them. What a trial needs is written here, a statement a table: Optuna's own calls look up
each parameter before they write it, at some ten times the cost.
"""

import json
import os
import platform
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, TypeVar

from optuna.distributions import BaseDistribution, distribution_to_json
from optuna.exceptions import StorageInternalError
from optuna.storages import RDBStorage
from optuna.storages._rdb import models
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import Connection, func, insert, select, update
from sqlalchemy.exc import SQLAlchemyError

from distprune.errors import TakenOver
from distprune.store.address import shown
from distprune.store.connection import begin_study, connect, find_study, in_a_line, passing
from distprune.store.study import Truth, read_directions, step_of

T = TypeVar("T")
Waits = Callable[[str], None]  # hears in a line that the database does not answer, and when it does again

_OWNER = "distprune:owner"  # system attribute of a study: the driver that opened it last
_TRY_AGAIN_S = 2.0
_sleep = time.sleep

_trials, _params = models.TrialModel.__table__, models.TrialParamModel.__table__
_user, _system = models.TrialUserAttributeModel.__table__, models.TrialSystemAttributeModel.__table__
_values, _intermediate = models.TrialValueModel.__table__, models.TrialIntermediateValueModel.__table__
_study = models.StudySystemAttributeModel.__table__


class Database(Truth):
    """What is known of the trials of a study in a database."""

    def __init__(self, url: str, storage: RDBStorage, study_id: int, waits: Waits) -> None:
        """Take the study over from whoever has it."""
        super().__init__(storage, study_id, {}, self._look)
        self._url, self._waits, self._engine = shown(url), waits, storage.engine
        self._token, self._taken = uuid.uuid4().hex, ""
        self._hurried = False
        storage.set_study_system_attr(study_id, _OWNER, {"token": self._token, "driver": f"process {os.getpid()} on {platform.node()}"})
        known = select(_trials.c.number, _trials.c.trial_id, _trials.c.state).where(_trials.c.study_id == study_id)
        rows = self._written(lambda connection, again: connection.execute(known).all())
        self._ids = {number: trial_id for number, trial_id, _ in rows}
        self._ended = {number for number, _, state in rows if state.is_finished()}

    @classmethod
    def at(
        cls, url: str, *, name: str, run: str, directions: Sequence[str], begun: bool = False, waits: Waits = lambda message: None
    ) -> "Database":
        """Open or begin the study of a run. Raises UserError for one of another run, one that a begun run has lost, and no database."""

        def open_it() -> "Database":
            storage = connect(url)
            study_id = find_study(storage, url, name, run, begun=begun)
            return cls(url, storage, study_id or begin_study(storage, url, name, run, read_directions(directions)), waits)

        return in_a_line(url, open_it)

    def close(self) -> None:
        """Give the connection back."""
        self._engine.dispose()

    def _create(self, trial: FrozenTrial) -> int:
        own = _trials.c.study_id == self._study

        def work(connection: Connection, again: bool) -> int:
            if again and (found := connection.execute(select(_trials.c.trial_id).where(own, _trials.c.number == trial.number)).scalar()):
                return int(found)  # it was born when the connection was lost
            count = connection.execute(select(func.count()).select_from(_trials).where(own)).scalar()
            assert count == trial.number, f"the study has {count} trials before trial {trial.number} is born: something else writes it"
            facts = {"study_id": self._study, "number": trial.number, "state": trial.state, "datetime_start": _now()}
            trial_id = int(connection.execute(insert(_trials).values(facts).returning(_trials.c.trial_id)).scalar_one())
            kinds = {name: (kind, distribution_to_json(kind)) for name, kind in trial.distributions.items()}
            params = [
                {"param_name": name, "param_value": kinds[name][0].to_internal_repr(value), "distribution_json": kinds[name][1]}
                for name, value in trial.params.items()
            ]
            _add(connection, _params, trial_id, params)
            _add(connection, _user, trial_id, _attributes(trial.user_attrs))
            _add(connection, _system, trial_id, _attributes(trial.system_attrs))
            return trial_id

        return self._written(work)

    def tell(
        self, number: int, state: TrialState, values: Sequence[float] | None, constraints: Mapping[str, float], attrs: Mapping[str, Any]
    ) -> bool:
        if number in self._ended:
            return False
        trial_id, numbers = self._ids[number], list(values or ())
        intermediate = {step_of(attrs["rung"]): numbers[0]} if state == TrialState.PRUNED and numbers else {}

        def work(connection: Connection, again: bool) -> bool:
            running = (_trials.c.trial_id == trial_id) & (_trials.c.state == TrialState.RUNNING)
            if not connection.execute(update(_trials).where(running).values(state=state, datetime_complete=_now())).rowcount:
                return again  # told when the connection was lost; else by other hands
            stored = [models.TrialValueModel.value_to_stored_repr(float(value)) for value in numbers]
            _add(connection, _values, trial_id, [{"objective": i, "value": v, "value_type": kind} for i, (v, kind) in enumerate(stored)])
            for step, value in intermediate.items():
                found, kind = models.TrialIntermediateValueModel.intermediate_value_to_stored_repr(float(value))
                row = {"step": step, "intermediate_value": found, "intermediate_value_type": kind}
                _add(connection, _intermediate, trial_id, [row])
            _add(connection, _user, trial_id, _attributes({"end": dict(attrs)}))
            # as optuna.Trial.set_constraint stores it
            _add(connection, _system, trial_id, _attributes({f"constraints:{name}": float(value) for name, value in constraints.items()}))
            return True

        told = self._written(work)
        self._ended.add(number)
        return told

    def parameters(self, number: int) -> tuple[dict[str, Any], dict[str, BaseDistribution]]:
        return self._patiently(lambda again: super(Database, self).parameters(number))

    def trials(self) -> list[FrozenTrial]:
        return self._patiently(lambda again: self._storage.get_all_trials(self._study, deepcopy=False))  # nobody else has them

    def _look(self) -> None:
        """See that the study is still this driver's; what was told lies with the server."""
        self._written(lambda connection, again: None)

    def _check(self, connection: Connection) -> None:
        """Raise TakenOver if the study is another driver's. If not, it cannot become so before this transaction has ended."""
        owner = select(_study.c.value_json).where(_study.c.study_id == self._study, _study.c.key == _OWNER).with_for_update()
        found = json.loads(connection.execute(owner).scalar() or "{}")
        if found.get("token") != self._token:
            self._taken = (
                f"The study in {self._url} was taken over by {found.get('driver', 'nobody known')}: this driver ends, and all that it has "
                "told is kept. Leave it to the other, or resume the run here, which takes the study back."
            )
            raise TakenOver(self._taken)

    def hurry(self) -> None:
        self._hurried = True

    def _written(self, work: Callable[[Connection, bool], T]) -> T:
        """Do `work` in one transaction of this driver. It hears whether it is done again, as the answer to a commit may be lost."""

        def transaction(again: bool) -> T:
            with self._engine.connect() as connection:
                self._check(connection)
                done = work(connection, again)
                connection.commit()
                return done

        return self._patiently(transaction)

    def _patiently(self, work: Callable[[bool], T]) -> T:
        """Do `work`, again and again while the database does not answer."""
        failed = 0
        while True:
            if self._taken:
                raise TakenOver(self._taken)
            try:
                done = work(failed > 0)
                break
            except (StorageInternalError, SQLAlchemyError) as error:
                if self._hurried or not (why := passing(error)):
                    raise
            failed += 1
            if failed == 1:
                self._waits(f"{self._url} does not answer: {why}. The search waits for it; nothing that was told is lost.")
            _sleep(_TRY_AGAIN_S)
        if failed:
            self._waits(f"{self._url} answers again, and the search goes on.")
        return done


def _now() -> datetime:
    return datetime.now(UTC).replace(tzinfo=None)  # as Optuna has it in tables


def _attributes(attrs: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [{"key": key, "value_json": json.dumps(value)} for key, value in attrs.items()]


def _add(connection: Connection, table: Any, trial_id: int, rows: list[dict[str, Any]]) -> None:
    if rows:
        connection.execute(insert(table), [{"trial_id": trial_id, **row} for row in rows])
