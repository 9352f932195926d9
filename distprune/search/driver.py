"""From a checked search to a finished run folder: the walk of a search, local or inside a cluster."""

import json
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from distprune.core.config import read_yaml
from distprune.environment import environment
from distprune.search.book import DIRECTIONS, Assignment, Book
from distprune.search.config import Search
from distprune.search.finale import finalize
from distprune.search.proposer import Proposer
from distprune.search.retention import Retention
from distprune.search.setup import Setup, check_gpus, set_up, slots_of
from distprune.search.trial import Job
from distprune.store.files import lock, publish
from distprune.store.folder import RunFolder
from distprune.store.reports import ReportWriter, recover
from distprune.store.study import Truth

Listener = Callable[[str, dict[str, Any]], None]  # (event, facts): what a display hears


def start(search: Search, *, address: str | None = None, listen: Listener) -> RunFolder:
    """Run a new search. Raises UserError before anything is written if it cannot be done."""
    RunFolder(search.folder).check_new()
    if address is None and "RAY_ADDRESS" not in os.environ:
        check_gpus(search)
    listen("checking", {"search": search})
    setup = set_up(search)
    folder = RunFolder(search.folder).create()
    write_search(folder, search)
    return _drive(setup, folder, address=address, listen=listen)


def resume(path: str | Path, *, limits: dict[str, Any] | None = None, address: str | None = None, listen: Listener) -> RunFolder:
    """Go on with an interrupted search, or with a finished one under larger `limits`."""
    folder = RunFolder.existing(path)
    search = read_search(folder)
    if limits:
        search = replace(search, limits=replace(search.limits, **limits))
    listen("checking", {"search": search})
    setup = set_up(search)
    if limits:
        write_search(folder, search)
    return _drive(setup, folder, address=address, listen=listen)


def write_search(folder: RunFolder, search: Search) -> None:
    """`search.yaml`: the resolved search, and what it ran on."""
    import yaml

    facts = {"search": search.plain(), "environment": environment()}
    publish(folder.search_yaml, yaml.safe_dump(json.loads(json.dumps(facts)), sort_keys=False).encode())


def read_search(folder: RunFolder) -> Search:
    """The search of a run folder."""
    return Search.read({**read_yaml(folder.search_yaml)["search"], "storage": str(folder.path.parent), "name": folder.path.name})


def _drive(setup: Setup, folder: RunFolder, *, address: str | None, listen: Listener) -> RunFolder:
    search = setup.search
    with lock(folder.path):
        truth = Truth.open(folder.journal, search.name, DIRECTIONS)
        rows, damage = recover(folder.reports)
        if damage:
            listen("damaged", {"message": damage})
        started = time.monotonic()
        with ReportWriter(folder.reports) as reports:
            book = Book(
                space=setup.space,
                proposer=Proposer(search.sampler, setup.space.build, directions=DIRECTIONS, seed=search.seed),
                rungs=setup.rungs(),
                truth=truth,
                reports=reports,
                most_trials=search.limits.trials,
                most_cost=search.limits.cost,
                out_of_time=lambda: search.limits.wall is not None and time.monotonic() - started >= search.limits.wall,
            )
            found = book.reconcile(rows)
            retention = Retention(folder, book)
            retention.sweep()
            if book.has_work:
                try:
                    _run(setup, folder, book, retention, found, address=address, listen=listen)
                finally:
                    book.settle()
        listen("finishing", {"front": sorted(book.front)})
        finalize(folder, book)
        listen("finished", {"summary": book.summary()})
        return folder


def _run(
    setup: Setup, folder: RunFolder, book: Book, retention: Retention, found: dict[str, int], *, address: str | None, listen: Listener
) -> None:
    from distprune.search import runner  # imports Ray

    search, workers = setup.search, setup.search.workers
    listen("starting", {"search": search})
    slots = slots_of(search, runner.connect(address))
    listen("running", {"setup": setup, "slots": slots, "found": found, "folder": folder})

    def job(assignment: Assignment) -> Job:
        return Job(
            number=assignment.number,
            recipe=assignment.recipe.plain(),
            folder=str(folder.path.absolute()),
            rungs=book.rungs.costs,
            report_every=search.report_every,
            recovery=search.recovery,
            known=assignment.known,
            threads=workers.cpus,
            device="cuda" if workers.gpus else "cpu",
            working_dir=os.getcwd(),
        )

    runner.run(
        book,
        job=job,
        slots=slots,
        cpus=workers.cpus,
        gpus=workers.gpus,
        ended=retention.sweep,
        draw=lambda: listen("progress", book.summary()),
    )
