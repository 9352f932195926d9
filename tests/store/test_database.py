"""Laws of a study in a database: a birth and an end are one transaction each, the newest driver owns it, and no password is ever said."""

import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import optuna
import pytest
import sqlalchemy
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState
from postgres import Postgres
from sqlalchemy import Connection, Engine, event
from sqlalchemy.exc import OperationalError

from distprune.errors import TakenOver
from distprune.store import connection, database
from distprune.store.connection import read_study
from distprune.store.database import Database
from distprune.store.study import Truth

pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")

PARAMS = {"lr": 0.123456789012345, "paradigm": "lth", "steps": 3}
DISTRIBUTIONS = {
    "lr": FloatDistribution(1e-3, 1.0, log=True),
    "paradigm": CategoricalDistribution(["lth", "snip"]),
    "steps": IntDistribution(1, 9),
}
DIRECTIONS = ("maximize", "minimize")


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/studies.db"
    return str(request.getfixturevalue("postgres_server").database())


@pytest.fixture(autouse=True)
def in_no_hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database, "_TRY_AGAIN_S", 0.05)


@pytest.fixture
def opened(url: str) -> Iterator[Callable[..., Database]]:
    """Opens the study again and again, and gives the connections back in the end."""
    found: list[Database] = []

    def open_it(**changes: Any) -> Database:
        found.append(Database.at(url, **{"name": "digits-1", "run": "r1", "directions": DIRECTIONS, **changes}))
        return found[-1]

    yield open_it
    for truth in found:
        truth.close()


def born(truth: Truth, number: int) -> None:
    truth.born(number, PARAMS, DISTRIBUTIONS, {"identity": f"k{number}", "recipe": {"model": "x"}}, {"grid_id": number})


def told(truth: Truth, number: int, **constraints: float) -> bool:
    return truth.tell(number, TrialState.COMPLETE, [0.9, 0.1], constraints, {"ended": "finished", "rung": 2})


def facts(trials: list[Any]) -> list[Any]:
    """All that must be the same wherever the study is; of times, only that they are there."""
    return [
        (
            trial.number,
            trial.state,
            trial.values,
            list(trial.params.items()),
            trial.distributions,
            trial.user_attrs,
            trial.system_attrs,
            trial.constraints,
            trial.intermediate_values,
            trial.datetime_start is not None,
            trial.datetime_complete is not None,
        )
        for trial in trials
    ]


def alone(url: str, name: str = "digits-1") -> optuna.Study:
    """As optuna and optuna-dashboard open it."""
    return optuna.load_study(study_name=name, storage=url.replace("postgresql:", "postgresql+psycopg:"))


def test_it_says_what_the_journal_says(url: str, opened: Callable[..., Database], tmp_path: Path) -> None:
    """Also to optuna by itself, and to whoever opens it again."""
    journal, truth = Truth.open(tmp_path / "study.journal", "digits", DIRECTIONS), opened()
    for each in (journal, truth):
        for number in range(4):
            born(each, number)
        assert told(each, 0) and told(each, 2, unfinished=0.5, late=0.1)
        assert each.tell(3, TrialState.FAIL, None, {}, {"ended": "error", "rung": -1})
        assert len(each) == 4
    assert facts(truth.trials()) == facts(journal.trials()) == facts(opened().trials()) == facts(alone(url).trials)
    assert truth is not None and journal.parameters(1) == opened().parameters(1) == (PARAMS, DISTRIBUTIONS)
    study = alone(url)
    assert [direction.name.lower() for direction in study.directions] == list(DIRECTIONS)
    assert [trial.number for trial in study.best_trials] == [0], "a stopped trial is not on the front"
    assert facts(read_study(url, "digits-1")) == facts(study.trials)


@pytest.mark.parametrize(("rung", "step"), [(-1, 0), (2, 2)])
def test_the_value_of_a_pruned_trial_lies_at_its_rung(rung: int, step: int, url: str, opened: Callable[..., Database]) -> None:
    truth = opened(directions=["maximize"])
    born(truth, 0)
    truth.tell(0, TrialState.PRUNED, [0.5], {}, {"rung": rung})
    (trial,) = alone(url).trials
    assert trial.state == TrialState.PRUNED and trial.intermediate_values == {step: 0.5}


def test_an_end_is_told_once(url: str, opened: Callable[..., Database]) -> None:
    truth = opened()
    born(truth, 0)
    assert told(truth, 0)
    before = facts(alone(url).trials)
    assert not truth.tell(0, TrialState.FAIL, None, {"late": 1.0}, {"ended": "error", "rung": 0})
    assert not opened().tell(0, TrialState.FAIL, None, {"late": 1.0}, {"ended": "error", "rung": 0})
    assert facts(alone(url).trials) == before


def test_an_end_that_somebody_else_told_stays(url: str, opened: Callable[..., Database]) -> None:
    truth = opened()
    born(truth, 0)
    alone(url).tell(0, [0.1, 0.2])
    assert not told(truth, 0, late=1.0)
    assert alone(url).trials[0].values == [0.1, 0.2] and not alone(url).trials[0].constraints


def test_the_newest_driver_owns_the_study(url: str, opened: Callable[..., Database]) -> None:
    first = opened()
    born(first, 0)
    born(first, 1)
    assert told(first, 0)
    second = opened()
    before = facts(alone(url).trials)
    for write in (lambda: born(first, 2), lambda: told(first, 1), first.sync):
        with pytest.raises(TakenOver, match=f"was taken over by process {os.getpid()} on"):
            write()
    assert facts(alone(url).trials) == before, "what it told is kept, and nothing is added"
    assert told(second, 1)
    born(second, 2)
    assert len(second) == 3


def test_whoever_takes_over_waits_for_what_is_under_way(url: str, opened: Callable[..., Database]) -> None:
    """No write of the old driver can come after the new one has looked: not even one that had begun."""
    first = opened()
    arrived, go_on = threading.Event(), threading.Event()

    def work(connection: Connection, again: bool) -> None:
        arrived.set()
        go_on.wait(30)
        connection.execute(sqlalchemy.insert(database._trials).values(study_id=first._study, number=0, state=TrialState.RUNNING))

    with ThreadPoolExecutor(2) as threads:
        old = threads.submit(first._written, work)
        assert arrived.wait(30)
        new = threads.submit(lambda: len(opened()))
        time.sleep(0.3)
        assert not new.done(), "the new driver has to wait"
        go_on.set()
        old.result(30)
        assert new.result(60) == 1, "and sees what the old one has written"


# Kills


def drive(url: str, trials: int) -> list[Any]:
    """A small search: starts or goes on, as the real driver does; returns its trials as Optuna reads them."""
    truth = Database.at(url, name="digits-1", run="r1", directions=DIRECTIONS)
    for number in range(trials):
        if number == len(truth):
            born(truth, number)
        told(truth, number, unfinished=0.5)
    found = truth.trials()
    truth.close()
    return found


def killed(url: str, at: int) -> bool:
    """Whether a driver died at that moment: before a statement or a commit, once the tables are there."""
    if (child := os.fork()) == 0:
        left = [at]

        def moment(*ignored: Any) -> None:
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left[0] -= 1

        try:
            connected = connection.connect

            def connect(url: str) -> Any:
                storage = connected(url)
                for name in ("before_cursor_execute", "commit"):
                    event.listen(Engine, name, moment)
                return storage

            database.connect = connect
            drive(url, 1)
            os._exit(0)
        finally:
            os._exit(70)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, -signal.SIGKILL)
    return code != 0


def rows(url: str, *tables: str) -> list[int]:
    """How many each table has."""
    engine = sqlalchemy.create_engine(url.replace("postgresql:", "postgresql+psycopg:"))
    with engine.connect() as connected:
        found = [connected.execute(sqlalchemy.text(f"select count(*) from {table}")).scalar_one() for table in tables]
    engine.dispose()
    return found


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_a_driver_killed_at_its_statements_leaves_each_trial_born_once_and_told_once(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    empty = f"sqlite:///{tmp_path}/empty.db"
    connection.connect(empty).engine.dispose()
    at, died = 0, True
    while died:
        if kind == "sqlite":
            shutil.copy(tmp_path / "empty.db", tmp_path / f"{at}.db")
        url = f"sqlite:///{tmp_path}/{at}.db" if kind == "sqlite" else request.getfixturevalue("postgres_server").database()
        died = killed(url, at)
        ended = drive(url, 2)
        assert [(trial.number, trial.state.name, trial.values) for trial in ended] == [(n, "COMPLETE", [0.9, 0.1]) for n in (0, 1)], at
        assert all(trial.constraints == {"unfinished": 0.5} and trial.params == PARAMS for trial in ended), at
        assert rows(url, "studies", "trials", "trial_values", "trial_params") == [1, 2, 4, 6], at
        at += 2 if kind == "sqlite" else 9
    assert at > 25, "it was killed all along"


# Connections that are lost


@pytest.fixture
def said() -> list[str]:
    return []


def lose_after_commits(monkeypatch: pytest.MonkeyPatch, times: int) -> None:
    """The connection is lost when the server has done a commit and the driver has not heard of it."""
    commit, left = Connection.commit, [times]

    def losing(connected: Connection) -> None:
        commit(connected)
        if left[0]:
            left[0] -= 1
            raise OperationalError("commit", None, Exception("server closed the connection unexpectedly"))

    monkeypatch.setattr(Connection, "commit", losing)


def test_a_commit_that_was_done_and_not_heard_of_is_not_done_again(
    url: str, opened: Callable[..., Database], said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    truth = opened(waits=said.append)
    lose_after_commits(monkeypatch, 1)
    born(truth, 0)
    born(truth, 1)
    lose_after_commits(monkeypatch, 2)
    assert told(truth, 0, unfinished=0.5), "it is this driver that told it"
    assert rows(url, "trials", "trial_values") == [2, 2]
    assert [(trial.number, trial.state) for trial in alone(url).trials] == [(0, TrialState.COMPLETE), (1, TrialState.RUNNING)]
    assert len(said) == 4 and "does not answer: server closed the connection" in said[0] and "answers again" in said[1]


def test_a_lost_connection_is_said_and_opened_again(postgres_server: Postgres, said: list[str]) -> None:
    url = postgres_server.database()
    truth = Database.at(url, name="digits-1", run="r1", directions=DIRECTIONS, waits=said.append)
    born(truth, 0)
    ended = "select count(pg_terminate_backend(pid)) from pg_stat_activity where application_name = 'distprune'"
    assert postgres_server.query(ended) == "1\n"
    assert told(truth, 0)
    postgres_server.stop()
    threading.Timer(0.3, postgres_server.start).start()
    born(truth, 1)
    truth.sync()
    assert [(trial.number, trial.state) for trial in alone(url).trials] == [(0, TrialState.COMPLETE), (1, TrialState.RUNNING)]
    assert ["does not answer" in line for line in said] == [True, False] * 2
    truth.close()


def test_a_frozen_driver_does_not_hold_the_study(postgres_server: Postgres, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its transaction is given up by the server, and it is told so when it wakes up."""
    monkeypatch.setattr(connection, "_IDLE_S", 1)
    url = postgres_server.database()
    name = {"name": "digits-1", "run": "r1", "directions": DIRECTIONS}
    first = Database.at(url, **name)
    born(first, 0)

    def freeze(inside: Connection, again: bool) -> None:
        monkeypatch.setattr(connection, "_IDLE_S", 60)  # the second one is not frozen, however slow this machine is
        assert len(Database.at(url, **name)) == 1  # waits until the server has given the first one up
        inside.execute(sqlalchemy.insert(database._trials).values(study_id=first._study, number=1, state=TrialState.RUNNING))

    with pytest.raises(TakenOver):
        first._written(freeze)
    assert rows(url, "trials") == [1]
    first.close()


def test_what_waiting_does_not_help_is_raised(opened: Callable[..., Database]) -> None:
    truth = opened()
    with pytest.raises(sqlalchemy.exc.DBAPIError):
        truth._written(lambda connection, again: connection.execute(sqlalchemy.text("select nothing from trials")))
