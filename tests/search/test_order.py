"""The order in which proposals run: finished beginnings first, nobody overtaken for long, nothing lost."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from searches import curve, outcome, search, start
from toys import recipe

from distprune.search.order import MOST_OVERTAKEN, Order

RECIPES = {name: recipe(sparsity=sparsity) for name, sparsity in zip("abcdef", (0.5, 0.6, 0.7, 0.8, 0.9, 0.95), strict=True)}


def _order(prefixes: dict[str, list[tuple[str, int]]], **options: Any) -> Order:
    """An order of made-up recipes by what they share."""
    return Order(lambda found: next(prefixes[name] for name, known in RECIPES.items() if known is found), **options)


def _waits(order: Order, *names: str) -> None:
    for number, name in enumerate(names):
        order.wait(number, RECIPES[name])


def test_a_finished_beginning_goes_first_and_the_longest_of_them() -> None:
    order = _order({"a": [("dense", 100)], "b": [("other", 100)], "c": [("dense", 100)], "d": [("dense", 100), ("round", 200)]})
    _waits(order, "a")
    assert order.take(more=True) == 0, "nothing to wait for"
    order.wait(1, RECIPES["c"])
    assert order.take(more=True) is None, "trial 0 computes what it would read: another proposal is asked for"
    order.wait(2, RECIPES["b"])
    order.reached(0, 99)
    assert order.take(more=True) == 2, "which lets trial 1 wait"
    order.wait(3, RECIPES["d"])
    order.reached(0, 100)
    assert order.take(more=True) == 1, "both can begin at 100 samples, the older goes first"
    assert order.take(more=True) == 3 and order.take(more=True) is None


def test_nothing_waits_for_a_trial_that_ended_before_it_came_there() -> None:
    order = _order({"a": [("dense", 100)], "b": [("dense", 100)]})
    _waits(order, "a", "b")
    assert order.take(more=True) == 0
    order.reached(0, 50)
    assert order.take(more=True) is None
    order.ended(0)
    assert order.take(more=True) == 1


def test_it_runs_all_the_same_where_nothing_else_is_left() -> None:
    order = _order({"a": [("dense", 100)], "b": [("dense", 100)]})
    _waits(order, "a", "b")
    assert order.take(more=False) == 0 and order.take(more=False) == 1


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from("abcdef"), min_size=1, max_size=25), st.lists(st.integers(0, 300), min_size=80, max_size=80))
def test_all_run_once_and_none_is_overtaken_more_than_a_few_times(names: list[str], costs: list[int]) -> None:
    keys = {name: [(f"{index % 2}", 100 * (index + 1)) for index in range(place % 3)] for place, name in enumerate("abcdef")}
    order, begun, born = _order(keys), [], 0
    for cost in costs:
        while (number := order.take(more=born < len(names))) is None and born < len(names):
            order.wait(born, RECIPES[names[born]])
            born += 1
        if number is None:
            break
        begun.append(number)
        order.reached(begun[cost % len(begun)], cost)
        if cost % 3 == 0:
            order.ended(begun[cost % len(begun)])
    assert sorted(begun) == list(range(len(names)))
    for place, number in enumerate(begun):
        assert sum(other > number for other in begun[:place]) <= MOST_OVERTAKEN


def test_where_nothing_is_shared_nothing_is_proposed_ahead() -> None:
    order = _order({name: [] for name in RECIPES})
    for number, name in enumerate(RECIPES):
        order.wait(number, RECIPES[name])
        assert order.take(more=True) == number


@pytest.mark.usefixtures("no_finale")
def test_a_search_lets_trials_wait_for_a_beginning_that_is_being_computed(tmp_path: Path) -> None:
    space = {"paradigm": ["finetune", "at_init"], "criterion": ["magnitude", "random"], "allocator": ["erk"], "regularizer": ["none"]}
    begun: dict[bool, list[int]] = {True: [], False: []}
    found = {}
    for cache in begun:

        def noting(job: Any, begun: list[int] = begun[cache]) -> Any:
            begun.append(job.number)
            return curve(job)

        value = search(tmp_path, name=f"cache-{cache}", trials=12, space=space, scheduler="none", seed=2, cache=cache)
        found[cache] = outcome(start(value, workers=4, using=noting))
    assert found[True] == found[False], "the same trials with the same results"
    assert begun[False] == sorted(begun[False]) and begun[True] != begun[False] and sorted(begun[True]) == begun[False]
    late = [sum(other > number for other in begun[True][:place]) for place, number in enumerate(begun[True])]
    assert 0 < max(late) <= MOST_OVERTAKEN
