"""Failures by class: errors that repeat, and workers that die."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from books import book_of, dies, row_of
from searches import curve, resume, search, start, trials

from distprune.report.tables import failures
from distprune.result import Result
from distprune.search import driver
from distprune.search.failures import MOST_DEATHS, SAME_ERRORS, Repeated, cause_of_death
from distprune.search.goals import Goals
from distprune.search.simulate import Simulator
from distprune.search.trial import Job
from distprune.search.verdict import verdict
from distprune.store.folder import RunFolder
from distprune.store.trials import FAILED, write_trials

pytestmark = pytest.mark.usefixtures("elsewhere")


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


def test_a_trial_whose_workers_die_is_lost_only_without_progress(tmp_path: Path) -> None:
    book = book_of(tmp_path)
    for index in range(5):  # dies twice after every report
        assert dies(book) and dies(book)
        assert book.hear(row_of(0, index, attempt=str(index)))
    assert dies(book) and dies(book, "memory of the node") and not dies(book, "memory of the node")
    entry = book.entries[0]
    assert entry.told and entry.ended == "lost" and len(entry.deaths) == 10 + MOST_DEATHS
    assert entry.reason == (
        "its workers died 3 times without a report in between: worker process died, memory of the node, memory of the node"
    )
    assert verdict(entry, 0, Goals())[1].name == "FAIL"


def test_reports_sent_again_are_no_progress_and_preemption_counts_for_nothing(tmp_path: Path) -> None:
    book = book_of(tmp_path)
    book.hear(row_of(0, 0))
    assert all(dies(book, "preempted", free=True) for _ in range(20))
    assert dies(book) and dies(book)
    book.hear(row_of(0, 0, attempt="b"))
    assert not dies(book), "it only repeated what it had said"


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


def test_every_failure_is_said_with_its_reason(tmp_path: Path) -> None:
    """As many as the progress line counts."""
    run = RunFolder(tmp_path / "x").create()
    ends = ["finished", "stopped", "error", "nan", "oom", "timeout", "lost", "duplicate", "running"]
    write_trials(run.trials, [{"number": number, "ended": end, "reason": f"of {end}"} for number, end in enumerate(ends)])
    run.search_yaml.touch()
    assert sorted(failures(Result(run.path))) == sorted(f"1 failed: of {end}" for end in FAILED) and len(FAILED) == 5
