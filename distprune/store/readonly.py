"""The study of a run as a storage of Optuna's that can be looked at and never changed; it may be going on."""

import os
import threading
import time
from collections.abc import Callable, Container, Sequence
from copy import copy
from typing import Any, NoReturn

import optuna
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.study import StudyDirection
from optuna.study._frozen import FrozenStudy
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import event, make_url

from distprune.core.config import read_yaml
from distprune.errors import UserError, command
from distprune.store.address import full_address, shown
from distprune.store.connection import in_a_line
from distprune.store.folder import RunFolder

BRING_EVERY_S = 10.0  # the copy of a run at a URL
_NAMES = "study:metric_names"  # where Optuna keeps what the objectives are called


class Refused(RuntimeError):
    """Something would have changed the study."""


class ReadOnly(BaseStorage):
    """One study of the storage that `current` returns; the objectives are called `names` where the study itself has no names for them."""

    def __init__(self, current: Callable[[], BaseStorage], study: str | None = None, names: Sequence[str] = ()) -> None:
        self._current, self._study, self._names_of_objectives = current, study, list(names)

    def _refuse(self, *args: Any, **options: Any) -> NoReturn:
        raise Refused("This study is shown read-only. Go on with it by distprune alone.")

    create_new_study = delete_study = set_study_user_attr = set_study_system_attr = _refuse
    create_new_trial = set_trial_param = set_trial_state_values = set_trial_intermediate_value = _refuse
    set_trial_user_attr = set_trial_system_attr = _refuse

    def get_study_id_from_name(self, study_name: str) -> int:
        return self._current().get_study_id_from_name(study_name)

    def get_study_name_from_id(self, study_id: int) -> str:
        return self._current().get_study_name_from_id(study_id)

    def get_study_directions(self, study_id: int) -> list[StudyDirection]:
        return self._current().get_study_directions(study_id)

    def get_study_user_attrs(self, study_id: int) -> dict[str, Any]:
        return self._current().get_study_user_attrs(study_id)

    def get_study_system_attrs(self, study_id: int) -> dict[str, Any]:
        return self._named(self._current().get_study_system_attrs(study_id))

    def get_all_studies(self) -> list[FrozenStudy]:
        found = []
        for study in self._current().get_all_studies():
            if self._study in (None, study.study_name):
                study = copy(study)
                study.system_attrs = self._named(study.system_attrs)
                found.append(study)
        return found

    def get_trial(self, trial_id: int) -> FrozenTrial:
        return self._current().get_trial(trial_id)

    def get_all_trials(self, study_id: int, deepcopy: bool = True, states: Container[TrialState] | None = None) -> list[FrozenTrial]:
        return self._current().get_all_trials(study_id, deepcopy, states)

    def _named(self, attrs: dict[str, Any]) -> dict[str, Any]:
        return {_NAMES: self._names_of_objectives, **attrs} if self._names_of_objectives else attrs


class _Journal:
    """The journal of a run folder as it is just now."""

    def __init__(self, folder: RunFolder) -> None:
        self._folder, self._brought = folder, time.monotonic()
        self._storage: JournalStorage | None = None
        self._seen = (0, 0)  # inode and size
        self._lock = threading.Lock()

    def __call__(self) -> BaseStorage:
        with self._lock:
            return self._opened()

    def _opened(self) -> JournalStorage:
        if self._folder.url and time.monotonic() - self._brought > BRING_EVERY_S:
            self._brought = time.monotonic()
            try:
                RunFolder.existing(self._folder.url)
            except UserError:  # the object store does not answer: what was brought before is shown
                pass
        facts = os.stat(self._folder.journal)
        inode, size = self._seen
        # A driver that goes on after its machine died may have cut the end off, which Optuna's reader would not notice.
        if self._storage is None or facts.st_ino != inode or facts.st_size < size:
            self._storage = JournalStorage(JournalFileBackend(str(self._folder.journal)))
        self._seen = (facts.st_ino, facts.st_size)
        return self._storage


def open_study(folder: RunFolder, names: Sequence[str] = ()) -> ReadOnly:
    """The study of a run, in its journal or a database. Raises UserError where there is none yet."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    facts = read_yaml(folder.search_yaml)
    if "study" in facts:
        url = str((facts.get("search") or {}).get("study"))
        storage = in_a_line(url, lambda: _database(url))
        name = str(facts["study"]["name"])
        if name not in [study.study_name for study in in_a_line(url, storage.get_all_studies)]:
            raise UserError(f"{shown(url)} has no study '{name}'. Restore the database, or show another run.")
        return ReadOnly(lambda: storage, name, names)
    if not folder.journal.exists():
        raise UserError(f"{folder} has no trials yet. Wait, or go on with: {command(f'resume {folder.quoted}')}")
    journal = _Journal(folder)
    journal()  # what cannot be read is said now
    return ReadOnly(journal, names=names)


def _database(url: str) -> RDBStorage:
    """Connections that the database itself holds to reading."""
    path = make_url(url).database or ""
    if url.startswith("sqlite") and not os.path.exists(path):
        raise UserError(f"{shown(url)} is not there: {path} does not exist. Restore the database, or show another run.")  # it would be made
    storage = RDBStorage(full_address(url), engine_kwargs={"hide_parameters": True}, skip_table_creation=True)
    storage.engine.dispose()
    reading = "pragma query_only = on" if storage.engine.name == "sqlite" else "set default_transaction_read_only = on"

    def only_read(connection: Any, record: Any) -> None:
        cursor = connection.cursor()
        cursor.execute(reading)
        cursor.close()
        connection.commit()

    event.listen(storage.engine, "connect", only_read)
    return storage
