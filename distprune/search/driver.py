"""From a checked search to a finished run folder: the walk of a search, local or inside a cluster."""

import functools
import json
import os
import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from distprune.core.config import read_yaml
from distprune.core.prefix import shared_keys
from distprune.core.recipe import Recipe
from distprune.environment import environment
from distprune.errors import UserError
from distprune.search.again import Again
from distprune.search.book import Book
from distprune.search.byproducts import ByProducts
from distprune.search.config import Search
from distprune.search.disk import Disk, tell_waiting
from distprune.search.entry import Assignment
from distprune.search.finale import close_tables, finalize, write_table
from distprune.search.goals import Goals
from distprune.search.learned import as_trials
from distprune.search.log import Log
from distprune.search.loggers import check_loggers
from distprune.search.more import Ask, More
from distprune.search.order import Order
from distprune.search.proposer import Proposer
from distprune.search.recorded import Recorded
from distprune.search.retention import Retention
from distprune.search.rungs import Rungs
from distprune.search.setup import Setup, check_cache, check_storage, set_up
from distprune.search.simulate import Simulator
from distprune.search.studies import check_study, new_study, one_owner, open_truth
from distprune.search.trial import Job
from distprune.store.files import lock, publish, telling
from distprune.store.folder import RunFolder
from distprune.store.mirror import Here, mirrored
from distprune.store.reports import ReportWriter, recover

TABLE_EVERY_S = 10.0  # `trials.parquet` of a running search is at most this old,
TABLE_SHARE = 0.05  # or older where writing it would take more than this share of the driver's time
SIMULATED_WORKERS = 4  # where neither the command nor the search says how many

Listener = Callable[[str, dict[str, Any]], None]  # (event, facts): what a display hears


class Engine(Protocol):
    """Where trials run: Ray, or the simulator in its place."""

    def open(self, search: Search) -> None:
        """Get ready. Raises UserError if the search cannot run there."""

    def largest(self) -> float | None:
        """Memory (bytes) of the largest node, as far as trials can ask for it; None where they cannot."""

    def run(
        self, search: Search, book: Book, job: Callable[[Assignment], Job], ended: Callable[[int], None], draw: Callable[[], None]
    ) -> None:
        """Run until the book has no trial left; call `ended` when one was told, and `draw` often."""


def start(search: Search, *, engine: Engine, listen: Listener) -> RunFolder:
    """Run a new search. Raises UserError before anything is written if it cannot be done."""
    check_storage(search)
    folder = RunFolder(search.folder, search.url)
    folder.check_new()
    listen("checking", {"search": search})
    setup = set_up(search)
    check_cache(search)
    check_loggers(search.log)
    check_study(search, study := new_study(search), folder, begun=False)
    engine.open(search)
    folder.create()
    with lock(folder.path), one_owner():
        rungs = setup.rungs()
        _write_search(folder, {**_facts(search, rungs), **study})
        return _drive(setup, rungs, folder, engine, listen)


def simulate(search: Search, *, recorded: Recorded, workers: int | None, listen: Listener) -> RunFolder:
    """Run a new search on recorded curves and a virtual clock. Its run folder says that it is simulated, and holds no networks.

    Raises UserError before anything is written if it cannot be done.
    """
    workers = search.workers.most or SIMULATED_WORKERS if workers is None else workers
    if workers < 1:
        raise UserError(f"workers must be at least 1, got {workers}.")
    search = replace(search, study=None, log=())  # thousands of trials that nobody shares
    check_storage(search)
    folder = RunFolder(search.folder, search.url)
    folder.check_new()
    listen("checking", {"search": search})
    setup = set_up(search)
    recorded.check(setup)
    simulated = {"run": str(recorded.path), "trials": recorded.trials, "usable": recorded.usable, "scored": recorded.scored}
    listen("recorded", simulated)
    folder.create()
    with lock(folder.path), one_owner():
        rungs = setup.rungs()
        engine = Simulator(recorded.curve, workers=workers, by=recorded.by)
        facts = {**_facts(search, rungs), "simulated": {**simulated, "workers": workers, "clock": recorded.by}}
        _write_search(folder, facts)

        def finale(folder: RunFolder, book: Book) -> None:
            close_tables(folder, book)
            facts["simulated"]["time"] = round(engine.clock(), 3)
            _write_search(folder, facts)

        return _drive(setup, rungs, folder, engine, listen, clock=engine.clock, finale=finale)


def resume(path: str | Path, *, limits: Mapping[str, Any], engine: Engine, listen: Listener) -> RunFolder:
    """Go on with an interrupted search, or with a finished one under larger `limits`. Rungs and first environment stay as they are."""
    with RunFolder.driven(path) as folder, one_owner():
        folder.check_real("resumed")
        facts = read_facts(folder)
        search = Search.load(facts["search"], limits=limits, storage=folder.storage, name=folder.path.name)
        listen("checking", {"search": search})
        setup = set_up(search, learned=folder.learned)
        check_cache(search)
        check_study(search, facts, folder, begun=folder.reports.exists())
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
    with mirrored(folder, listen) as mirror:
        book = _run(setup, rungs, folder, engine, listen, mirror, clock=clock, trains=finale is None)
        if book.gave_up:
            listen("gave_up", {"reason": book.gave_up, "folder": folder})
        if finale is None:
            listen("finishing", {"front": sorted(book.front)})
        (finale or finalize)(folder, book)
    listen("finished", {"summary": book.summary()})
    return folder


def _run(
    setup: Setup,
    rungs: Rungs,
    folder: RunFolder,
    engine: Engine,
    listen: Listener,
    mirror: Here,
    *,
    clock: Callable[[], float],
    trains: bool,  # else nothing but tables is written
) -> Book:
    search = setup.search
    if setup.learned and not folder.learned.exists():
        publish(folder.learned, json.dumps(setup.learned).encode())
    goals = Goals.of(search)
    truth = open_truth(search, folder, goals.directions, listen)
    rows, damage = recover(folder.reports, born=len(truth))
    if damage:
        listen("damaged", {"message": damage})
    started, driver = clock(), uuid.uuid4().hex
    waiting = functools.partial(tell_waiting, listen)
    log = Log(search.log, folder, listen)
    with telling(waiting), telling(folder.say_full), log, ReportWriter(folder.reports) as reports:
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
            more=More(search.workers, engine.largest),
            byproducts=_byproducts(setup, rungs) if trains else None,
            out_of_time=lambda: search.limits.wall is not None and clock() - started >= search.limits.wall,
        )
        found = book.reconcile(rows)
        mirror.begin()
        retention = Retention(folder, book, limit=search.limits.disk if trains else None, listen=listen, later=mirror.later)
        disk = Disk(folder, search.limits.free, retention, listen)
        book.on_report, book.holds = _both(retention.heard, log.heard), lambda: disk.holds() or ("full" if mirror.waits else "")
        log.begin(book, rows)
        retention.sweep()
        write_table(folder, book)
        ended = _Ended(folder, book, retention, log)
        try:

            def job(assignment: Assignment) -> Job:
                return replace(job_of(search, folder, rungs.costs, assignment), cache_room=retention.room, driver=driver)

            def draw() -> None:
                mirror.check()
                log.check()
                listen("progress", book.summary())
                book.prepare()

            listen("running", {"setup": setup, "found": found, "folder": folder})
            if book.has_work:
                engine.run(search, book, job, ended, draw)
            book.settle()
            if book.has_rounds:
                engine.run(search, book, job, ended, draw)
                book.settle()
            if repeats := book.open_finale():
                listen("finalists", {"repeats": repeats})
                engine.run(search, book, job, ended, draw)
        except BaseException:
            truth.hurry()
            with suppress(Exception):  # what cannot be told now, the next driver tells
                book.settle()
            retention.sweep()
            raise
        book.settle()
        retention.sweep()
    return book


def _both(first: Callable[[Mapping[str, Any]], None], second: Callable[[Mapping[str, Any]], None]) -> Callable[[Mapping[str, Any]], None]:
    def heard(row: Mapping[str, Any]) -> None:
        first(row)
        second(row)

    return heard


def _device(search: Search) -> str:
    return "cuda" if search.workers.gpus else "cpu"


def _order(setup: Setup, rungs: Rungs) -> Order:
    """Trials let others pass whose beginning is not being computed just now, where a cache shares beginnings and no policy learns."""
    search = setup.search
    if search.cache is None or search.sampler.entry.facts["learns"]:
        return Order()
    return Order(_prefixes(setup, rungs))


def _byproducts(setup: Setup, rungs: Rungs) -> ByProducts | None:
    """Rounds count as results where a cache has them."""
    if setup.search.cache is None or not setup.search.rounds:
        return None
    return ByProducts(_prefixes(setup, rungs), setup.space.searches, steps_per_epoch=setup.steps_per_epoch)


def _prefixes(setup: Setup, rungs: Rungs) -> Callable[[Recipe], list[tuple[str, int]]]:
    """What the run of a recipe takes from the cache and gives to it."""
    search = setup.search
    return functools.partial(
        shared_keys,
        steps_per_epoch=setup.steps_per_epoch,
        device=_device(search),
        threads=search.workers.cpus,
        ranks=search.workers.ranks,
        report_every=search.report_every,
        rungs=rungs.costs,
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

    def __init__(self, folder: RunFolder, book: Book, retention: Retention, log: Log) -> None:
        self._folder, self._book, self._retention, self._log = folder, book, retention, log
        self._next = time.monotonic() + TABLE_EVERY_S

    def __call__(self, number: int) -> None:
        self._log.ended(number)
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
        folder=folder.place,
        rungs=rungs if assignment.judged else [],
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
        ask=(assignment.ask or Ask.of(search.workers)).plain(),
        ranks=search.workers.ranks,
    )
