"""From a checked search to a finished run folder: the walk of a search, local or inside a cluster."""

import functools
import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from distprune.core.config import read_yaml
from distprune.environment import environment
from distprune.errors import UserError
from distprune.search.book import DIRECTIONS, Assignment, Book
from distprune.search.config import Search
from distprune.search.finale import finalize, write_table
from distprune.search.proposer import Proposer
from distprune.search.retention import Retention
from distprune.search.rungs import Rungs
from distprune.search.setup import Setup, set_up
from distprune.search.trial import Job
from distprune.store.files import lock, publish
from distprune.store.folder import RunFolder
from distprune.store.reports import ReportWriter, recover
from distprune.store.study import Truth

TABLE_EVERY_S = 10.0  # `trials.parquet` of a running search is at most this old

Listener = Callable[[str, dict[str, Any]], None]  # (event, facts): what a display hears


class Engine(Protocol):
    """Where trials run: Ray, or the simulator in its place."""

    def open(self, search: Search) -> None:
        """Get ready. Raises UserError if the search cannot run there."""

    def run(
        self, search: Search, book: Book, job: Callable[[Assignment], Job], ended: Callable[[int], None], draw: Callable[[], None]
    ) -> None:
        """Run until the book has no trial left; call `ended` when one was told, and `draw` often."""


def start(search: Search, *, engine: Engine, listen: Listener) -> RunFolder:
    """Run a new search. Raises UserError before anything is written if it cannot be done."""
    RunFolder(search.folder).check_new()
    listen("checking", {"search": search})
    setup = set_up(search)
    engine.open(search)
    folder = RunFolder(search.folder).create()
    with lock(folder.path):
        rungs = setup.rungs()
        _write_search(folder, {"search": search.plain(), "rungs": rungs.costs, "environment": environment()})
        return _drive(setup, rungs, folder, engine, listen)


def resume(path: str | Path, *, limits: Mapping[str, Any], engine: Engine, listen: Listener) -> RunFolder:
    """Go on with an interrupted search, or with a finished one under larger `limits`. Rungs and first environment stay as they are."""
    folder = RunFolder.existing(path)
    with lock(folder.path):
        facts = read_yaml(folder.search_yaml)
        if not {"search", "rungs", "environment"} <= facts.keys():
            raise UserError(
                f"{folder.search_yaml} must hold search, rungs and environment. Restore it, or start a new search from your own file."
            )
        search = Search.load(facts["search"], limits=limits, storage=str(folder.path.parent), name=folder.path.name)
        listen("checking", {"search": search})
        setup = set_up(search)
        engine.open(search)
        if limits:
            _write_search(folder, {**facts, "search": search.plain()})
        return _drive(setup, setup.rungs(facts["rungs"]), folder, engine, listen)


def _write_search(folder: RunFolder, facts: dict[str, Any]) -> None:
    import yaml

    publish(folder.search_yaml, yaml.safe_dump(json.loads(json.dumps(facts)), sort_keys=False).encode())


def _drive(setup: Setup, rungs: Rungs, folder: RunFolder, engine: Engine, listen: Listener) -> RunFolder:
    search = setup.search
    truth = Truth.open(folder.journal, search.name, DIRECTIONS)
    rows, damage = recover(folder.reports)
    if damage:
        listen("damaged", {"message": damage})
    started = time.monotonic()
    with ReportWriter(folder.reports) as reports:
        book = Book(
            space=setup.space,
            proposer=Proposer(search.sampler, setup.space.build, directions=DIRECTIONS, seed=search.seed, budgets=setup.budgets),
            rungs=rungs,
            truth=truth,
            reports=reports,
            most_trials=search.limits.trials,
            most_cost=search.limits.cost,
            budget=search.budget,
            out_of_time=lambda: search.limits.wall is not None and time.monotonic() - started >= search.limits.wall,
        )
        found = book.reconcile(rows)
        retention = Retention(folder, book)
        retention.sweep()
        write_table(folder, book)
        try:
            if book.has_work:
                listen("running", {"setup": setup, "found": found, "folder": folder})
                job = functools.partial(_job, setup, folder, book)
                engine.run(search, book, job, _Ended(folder, book, retention), lambda: listen("progress", book.summary()))
        finally:
            book.settle()
    listen("finishing", {"front": sorted(book.front)})
    finalize(folder, book)
    listen("finished", {"summary": book.summary()})
    return folder


class _Ended:
    """What happens when a trial was told: its checkpoints go, and now and then the table of trials is written."""

    def __init__(self, folder: RunFolder, book: Book, retention: Retention) -> None:
        self._folder, self._book, self._retention = folder, book, retention
        self._written = time.monotonic()

    def __call__(self, number: int) -> None:
        self._retention.sweep(number)
        if time.monotonic() - self._written > TABLE_EVERY_S:
            self._written = time.monotonic()
            write_table(self._folder, self._book)


def _job(setup: Setup, folder: RunFolder, book: Book, assignment: Assignment) -> Job:
    search = setup.search
    return Job(
        number=assignment.number,
        recipe=assignment.recipe.plain(),
        folder=str(folder.path.absolute()),
        rungs=book.rungs.costs,
        report_every=search.report_every,
        recovery=search.recovery,
        known=assignment.known,
        threads=search.workers.cpus,
        device="cuda" if search.workers.gpus else "cpu",
        working_dir=os.getcwd(),
        cost=search.budget.cost.plain() if search.budget and search.budget.measured else None,
    )
