"""Laws of dynamic sparse training: what is dropped, what is grown, and that the count is kept."""

from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from toys import finish, ready

from distprune.core.budgets import budget
from distprune.core.executor import execute
from distprune.core.hooks.regrow import Regrow, RegrowByMomentum, RegrowByThreshold, adapted, shared_out
from distprune.core.masks import Masks
from distprune.core.schedules import cubic
from distprune.core.state import State
from distprune.errors import UserError

DYNAMIC: list[Any] = ["set", "rigl", "snfs", "dsr", "granet", {"name": "granet", "initial": 0.0}]
OPTIMIZERS = [{"name": "sgd", "lr": 0.05, "momentum": 0.9}, {"name": "adamw", "lr": 3e-3, "weight_decay": 0.1}]
each = pytest.mark.parametrize("paradigm", DYNAMIC, ids=str)
SPAN: dict[str, int] = {"begin": 1, "end_at": 100, "every": 1}
ENV: Any = SimpleNamespace(seed=0)


def by_hand(*layers: tuple[list[float], int]) -> State:
    """A state whose layers have these weights, of which the first few are kept."""
    model = nn.Sequential(*(nn.Linear(len(values), 1, bias=False) for values, _ in layers))
    weights = dict(model.named_parameters())
    masks = {}
    for (name, weight), (values, kept) in zip(weights.items(), layers, strict=True):
        weight.data = torch.tensor([values])
        masks[name] = torch.arange(len(values)).unsqueeze(0) < kept
    return State(model, weights, Masks(masks))


def give(state: State, *gradients: list[float]) -> None:
    """Set the dense gradients."""
    for weight, gradient in zip(state.weights.values(), gradients, strict=True):
        weight.grad = torch.tensor([gradient])


def update(hook: Regrow, state: State, memory: dict[str, Any] | None = None) -> list[list[int]]:
    """One step of the loop, without an optimizer; the kept indices of each layer."""
    if memory is None:
        hook.start(memory := {}, state, ENV)
    hook.grad(memory, state, ENV)
    state.clock += 1
    hook.step(memory, state, ENV)
    return [mask.flatten().nonzero().flatten().tolist() for mask in state.masks.values()]


def test_rigl_drops_the_smallest_and_grows_the_largest_gradient() -> None:
    state = by_hand(([4.0, -3.0, 2.0, 1.0, 0.0, 0.0, 0.0], 4))
    give(state, [9.0, 9.0, -9.0, 5.0, 1.0, -8.0, 7.0])
    # Half of four is two: 2.0 and 1.0 go; among the missing, -9.0 (just dropped) and -8.0 grow.
    assert update(Regrow(**SPAN, growth="gradient", share=0.5, decay="constant"), state) == [[0, 1, 2, 5]]
    assert state.weights["0.weight"].tolist() == [[4, -3, 2, 0, 0, 0, 0]], "what is grown anew is zero, what was dropped just now is kept"


def test_the_share_falls_along_a_cosine() -> None:
    values = [float(i) for i in range(20, 0, -1)]
    for clock, stay in ((0, 5), (49, 7), (99, 10)):  # half of ten, a quarter, none
        state = by_hand((values[:10] + [0.0] * 10, 10))
        state.clock = clock
        give(state, [0.0] * 10 + [1.0] * 10)
        (kept,) = update(Regrow(**SPAN, growth="gradient", share=0.5), state)
        assert [i for i in kept if i < 10] == list(range(stay)) and len(kept) == 10


def test_set_grows_at_random_from_its_own_stream() -> None:
    hook = Regrow(**SPAN, growth="random", share=0.3, decay="constant")

    def kept(clock: int = 0, lap: int = 0, seed: int = 0) -> list[int]:
        state = by_hand(([float(i) for i in range(10, 0, -1)] + [0.0] * 90, 10))
        state.clock, state.lap = clock, lap
        memory: dict[str, Any] = {}
        state.clock += 1
        hook.step(memory, state, SimpleNamespace(seed=seed))  # type: ignore[arg-type]
        assert not memory
        return state.masks["0.weight"].flatten().nonzero().flatten().tolist()

    assert kept() == kept() and kept()[:7] == list(range(7)) and len(kept()) == 10
    assert len({tuple(found) for found in (kept(), kept(clock=1), kept(lap=1), kept(seed=1))}) == 4


def test_snfs_shares_out_by_the_momentum_of_what_is_kept_and_grows_where_it_is_largest() -> None:
    state = by_hand(([4.0, 3.0, 2.0, 1.0, 0.0, 0.0], 4), ([1.0, 2.0, 3.0, 4.0, 0.0, 0.0, 0.0, 0.0], 4))
    give(state, [2.0, -1.0, 1.0, 0.0, 5.0, 6.0], [4.0, -4.0, 2.0, 2.0, 0.0, -7.0, 6.0, 5.0])
    hook = RegrowByMomentum(**SPAN, share=0.5, beta=0.9, decay="constant")
    # Two of each go, four in all; mean |m| of the kept is 1 to 3, so the layers grow 1 and 3.
    assert update(hook, state) == [[0, 1, 5], [2, 3, 5, 6, 7]]


def test_snfs_smooths_the_dense_gradient_until_the_last_update() -> None:
    state, memory = by_hand(([4.0, 3.0, 0.0], 2)), {}
    hook = RegrowByMomentum(begin=3, end_at=3, every=1, share=0.5, beta=0.75)
    hook.start(memory, state, ENV)
    give(state, [8.0, 0.0, 16.0])
    update(hook, state, memory)
    assert memory["0.weight"].tolist() == [[2, 0, 4]]
    give(state, [0.0, -4.0, 4.0])
    update(hook, state, memory)
    assert memory["0.weight"].tolist() == [[1.5, -1, 4]]
    state.weights["0.weight"].grad = None
    hook.grad(memory, state, ENV)
    assert memory["0.weight"].tolist() == [[1.125, -0.75, 3]], "no gradient is a gradient of zero"
    update(hook, state, memory)
    assert memory == {}, "it is as large as the network, so it goes when no update is left"
    update(hook, state, memory)


def test_snfs_and_dsr_never_empty_a_layer() -> None:
    tiny = ([0.1, 0.0, 0.0, 0.0], 1), ([5.0, 4.0, 3.0, 2.0] + [0.0] * 6, 4)
    for hook in (
        RegrowByMomentum(**SPAN, share=0.9, beta=0.0, decay="constant"),
        RegrowByThreshold(**SPAN, share=0.1, threshold=10.0),
    ):
        state = by_hand(*tiny)
        give(state, [0.0] * 4, [1.0] * 10)
        kept = update(hook, state)
        assert 0 in kept[0] and 0 in kept[1] and sum(map(len, kept)) == 5


def test_dsr_drops_below_a_threshold_and_grows_with_the_survivors() -> None:
    state = by_hand(([0.1, -0.2, 0.9, 1.0, 0.0, 0.0], 4), ([0.3, 2.0, -3.0, 4.0, 0.0, 0.0, 0.0, 0.0], 4))
    memory: dict[str, Any] = {}
    hook = RegrowByThreshold(**SPAN, share=0.1, threshold=0.5)
    hook.start(memory, state, ENV)
    kept = update(hook, state, memory)
    # Three are below 0.5. Of the survivors two are in the first layer and three in the second: 1.2 and 1.8, so 1 and 2 grow.
    assert {2, 3} <= set(kept[0]) and {1, 2, 3} <= set(kept[1]) and [len(layer) for layer in kept] == [3, 5]
    assert memory == {"threshold": 0.25}, "three of eight is more than the target of 0.8"


@pytest.mark.parametrize(("dropped", "threshold"), [(0, 2.0), (8, 2.0), (9, 1.0), (10, 1.0), (11, 1.0), (12, 0.5), (99, 0.5)])
def test_dsr_doubles_or_halves_its_threshold_outside_of_a_tenth(dropped: int, threshold: float) -> None:
    assert adapted(1.0, dropped, 10.0) == threshold


@pytest.mark.parametrize(
    ("count", "wishes", "room", "given_"),
    [
        (10, [1, 1, 2], [99, 99, 99], [3, 2, 5]),
        (10, [1, 1, 8], [10, 10, 4], [3, 3, 4]),
        (3, [0, 0], [2, 2], [2, 1]),
        (5, [1, 1e9], [5, 0], [5, 0]),
        (4, [1, 1], [2, 2], [2, 2]),
        (0, [1, 2], [3, 0], [0, 0]),
    ],
)
def test_sharing_out_by_hand(count: int, wishes: list[float], room: list[int], given_: list[int]) -> None:
    assert shared_out(count, wishes, room) == given_


@given(st.lists(st.tuples(st.floats(0, 1e6), st.integers(0, 1000)), min_size=1, max_size=8), st.floats(0, 1))
def test_sharing_out_is_exact_and_within_bounds(layers: list[tuple[float, int]], share: float) -> None:
    wishes, room = [wish for wish, _ in layers], [most for _, most in layers]
    count = int(share * sum(room))
    found = shared_out(count, wishes, room)
    assert sum(found) == count and all(0 <= got <= most for got, most in zip(found, room, strict=True))
    open_ = [i for i, got in enumerate(found) if got < room[i]]
    assert all(found[i] <= found[j] + 1 for i in open_ for j in open_ if wishes[i] <= wishes[j])


@each
@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda value: value["name"])
def test_what_is_grown_starts_at_zero_and_unremembered(paradigm: Any, optimizer: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    original, seen = Regrow.step, [0, 0]

    def watched(self: Regrow, memory: Any, state: State, env: Any) -> bool:
        before, counts = state.masks, state.masks.counts
        ends = original(self, memory, state, env)
        assert state.masks.kept == before.kept, "regrowing never changes the count"
        if not isinstance(self, RegrowByMomentum | RegrowByThreshold):
            assert state.masks.counts == counts, "nor that of a layer"
        for name, mask in state.masks.items():
            grown = mask & ~before[name]
            remembered = [row for row in state.memory[name].values() if isinstance(row, torch.Tensor) and row.shape == mask.shape]
            assert len(remembered) == (1 if optimizer["name"] == "sgd" else 2)
            for tensor in (state.weights[name], *remembered):
                assert not tensor[grown].any() and not tensor[~mask].any() and tensor[mask].any()
            seen[0] += int(grown.sum())
            seen[1] += int((state.weights[name][mask & before[name]] != 0).sum())
        return ends

    monkeypatch.setattr(Regrow, "step", watched)
    finish(ready(paradigm, train={"optimizer": optimizer}))
    assert all(seen)


@each
@pytest.mark.parametrize("sparsity", [0.5, 0.9, 0.985])
def test_the_budget_is_exact_no_layer_is_empty_and_masks_move(paradigm: Any, sparsity: float) -> None:
    run = ready({**({"name": paradigm} if isinstance(paradigm, str) else paradigm), "updates": 10}, sparsity, report_every="1it")
    total, seen = run.state.masks.total, []
    for report in execute(run.plan, run.state, run.env):
        masks = run.state.masks
        assert all(1 <= count <= masks[name].numel() for name, count in masks.counts.items()) and report.kept == masks.kept
        if not seen or not masks.equal(seen[-1]):
            seen.append(masks)
    assert masks.kept == budget(sparsity, total)
    assert len(seen) > 5
    assert any(not later.nested_in(earlier) for earlier, later in pairwise(seen)), "some came back"
    if "granet" not in str(paradigm):
        assert {mask.kept for mask in seen} == {masks.kept}
    counts = [masks.counts for masks in seen]
    if paradigm in ("set", "rigl"):
        assert all(row == counts[0] for row in counts)
    if paradigm in ("snfs", "dsr") and sparsity > 0.5:  # at 0.5 the small layers are full, and stay so
        assert any(row != counts[0] for row in counts), "weights wander between layers"


@pytest.mark.parametrize("initial", [0.0, 0.5])
def test_granet_follows_the_cubic_exactly_and_regenerates(initial: float) -> None:
    run = ready({"name": "granet", "initial": initial, "updates": 5}, sparsity=0.9, report_every="1it")
    total, pruned = run.state.masks.total, None
    for report in execute(run.plan, run.state, run.env):
        # Half of 40 steps are 20: an update after 4, 8, 12, 16 and 20.
        progress = min(report.clock // 4 * 4, 20) / 20
        assert report.kept == budget(cubic(initial, 0.9, progress), total)
        if report.clock == 20:
            pruned = run.state.masks
    assert pruned is not None and run.state.masks.equal(pruned), "after the end masks are fixed"


def test_granet_regenerates_what_it_pruned_by_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    original, back = Regrow.step, []

    def watched(self: Regrow, memory: Any, state: State, env: Any) -> bool:
        pruned = state.masks
        ends = original(self, memory, state, env)
        back.append(not state.masks.nested_in(pruned))
        return ends

    monkeypatch.setattr(Regrow, "step", watched)
    finish(ready({"name": "granet", "updates": 4}))
    assert [index for index, was in enumerate(back, 1) if was] == [5, 10, 15], "at every update but the last, where the share is zero"


@pytest.mark.parametrize("initial", [0.0, 0.5, 0.6])
def test_granet_ends_at_its_target_wherever_it_starts(initial: float) -> None:
    for sparsity in (0.3, 0.5):
        run = ready({"name": "granet", "initial": initial, "end": "100%", "updates": 1}, sparsity=sparsity)
        finish(run)
        assert run.state.masks.kept == budget(sparsity, run.state.masks.total)


@pytest.mark.parametrize(
    ("paradigm", "message"),
    [
        ({"name": "rigl", "share": 1.5}, r"paradigm.share must be in \(0, 1\), got 1.5"),
        ({"name": "set", "updates": 0}, "paradigm.updates must be at least 1, got 0"),
        ({"name": "snfs", "beta": 1.0}, r"paradigm.beta must be in \[0, 1\), got 1.0"),
        ({"name": "dsr", "threshold": 0.0}, "paradigm.threshold must be above 0, got 0.0"),
        ({"name": "granet", "initial": 1.0}, r"paradigm.initial must be in \[0, 1\), got 1.0"),
        ({"name": "granet", "end": "0%"}, "paradigm.begin < paradigm.end <= train.length must hold, got steps 0, 0, 40"),
    ],
)
def test_options_that_make_no_sense_are_refused(paradigm: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ready(paradigm)
