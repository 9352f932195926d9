"""Measuring networks in turn, on a clock of the tests' own: nothing here depends on how long anything takes."""

from collections import Counter
from itertools import pairwise

import pytest
import torch
from torch import nn

from distprune.core.latency import ROUNDS, compare, measure, quartiles, shares


class Clock:
    """A clock that networks move on, and what was called."""

    def __init__(self) -> None:
        self.now = 0.0
        self.calls: list[str] = []
        self.load = 1.0  # how much slower the whole machine is

    def network(self, name: str, seconds: float) -> nn.Module:
        clock = self

        class Timed(nn.Module):
            def forward(self, inputs: torch.Tensor) -> torch.Tensor:
                clock.now += seconds * clock.load
                clock.calls.append(name)
                return inputs

        return Timed()


def test_seconds_of_a_pass_by_network_and_round() -> None:
    clock = Clock()
    networks = {name: clock.network(name, seconds) for name, seconds in (("a", 0.25), ("b", 0.5), ("c", 0.125))}
    heard: list[int] = []
    took = measure(networks, torch.zeros(1), rounds=6, block_s=1.0, clock=lambda: clock.now, tell=heard.append)
    assert took == {"a": [0.25] * 6, "b": [0.5] * 6, "c": [0.125] * 6} and heard == [1, 2, 3, 4, 5, 6]
    warm_up = 3 * 3 + 1  # and one of the first, that says how many passes a block has
    counts = Counter(clock.calls[warm_up:])
    assert counts == dict.fromkeys("abc", 6 * 4), "as many passes of each as take the first network a block"


def test_networks_take_turns_in_changing_order() -> None:
    """Over two rounds for each network, each has each place equally often, and each pair of neighbours has both orders equally often."""
    clock = Clock()
    names = "abcd"
    rounds = 2 * len(names)
    measure({name: clock.network(name, 1.0) for name in names}, torch.zeros(1), rounds=rounds, block_s=1.0, clock=lambda: clock.now)
    calls = clock.calls[-len(names) * rounds :]
    turns = [calls[start : start + len(names)] for start in range(0, len(calls), len(names))]
    assert all(sorted(turn) == list(names) for turn in turns)
    for place in range(len(names)):
        assert Counter(turn[place] for turn in turns) == dict.fromkeys(names, 2)
    orders = Counter(pair for turn in turns for pair in pairwise(turn))
    assert all(orders[a, b] == orders[b, a] for a, b in orders)


def test_a_machine_that_becomes_slower_slows_all_alike() -> None:
    """Shares are taken within rounds, so that load which changes between them leaves no trace; medians of seconds would show it."""
    clock = Clock()
    networks = {"dense": clock.network("dense", 1.0), "small": clock.network("small", 0.5)}

    def busier(done: int) -> None:
        clock.load = 1.0 + done

    took = measure(networks, torch.zeros(1), rounds=9, clock=lambda: clock.now, tell=busier)
    assert shares(took["small"], took["dense"]) == [0.5] * 9 and took["dense"] == [float(turn) for turn in range(1, 10)]
    clock.load = 1.0
    assert compare(*networks.values(), torch.zeros(1), spread=0.0, attempts=1, clock=lambda: clock.now) == 0.5


@pytest.mark.parametrize(("low", "high", "found"), [(0.5, 0.5, 0.5), (0.4, 0.6, None)])
def test_a_ratio_is_given_only_where_its_spread_allows(low: float, high: float, found: float | None) -> None:
    clock = Clock()
    dense, quick, slow = clock.network("dense", 1.0), clock.network("small", low), clock.network("small", high)
    passes = iter(range(10**6))

    def small(inputs: torch.Tensor) -> torch.Tensor:
        return (quick if next(passes) % 2 else slow)(inputs)

    assert compare(dense, small, torch.zeros(1), spread=0.1, attempts=3, clock=lambda: clock.now) == found
    assert clock.calls.count("dense") == 3 + 1 + (1 if found else 3) * ROUNDS


def test_modes_are_as_before_and_networks_may_be_any_functions() -> None:
    model = nn.Sequential(nn.Dropout(), nn.Sequential(nn.Dropout()).eval())
    seen: list[bool] = []

    def function(inputs: torch.Tensor) -> torch.Tensor:
        seen.append(torch.is_inference_mode_enabled())
        assert not any(module.training for module in model.modules())
        return inputs

    measure({"module": model, "function": function}, torch.ones(3), rounds=1)
    assert [module.training for module in model.modules()] == [True, True, False, False] and all(seen)
    with pytest.raises(RuntimeError, match="broken"):
        measure({"module": model, "broken": _broken}, torch.ones(3), rounds=1)
    assert [module.training for module in model.modules()] == [True, True, False, False]


def _broken(inputs: torch.Tensor) -> torch.Tensor:
    raise RuntimeError("broken")


def test_quartiles_by_hand() -> None:
    assert quartiles([4.0, 1.0, 3.0, 2.0, 5.0, 7.0, 6.0]) == (2.0, 4.0, 6.0)
