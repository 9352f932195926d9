"""For how many trials there is room, and who waits for it."""

from pathlib import Path
from typing import Any

import pytest
from books import book_of, on_ray
from machines import GB
from searches import job_in
from toys import recipe

from distprune.search.config import Workers
from distprune.search.entry import Assignment
from distprune.search.more import Ask
from distprune.search.resources import bounded, weight
from distprune.search.trial import Job

pytestmark = pytest.mark.usefixtures("elsewhere")


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
