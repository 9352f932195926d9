"""What a trial is given when memory runs out: more of what ran out, up to what a node has."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from books import book_of, row_of
from machines import GB
from searches import STEPS, curve, outcome, reports, resume, search, start

from distprune.search import driver
from distprune.search.book import Book
from distprune.search.config import Workers
from distprune.search.entry import Assignment
from distprune.search.finale import close_tables
from distprune.search.more import Ask, More
from distprune.search.trial import Job
from distprune.store.folder import RunFolder
from distprune.store.reports import recover
from distprune.store.trials import read_trials

pytestmark = pytest.mark.usefixtures("elsewhere")


@pytest.fixture
def no_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Made-up curves leave no networks to measure on the test split."""
    monkeypatch.setattr(driver, "finalize", close_tables)


def _needs(gpus: float, log: list[Any] | None = None) -> Any:
    """Curves whose trials run out of memory at their third report with less than that much of a GPU."""

    def using(job: Job) -> Iterator[dict[str, Any]]:
        if log is not None:
            log.append((job.number, job.ask["times"], job.ask["gpus"]))
        for row in curve(job):
            extra = {"reason": "CUDA out of memory", "micro_batch": 1, "asked": job.ask["times"]}
            if row["index"] == 2 and job.ask["gpus"] < gpus:
                yield {**row, "final": True, "ended": "oom", "rung": -1, "extra": json.dumps(extra)}
                return
            yield row

    return using


def _table(folder: RunFolder) -> list[dict[str, Any]]:
    return list(read_trials(folder.trials).to_pylist())


@pytest.mark.usefixtures("no_networks")
def test_a_trial_that_does_not_fit_goes_on_with_twice_the_share(tmp_path: Path) -> None:
    log: list[Any] = []
    plain = start(search(tmp_path, name="plain", scheduler="none", workers={"gpus": 1}))
    folder = start(search(tmp_path, name="s", scheduler="none", workers={"gpus": 0.25}), using=_needs(1.0, log))
    assert [row[3:] for row in outcome(folder)] == [row[3:] for row in outcome_of(plain, "plain")], "the same values as with a whole GPU"
    ran = [row for row in _table(folder) if row["ended"] == "finished"]
    assert ran and all(row["asked"] == 2 and row["deaths"] == "[]" for row in ran)
    first = ran[0]["number"]
    assert [entry[1:] for entry in log if entry[0] == first] == [(0, 0.25), (1, 0.5), (2, 1.0)]
    assert all([row["index"] for row in rows] == list(range(STEPS)) for rows in reports(folder).values()), "what it asked for is no report"


def outcome_of(folder: RunFolder, name: str) -> list[tuple[Any, ...]]:
    from searches import trials

    return [
        (t.number, t.state.name, t.user_attrs["end"]["ended"], sorted(t.params.items(), key=str), t.values)
        for t in trials(folder, name=name)
    ]


@pytest.mark.usefixtures("no_networks")
def test_only_then_it_fails(tmp_path: Path) -> None:
    log: list[Any] = []
    folder = start(search(tmp_path, trials=1, workers={"gpus": 0.4}), using=_needs(2.0, log))
    (row,) = _table(folder)
    assert [entry[1:] for entry in log] == [(0, 0.4), (1, 0.8), (2, 1.0)], "up to a whole one"
    assert (row["ended"], row["reason"], row["asked"], row["attempts"]) == ("oom", "CUDA out of memory", 2, 2)
    log.clear()
    start(search(tmp_path, name="whole", trials=1, workers={"gpus": 1}), using=_needs(2.0, log))
    start(search(tmp_path, name="cpu", trials=1), using=_needs(2.0, log))
    assert len(log) == 2, "where there is no more to be had, the first time is the end"


ON_A_GPU = (
    "A pass of 1 at once does not fit: CUDA out of memory. Tried to allocate 2.00 GiB.",
    "MemoryError: OutOfMemoryError: CUDA out of memory",
    "RuntimeError: CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    "RuntimeError: cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
    "With a micro-batch of 1 after running out of memory: ValueError: Expected more than 1 value per channel when training",
)
ON_THE_HOST = (
    "MemoryError: ",
    "RuntimeError: [enforce fail at alloc_cpu.cpp:125] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 9",
    "A pass of 1 at once does not fit: Unable to allocate 3.00 GiB for an array",
)


@pytest.mark.parametrize(("reason", "of_a_gpu"), [*((text, True) for text in ON_A_GPU), *((text, False) for text in ON_THE_HOST)])
def test_more_of_what_ran_out_and_of_nothing_else(reason: str, of_a_gpu: bool, tmp_path: Path) -> None:
    """What is given grows to the end of that, then the trial fails, as it does at once where there is no more."""

    def given(**asked: Any) -> list[tuple[float, int | None]]:
        workers = Workers(**asked)
        book, ask, found = book_of(tmp_path, more=More(workers, lambda: 10.0 * GB)), Ask.of(workers), []
        while True:
            book.hear(row_of(0, 0, ended="oom", final=True, extra=json.dumps({"asked": ask.times, "reason": reason})))
            book.finish(0)
            if (again := book.next()) is None:
                assert book.entries[0].ended == "oom"
                return found
            assert again.ask is not None
            ask = again.ask
            found.append((ask.gpus, ask.memory))

    everything = given(gpus=0.25, memory=3 * GB)
    assert everything == ([(0.5, 3 * GB), (1.0, 3 * GB)] if of_a_gpu else [(0.25, 6 * GB), (0.25, 10 * GB)])
    assert len(given(gpus=1.0, memory=3 * GB)) == (0 if of_a_gpu else 2)
    assert len(given(gpus=0.25)) == (2 if of_a_gpu else 0)


@pytest.mark.usefixtures("no_networks")
@pytest.mark.parametrize("moment", range(1, 4))
def test_what_was_given_survives_the_driver(moment: int, tmp_path: Path) -> None:
    value = search(tmp_path, name="s", trials=3, scheduler="none", workers={"gpus": 0.25})
    whole = start(replace(value, name="whole"), using=_needs(1.0))
    begun: list[int] = []

    def cut(job: Job) -> Iterator[dict[str, Any]]:
        begun.append(job.number)
        if job.ask["times"] and len(begun) > 2 + moment:
            raise KeyboardInterrupt
        yield from _needs(1.0)(job)

    with pytest.raises(KeyboardInterrupt):
        start(value, using=cut)
    log: list[Any] = []
    folder = RunFolder(value.folder)
    notes = {row["trial"]: json.loads(row["extra"])["ask"] for row in recover(folder.reports)[0] if row["index"] < 0}
    resume(value.folder, using=_needs(1.0, log))
    assert notes and all((number, note["times"], note["gpus"]) in log for number, note in notes.items())
    assert not any(entry[0] == number and entry[1] < note["times"] for number, note in notes.items() for entry in log)
    assert outcome(folder) == outcome_of(whole, "whole")


def _dies(book: Book, cause: str) -> Assignment | None:
    book.died(0, cause, free=False)
    book.gone(0)
    return book.next()


def test_a_worker_that_is_killed_for_memory_begins_again_with_twice_as_much(tmp_path: Path) -> None:
    book = book_of(tmp_path, more=More(Workers(memory=3 * GB), lambda: 10.0 * GB))
    given = [again.ask.memory for _ in range(2) if (again := _dies(book, "memory of the node")) and again.ask]
    assert given == [6 * GB, 10 * GB], "up to what the largest node has"
    assert book.entries[0].stuck == 0, "nobody's fault"
    assert _dies(book, "worker process died") is not None and book.entries[0].stuck == 1, "which is another cause"
    assert _dies(book, "memory of the node") is not None
    assert _dies(book, "memory of the node") is None and book.entries[0].ended == "lost", "three deaths, not all for memory"

    book = book_of(tmp_path, more=More(Workers(memory=9 * GB), lambda: 10.0 * GB))
    assert [_dies(book, "memory of the node") is not None for _ in range(4)] == [True, True, True, False]
    entry = book.entries[0]
    assert (
        entry.ended == "oom" and entry.reason == "its workers were killed for the memory of their node 3 times without a report in between"
    )
    book = book_of(tmp_path, more=More(Workers(), lambda: 10.0 * GB))
    assert [_dies(book, "memory of the node") is not None for _ in range(3)] == [True, True, False], (
        "nothing is set aside, nothing is added"
    )


def test_a_late_word_of_an_earlier_attempt_asks_for_nothing(tmp_path: Path) -> None:
    book = book_of(tmp_path, more=More(Workers(gpus=0.25)))
    oom = row_of(0, 0, ended="oom", final=True, extra=json.dumps({"asked": 0}))
    assert not book.hear(oom)
    book.finish(0)
    assert (again := book.next()) is not None and again.ask == Ask(times=1, gpus=0.5)
    book.finish(0)
    assert book.next() is None, "queued once"
