"""Rungs: which trials go on, against references that rank everything anew at each decision."""

import functools
import math
import random
import statistics
import sys
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distprune.errors import UserError
from distprune.search import rungs as room
from distprune.search.rungs import Rungs, Vector, boundaries, dominates
from distprune.search.tables import scheduler

Seen = dict[int, Vector]
LEVELS = 3


def ranked(seen: Seen) -> list[tuple[int, int]]:
    """(how many dominate it, number) from best to worst: by that count, then farthest first, as the papers define them."""
    above = {number: sum(dominates(other, vector) for other in seen.values()) for number, vector in seen.items()}
    spans = [max(column) - min(column) or 1.0 for column in zip(*seen.values(), strict=True)]

    def distance(a: Vector, b: Vector) -> float:
        parts = [((x - y) / span) for x, y, span in zip(a, b, spans, strict=True)]
        total = 0.0
        for part in parts:
            total += part * part
        return total

    rows: list[tuple[int, int]] = []
    for count in sorted(set(above.values())):
        rest = sorted(number for number in seen if above[number] == count)
        chosen: list[int] = []
        reach: list[int] = []  # the net, which the rest is measured by
        while rest:
            if not chosen:
                best = min(rest, key=lambda number: ([-value for value in seen[number]], number))
            else:
                best = max(rest, key=lambda number: (min(distance(seen[number], seen[other]) for other in reach), -number))
            chosen.append(best)
            reach = chosen[: room.NET]
            rest.remove(best)
        rows += [(count, number) for number in chosen]
    return rows


def finite(vector: Vector) -> bool:
    return all(math.isfinite(value) for value in vector)


class Naive:
    """The rule of `Rungs`, written down without a thought for its cost."""

    def __init__(self, reduction: int, front: float) -> None:
        self.reduction, self.front = reduction, front
        self.seen: list[Seen] = [{} for _ in range(LEVELS)]
        self.waiting: list[set[int]] = [set() for _ in range(LEVELS)]
        self.on = [0] * LEVELS

    def those_that_go(self, rung: int) -> list[int]:
        rows = ranked(self.seen[rung])
        best = [number for _, number in rows[: math.ceil(len(rows) / self.reduction)]]
        if self.on[rung] < self.front * len(rows):
            best = [number for count, number in rows if count == 0 or number in best]
        return best

    def goes_on(self, number: int, rung: int, vector: Vector) -> bool:
        if not finite(vector):
            return False
        self.seen[rung][number] = vector
        goes = number in self.those_that_go(rung)
        self.on[rung] += goes
        return goes

    def finished(self, number: int, rung: int, vector: Vector) -> None:
        for above in range(rung + 1, LEVELS):
            if finite(vector):
                self.seen[above][number] = vector

    def promotable(self) -> tuple[int, int] | None:
        for rung in reversed(range(LEVELS)):
            go = self.those_that_go(rung) if self.seen[rung] else []
            above = {number: count for count, number in ranked(self.seen[rung])} if go else {}
            for first in [number for number in go if number in self.waiting[rung]]:
                equals = [number for number, count in above.items() if count == above[first]]
                oldest = min(number for number in equals if number in self.waiting[rung])
                return (oldest if set(equals) <= set(go) else first), rung
        return None


def streams(objectives: int) -> st.SearchStrategy[list[tuple[int, bool, Vector]]]:
    """(rung, whether it finished there, vector) of one trial after the other, with ties and what is not a number."""
    few = st.sampled_from([0.0, 0.25, 0.5, 1.0, 3.0])
    value = st.one_of(few, st.floats(-2, 2), st.sampled_from([math.nan, -math.inf, math.inf]))
    row = st.tuples(st.integers(0, LEVELS - 1), st.booleans(), st.tuples(*[value] * objectives))
    return st.lists(row, min_size=1, max_size=40)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3).flatmap(streams), st.integers(2, 4), st.sampled_from([0.0, 0.5, 0.75, 1.0]), st.sampled_from([2, 3, 64]))
def test_decisions_are_those_of_ranking_everything_anew(
    stream: list[tuple[int, bool, Vector]], reduction: int, front: float, size: int
) -> None:
    rungs, naive = Rungs([1, 2, 3], reduction, front=front), Naive(reduction, front)
    order = random.Random(0).sample(range(len(stream)), len(stream))  # numbers do not come in order
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(room, "NET", size)
        for number, (rung, finished, vector) in zip(order, stream, strict=True):
            assert rungs.goes_on(number, rung, vector) == naive.goes_on(number, rung, vector)
            if finished:
                rungs.finished(number, rung, vector)
                naive.finished(number, rung, vector)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3).flatmap(streams), st.integers(2, 4), st.sampled_from([0.0, 0.75]), st.data())
def test_promotions_are_those_of_ranking_everything_anew(
    stream: list[tuple[int, bool, Vector]], reduction: int, front: float, data: Any
) -> None:
    rungs, naive = Rungs([1, 2, 3], reduction, front=front, promotes=True), Naive(reduction, front)
    for number, (rung, finished, vector) in enumerate(stream):
        assert not rungs.goes_on(number, rung, vector), "all of them wait first"
        if finite(vector):
            naive.seen[rung][number] = vector
            naive.waiting[rung].add(number)
        if finished:
            rungs.finished(number, rung, vector)
            naive.finished(number, rung, vector)
        for _ in range(data.draw(st.integers(0, 2))):  # workers that are free
            expected = naive.promotable()
            assert rungs.promotable() == (expected and expected[0])
            if expected:
                best, at = expected
                rungs.leaves(best, at)
                naive.waiting[at].remove(best)
                naive.on[at] += 1


def test_with_one_objective_it_is_asha() -> None:
    """At a rung goes on who is among the ceil(n / reduction) best of the n scores seen there, whatever else there is."""
    generator = random.Random(0)
    rungs = scheduler.read({"name": "halving", "reduction": 3}, "scheduler")(10, 20, 1)
    seen: list[float] = []
    for number in range(200):
        seen.append(generator.random())
        better = sum(score > seen[-1] for score in seen)
        assert rungs.goes_on(number, 0, (seen[-1],)) == (better < math.ceil(len(seen) / 3))


def test_a_trial_stops_below_the_median_of_the_others_after_a_grace() -> None:
    generator = random.Random(0)
    rungs = scheduler.read({"name": "median", "grace": 4}, "scheduler")(10, 20, 1)
    seen: list[float] = []
    for number in range(60):
        score = math.nan if number == 7 else round(generator.random(), 1)
        goes = number < 4 or score >= statistics.median(seen)
        assert rungs.goes_on(number, 0, (score,)) == goes
        seen += [score] if math.isfinite(score) else []


@pytest.mark.parametrize("name", ["halving", "median"])
def test_what_compares_scores_alone_refuses_several_objectives(name: str) -> None:
    with pytest.raises(UserError, match=f"scheduler '{name}' compares trials by their score alone, and the search has 3") as caught:
        scheduler.choose(name)(10, 20, 3)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "options", [{"reduction": 1}, {"first": 0.0}, {"front": 1.5}, {"variant": "pause"}, {"name": "median", "grace": 0}], ids=str
)
def test_options_that_make_no_sense(options: dict[str, Any]) -> None:
    with pytest.raises(UserError):
        scheduler.read({"name": "pareto_halving", **options}, "scheduler")(10, 20, 1)


def test_boundaries_by_hand() -> None:
    assert boundaries(10, 100, 3) == [10, 30, 90] and boundaries(10, 90, 3) == [10, 30] and boundaries(10, 10, 3) == []
    assert dominates((1, 1), (1, 0)) and not dominates((1, 1), (1, 1)) and not dominates((2, 0), (1, 1))
    assert dominates((2, 1, 1), (1, 1, 1)) and not dominates((2, 1, 0), (1, 1, 1))


def test_a_sparse_trial_is_not_stopped_for_being_less_accurate() -> None:
    rungs = Rungs([100], 3)
    assert rungs.goes_on(0, 0, (0.95, -1000.0)) and not rungs.goes_on(1, 0, (0.94, -1000.0))
    assert not rungs.goes_on(2, 0, (0.93, -1000.0)) and rungs.goes_on(3, 0, (0.80, -20.0))


def test_finished_trials_compete_at_later_rungs() -> None:
    rungs = Rungs([100, 300], 2)
    rungs.finished(0, 0, (0.99, -1.0))
    assert not rungs.goes_on(1, 1, (0.5, -2.0))


def _passed(front: float, vectors: Sequence[Vector]) -> list[bool]:
    rungs = Rungs([1], 3, front=front)
    return [rungs.goes_on(number, 0, vector) for number, vector in enumerate(vectors)]


def test_the_middle_of_a_front_goes_on_as_its_ends_do() -> None:
    """Thirty trials, half of them a front, the others below it: with the net alone the middle of the front is thinned out."""
    middle = {-cost: 1 - 1 / cost for cost in range(2, 17)}  # a front
    vectors = [(score - lower, cost) for cost, score in middle.items() for lower in (0.0, 0.3)]
    shares = []
    for front in (0.0, 0.75):
        counts = {True: [0, 0], False: [0, 0]}  # of the front or not: [went on, seen]
        for seed in range(50):
            order = random.Random(seed).sample(range(len(vectors)), len(vectors))
            for place, went in zip(order, _passed(front, [vectors[place] for place in order]), strict=True):
                counts[place % 2 == 0][0] += went
                counts[place % 2 == 0][1] += 1
        shares.append([counts[on_front][0] / counts[on_front][1] for on_front in (True, False)])
    (front_alone, below_alone), (front_with, below_with) = shares
    assert front_alone < 0.7 < 0.95 < front_with
    assert below_with < below_alone + 0.1 and below_with < 0.4, "what is below goes on no more often than it did"


def test_where_all_are_on_the_front_the_share_is_kept() -> None:
    vectors = [(float(number), -float(number)) for number in random.Random(0).sample(range(200), 200)]
    assert 0.70 < sum(_passed(0.75, vectors)) / 200 < 0.80
    assert sum(_passed(1.0, vectors)) == 200


def _lines(do: Callable[[], object]) -> int:
    """Lines of the scheduler that are run."""
    count = 0

    def trace(frame: Any, event: str, argument: Any) -> Any:
        nonlocal count
        count += event == "line"
        return trace if frame.f_code.co_filename == room.__file__ else None

    sys.settrace(trace)
    try:
        do()
    finally:
        sys.settrace(None)
    return count


@pytest.mark.parametrize("kind", ["spread", "all on the front", "one cost"])
@pytest.mark.parametrize("promotes", [False, True])
def test_a_decision_takes_as_many_operations_after_ten_thousand_trials_as_after_a_hundred(kind: str, promotes: bool) -> None:
    """Lines that are run, each at most one pass over the rung: a net of NET members, and a few for the rest."""
    generator = random.Random(0)
    rungs = Rungs([1], 3, promotes=promotes)
    most = {100: 0, 10_000: 0}

    def decide(number: int, vector: Vector) -> None:
        rungs.goes_on(number, 0, vector)
        if promotes and (best := rungs.promotable()) is not None:
            rungs.leaves(best, 0)

    for number in range(max(most)):
        x, y = generator.random(), generator.random()
        vector = {"spread": (x, y), "all on the front": (x, -x), "one cost": (x, -0.1)}[kind]
        for end in most:
            if end - 10 <= number < end:
                most[end] = max(most[end], _lines(functools.partial(decide, number, vector)))
                break
        else:
            rungs.note(number, 0, vector) if number >= 100 else decide(number, vector)
    member = 6 + 4 * 2  # lines of the net: the loop and, an objective, what makes a distance
    assert max(most.values()) <= 80 + room.NET * member, most
