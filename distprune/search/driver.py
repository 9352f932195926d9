"""From a checked search to a finished run folder: the walk of a search, local or inside a cluster."""

import functools
import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from distprune.core.config import read_yaml
from distprune.core.prefix import shared_keys
from distprune.environment import environment
from distprune.errors import UserError
from distprune.search.again import Again
from distprune.search.book import Book
from distprune.search.config import Search
from distprune.search.disk import Disk, tell_waiting
from distprune.search.entry import Assignment
from distprune.search.finale import close_tables, finalize, write_table
from distprune.search.goals import Goals
from distprune.search.learned import as_trials
from distprune.search.order import Order
from distprune.search.proposer import Proposer
from distprune.search.recorded import Recorded
from distprune.search.retention import Retention
from distprune.search.rungs import Rungs
from distprune.search.setup import Setup, check_cache, check_storage, set_up
from distprune.search.simulate import Simulator
from distprune.search.trial import Job
from distprune.store.files import lock, publish, telling
from distprune.store.folder import RunFolder
from distprune.store.reports import ReportWriter, recover
from distprune.store.study import Truth

TABLE_EVERY_S = 10.0  # `trials.parquet` of a running search is at most this old,
TABLE_SHARE = 0.05  # or older where writing it would take more than this share of the driver's time
SIMULATED_WORKERS = 4  # where neither the command nor the search says how many

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
    check_storage(search)
    RunFolder(search.folder).check_new()
    listen("checking", {"search": search})
    setup = set_up(search)
    check_cache(search)
    engine.open(search)
    folder = RunFolder(search.folder).create()
    with lock(folder.path):
        rungs = setup.rungs()
        _write_search(folder, _facts(search, rungs))
        return _drive(setup, rungs, folder, engine, listen)


def simulate(search: Search, *, recorded: Recorded, workers: int | None, listen: Listener) -> RunFolder:
    """Run a new search on recorded curves and a virtual clock. Its run folder says that it is simulated, and holds no networks.

    Raises UserError before anything is written if it cannot be done.
    """
    workers = search.workers.most or SIMULATED_WORKERS if workers is None else workers
    if workers < 1:
        raise UserError(f"workers must be at least 1, got {workers}.")
    check_storage(search)
    RunFolder(search.folder).check_new()
    listen("checking", {"search": search})
    setup = set_up(search)
    recorded.check(setup)
    simulated = {"run": str(recorded.path), "trials": recorded.trials, "usable": recorded.usable, "scored": recorded.scored}
    listen("recorded", simulated)
    folder = RunFolder(search.folder).create()
    with lock(folder.path):
        rungs = setup.rungs()
        engine = Simulator(recorded.curve, workers=workers, by=recorded.by)
        facts = {**_facts(search, rungs), "simulated": {**simulated, "workers": workers, "clock": recorded.by}}
        _write_search(folder, facts)
        _drive(setup, rungs, folder, engine, listen, clock=engine.clock, finale=close_tables)
        facts["simulated"]["time"] = round(engine.clock(), 3)
        _write_search(folder, facts)
    return folder


def resume(path: str | Path, *, limits: Mapping[str, Any], engine: Engine, listen: Listener) -> RunFolder:
    """Go on with an interrupted search, or with a finished one under larger `limits`. Rungs and first environment stay as they are."""
    folder = RunFolder.existing(path)
    folder.check_real("resumed")
    with lock(folder.path):
        facts = read_facts(folder)
        search = Search.load(facts["search"], limits=limits, storage=str(folder.path.parent), name=folder.path.name)
        listen("checking", {"search": search})
        setup = set_up(search, learned=folder.learned)
        check_cache(search)
        engine.open(search)
        if limits:
            _write_search(folder, {**facts, "search": search.plain()})
        return _drive(setup, setup.rungs(facts["rungs"]), folder, engine, listen)


def read_facts(folder: RunFolder) -> dict[str, Any]:
    """What `search.yaml` holds. Raises UserError if it is not one."""
    facts = read_yaml(folder.search_yaml)
    if not {"search", "rungs", "environment"} <= facts.keys():
        raise UserError(
            f"{folder.search_yaml} must hold search, rungs and environment. Restore it, or start a new search from your own file."
        )
    return facts


def _facts(search: Search, rungs: Rungs) -> dict[str, Any]:
    return {"search": search.plain(), "rungs": rungs.costs, "environment": environment()}


def _write_search(folder: RunFolder, facts: dict[str, Any]) -> None:
    import yaml

    publish(folder.search_yaml, yaml.safe_dump(json.loads(json.dumps(facts)), sort_keys=False).encode())


def _drive(
    setup: Setup,
    rungs: Rungs,
    folder: RunFolder,
    engine: Engine,
    listen: Listener,
    *,
    clock: Callable[[], float] = time.monotonic,
    finale: Callable[[RunFolder, Book], None] | None = None,
) -> RunFolder:
    search = setup.search
    if setup.learned and not folder.learned.exists():
        publish(folder.learned, json.dumps(setup.learned).encode())
    goals = Goals.of(search)
    truth = Truth.open(folder.journal, search.name, goals.directions)
    rows, damage = recover(folder.reports, born=len(truth))
    if damage:
        listen("damaged", {"message": damage})
    started = clock()
    with telling(functools.partial(tell_waiting, listen)), telling(folder.say_full), ReportWriter(folder.reports) as reports:
        book = Book(
            goals=goals,
            proposer=_proposer(setup, goals),
            rungs=rungs,
            truth=truth,
            reports=reports,
            most_trials=search.limits.trials,
            most_cost=search.limits.cost,
            most_wall=search.limits.trial_wall,
            again=Again(seed=search.seed, duplicates=search.duplicates, finalists=search.finalists),
            order=_order(setup, rungs),
            out_of_time=lambda: search.limits.wall is not None and clock() - started >= search.limits.wall,
        )
        found = book.reconcile(rows)
        retention = Retention(folder, book, limit=None if finale else search.limits.disk, listen=listen)  # simulated trials write nothing
        disk = Disk(folder, search.limits.free, retention, listen)
        book.on_report, book.holds = retention.heard, disk.holds
        retention.sweep()
        write_table(folder, book)
        try:

            def job(assignment: Assignment) -> Job:
                return replace(job_of(search, folder, rungs.costs, assignment), cache_room=retention.room)

            def draw() -> None:
                listen("progress", book.summary())
                book.prepare()

            if book.has_work:
                listen("running", {"setup": setup, "found": found, "folder": folder})
                engine.run(search, book, job, _Ended(folder, book, retention), draw)
            book.settle()
            if repeats := book.open_finale():
                listen("finalists", {"repeats": repeats})
                engine.run(search, book, job, _Ended(folder, book, retention), draw)
        finally:
            book.settle()
            retention.sweep()
    if book.gave_up:
        listen("gave_up", {"reason": book.gave_up, "folder": folder})
    if finale is None:
        listen("finishing", {"front": sorted(book.front)})
    (finale or finalize)(folder, book)
    listen("finished", {"summary": book.summary()})
    return folder


def _device(search: Search) -> str:
    return "cuda" if search.workers.gpus else "cpu"


def _order(setup: Setup, rungs: Rungs) -> Order:
    """Trials let others pass whose beginning is not being computed just now, where a cache shares beginnings and no policy learns."""
    search = setup.search
    if search.cache is None or search.sampler.entry.facts["learns"]:
        return Order()
    return Order(
        functools.partial(
            shared_keys,
            steps_per_epoch=setup.steps_per_epoch,
            device=_device(search),
            threads=search.workers.cpus,
            report_every=search.report_every,
            rungs=rungs.costs,
        )
    )


def _proposer(setup: Setup, goals: Goals) -> Proposer:
    search = setup.search
    return Proposer(
        search.sampler,
        setup.space,
        directions=goals.directions,
        seed=search.seed,
        budgets=setup.budgets,
        first=setup.first,
        learned=as_trials(setup.learned, setup.space),
    )


class _Ended:
    """What happens when a trial was told: its checkpoints go, and now and then the table of trials is written."""

    def __init__(self, folder: RunFolder, book: Book, retention: Retention) -> None:
        self._folder, self._book, self._retention = folder, book, retention
        self._next = time.monotonic() + TABLE_EVERY_S

    def __call__(self, number: int) -> None:
        self._retention.sweep(number)
        if (begun := time.monotonic()) > self._next:
            write_table(self._folder, self._book)
            written = time.monotonic()
            self._next = written + max(TABLE_EVERY_S, (written - begun) / TABLE_SHARE)


def job_of(search: Search, folder: RunFolder, rungs: list[int], assignment: Assignment) -> Job:
    """What the worker of a trial is told."""
    return Job(
        number=assignment.number,
        recipe=assignment.recipe.plain(),
        folder=str(folder.path.absolute()),
        rungs=rungs,
        report_every=search.report_every,
        recovery=search.recovery,
        known=assignment.known,
        threads=search.workers.cpus,
        device=_device(search),
        working_dir=os.getcwd(),
        costs=[cost.plain() for cost in Goals.of(search).costs],
        cache=search.cache_at,
        cache_limit=search.cache.size if search.cache else None,
        silence=search.limits.silence,
    )
