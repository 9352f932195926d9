"""Positions: a state that is taken up at one goes on as if it had come there itself, in its own plan and in others."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from toys import PARADIGMS, finish, ready, recipe, same, tensors

from distprune.core import prefix
from distprune.core.executor import Report, execute, walk
from distprune.core.keys import keys
from distprune.core.plan import Plan
from distprune.core.prefix import Prefixes, shared_keys
from distprune.core.registry import WEIGHT
from distprune.core.run import Run, root_key
from distprune.core.stages import Prune, SetWeights, Snapshot, Train

EVERY = 10  # an epoch of the toys


def _prefixes(run: Run, plan: Plan | None = None) -> Prefixes:
    return Prefixes("root", plan or run.plan, run.env.report_every)


def _visited(run: Run, folder: Path) -> tuple[list[Report], dict[str, int]]:
    """Run to the end, saving the state at every position: the reports, and key -> reports before it."""
    prefixes, reports, saved = _prefixes(run), [], {}
    for report in walk(run.plan, run.state, run.env):
        position = prefixes.at(run.state)
        if position is not None and (key := prefixes.key(position)) not in saved:
            saved[key] = len(reports)
            prefix.save(folder / key, run.state, key, [{"cost": made.cost} for made in reports])
        if report is not None:
            reports.append(report)
    return reports, saved


@pytest.mark.parametrize("paradigm", PARADIGMS)
def test_a_run_goes_on_from_every_position_of_its_plan(paradigm: str, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"regularizer": "l2", "train": {"length": "2ep"}, "report_every": "7it"}
    whole = ready(paradigm, **changes)
    reports, saved = _visited(whole, tmp_path)
    prefixes = _prefixes(whole)
    at_ends = [position for position in prefixes.positions if prefixes.key(position) in saved]
    assert at_ends, "every plan has a position"
    for position in {at_ends[len(at_ends) // 2], at_ends[-1]}:
        key = prefixes.key(position)
        again = ready(paradigm, **changes)
        before = prefix.reports_of(tmp_path / key, key, position)
        root = again.state.values()
        needs = prefixes.needs(position)
        found = {tag: root if need.key == prefixes.root else None for tag, need in needs.items()}
        for tag, need in needs.items():
            if found[tag] is None:
                assert need.found
                found[tag] = prefix.values_of(tmp_path / need.key, torch.device("cpu"))
        prefix.load(tmp_path / key, again.state, position, found)  # type: ignore[arg-type]
        rest = [report for report in walk(again.plan, again.state, again.env, arriving=True) if report is not None]
        assert len(before) == saved[key] and rest == reports[len(before) :]
        assert same(tensors(again), tensors(whole)) and again.state.ledger == whole.state.ledger
        if position.exact and position.reports and rest:
            assert position.most == rest[0].cost, "what a position costs is known beforehand"


def test_the_file_of_a_position_holds_nothing_of_its_plan(tmp_path: Path) -> None:
    """Two plans come to the same content: one takes snapshots and has observers, the other has not."""
    whole = ready("dense").plan.stages[0]
    assert isinstance(whole, Train)
    files = []
    for name, stages in {"a": [whole], "b": [replace(whole, until=7), Snapshot(tag="s"), whole]}.items():
        run = ready("dense")
        plan = Plan(stages)
        prefixes, count = _prefixes(run, plan), 0
        run.state.ledger.observing = 100 * len(stages)
        for report in walk(plan, run.state, run.env):
            position = prefixes.at(run.state)
            if position is not None and run.state.clock == 20 and run.state.entered:
                prefix.save(tmp_path / name, run.state, prefixes.key(position), [{"count": count}])
                break
            count += report is not None
        assert run.state.ledger.observing == 100 * len(stages) and len(run.state.snapshots) == len(stages) // 2
        files.append(safe_open(str(tmp_path / name), "pt"))
    assert files[0].metadata() == files[1].metadata(), "safetensors writes its two entries in any order"
    assert same(*(load_file(tmp_path / name) for name in "ab"))


@pytest.mark.parametrize("hook", ["none", "growing_l2"])
@pytest.mark.parametrize("cut", [7, 10, 13, 20, 39])
def test_reports_are_those_of_the_trajectory_wherever_it_is_split(cut: int, hook: str) -> None:
    one, two = ready("gradual", regularizer=hook), ready("gradual", regularizer=hook)
    (whole,) = one.plan.stages
    assert isinstance(whole, Train)
    split = Plan([replace(whole, until=cut), Snapshot(tag="s"), whole])
    expected = list(execute(one.plan, one.state, one.env))
    found = list(execute(split, two.state, two.env))
    assert [replace(report, stage=0) for report in found] == [replace(report, stage=0) for report in expected]
    assert same(tensors(one), tensors(two))


def test_a_plan_of_two_parts_shares_all_positions_of_the_whole() -> None:
    run = ready("dense")
    (whole,) = run.plan.stages
    assert isinstance(whole, Train)
    one = _prefixes(run)
    split = _prefixes(run, Plan([replace(whole, until=7), Snapshot(tag="s"), whole]))
    assert {one.key(position) for position in one.positions} < {split.key(position) for position in split.positions}
    assert one.key(one.positions[-1]) == keys(one.root, run.plan)[-1] and [p.clock for p in one.positions] == [10, 20, 30, 40]


def test_a_shorter_training_is_a_position_of_a_longer_one_and_another_schedule_is_none() -> None:
    run = ready("dense")
    (whole,) = run.plan.stages
    assert isinstance(whole, Train)
    half, other = replace(whole, until=20), replace(whole, config=replace(whole.config, length=41))
    long, short, stretched = (
        {p.key(position) for position in p.positions} for p in (_prefixes(run, Plan([stage])) for stage in (whole, half, other))
    )
    assert short < long and len(short) == 2 and not long & stretched, "the rate is a function of the whole length"


def test_what_reports_depend_on_is_in_the_key() -> None:
    run = ready("dense")
    often = Prefixes("root", run.plan, 5)
    assert often.positions[1].clock == 10 and _prefixes(run).positions[0].clock == 10
    assert often.key(often.positions[1]) != _prefixes(run).key(_prefixes(run).positions[0])


def test_rewinding_to_0_and_to_a_step_never_meet_after_the_first_round() -> None:
    zero, late = (_prefixes(ready({"name": "lth", "share": 0.5, "rewind_to": step}, sparsity=0.75)) for step in ("0%", "10%"))
    first = {p.stage: zero.key(p) for p in zero.positions}
    shared = {zero.key(p) for p in zero.positions} & {late.key(p) for p in late.positions}
    prune = next(i for i, stage in enumerate(zero.plan.stages) if isinstance(stage, Prune))
    assert shared == {zero.key(p) for p in zero.positions if p.stage <= prune + 1}, (
        "the dense training and the first masks, no rewound state"
    )
    assert first


def test_what_a_hook_may_end_has_no_middle_and_what_ends_at_a_bill_has_no_position() -> None:
    run = ready({"name": "early_bird", "every": "2it", "near": 1.0}, equal_cost=True, train={"length": "10ep"})
    positions = _prefixes(run).positions
    stages = run.plan.stages
    watched = next(i for i, stage in enumerate(stages) if isinstance(stage, Train) and stage.may_end_early)
    billed = next(i for i, stage in enumerate(stages) if isinstance(stage, Train) and stage.spend is not None)
    assert [(p.stage, p.clock) for p in positions if p.stage == watched + 1][:1] == [(watched + 1, None)]
    assert not any(p.clock is not None and p.stage in (watched, billed) for p in positions)
    assert not any(p.exact for p in positions)


def test_a_training_that_may_have_ended_is_not_gone_on_with() -> None:
    run = ready({"name": "early_bird", "every": "2it", "near": 1.0})
    watch = next(stage for stage in run.plan.stages if isinstance(stage, Train) and stage.may_end_early)
    assert not Plan([watch, replace(watch, until=watch.until + 5)]).is_continued(0)


def test_needs_are_what_is_read_later_and_whether_its_position_holds_it() -> None:
    run = ready("dense", regularizer="l2")
    (whole,) = run.plan.stages
    assert isinstance(whole, Train) and whole.hooks
    prune = Prune(sparsity=0.5, criterion=recipe().criterion, allocator=recipe().allocator, granularity=WEIGHT)
    rewind, again = SetWeights(policy="rewind", tag="s"), replace(whole, since=0)
    continued = _prefixes(run, Plan([replace(whole, until=10), Snapshot(tag="s"), whole, prune, rewind, again]))
    left = _prefixes(run, Plan([replace(whole, until=10), Snapshot(tag="s"), prune, rewind, again]))
    bare = replace(whole, hooks=())
    plain = _prefixes(run, Plan([replace(bare, until=10), Snapshot(tag="s"), prune, rewind, replace(bare, since=0)]))

    def needs(prefixes: Prefixes, kind: type) -> list[tuple[str, bool]]:
        stages = prefixes.plan.stages
        at = next(p for p in prefixes.positions if p.clock is None and isinstance(stages[p.stage - 1], kind))
        return [(need.key == prefixes.key(prefixes.positions[0]), need.found) for need in prefixes.needs(at).values()]

    assert needs(continued, Prune) == [(True, True)], "the training goes on, so its state is the one that was remembered"
    assert needs(left, Prune) == [(True, False)], "its hooks may change weights at its end, after its position"
    assert needs(plain, Prune) == [(True, True)]
    assert needs(continued, SetWeights) == [], "read for the last time"
    assert continued.needs(continued.positions[0]) == {}, "not yet written"


def test_stops_are_rungs_and_ends_and_no_shorter_than_worth_it() -> None:
    lth = _prefixes(ready({"name": "lth", "share": 0.5, "rewind_to": "10%"}, sparsity=0.75))
    dense = _prefixes(ready("dense"))
    stops = [(p.stage, p.clock) for p in lth.stops([320, 960], 320)]
    assert stops[:4] == [(0, 4), (2, 10), (2, 30), (2, 40)], "the snapshot, two rungs and the end of the dense training"
    assert {dense.key(p) for p in dense.stops([320, 960], 320)} < {lth.key(p) for p in lth.stops([320, 960], 320)}
    assert [(p.stage, p.clock) for p in dense.stops([320, 640, 960], 1000)] == [(0, 40)]
    rewound = _prefixes(ready({"name": "lth", "share": 0.5}, sparsity=0.75))
    first = rewound.stops([320, 960], 320)[0]
    assert (first.stage, first.clock) == (1, 10), "the start needs no keeping"


@pytest.mark.parametrize("paradigm", PARADIGMS)
def test_shared_keys_are_those_of_the_run_and_need_no_network(paradigm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run = ready(paradigm)
    prefixes = Prefixes(root_key(run.recipe, run.env.device), run.plan, run.env.report_every)
    expected = [(prefixes.key(position), position.most) for position in prefixes.stops([640, 1920], 320)]
    monkeypatch.setattr("distprune.core.run.build_model", None)
    found = shared_keys(run.recipe, EVERY, device="cpu", threads=1, report_every="1ep", rungs=[640, 1920])
    assert found == expected and len(set(found)) == len(found)
    assert not set(found) & set(shared_keys(run.recipe, EVERY, device="cpu", threads=2, report_every="1ep", rungs=[640, 1920]))


def test_two_targets_share_their_first_keys() -> None:
    a, b = (
        shared_keys(recipe({"name": "lth", "share": 0.5}, sparsity), EVERY, device="cpu", threads=1, report_every="1ep")
        for sparsity in (0.9, 0.8)
    )
    assert a[:3] == b[:3] and a[3] != b[3], "dense, and the rounds at 0.5 and 0.75"


def test_finishing_is_walking_without_the_pauses() -> None:
    assert finish(ready("lth")) == [report for report in _walked(ready("lth")) if report is not None]


def _walked(run: Run) -> list[Report | None]:
    return list(walk(run.plan, run.state, run.env))
