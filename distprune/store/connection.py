"""Optuna's storage in a database: how it is opened, which study is a run's own, and what its errors mean."""

from collections.abc import Callable
from typing import Any, TypeVar

import optuna
from optuna.exceptions import DuplicatedStudyError, StorageInternalError
from optuna.storages import RDBStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial
from sqlalchemy import event
from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError, SQLAlchemyError

from distprune.errors import UserError
from distprune.store.address import full_address, shown

T = TypeVar("T")

RUN = "distprune:run"  # system attribute of a study: the run that it belongs to
_IDLE_S = 60  # after which the server gives up the transaction of a driver that is frozen or cut off
# What passes, by SQLSTATE: lost connections, a standby that is no primary yet, conflicts, a full server, locks, a server that stops.
_PASSING = ("08", "25006", "25P03", "40", "53", "55", "57", "SQLITE_BUSY", "SQLITE_LOCKED", "SQLITE_FULL", "SQLITE_IOERR")


def connect(url: str) -> RDBStorage:
    """Optuna's storage at a checked URL; an empty database gets its tables."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    storage = RDBStorage(full_address(url), engine_kwargs={"pool_size": 1, "max_overflow": 2, "hide_parameters": True})
    engine = storage.engine
    engine.dispose()  # connections that know nothing of the following
    if engine.name == "sqlite":  # a transaction is alone from its beginning, and not only from its first write
        event.listen(engine, "connect", lambda connection, record: setattr(connection, "isolation_level", None))
        event.listen(engine, "begin", lambda connection: connection.exec_driver_sql("begin immediate"))
    else:
        event.listen(engine, "connect", _be_given_up)
    return storage


def _be_given_up(connection: Any, record: Any) -> None:
    with connection.cursor() as cursor:
        cursor.execute(f"set idle_in_transaction_session_timeout = '{_IDLE_S}s'")
    connection.commit()


def find_study(storage: RDBStorage, url: str, name: str, run: str, *, begun: bool = False) -> int | None:
    """The id of a run's study, None if it has none yet.

    Raises UserError for one of that name that belongs to another run, and for one that a run which has `begun` has lost.
    """
    try:
        study_id = storage.get_study_id_from_name(name)
    except KeyError:
        if begun:
            raise UserError(f"{shown(url)} has lost study '{name}' of this run. Restore the database, or start the search anew.") from None
        return None
    owner = storage.get_study_system_attrs(study_id).get(RUN)
    if owner is None and storage.get_n_trials(study_id) == 0:  # a driver died before it could say whose it is
        storage.set_study_system_attr(study_id, RUN, run)
    elif owner != run:
        raise UserError(f"{shown(url)} has a study '{name}' already, of another run. Start the search under another name: --name NAME.")
    return study_id


def begin_study(storage: RDBStorage, url: str, name: str, run: str, directions: list[StudyDirection]) -> int:
    """The id of the study of a run, which is made."""
    try:
        storage.create_new_study(directions, name)
    except DuplicatedStudyError:
        pass  # by another driver, just now
    found = find_study(storage, url, name, run)
    assert found is not None
    return found


def check_study(url: str, name: str, run: str, *, begun: bool) -> None:
    """Raise UserError if the database cannot be used for the study of a run."""

    def look() -> None:
        storage = connect(url)
        find_study(storage, url, name, run, begun=begun)
        storage.engine.dispose()

    in_a_line(url, look)


def read_study(url: str, name: str) -> list[FrozenTrial]:
    """The trials of a study, which may be going on. Raises UserError if there is none."""

    def read() -> list[FrozenTrial]:
        storage = connect(url)
        try:
            return storage.get_all_trials(storage.get_study_id_from_name(name), deepcopy=False)
        except KeyError:
            raise UserError(f"{shown(url)} has no study '{name}'. Restore the database, or leave the run out.") from None
        finally:
            storage.engine.dispose()

    return in_a_line(url, read)


def in_a_line(url: str, work: Callable[[], T]) -> T:
    """Do `work`; what goes wrong with the database is a UserError. What it was opened with is in none."""
    try:
        return work()
    except ImportError:
        raise UserError(f'study {shown(url)} needs a driver that is not installed. Write: pip install "distprune[postgresql]".') from None
    except (StorageInternalError, SQLAlchemyError) as error:
        raise UserError(
            f"study {shown(url)} cannot be used: {reason(error)}. Check that the server runs, the URL, and who may log in: a password is "
            "given as PGPASSWORD, in ~/.pgpass or by a service file."
        ) from None
    except RuntimeError as error:  # tables of another version of Optuna; it says what to do
        raise UserError(f"study {shown(url)} cannot be used: {' '.join(str(error).split())}") from None


def passing(error: Exception) -> str:
    """Why the database does not do what it will do again later; empty where waiting does not help."""
    cause = _cause(error)
    if not isinstance(cause, DBAPIError):
        return ""
    states = (getattr(cause.orig, name, None) for name in ("sqlstate", "pgcode", "sqlite_errorname"))
    state = next((state for state in states if state), "")
    lost = cause.connection_invalidated or (isinstance(cause, OperationalError | InterfaceError) and not state)
    return reason(cause) if lost or state.startswith(_PASSING) else ""


def reason(error: Exception) -> str:
    """What the database or its driver says, in a line."""
    cause = _cause(error)
    return " ".join(str(cause.orig if isinstance(cause, DBAPIError) else cause).split()).rstrip(".")[:300]


def _cause(error: BaseException) -> BaseException:
    while isinstance(error, StorageInternalError) and error.__cause__ is not None:
        error = error.__cause__
    return error
