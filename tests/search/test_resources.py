"""What a trial asks for, how many there is room for, and what it is given when memory runs out."""

import itertools
import json
import re
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from books import book_of, on_ray, row_of
from searches import STEPS, curve, job_in, outcome, reports, resume, search, start
from torch import nn
from toys import BASE, recipe

from distprune.errors import UserError
from distprune.search import driver
from distprune.search.book import Book
from distprune.search.config import Workers
from distprune.search.entry import Assignment
from distprune.search.finale import close_tables
from distprune.search.more import Ask, More
from distprune.search.parcels import Parcels
from distprune.search.resources import bounded, bundles, largest_on, no_room, slots_on, weight
from distprune.search.setup import check_machine
from distprune.search.trial import Job, run_trial
from distprune.store.folder import RunFolder
from distprune.store.reports import recover
from distprune.store.trials import read_trials

pytestmark = pytest.mark.usefixtures("elsewhere")
GB = 10**9


@pytest.fixture
def no_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Made-up curves leave no networks to measure on the test split."""
    monkeypatch.setattr(driver, "finalize", close_tables)


# What a trial asks for.


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"memory": 0}, r"workers.memory must be above 0, got 0\. Write 8GB"),
        ({"memory": "much"}, r"workers.memory must be a size in bytes, got 'much'\. Write 20GB"),
        ({"accelerator": "H100"}, r"accelerator is the type of GPU .* got 'H100' with gpus: 0\. Write gpus: 1"),
        ({"accelerator": "", "gpus": 1}, r"accelerator is the type of GPU .* in one word, got ''"),
        ({"ranks": 0}, r"workers.ranks must be in \[1, 1024\], got 0\. Leave it out"),
        ({"ranks": 2, "gpus": 0.5}, r"workers.gpus is that of each rank and must be 1, or 0 .* ranks: 2, got 0.5\. Write gpus: 1"),
        ({"ranks": 2, "gpus": 2}, r"workers.gpus is that of each rank .* got 2"),
        ({"resources": {"GPU": 1}}, r"workers.resources are custom resources .* 'GPU' is none\. Write cpus"),
        ({"resources": {"spot": 0}}, r"workers.resources.spot must be a whole number or a share .* got 0\. Write 1"),
        ({"resources": {"spot": 1.5}}, r"workers.resources.spot must be a whole number .* got 1.5"),
    ],
)
def test_a_wrong_value_is_one_line(value: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        Workers.read(value, "workers")
    assert "\n" not in str(caught.value)


def test_a_search_that_says_nothing_asks_for_what_it_always_did(tmp_path: Path) -> None:
    assert bundles(Workers()) == [{"CPU": 1.0}] and bundles(Workers(cpus=2, gpus=0.25)) == [{"CPU": 2.0, "GPU": 0.25}]
    value = search(tmp_path, workers={"memory": "8GB", "gpus": 1, "accelerator": "H100", "ranks": 2, "resources": {"spot": 0.01}})
    assert type(value).read(json.loads(json.dumps(value.plain()))) == value
    each = {"CPU": 1.0, "spot": 0.01, "GPU": 1.0, "memory": 8e9, "accelerator_type:H100": 0.001}
    assert bundles(value.workers) == [each, each]


NODE = {"CPU": 3.0, "GPU": 2.0, "memory": 10.0 * GB, "accelerator_type:H100": 1.0}


@pytest.mark.parametrize(
    ("nodes", "asked", "slots"),
    [
        ([NODE], {}, 3),
        ([NODE, NODE], {"cpus": 2}, 2),  # 6 CPUs would be three trials
        ([NODE], {"gpus": 0.25}, 3),
        ([NODE], {"gpus": 1}, 2),
        ([{**NODE, "CPU": 64.0}], {"gpus": 0.1}, 20),
        ([{**NODE, "CPU": 9.0}], {"gpus": 0.4}, 4),  # of five one would lie on both
        ([{"CPU": 64.0, "GPU": 8.0}], {"gpus": 0.6}, 8),
        ([{"CPU": 64.0, "GPU": 3.0}], {"gpus": 1 / 3}, 9),
        ([{**NODE, "spot": 2.0}], {"resources": {"spot": 0.7}}, 2),
        ([{**NODE, "CPU": 9.0, "spot": 2.0}], {"resources": {"spot": 0.4}}, 5),  # of what is no device, no share lies anywhere
        ([NODE], {"gpus": 2}, 1),
        ([NODE, NODE], {"gpus": 3}, 0),
        ([NODE, NODE], {"memory": 4 * GB}, 4),
        ([NODE, NODE], {"gpus": 1, "ranks": 2}, 2),
        ([NODE, {"CPU": 3.0}], {"gpus": 1, "ranks": 3}, 0),  # of ranks, two fit
        ([NODE, {"CPU": 9.0, "GPU": 9.0, "accelerator_type:T4": 1.0}], {"gpus": 1, "accelerator": "H100"}, 2),
        ([NODE, {**NODE, "spot": 1.0}], {"resources": {"spot": 0.01}}, 3),
        ([NODE], {"resources": {"spot": 0.01}}, 0),
        ([NODE] * 4, {"most": 5}, 5),
        ([], {}, 0),
    ],
)
def test_a_bundle_lies_on_one_node(nodes: list[dict[str, float]], asked: dict[str, Any], slots: int) -> None:
    assert slots_on(nodes, Workers.read(asked, "workers")) == slots


HEAD, SMALL, BIG = (
    {"CPU": cpus, "GPU": gpus, "memory": size * GB} for cpus, gpus, size in ((0.0, 0.0, 64.0), (3.0, 1.0, 10.0), (9.0, 0.0, 20.0))
)


@pytest.mark.parametrize(
    ("nodes", "asked", "largest"),
    [
        ([SMALL, HEAD], {}, 9.5),  # no trial lies on a head without CPUs
        ([SMALL, BIG, HEAD], {}, 19),
        ([SMALL, BIG, HEAD], {"gpus": 0.5}, 9.5),  # nor on a node without GPUs
        ([SMALL, BIG, HEAD], {"cpus": 4}, 19),
        ([SMALL, BIG, HEAD], {"ranks": 2}, 9.5),  # on the large one there is room for one rank with as much as it has
        ([BIG, {**BIG, "memory": 20.02 * GB}, HEAD], {"ranks": 2}, 19),  # of which the machines of one kind have a little more or less
        ([SMALL, BIG, HEAD], {"cpus": 10}, 0),
        ([], {}, 0),
    ],
)
def test_a_trial_can_be_given_what_a_node_has_on_which_it_fits(
    nodes: list[dict[str, float]], asked: dict[str, Any], largest: float
) -> None:
    """What it is given has room, and on each of its nodes a little is left."""
    workers = Workers.read({"memory": "3GB", **asked}, "workers")
    found = largest_on(nodes, workers)
    assert found == pytest.approx(largest * GB, rel=0.01)
    if found:
        assert slots_on(nodes, replace(workers, memory=int(found))) >= 1 > slots_on(nodes, replace(workers, memory=int(found * 1.1)))


def test_what_a_trial_was_given_on_larger_nodes_is_taken_back() -> None:
    workers, ask = Workers(memory=3 * GB), Ask(times=2, memory=12 * GB)
    assert [bounded(ask, workers, size * GB).memory for size in (20.0, 9.5, 2.0, 0.0)] == [12 * GB, int(9.5 * GB), 3 * GB, 3 * GB]
    assert bounded(ask, workers, 9.5 * GB).times == 2, "so that it may ask again"
    assert bounded(Ask(times=1, gpus=1.0), Workers(gpus=0.5), 0.0) == Ask(times=1, gpus=1.0)


def test_no_room_says_what_is_asked_for_and_what_there_is() -> None:
    asked = Workers.read({"gpus": 1, "accelerator": "A100", "memory": "16GB", "ranks": 2}, "workers")
    message = str(no_room([NODE, NODE], asked))
    assert message == (
        "workers asks for 1 CPUs, 1 GPUs, 16 GB, a A100 for each of 2 ranks, and the cluster has no room for one trial. "
        "Its nodes have: 3 CPUs, 2 GPUs, 10 GB, no A100. Ask for less."
    )


def test_this_machine_counts_all_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    check_machine(search(tmp_path, workers={"cpus": 2, "ranks": 2}))
    with pytest.raises(UserError, match=r"at most the 4 CPUs of this machine, got 2 for each of 3 ranks\. Write cpus: 1"):
        check_machine(search(tmp_path, workers={"cpus": 2, "ranks": 3}))


@pytest.mark.parametrize(("cpus", "gpus"), [(1, 0), (2, 0), (4, 0), (8, 1), (8, 3)])
@pytest.mark.parametrize("asked", [{"cpus": 1}, {"cpus": 3}, {"cpus": 16}, {"gpus": 1}, {"gpus": 2, "ranks": 1}])
@pytest.mark.parametrize("ranks", [1, 4])
def test_the_way_out_is_one(ranks: int, asked: Any, cpus: int, gpus: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who writes what the error says has less to write the next time, and at the third time nothing."""
    monkeypatch.setattr("os.cpu_count", lambda: cpus)
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    workers = {"ranks": ranks, **asked}
    for _ in range(3):
        try:
            check_machine(search(tmp_path, workers=workers))
            break
        except UserError as error:
            told = {name: int(number) for name, number in re.findall(r"(cpus|gpus|ranks): (\d+)", str(error).partition("Write ")[2])}
            assert told and all(number < workers.get(name, 1) for name, number in told.items()), (workers, str(error))
            workers |= told
    else:
        pytest.fail(f"no way out of {asked}: {workers}")


# A share of a GPU is a share of its memory.


def test_a_trial_is_held_to_its_share_and_the_next_one_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    set_to: list[float] = []
    monkeypatch.setattr("torch.cuda.set_per_process_memory_fraction", set_to.append)
    monkeypatch.setattr("distprune.search.trial.rows_of", lambda job, base, memory: iter([row_of(job.number, 0, final=True)]))
    job = job_in(tmp_path, recipe=recipe("dense").plain())
    list(run_trial(job))
    assert set_to == [], "a CPU has no cap"
    on_gpu = replace(job, device="cuda")
    for gpus in (0.0, 1.0, 2.0):
        list(run_trial(replace(on_gpu, ask=Ask(gpus=gpus).plain())))
    assert set_to == [], "nor has a whole GPU"
    with closing(run_trial(replace(on_gpu, ask=Ask(gpus=0.25).plain()))) as work:
        next(work)
        assert set_to == [0.25]
    assert set_to == [0.25, 1.0], "a worker that takes another trial, or is stopped, begins without a cap"


# Asking for more.


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


# Room.


def test_a_trial_that_was_given_more_takes_the_room_of_as_many() -> None:
    workers = Workers(gpus=0.25, memory=4 * GB)
    asks = (None, Ask(gpus=0.5, memory=4 * GB), Ask(gpus=0.8), Ask(gpus=0.25, memory=9 * GB))
    assert [weight(ask, workers) for ask in asks] == [1, 2, 4, 3]
    for first, given, takes in ((0.4, 0.8, 2), (0.4, 1.0, 2), (0.6, 1.0, 1), (0.3, 0.6, 2)):  # of as many as a GPU has
        assert weight(Ask(gpus=given), Workers(gpus=first)) == takes


@on_ray
def test_no_trial_takes_what_a_larger_one_waits_for(tmp_path: Path) -> None:
    """Four shares of one GPU: while a trial waits for two of them, nobody is let in until it has both."""
    from distprune.search.runner import Face

    asks = iter([None, None, None, None, Ask(times=1, gpus=0.5), None, None])
    book, told, room = book_of(tmp_path, entries=0), list[int](), [4]
    book.finish = told.append  # type: ignore[method-assign, assignment]
    numbers = iter(range(9))
    book.next = lambda: Assignment(next(numbers), recipe("dense"), 0, next(asks))  # type: ignore[method-assign]
    face = Face(
        book, lambda assignment: job_in(tmp_path, recipe={}), {}, lambda number: None, room=lambda: room[0], workers=Workers(gpus=0.25)
    )
    started = [trial for trial in "abcd" if face.suggest(trial)]
    assert started == list("abcd") and face.suggest("e") is None, "there is no room"
    face.on_trial_complete("a")
    assert face.suggest("e") and face.suggest("f") is None
    face.on_trial_complete("b")
    assert face.suggest("f") is None, "what became free is for the larger one"
    face.on_trial_complete("c")
    assert face.suggest("f") and face.suggest("g") is None
    room[0] = 5  # a node has joined
    assert face.suggest("g")
    room[0] = 0
    for trial in "defg":
        face.on_trial_complete(trial)
    book.next = lambda: Assignment(9, recipe("dense"), 0)  # type: ignore[method-assign]
    assert face.suggest("h") and face.suggest("i") is None, "without nodes one trial waits, so that Ray goes round"


@on_ray
def test_what_a_trial_was_given_is_looked_at_again_as_it_begins(tmp_path: Path) -> None:
    from distprune.search.runner import Face

    book, jobs = book_of(tmp_path, entries=0), list[Any]()
    book.next = lambda: Assignment(0, recipe("dense"), 0, Ask(times=2, memory=12 * GB))  # type: ignore[method-assign]

    def job(assignment: Assignment) -> Job:
        jobs.append(assignment.ask)
        return job_in(tmp_path, recipe={})

    workers = Workers(memory=3 * GB)
    face = Face(book, job, {}, lambda number: None, room=lambda: 2, workers=workers, bounded=lambda ask: ask and bounded(ask, workers, 6e9))
    assert face.suggest("a")["bundle"]["memory"] == 6e9 and jobs == [Ask(times=2, memory=6 * GB)]
    assert face.suggest("b") is None, "it takes the room of two"


@on_ray
def test_beyond_the_limits_nobody_waits_for_room(monkeypatch: pytest.MonkeyPatch) -> None:
    from distprune.search import runner

    class Limited:
        limit_reached = False

    now, idle, book = [0.0], [True], Limited()
    monkeypatch.setattr(runner.time, "monotonic", lambda: now[0])
    over = runner.Over(book, lambda: idle[0])  # type: ignore[arg-type]

    def later(seconds: float) -> bool:
        now[0] += seconds
        return over.stop_all()

    assert not later(0) and not later(1e6), "within its limits a search waits as long as it takes"
    book.limit_reached = True
    assert [later(seconds) for seconds in (1, 29, 2)] == [False, False, True]
    idle[0] = False
    assert not later(1e6), "who is at work hears of it at its next report"
    idle[0] = True
    assert [later(seconds) for seconds in (1, 29, 2)] == [False, False, True], "what starts has its time to start"
    assert over("t", {}) is False


# Nodes that come and go.


class Nodes:
    """A cluster on a clock that sleeping moves on: which nodes it has when, and what its autoscaler is asked for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, scales: bool, **kinds: list[tuple[float, list[dict[str, float]]]]) -> None:
        from distprune.search import cluster

        self.now, self.asked, self.said, self._when = 0.0, list[Any](), list[str](), kinds["when"]
        monkeypatch.setattr(cluster.access, "connect", lambda address: None)
        monkeypatch.setattr(cluster, "nodes", lambda: next(nodes for since, nodes in reversed(self._when) if since <= self.now))
        monkeypatch.setattr(cluster, "autoscales", lambda: scales)
        monkeypatch.setattr(cluster, "request_resources", lambda bundles: self.asked.append(bundles))
        monkeypatch.setattr(cluster.ray, "cluster_resources", dict)

    def cluster(self, address: str | None = "head:6379") -> Any:
        from distprune.search.cluster import Cluster

        return Cluster(
            address, lambda event, facts: self.said.append(facts.get("message", event)), clock=lambda: self.now, sleep=self.sleep
        )

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        if self.now > 1000:
            raise KeyboardInterrupt


ONE: dict[str, float] = {"CPU": 1.0}


@on_ray
def test_nodes_are_asked_for_at_once_waited_for_and_given_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there = Nodes(monkeypatch, scales=True, when=[(0.0, [{"GPU": 1.0}]), (70.0, [ONE]), (80.0, [ONE, ONE]), (90.0, [ONE])])
    cluster, value = there.cluster(), search(tmp_path, workers={"most": 3})
    cluster.join(value)
    assert there.now == 70 and there.asked == [[ONE] * 3], "for all trials at once, before the first begins"
    assert [line for line in there.said if "waiting" in line] == [
        f"waiting for a node with 1 CPU, for {seconds} s so far; Ctrl-C ends it" for seconds in (0, 30, 60)
    ]
    slots = []
    for there.now in (71.0, 80.0, 81.0, 84.0, 90.0, 95.0):
        slots.append(cluster.slots(value))
    assert slots == [1, 2, 2, 2, 1, 1] and there.said[-1] == "the nodes have changed: 1 trials at once, 2 before"
    cluster.release()
    cluster.release()
    assert there.asked[1:] == [[]], "once"


@on_ray
def test_no_node_is_asked_for_what_it_has_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A trial has grown on the larger node, which then leaves; the largest of all is not for trials."""
    there = Nodes(monkeypatch, scales=False, when=[(0.0, [HEAD, SMALL, BIG]), (10.0, [HEAD, SMALL])])
    cluster = there.cluster()
    cluster.join(search(tmp_path, workers={"memory": "8GB"}))
    assert cluster.bounded(None) is None
    for there.now, most in ((0.0, 19e9), (10.0, 9.5e9)):
        assert cluster.largest() == most and cluster.bounded(Ask(memory=64 * GB)).memory == most


@on_ray
@pytest.mark.parametrize(
    ("address", "scales", "workers", "message"),
    [
        ("head:6379", False, {"most": 2}, r"the cluster has no room for one trial\. .* Ask for less\.$"),
        (None, True, {"most": 2}, r"Ask for less\.$"),
        ("head:6379", True, {}, r"The cluster can bring nodes if it is told how many: write workers\.most"),
    ],
)
def test_nodes_that_will_not_come_are_not_waited_for(
    address: str | None, scales: bool, workers: Any, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = Nodes(monkeypatch, scales=scales, when=[(0.0, [])])
    with pytest.raises(UserError, match=message):
        there.cluster(address).join(search(tmp_path, workers=workers))
    assert there.now == 0 and there.asked == []


@on_ray
def test_who_gives_up_waiting_takes_back_what_was_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there = Nodes(monkeypatch, scales=True, when=[(0.0, [])])
    with pytest.raises(KeyboardInterrupt):
        there.cluster().join(search(tmp_path, trials=2, workers={"most": 9, "ranks": 2}))
    assert there.asked == [[ONE] * 4, []], "two trials of two ranks are all that will run"


@on_ray
@pytest.mark.parametrize(
    ("said", "scales"),
    [
        (None, False),
        ({"autoscaler_report": {"active_nodes": {"node_" + "ab" * 28: 1}}}, False),
        ({"autoscaler_report": {"active_nodes": {"ray.head.default": 1}}}, True),
    ],
)
def test_an_autoscaler_names_the_kinds_of_its_nodes(said: Any, scales: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from distprune.search import cluster

    monkeypatch.setattr("ray.autoscaler.v2.utils.is_autoscaler_v2", lambda: False)
    monkeypatch.setattr(cluster, "_internal_kv_get", lambda key: said and json.dumps(said).encode())
    assert cluster.autoscales() is scales


# Reports that go together.


def _parcels(rows: list[tuple[float, int, bool]]) -> list[list[int]]:
    """The parcels, by index, of reports given as (seconds that it takes, rung, whether it is the last)."""
    now = [0.0]

    def made() -> Iterator[dict[str, Any]]:
        for index, (seconds, rung, final) in enumerate(rows):
            now[0] += seconds
            yield {"index": index, "rung": rung, "final": final}

    parcels, found = Parcels(made(), clock=lambda: now[0]), list[list[int]]()
    while not found or not rows[found[-1][-1]][2]:
        found.append([row["index"] for row in parcels.next()])
    return found


def test_reports_wait_for_others_for_two_seconds_at_most() -> None:
    assert _parcels([(3.0, -1, False)] * 3 + [(3.0, -1, True)]) == [[0], [1], [2], [3]], "slow ones are sent as they come"
    assert _parcels([(0.5, -1, False)] * 9 + [(0.5, -1, True)]) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    many = _parcels([(0.01, -1, False)] * 999 + [(0.01, -1, True)])
    assert len(many) == 5 and [*itertools.chain(*many)] == list(range(1000)), (
        "what the driver hears does not grow with how often a trial reports"
    )
    assert _parcels([(9.0, -1, False), (0.1, -1, False), (0.1, -1, True)]) == [[0], [1, 2]], "the first takes longer, for the data"


def test_what_is_decided_on_is_sent_at_once() -> None:
    assert _parcels([(0.1, -1, False), (0.1, 0, False), (0.1, 0, False), (0.1, 1, False), (0.1, 1, True)]) == [[0, 1], [2, 3], [4]]


@on_ray
def test_of_reports_that_come_together_none_counts_after_the_stop(tmp_path: Path) -> None:
    from distprune.search.runner import Gate

    class Handle:
        trial_id = "t"

    book = book_of(tmp_path, most_cost=15.0)
    gate = Gate(book, {"t": 0})
    parcel = {"r": json.dumps([row_of(0, index) for index in range(5)])}  # 10 samples each
    assert gate.on_trial_result(None, Handle(), parcel) == "STOP"  # type: ignore[arg-type]
    assert book.entries[0].reports == 3 and book.entries[0].stopped == "limit"


class Hungry(nn.Sequential):
    """Runs out of memory in a worker that has set aside less than 300 MB."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        import ray

        context = ray.get_runtime_context() if ray.is_initialized() else None
        if context and context.get_actor_id() and context.get_assigned_resources().get("memory", 0) < 3e8:
            raise MemoryError
        return super().forward(inputs)  # type: ignore[no-any-return]


def hungry(shape: tuple[int, int, int], classes: int) -> nn.Module:
    """A network that needs much memory."""
    return Hungry(nn.Flatten(), nn.Linear(shape[0] * shape[1] * shape[2], classes))


@on_ray
def test_on_ray_a_trial_gets_more_memory_and_a_node_that_joins_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import ray
    from ray.cluster_utils import Cluster

    from distprune.search.runner import Ray

    here = Path(__file__).parent
    monkeypatch.setenv("PYTHONPATH", f"{here}:{here.parent}")  # in workers
    node = {"num_cpus": 1, "resources": {"spot": 1}, "memory": 10**9, "object_store_memory": 10**8}
    ray.shutdown()
    cluster = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
    said, running = list[str](), list[int]()

    def listen(event: str, facts: dict[str, Any]) -> None:
        said.extend([facts["message"]] if event == "nodes" else [])
        if event == "progress":
            running.append(facts["ends"]["running"])
            if len(running) == 1:
                cluster.add_node(**node)

    value = search(
        tmp_path,
        trials=2,
        recipe={**BASE, "model": {"import": "test_resources:hungry"}},
        space={
            "paradigm": ["at_init"],
            "sparsity": [0.9],
            "criterion": ["magnitude", "random"],
            "allocator": ["erk"],
            "regularizer": ["none"],
        },
        sampler="grid",
        scheduler="none",
        workers={"memory": "200MB", "resources": {"spot": 0.01}},
    )
    try:
        ray.init(address=cluster.address, log_to_driver=False)
        folder = driver.start(value, engine=Ray(None, listen), listen=listen)
        with pytest.raises(UserError, match=r"workers asks for 1 CPUs, 2 spot, and the cluster has no room .* 1 CPUs, 1 spot"):
            Ray(None, listen).open(search(tmp_path, workers={"resources": {"spot": 2}}))
    finally:
        ray.shutdown()
        cluster.shutdown()
    rows = _table(folder)
    assert [(row["ended"], row["asked"], row["retries"], row["deaths"]) for row in rows] == [("finished", 1, 0, "[]")] * 2, rows
    assert said == ["the nodes have changed: 2 trials at once, 1 before"] and running[0] == 1 and max(running) == 2


@on_ray
def test_on_ray_a_search_ends_in_time_whose_trial_has_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another takes what the trial asks for. It stays with the search, which goes on with it when it is resumed."""
    import ray

    from distprune.search import runner

    monkeypatch.setattr(runner, "WAITS_S", 1.0)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    space = {"paradigm": ["dense"], "regularizer": ["none"]}
    value = search(tmp_path, trials=1, space=space, workers={"resources": {"spot": 1}}, limits={"trials": 1, "wall": 2})
    engine = runner.Ray(None, lambda event, facts: None)
    ray.init(num_cpus=2, resources={"spot": 1}, include_dashboard=False, log_to_driver=False)
    try:
        taken = ray.util.placement_group([{"spot": 1}])
        ray.get(taken.ready())
        folder = driver.start(value, engine=engine, listen=lambda event, facts: None)
        (row,) = _table(folder)
        assert row["ended"] in ("", None, "running") and not reports(folder), row
        ray.util.remove_placement_group(taken)
        driver.resume(folder.path, limits={"wall": 600}, engine=engine, listen=lambda event, facts: None)
    finally:
        ray.shutdown()
    assert [(row["ended"], row["attempts"]) for row in _table(folder)] == [("finished", 1)]
