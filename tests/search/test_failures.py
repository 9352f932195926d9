"""Failures by class: memory that runs out, errors that repeat, workers that die or say nothing, and a disk that fills up."""

import inspect
import itertools
import json
import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from searches import STEPS, TOTAL, checkpoints, curve, job_in, outcome, reports, resume, search, start, trials
from torch import nn
from toys import BASE, recipe

import distprune as dp
from distprune.errors import UserError
from distprune.report.tables import failures
from distprune.result import Result
from distprune.search import driver
from distprune.search.book import Book
from distprune.search.config import Limits, Search
from distprune.search.disk import Disk
from distprune.search.entry import Entry
from distprune.search.failures import MOST_DEATHS, SAME_ERRORS, Repeated, Silence, cause_of_death
from distprune.search.finale import load_trial
from distprune.search.goals import Goals
from distprune.search.retention import Retention
from distprune.search.rungs import Rungs
from distprune.search.simulate import Simulator
from distprune.search.trial import Job, run_trial
from distprune.search.verdict import verdict
from distprune.search.volume import contributions, hypervolume
from distprune.store.folder import RunFolder
from distprune.store.trials import FAILED, read_trials, write_trials


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)  # and back, as a trial changes the working directory


# Out of memory.


class Greedy(nn.Sequential):
    """Runs out of memory above `most` samples in training, from pass `after` on, and above `at_once` when it is measured."""

    most, at_once, after, passes = 10, 1000, 0, 0
    error: Exception = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        Greedy.passes += self.training
        if len(inputs) > (self.most if self.training else self.at_once) and Greedy.passes > self.after:
            raise self.error
        return super().forward(inputs)  # type: ignore[no-any-return]


def greedy(shape: tuple[int, int, int], classes: int, *, norm: bool = False) -> nn.Module:
    """A network that needs much memory."""
    middle: list[nn.Module] = [nn.BatchNorm1d(16)] if norm else []
    return Greedy(nn.Flatten(), nn.Linear(shape[0] * shape[1] * shape[2], 16), *middle, nn.ReLU(), nn.Linear(16, classes))


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Any:
    def has(**values: Any) -> None:
        for key, value in {"most": 10, "at_once": 1000, "after": 0, "passes": 0, **values}.items():
            monkeypatch.setattr(Greedy, key, value)

    return has


def _job(folder: Path, *, paradigm: Any = "dense", number: int = 3, **changes: Any) -> Job:
    model = {"import": "test_failures:greedy", **changes.pop("model", {})}
    value = {**recipe(paradigm, model=model, **changes.pop("recipe", {})).plain()}
    return job_in(folder, number=number, recipe=value, **{"rungs": [640], **changes})


def _numbers(rows: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    """Each report once, the first of it."""
    first = {row["index"]: row for row in reversed(rows)}
    return [tuple(first[index][key] for key in ("index", "cost", "objective", "kept", "final")) for index in sorted(first)]


ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."
    ),
    MemoryError(),
]


@pytest.mark.parametrize("error", ERRORS, ids=["cuda", "cpu", "python"])
def test_out_of_memory_is_tried_again_with_half_of_the_samples_and_recorded(error: Exception, memory: Any, tmp_path: Path) -> None:
    memory(most=1000)
    whole = list(run_trial(_job(tmp_path / "whole")))
    memory(error=error)
    rows = list(run_trial(_job(tmp_path / "short")))
    extra = json.loads(rows[-1]["extra"])
    assert rows[-1]["ended"] == "finished" and (extra["micro_batch"], extra["retries"]) == (8, 2), "32, 16, 8"
    assert [row[:2] for row in _numbers(rows)] == [row[:2] for row in _numbers(whole)], "the same bill"
    assert [row[2] for row in _numbers(rows)] == pytest.approx([row[2] for row in _numbers(whole)], abs=0.02)
    assert "micro_batch" not in json.loads(whole[-1]["extra"])


def test_it_goes_on_from_its_own_checkpoint_and_stays_where_it_was(memory: Any, tmp_path: Path) -> None:
    memory(most=1000)
    whole = list(run_trial(_job(tmp_path / "whole")))
    memory(after=35)  # after three epochs of ten steps, with a checkpoint at the rung after the second
    rows = list(run_trial(_job(tmp_path / "short")))
    assert rows[-1]["ended"] == "finished" and json.loads(rows[-1]["extra"])["micro_batch"] == 8
    assert _numbers(rows)[:2] == _numbers(whole)[:2]
    assert len({row["attempt"] for row in rows}) > 1, "what was lost is paid for by the attempt that lost it"
    assert max(row["spent"] for row in rows if row["attempt"] == rows[-1]["attempt"]) < whole[-1]["spent"], "not from the start"
    memory(after=10**9)  # memory would be enough again: after a kill it goes on as it did all the same
    last = checkpoints(tmp_path / "short", 3)
    again = list(run_trial(_job(tmp_path / "short", known=0)))
    assert last and [row["objective"] for row in again] == [row[2] for row in _numbers(rows)]


def test_after_a_kill_a_trial_goes_on_with_the_micro_batch_that_it_had(memory: Any, tmp_path: Path) -> None:
    memory()
    undisturbed = list(run_trial(_job(tmp_path / "whole")))
    memory()
    work = run_trial(_job(tmp_path / "cut"))
    heard = [next(work) for _ in range(3)]
    work.close()
    memory(most=1000)
    rows = list(run_trial(_job(tmp_path / "cut", known=2)))
    assert _numbers(heard[:2] + rows) == _numbers(undisturbed)
    assert json.loads(rows[-1]["extra"])["retries"] == 2


def test_measuring_that_does_not_fit_leaves_training_alone(memory: Any, tmp_path: Path) -> None:
    memory(most=1000)
    whole = list(run_trial(_job(tmp_path / "whole")))
    memory(most=1000, at_once=60)
    rows = list(run_trial(_job(tmp_path / "short")))
    assert json.loads(rows[-1]["extra"])["micro_batch"] == 50, "of 100 samples of validation"
    assert _numbers(rows) == [tuple(pytest.approx(value, abs=1e-6) for value in row) for row in _numbers(whole)]


def test_a_trial_that_fails_with_a_single_sample_is_told_so(memory: Any, tmp_path: Path) -> None:
    memory(most=0)
    (row,) = run_trial(_job(tmp_path))
    extra = json.loads(row["extra"])
    assert row["ended"] == "oom" and row["final"] and row["index"] == 0 and extra["micro_batch"] == 1 and extra["retries"] == 5
    assert "micro-batch of 1 after running out of memory" in extra["reason"] and "CUDA out of memory" in extra["reason"]


@pytest.mark.parametrize(("most", "ended", "micro_batch"), [(2, "finished", 2), (1, "oom", 1)])
def test_batch_normalisation_needs_two_samples(most: int, ended: str, micro_batch: int, memory: Any, tmp_path: Path) -> None:
    memory(most=most)
    last = list(run_trial(_job(tmp_path, model={"norm": True})))[-1]
    assert last["ended"] == ended and json.loads(last["extra"])["micro_batch"] == micro_batch


def test_a_batch_that_cannot_be_split_is_told_as_out_of_memory(memory: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from distprune.core.task import Task
    from distprune.core.tasks.classification import Classification

    monkeypatch.setattr(Classification, "split", Task.split)
    memory()
    (row,) = run_trial(_job(tmp_path))
    assert row["ended"] == "oom" and "cannot be split" in json.loads(row["extra"])["reason"]


def test_scoring_runs_out_of_memory_and_is_halved(memory: Any, tmp_path: Path) -> None:
    memory()
    rows = list(run_trial(_job(tmp_path, paradigm="at_init", recipe={"criterion": "snip"})))
    assert rows[-1]["ended"] == "finished" and json.loads(rows[-1]["extra"])["micro_batch"] == 8


def test_the_table_of_trials_says_what_memory_cost(memory: Any, tmp_path: Path) -> None:
    memory()
    value = search(tmp_path, trials=1, recipe={**BASE, "model": {"import": "test_failures:greedy"}}, space={"paradigm": ["dense"]})
    (row,) = read_trials(start(value, workers=1, using=run_trial).trials).to_pylist()
    assert (row["ended"], row["micro_batch"], row["retries"], json.loads(row["deaths"])) == ("finished", 8, 2, [])


# Errors of the user.


def _failing(wrong: Any, *, at: int = 0) -> Any:
    """Curves of which those for which `wrong(number)` is a text end with it as an error in place of report `at`."""

    def using(job: Job) -> Iterator[dict[str, Any]]:
        for row in curve(job):
            if row["index"] == at and (reason := wrong(job.number)):
                yield {**row, "final": True, "ended": "error", "extra": json.dumps({"reason": reason})}
                return
            yield row

    return using


@pytest.mark.usefixtures("no_finale")
@pytest.mark.parametrize("at", [0, 3])
def test_the_same_error_again_and_again_ends_the_search_which_can_be_resumed(at: int, tmp_path: Path) -> None:
    events: list[tuple[str, Any]] = []
    value = search(tmp_path, trials=20, scheduler="none")
    engine = Simulator(_failing(lambda number: f"ValueError: no layer {number}", at=at), workers=1)
    folder = driver.start(value, engine=engine, listen=lambda event, facts: events.append((event, facts)))
    ends = [trial.user_attrs["end"] for trial in trials(folder)]
    assert [end["ended"] for end in ends] == ["error"] * SAME_ERRORS and all(end["attempts"] == 1 for end in ends), "none is tried again"
    (reason,) = [facts["reason"] for event, facts in events if event == "gave_up"]
    assert f"{SAME_ERRORS} trials in a row ended with the same error: ValueError: no layer" in reason
    resume(value.folder, workers=1)  # it was put right
    ended = trials(folder)
    assert len(ended) == 20 and all(trial.state.is_finished() for trial in ended)
    whole = trials(start(search(tmp_path, name="whole", trials=20, scheduler="none"), workers=1))
    assert [trial.params for trial in ended] == [trial.params for trial in whole]


@pytest.mark.usefixtures("no_finale")
def test_errors_that_differ_or_among_successes_do_not_end_it(tmp_path: Path) -> None:
    def wrong(number: int) -> str:
        return "" if number % SAME_ERRORS == SAME_ERRORS - 1 else "it broke"

    among = start(search(tmp_path, name="among", trials=20, scheduler="none"), workers=1, using=_failing(wrong))
    assert len(trials(among)) == 20
    letters = _failing(lambda number: f"it broke {'abc'[number % 3]}")
    assert len(trials(start(search(tmp_path, name="letters", trials=20), workers=1, using=letters))) == 20


@pytest.mark.usefixtures("no_finale")
def test_a_trial_that_comes_further_shows_that_it_can_be_done(tmp_path: Path) -> None:
    """One long trial runs well beside short ones that break: their errors are their own."""
    using = _failing(lambda number: "" if number == 0 else "it broke")
    assert len(trials(start(search(tmp_path, trials=12, scheduler="none"), workers=2, using=using))) > SAME_ERRORS + 1


@pytest.mark.usefixtures("no_finale")
def test_a_driver_killed_between_two_errors_goes_on_counting(tmp_path: Path) -> None:
    def dying(job: Job) -> Iterator[dict[str, Any]]:
        if job.number == 3:
            raise KeyboardInterrupt
        yield from _failing(lambda number: "it broke")(job)

    value = search(tmp_path, trials=20)
    with pytest.raises(KeyboardInterrupt):
        start(value, workers=1, using=dying)
    folder = resume(value.folder, workers=1, using=_failing(lambda number: "it broke"))
    assert len(trials(folder)) == SAME_ERRORS, "three before, two after"


def test_what_a_row_of_errors_is() -> None:
    row = Repeated()
    for step in range(SAME_ERRORS - 1):
        row.failed(f"at step {step} the loss broke", index=2)
        row.went_on(1)
    assert not row.verdict, "one is missing"
    row.went_on(2)
    for step in range(SAME_ERRORS):
        assert not row.verdict, "a report that came as far began the row anew"
        row.failed(f"at step {step} the loss broke", index=2)
    assert row.verdict
    row.went_on(9)
    assert row.verdict, "it stays"
    row.forgive()
    assert not row.verdict


# Workers that die.


class Nothing:
    """Takes the place of what a test does not look at."""

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments, **options: None


def _book(tmp_path: Path, entries: int = 1, **changes: Any) -> Book:
    due = [name for name, parameter in inspect.signature(Book).parameters.items() if parameter.default is parameter.empty]
    parts: dict[str, Any] = {name: Nothing() for name in due}
    book = Book(**{**parts, "goals": Goals(), "rungs": Rungs([], 3), "most_trials": 9, **changes})
    book.entries = [Entry(number, recipe("dense"), str(number)) for number in range(entries)]
    book._proposer.size, book._proposed = 0, 9  # type: ignore[misc]
    return book


def _row(number: int, index: int, *, attempt: str = "a", wall_s: float = 0.0, **changes: Any) -> dict[str, Any]:
    row = {"trial": number, "attempt": attempt, "index": index, "rung": -1, "final": False, "ended": "", "cost": 10.0 * index}
    row |= {"spent": 10.0, "sparsity": 0.5, "kept": TOTAL // 2, "objective": 0.5, "score": None, "wall_s": wall_s, "extra": "{}"}
    return row | changes


def _dies(book: Book, cause: str = "worker process died", *, free: bool = False) -> bool:
    """Whether trial 0 is begun again when its worker has died."""
    book.died(0, cause, free=free)
    book.gone(0)
    return (again := book.next()) is not None and again.number == 0


def test_a_trial_whose_workers_die_is_lost_only_without_progress(tmp_path: Path) -> None:
    book = _book(tmp_path)
    for index in range(5):  # dies twice after every report
        assert _dies(book) and _dies(book)
        assert book.hear(_row(0, index, attempt=str(index)))
    assert _dies(book) and _dies(book, "memory of the node") and not _dies(book, "memory of the node")
    entry = book.entries[0]
    assert entry.told and entry.ended == "lost" and len(entry.deaths) == 10 + MOST_DEATHS
    assert entry.reason == (
        "its workers died 3 times without a report in between: worker process died, memory of the node, memory of the node"
    )
    assert verdict(entry, 0, Goals())[1].name == "FAIL"


def test_reports_sent_again_are_no_progress_and_preemption_counts_for_nothing(tmp_path: Path) -> None:
    book = _book(tmp_path)
    book.hear(_row(0, 0))
    assert all(_dies(book, "preempted", free=True) for _ in range(20))
    assert _dies(book) and _dies(book)
    book.hear(_row(0, 0, attempt="b"))
    assert not _dies(book), "it only repeated what it had said"


@pytest.mark.parametrize(
    ("message", "cause"),
    [
        ("The actor died because its node has died. Node Id: 1\n\tthe actor's node was preempted: spot", "preempted"),
        ("The actor died because its node has died. Node Id: 1", "node died"),
        ("Task was killed due to the node running low on memory.", "memory of the node"),
        ("The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR ... OOM killer", "worker process died"),
        ("what is this", "unknown"),
    ],
)
def test_causes_of_death(message: str, cause: str) -> None:
    assert cause_of_death(message) == cause


# Timeouts.


def test_silence_is_measured_from_the_last_word() -> None:
    now = [0.0]
    silence = Silence(10, lambda: now[0])
    silence.heard("a")
    silence.heard("b")
    now[0] = 8
    silence.heard("b")
    now[0] = 11
    assert silence.too_long() == ["a"]
    silence.gone("a")
    now[0] = 19
    assert silence.too_long() == ["b"]
    silence.excuse()  # the disk is full: it waits
    assert silence.too_long() == []
    now[0] = 30
    assert silence.too_long() == ["b"]
    unlimited = Silence(None, lambda: now[0])
    unlimited.heard("a")
    now[0] = 1e9
    assert unlimited.too_long() == []


def test_a_silent_worker_is_given_a_second_chance_and_then_up(tmp_path: Path) -> None:
    book = _book(tmp_path)
    for index in range(2):  # it comes further in between
        book.silent(0, 60)
        assert _dies(book, "unknown")
        book.hear(_row(0, index))
    book.silent(0, 60)
    assert _dies(book, "unknown")
    book.silent(0, 60)
    assert not _dies(book, "unknown")
    assert book.entries[0].ended == "timeout" and "said nothing for 60 s, 2 times" in book.entries[0].reason


def test_the_time_of_a_trial_is_that_of_all_its_attempts(tmp_path: Path) -> None:
    def ended(rows: list[dict[str, Any]]) -> tuple[str, int]:
        book = _book(tmp_path, most_wall=100.0)
        heard = sum(1 for _ in itertools.takewhile(book.hear, rows))
        return book.entries[0].ended, heard

    one = [_row(0, index, wall_s=30.0 * (index + 1)) for index in range(6)]
    assert ended(one) == ("timeout", 3), "30, 60, 90, 120"
    two = [_row(0, 0, wall_s=60.0), *(_row(0, index, attempt="b", wall_s=15.0 * index) for index in range(1, 6))]
    assert ended(two) == ("timeout", 3), "60, 75, 90, 105"
    assert ended([_row(0, 0, wall_s=60.0), _row(0, 1, wall_s=101.0, final=True, ended="finished")]) == ("finished", 1), "it made it"


@pytest.mark.usefixtures("no_finale")
def test_a_trial_over_its_time_ends_alone_and_again_from_the_stream(tmp_path: Path) -> None:
    def slow(job: Job) -> Iterator[dict[str, Any]]:
        for row in curve(job):
            yield {**row, "wall_s": 10.0 * (row["index"] + 1) * (5 if job.number == 2 else 1)}

    value = search(tmp_path, limits={"trials": 5, "trial_wall": 70}, scheduler="none")
    folder = start(value, using=slow)
    ends = [trial.user_attrs["end"] for trial in trials(folder)]
    assert [end["ended"] for end in ends] == ["finished", "finished", "timeout", "finished", "finished"]
    assert ends[2]["reason"] == "it ran for 100 s, and limits.trial_wall is 70" and len(reports(folder)[2]) == 2 < STEPS
    journal = folder.journal.read_bytes().splitlines(keepends=True)
    end = next(i for i, line in enumerate(journal) if b'"timeout"' in line)
    number = json.loads(journal[end])["trial_id"]
    kept = [line for i, line in enumerate(journal) if i < end or json.loads(line).get("trial_id") != number]
    folder.journal.write_bytes(b"".join(kept))  # as if the driver had died before it told the end
    assert outcome(resume(value.folder, using=slow)) == outcome(folder)


def test_every_failure_is_said_with_its_reason(tmp_path: Path) -> None:
    """As many as the progress line counts."""
    run = RunFolder(tmp_path / "x").create()
    ends = ["finished", "stopped", "error", "nan", "oom", "timeout", "lost", "duplicate", "running"]
    write_trials(run.trials, [{"number": number, "ended": end, "reason": f"of {end}"} for number, end in enumerate(ends)])
    run.search_yaml.touch()
    assert sorted(failures(Result(run.path))) == sorted(f"1 failed: of {end}" for end in FAILED) and len(FAILED) == 5


def test_a_trial_may_be_silent_for_as_long_as_it_has_time_left(tmp_path: Path) -> None:
    book = _book(tmp_path, most_wall=100.0)
    book.hear(_row(0, 0, wall_s=30.0))
    assert book.time_left(0) == 70.0 and not book.overdue(0, 69.9)
    book.hear(_row(0, 1, attempt="b", wall_s=15.0))
    assert book.time_left(0) == 55.0 and not book.overdue(0, 54.9) and book.overdue(0, 55.0)
    assert not book.overdue(0, 99.0), "it is known by now"
    book.gone(0)
    assert (book.entries[0].ended, book.entries[0].reason) == ("timeout", "it ran for 100 s, and limits.trial_wall is 100")
    unlimited = _book(tmp_path)
    unlimited.hear(_row(0, 0, wall_s=30.0))
    assert unlimited.time_left(0) == math.inf and not unlimited.overdue(0, 1e9)


def test_the_time_of_a_search_ends_what_says_nothing(tmp_path: Path) -> None:
    over = [False]
    book = _book(tmp_path, out_of_time=lambda: over[0])
    book.hear(_row(0, 0, wall_s=30.0))
    assert not book.overdue(0, 1e9)
    over[0] = True
    assert book.overdue(0, 0.1)
    book.gone(0)
    assert book.entries[0].told and (book.entries[0].ended, book.entries[0].reason) == ("stopped", "limit")


# The disk.


@pytest.mark.parametrize(("value", "size"), [("20GB", 20 * 10**9), ("1.5 MB", 1_500_000), (7, 7), ("900", 900), ("2e3KB", 2_000_000)])
def test_sizes_are_read(value: Any, size: int) -> None:
    assert Limits.read({"disk": value, "free": value}, "limits") == Limits(disk=size, free=size)


@pytest.mark.parametrize("value", ["many", "20 XB", "GB", "1.2.3GB", -1, 0])
def test_sizes_that_are_none_are_refused(value: Any) -> None:
    with pytest.raises(UserError, match=r"limits\.disk must be"):
        Limits.read({"disk": value}, "limits")


def test_limits_survive_writing(tmp_path: Path) -> None:
    value = search(tmp_path, limits={"trials": 3, "disk": "2GB", "free": "1MB", "silence": 60, "trial_wall": 3600})
    assert Search.read(value.plain()) == value


class Held:
    """A retention that is or is not crowded."""

    total, crowded = 5 * 10**9, False


def test_no_trial_is_begun_on_a_full_disk_and_it_is_said_once(tmp_path: Path) -> None:
    said: list[str] = []
    held, free = Held(), [5 * 10**9]
    disk = Disk(RunFolder(tmp_path), 10**9, held, lambda event, facts: said.append(facts["message"]), free=lambda folder: free[0])  # type: ignore[arg-type]
    assert disk.holds() == "" and said == []
    free[0] = 10**8
    assert disk.holds() == disk.holds() == "full" and len(said) == 1 and "100 MB are free" in said[0] and "limits.free: 1 GB" in said[0]
    free[0] = 10**9
    assert disk.holds() == disk.holds() == "" and said[1:] == ["There is room on the disk again."]
    held.crowded = True
    assert disk.holds() == "crowded" and "5 GB of checkpoints" in said[2]


def test_hypervolume_by_hand_and_by_counting_cells() -> None:
    assert hypervolume([(2, 1), (1, 3)], (0, 0)) == 2 + 3 - 1 and hypervolume([(3, -1)], (0, 0)) == 0
    draw = random.Random(0)
    for objectives in (1, 2, 3):
        points = [tuple(draw.randint(1, 5) for _ in range(objectives)) for _ in range(6)]
        cells = itertools.product(range(5), repeat=objectives)
        inside = sum(any(all(c < v for c, v in zip(cell, point, strict=True)) for point in points) for cell in cells)
        assert hypervolume(points, (0,) * objectives) == inside


def test_what_adds_least_to_a_front() -> None:
    worth = contributions({4: (0.9, -1000.0), 5: (0.89, -990.0), 6: (0.5, -100.0), 7: (0.7, -500.0)})
    assert min(worth, key=lambda n: worth[n]) == 5, "beside a better one"
    assert contributions({1: (0.5, -3.0)})[1] > 0 and contributions({}) == {}


def _checkpoint(folder: RunFolder, number: int, attempt: str, index: int, size: int = 100) -> dict[str, Any]:
    """Write one as a worker does, and what it then reports."""
    path = folder.checkpoint(number, attempt, index)
    path.mkdir(parents=True)
    (path / "state.safetensors").write_bytes(b"x" * size)
    return _row(number, index, attempt=attempt, extra=json.dumps({"checkpoint": size}))


def _on_disk(folder: RunFolder) -> set[str]:
    return {path.parent.relative_to(folder.checkpoints).as_posix() for path in folder.checkpoints.rglob("state.safetensors")}


@pytest.fixture
def masks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of the trials whose masks were written, in order."""
    written: list[int] = []
    monkeypatch.setattr("distprune.search.retention.write_masks", lambda folder, entry: written.append(entry.number))
    return written


def test_what_is_needed_least_goes_first_and_no_more_than_must(tmp_path: Path, masks: list[int]) -> None:
    folder, book, said = RunFolder(tmp_path / "x").create(), _book(tmp_path, entries=5), list[str]()
    retention = Retention(folder, book, limit=700, listen=lambda event, facts: said.append(facts["message"]))
    for number, vector in ((0, (0.9, -1000.0)), (1, (0.89, -990.0)), (2, (0.5, -100.0))):
        retention.heard(_checkpoint(folder, number, "a", 9))
        book.front[number], book.entries[number].told = vector, True
        retention.sweep(number)
    for number, index in ((3, 0), (3, 1), (4, 0), (4, 1)):
        retention.heard(_checkpoint(folder, number, "a", index))
    assert retention.total == 700 and said == [], "the limit is not exceeded"
    retention.heard(_checkpoint(folder, 4, "b", 2))  # a second attempt
    assert _on_disk(folder) == {"0/a/9", "1/a/9", "2/a/9", "3/a/1", "4/a/0", "4/a/1", "4/b/2"}, "the older one of one running trial"
    assert masks == [] and "1 superseded checkpoints" in said[0]
    retention.heard(_checkpoint(folder, 3, "a", 5, size=400))
    assert _on_disk(folder) == {"0/a/9", "2/a/9", "3/a/5", "4/b/2"} and masks == [1], "then the least of the front, masks first"
    assert retention.total == 700 and folder.dropped(1).exists() and "weights of trials 1, whose masks are kept" in said[-1]
    retention.heard(_checkpoint(folder, 4, "b", 7, size=900))
    assert _on_disk(folder) == {"3/a/5", "4/b/7"} and set(masks) == {0, 1, 2}, "the newest of what runs stays, come what may"
    assert not retention.crowded, "should both wait at a rung, nobody else would make room"
    book._busy |= {3, 4}
    assert retention.crowded
    book.entries[4].told = True
    retention.sweep(4)
    assert _on_disk(folder) == {"3/a/5"} and not retention.crowded


def test_weights_stay_where_masks_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(folder: RunFolder, entry: Entry) -> None:
        raise UserError("the data is gone")

    monkeypatch.setattr("distprune.search.retention.write_masks", broken)
    folder, book = RunFolder(tmp_path / "x").create(), _book(tmp_path)
    book.front[0], book.entries[0].told = (0.9, -1.0), True
    Retention(folder, book, limit=50).heard(_checkpoint(folder, 0, "a", 9))
    assert _on_disk(folder) == {"0/a/9"}


def test_sizes_are_those_on_the_disk_without_looking_at_it(tmp_path: Path) -> None:
    folder, book = RunFolder(tmp_path / "x").create(), _book(tmp_path, entries=3)
    retention = Retention(folder, book)
    for number, index in itertools.product(range(3), range(5)):
        retention.heard(_checkpoint(folder, number, "a", index, size=10 * index + 1))
        for old in range(index - 1):  # as the worker does
            path = folder.checkpoint(number, "a", old)
            if path.exists():
                (path / "state.safetensors").unlink()
                path.rmdir()
    assert retention.total == sum(path.stat().st_size for path in folder.checkpoints.rglob("*.safetensors")) == 3 * (31 + 41)
    again = Retention(folder, book)
    again.sweep()
    assert again.total == retention.total


def test_the_cache_has_the_room_that_checkpoints_leave(tmp_path: Path) -> None:
    folder, book = RunFolder(tmp_path / "x").create(), _book(tmp_path)
    retention = Retention(folder, book, limit=1000)
    assert retention.room == 1000
    retention.heard(_checkpoint(folder, 0, "a", 1, size=800))
    assert retention.room == 200
    retention.heard(_checkpoint(folder, 0, "b", 2, size=1100))
    assert retention.room == 0
    assert Retention(folder, book).room is None, "without a limit there is no bound"


def test_late_files_of_workers_thought_dead_are_swept(tmp_path: Path, masks: list[int]) -> None:
    folder, book = RunFolder(tmp_path / "x").create(), _book(tmp_path, entries=4)
    for number in (0, 1, 2):
        book.entries[number].told = True
    book.front |= {1: (0.9, -9.0), 2: (0.8, -8.0)}
    _checkpoint(folder, 0, "zombie", 3)  # ended, not on the front
    _checkpoint(folder, 1, "a", 9)  # on the front
    _checkpoint(folder, 1, "zombie", 3)
    folder.dropped(2).parent.mkdir()
    folder.dropped(2).touch()  # on the front, weights given up
    _checkpoint(folder, 2, "zombie", 3)
    _checkpoint(folder, 3, "a", 4)  # runs
    unfinished = folder.checkpoint(3, "zombie", 5).with_name(".5.abcdef")
    unfinished.mkdir(parents=True)
    Retention(folder, book).sweep()
    assert _on_disk(folder) == {"1/a/9", "3/a/4"} and not unfinished.exists() and folder.dropped(2).exists()


def test_a_search_keeps_to_its_limit_and_exports_say_why(tmp_path: Path) -> None:
    """On the toys, with real checkpoints: at every report, no more than the limit and what each worker has just written."""
    free = start(search(tmp_path, name="free", trials=8, report_every="2ep"), using=run_trial)
    files = [path.stat().st_size for path in free.checkpoints.rglob("*.safetensors")]
    largest = max(files)
    front = {row["number"] for row in read_trials(free.trials).to_pylist() if row["pareto"]}
    assert len(front) >= 3 and len(files) == len(front), "superseded checkpoints of the front go anyway"

    limit, most = 2 * largest, [0]
    value = search(tmp_path, name="bound", trials=8, report_every="2ep", limits={"trials": 8, "disk": limit})

    def watched(job: Job) -> Iterator[dict[str, Any]]:
        for row in run_trial(job):
            most[0] = max(most[0], sum(path.stat().st_size for path in (value.folder / "checkpoints").rglob("*.safetensors")))
            yield row

    folder = start(value, using=watched)
    assert outcome(folder) == outcome(free), "what is kept changes no decision"
    assert most[0] <= limit + 2 * largest
    left = {int(path.parts[-4]) for path in folder.checkpoints.rglob("*.safetensors")}
    assert sum(path.stat().st_size for path in folder.checkpoints.rglob("*.safetensors")) <= limit and left < front
    assert {int(path.stem) for path in folder.masks.glob("*.safetensors")} == front
    columns = ("number", "pareto", "test")
    tables = [[[row[name] for name in columns] for row in read_trials(run.trials).to_pylist()] for run in (free, folder)]
    assert tables[0] == tables[1], "what was measured early is what would have been measured in the end"
    gone = min(front - left)
    with pytest.raises(UserError, match=rf"Trial {gone} has kept its masks, .*, but no weights: .* limits\.disk"):
        load_trial(folder, gone, {"paradigm": "dense", **BASE})
    resume(value.folder, using=run_trial)
    assert {int(path.parts[-4]) for path in folder.checkpoints.rglob("*.safetensors")} == left


# On a real Ray.

ON_RAY = (
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
)


def on_ray(test: Any) -> Any:
    """A test that starts Ray, or uses what is made for it."""
    for mark in ON_RAY:
        test = mark(test)
    return test


class Handle:
    """What Ray knows of a trial, as far as it matters here."""

    trial_id = "t"

    def __init__(self, tmp_path: Path) -> None:
        self.error_file, self._failures = str(tmp_path / "error.txt"), 0
        self.temporary_state = type("State", (), {"ray_actor": "the actor"})()

    def dies(self, gate: Any, face: Any, message: str) -> None:
        """As Ray does it: it adds to the text of errors, and tells the scheduler and the searcher."""
        self._failures += 1
        with open(self.error_file, "a") as file:
            file.write(f"Failure # {self._failures} (occurred at 2026-01-01)\n{message}\n")
        gate.on_trial_error(None, self)
        face.on_trial_complete("t", error=True)


def _goes_on(book: Book) -> bool:
    return (again := book.next()) is not None and again.number == 0


@on_ray
def test_a_trial_is_begun_again_until_its_workers_die_without_progress(tmp_path: Path) -> None:
    from distprune.search.runner import Face, Gate

    book, handle, told = _book(tmp_path), Handle(tmp_path), list[int]()
    gate, face = Gate(book, {"t": 0}), Face(book, lambda assignment: _job(tmp_path), {"t": 0}, told.append)
    words = "The actor is dead because its worker process has died."
    for index in range(4):
        for _ in range(5):
            handle.dies(gate, face, "The actor died because its node has died. The actor's node was preempted.")
            assert _goes_on(book), "nobody's fault"
            handle.dies(gate, face, "The actor died because its node has died.")
            assert _goes_on(book), "nobody's fault, and what was said before is another death"
        for _ in range(2):
            handle.dies(gate, face, words)
            assert _goes_on(book)
        gate.on_trial_result(None, handle, {"r": json.dumps([_row(0, index, attempt=str(index))])})  # type: ignore[arg-type]
    for _ in range(2):
        handle.dies(gate, face, words)
        assert _goes_on(book)
    gate.on_trial_result(None, handle, {"r": json.dumps([_row(0, 3, attempt="again")])})  # type: ignore[arg-type]
    handle.dies(gate, face, "the node running low on memory")
    assert not _goes_on(book), "what was sent again was no progress"
    entry = book.entries[0]
    assert entry.ended == "lost" and entry.deaths[-2:] == ["worker process died", "memory of the node"] and "unknown" not in entry.deaths


@on_ray
def test_a_silent_worker_is_killed_and_a_second_one_is_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from distprune.search import runner

    now, killed, book, handle = [100.0], list[Any](), _book(tmp_path), Handle(tmp_path)
    monkeypatch.setattr(runner.ray, "kill", killed.append)
    monkeypatch.setattr(runner.time, "monotonic", lambda: now[0])
    gate, draw = runner.Gate(book, {"t": 0}), runner.Draw(lambda: None, book, {"t": 0}, 10)
    face = runner.Face(book, lambda assignment: _job(tmp_path), {"t": 0}, lambda number: None)
    some: Any = {"iteration": 0, "trials": [], "trial": handle}
    full = [""]
    book.holds = lambda: full[0]

    def wait(seconds: float) -> int:
        now[0] += seconds
        draw.on_step_end(0, [])
        return len(killed)

    draw.on_trial_start(**some)
    assert wait(9) == 0
    draw.on_trial_result(**some, result={})
    assert wait(9) == 0 and wait(2) == 1 == wait(30), "given up once"
    handle.dies(gate, face, "killed by `ray.kill`")
    assert _goes_on(book)
    draw.on_trial_error(**some)
    draw.on_trial_start(**some)
    full[0] = "full"
    assert wait(50) == 1, "on a full disk it waits for space"
    full[0] = "crowded"
    assert wait(9) == 1 and wait(2) == 2
    handle.dies(gate, face, "killed by `ray.kill`")
    assert not _goes_on(book) and book.entries[0].ended == "timeout"


@on_ray
def test_a_worker_that_hangs_is_killed_when_its_time_is_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With no limit of silence."""
    from distprune.search import runner

    now, killed, book, handle = [100.0], list[Any](), _book(tmp_path, most_wall=60.0), Handle(tmp_path)
    monkeypatch.setattr(runner.ray, "kill", killed.append)
    monkeypatch.setattr(runner.time, "monotonic", lambda: now[0])
    gate, draw = runner.Gate(book, {"t": 0}), runner.Draw(lambda: None, book, {"t": 0}, None)
    face = runner.Face(book, lambda assignment: _job(tmp_path), {"t": 0}, lambda number: None)
    some: Any = {"iteration": 0, "trials": [], "trial": handle}
    draw.on_trial_start(**some)

    def wait(seconds: float) -> int:
        now[0] += seconds
        draw.on_step_end(0, [])
        return len(killed)

    assert wait(40) == 0
    gate.on_trial_result(None, handle, {"r": json.dumps([_row(0, 0, wall_s=40.0)])})  # type: ignore[arg-type]
    draw.on_trial_result(**some, result={})
    assert wait(19) == 0 and wait(2) == 1 == wait(30)
    handle.dies(gate, face, "killed by `ray.kill`")
    assert not _goes_on(book) and book.entries[0].ended == "timeout" and not book.is_busy


@on_ray
def test_nothing_is_born_while_the_disk_is_full(tmp_path: Path) -> None:
    from distprune.search.runner import Face

    full, asked = ["full"], list[int]()
    book = _book(tmp_path, entries=0)
    book.holds, book.next = lambda: full[0], lambda: asked.append(1)  # type: ignore[assignment, method-assign, func-returns-value]
    face = Face(book, lambda assignment: _job(tmp_path), {}, lambda number: None)
    assert face.suggest("t") is None and asked == [], "Ray asks again"
    full[0] = ""
    assert face.suggest("t") == "FINISHED" and asked == [1]


@pytest.fixture
def toys_are_importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))  # in workers


def _fates(tmp_path: Path, *kinds: str, **limits: Any) -> dict[str, dict[str, Any]]:
    """Rows of the table of trials, one a kind, of a search on one worker."""
    candidates = [{"import": "toys:fate", "kind": kind, "folder": str(tmp_path)} for kind in kinds]
    value = search(
        tmp_path,
        space={"paradigm": ["dense"], "optimizer": candidates, "regularizer": ["none"]},
        limits={"trials": 3 * len(kinds), **limits},
        scheduler="none",
        workers={"most": 1},
    )
    rows = dp.search(value).trials.to_pylist()
    kind_of = {row["number"]: json.loads(row["recipe"])["train"]["optimizer"].get("kind", "lives") for row in rows}
    assert all(trial.state.is_finished() for trial in trials(RunFolder(value.folder)))
    return {kind_of[row["number"]]: row for row in rows if row["ended"] != "duplicate"}


@on_ray
@pytest.mark.usefixtures("toys_are_importable")
def test_workers_that_die_cost_their_trial_nothing_but_a_trial_that_kills_them_is_lost(tmp_path: Path) -> None:
    rows = _fates(tmp_path, "lives", "dies", "dies once")
    deaths = {kind: len(json.loads(row["deaths"])) for kind, row in rows.items()}
    assert {kind: row["ended"] for kind, row in rows.items()} == {"lives": "finished", "dies": "lost", "dies once": "finished"}
    assert (deaths["lives"], deaths["dies once"]) == (0, 1)
    assert deaths["dies"] in (MOST_DEATHS, MOST_DEATHS + 1), "a report may die with its worker, and get through in the next attempt"
    assert rows["dies once"]["objective"] == rows["lives"]["objective"], "the same numbers as undisturbed"
    assert rows["dies"]["reason"].startswith("its workers died 3 times without a report in between: worker process died")


@on_ray
@pytest.mark.usefixtures("toys_are_importable")
def test_a_worker_that_hangs_is_given_up_and_the_search_ends(tmp_path: Path) -> None:
    (row,) = _fates(tmp_path, "hangs", silence=4).values()
    assert row["ended"] == "timeout", row["reason"]
    assert row["reason"] == "its workers said nothing for 4 s, 2 times without a report in between"
    assert len(json.loads(row["deaths"])) == 2
