"""Trials and searches that are out of time, and workers that say nothing."""

import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from books import book_of, dies, row_of
from searches import STEPS, curve, outcome, reports, resume, search, start, trials

from distprune.search.failures import Silence
from distprune.search.trial import Job

pytestmark = pytest.mark.usefixtures("elsewhere")


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
    book = book_of(tmp_path)
    for index in range(2):  # it comes further in between
        book.silent(0, 60)
        assert dies(book, "unknown")
        book.hear(row_of(0, index))
    book.silent(0, 60)
    assert dies(book, "unknown")
    book.silent(0, 60)
    assert not dies(book, "unknown")
    assert book.entries[0].ended == "timeout" and "said nothing for 60 s, 2 times" in book.entries[0].reason


def test_the_time_of_a_trial_is_that_of_all_its_attempts(tmp_path: Path) -> None:
    def ended(rows: list[dict[str, Any]]) -> tuple[str, int]:
        book = book_of(tmp_path, most_wall=100.0)
        heard = sum(1 for _ in itertools.takewhile(book.hear, rows))
        return book.entries[0].ended, heard

    one = [row_of(0, index, wall_s=30.0 * (index + 1)) for index in range(6)]
    assert ended(one) == ("timeout", 3), "30, 60, 90, 120"
    two = [row_of(0, 0, wall_s=60.0), *(row_of(0, index, attempt="b", wall_s=15.0 * index) for index in range(1, 6))]
    assert ended(two) == ("timeout", 3), "60, 75, 90, 105"
    assert ended([row_of(0, 0, wall_s=60.0), row_of(0, 1, wall_s=101.0, final=True, ended="finished")]) == ("finished", 1), "it made it"


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


def test_a_trial_may_be_silent_for_as_long_as_it_has_time_left(tmp_path: Path) -> None:
    book = book_of(tmp_path, most_wall=100.0)
    book.hear(row_of(0, 0, wall_s=30.0))
    assert book.time_left(0) == 70.0 and not book.overdue(0, 69.9)
    book.hear(row_of(0, 1, attempt="b", wall_s=15.0))
    assert book.time_left(0) == 55.0 and not book.overdue(0, 54.9) and book.overdue(0, 55.0)
    assert not book.overdue(0, 99.0), "it is known by now"
    book.gone(0)
    assert (book.entries[0].ended, book.entries[0].reason) == ("timeout", "it ran for 100 s, and limits.trial_wall is 100")
    unlimited = book_of(tmp_path)
    unlimited.hear(row_of(0, 0, wall_s=30.0))
    assert unlimited.time_left(0) == math.inf and not unlimited.overdue(0, 1e9)


def test_the_time_of_a_search_ends_what_says_nothing(tmp_path: Path) -> None:
    over = [False]
    book = book_of(tmp_path, out_of_time=lambda: over[0])
    book.hear(row_of(0, 0, wall_s=30.0))
    assert not book.overdue(0, 1e9)
    over[0] = True
    assert book.overdue(0, 0.1)
    book.gone(0)
    assert book.entries[0].told and (book.entries[0].ended, book.entries[0].reason) == ("stopped", "limit")
