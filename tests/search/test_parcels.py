"""Reports that go to the driver together."""

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from books import book_of, on_ray, row_of

from distprune.search.parcels import Parcels

pytestmark = pytest.mark.usefixtures("elsewhere")


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


def test_what_was_made_before_a_failure_is_sent_before_it() -> None:
    def rows() -> Iterator[dict[str, Any]]:
        yield from ({"index": index, "rung": -1, "final": False} for index in range(2))
        raise RuntimeError("a rank has died")

    parcels = Parcels(rows(), clock=lambda: 0.0)
    assert [row["index"] for row in parcels.next()] == [0, 1]
    for _ in range(2):
        with pytest.raises(RuntimeError, match="a rank has died"):
            parcels.next()


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
