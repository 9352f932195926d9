"""Where the truth about a search's trials is: the journal in its run folder, or a study in a database."""

import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from optuna.trial import FrozenTrial

from distprune.core.config import read_yaml
from distprune.errors import TakenOver, UserError
from distprune.search.config import Search
from distprune.store.folder import RunFolder
from distprune.store.study import Truth

Listener = Callable[[str, dict[str, Any]], None]


def new_study(search: Search) -> dict[str, Any]:
    """What search.yaml says of a study in a database, which no other run has and which a renamed run folder keeps; empty for a journal."""
    if search.study is None:
        return {}
    run = uuid.uuid4().hex
    return {"study": {"name": f"{search.name}-{run[:8]}", "run": run}}


def check_study(search: Search, facts: Mapping[str, Any], folder: RunFolder, *, begun: bool) -> None:
    """Raise UserError if the study cannot be used: no database there, another run's, or none of a run that was `begun`."""
    if (search.study is None) != ("study" not in facts):
        before, now = ("the journal", search.study) if search.study else ("a database", "the journal")
        raise UserError(f"{folder} was begun with its study in {before}, got study: {now}. Put back what search.yaml had.")
    if search.study is not None:
        from distprune.store.connection import check_study

        check_study(search.study, *_names(facts, folder), begun=begun)


def open_truth(search: Search, folder: RunFolder, directions: Sequence[str], listen: Listener) -> Truth:
    """Open or begin the study of a run. The caller holds the run's lock; in a database, a driver elsewhere loses the study to this one."""
    if search.study is None:
        return Truth.open(folder.journal, search.name, directions)
    from distprune.store.database import Database

    name, run = _names(read_yaml(folder.search_yaml), folder)

    def waits(message: str) -> None:
        listen("database", {"message": message})

    return Database.at(search.study, name=name, run=run, directions=directions, begun=folder.reports.exists(), waits=waits)


def _names(facts: Mapping[str, Any], folder: RunFolder) -> tuple[str, str]:
    study = facts.get("study")
    name, run = (study.get("name"), study.get("run")) if isinstance(study, Mapping) else (None, None)
    if not (isinstance(name, str) and name and isinstance(run, str) and run):
        raise UserError(f"{folder.search_yaml} must say which study is its own, under study: {{name: ..., run: ...}}. Restore it.")
    return name, run


def trials_in_database(folder: RunFolder) -> list[FrozenTrial] | None:
    """The trials of a run that keeps them in a database; None for one with a journal."""
    facts = read_yaml(folder.search_yaml)
    if "study" not in facts:
        return None
    from distprune.store.connection import read_study

    search = Search.of_run(facts.get("search"))
    return read_study(search.study or "", _names(facts, folder)[0])


@contextmanager
def one_owner() -> Iterator[None]:
    """Within, a driver whose study is taken over ends with one line, whatever engine it runs on."""
    try:
        yield
    except TakenOver as taken:
        raise UserError(str(taken)) from None
