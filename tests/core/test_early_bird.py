"""Early-bird tickets end their search when masks have settled; lottery tickets start again from what is asked."""

from typing import Any

import pytest
import torch
from toys import finish, ready, recipe, same, tensors

from distprune.core.executor import execute
from distprune.core.hooks.early_bird import EarlyBird, distance
from distprune.core.hooks.slimming import Slimming
from distprune.core.masks import Masks
from distprune.core.stages import Prune, SetWeights, Snapshot, Train
from distprune.errors import UserError

# A rate at which no mask changes, and one at which no five masks agree to the last weight.
STILL: dict[str, Any] = {"name": "sgd", "lr": 1e-9, "weight_decay": 0.0}
MOVING: dict[str, Any] = {"name": "sgd", "lr": 0.2}


def _run(optimizer: dict[str, Any], **options: Any) -> Any:
    paradigm = {"name": "early_bird", "every": "2it", "until": "30it", **options}
    return ready(paradigm, train={"optimizer": optimizer, "length": "4ep"}, report_every="1it")


def _search_end(run: Any) -> tuple[int, list[Any]]:
    """The step at which the search ended, and all reports."""
    reports = finish(run)
    search = next(index for index, stage in enumerate(run.plan.stages) if isinstance(stage, Train))
    return max(report.clock for report in reports if report.lap == 0 and report.stage <= search + 1 and not report.sparsity), reports


def test_distance_by_hand() -> None:
    def masks(*kept: int) -> Masks:
        return Masks({"a": torch.tensor(kept[:3]), "b": torch.tensor(kept[3:])})

    assert distance(masks(1, 0, 1, 0, 1, 0), masks(1, 0, 1, 0, 1, 0)) == 0
    assert distance(masks(1, 0, 1, 0, 1, 0), masks(0, 1, 1, 0, 1, 0)) == 2 / 6, "half are kept: the share of all"
    assert distance(masks(1, 1, 1, 0, 0, 0), masks(0, 0, 0, 1, 1, 1)) == 1
    assert distance(masks(1, 0, 0, 0, 0, 0), masks(0, 0, 0, 0, 0, 1)) == 1, "all that two masks of one weight can differ"
    assert distance(masks(1, 1, 1, 1, 1, 0), masks(0, 1, 1, 1, 1, 1)) == 1
    assert distance(masks(1, 1, 1, 1, 1, 1), masks(1, 1, 1, 1, 1, 1)) == 0, "nothing is removed"


@pytest.mark.parametrize("window", [2, 5])
def test_ends_as_soon_as_there_are_enough_masks_if_they_agree(window: int) -> None:
    end, _ = _search_end(_run(STILL, window=window))
    assert end == 2 * window


def test_goes_on_to_the_most_if_they_do_not() -> None:
    end, reports = _search_end(_run(MOVING, near=0.0))
    run = _run(MOVING, near=0.0)
    assert end == 30 and reports[-1].cost == run.plan.cost


def test_settles_in_between_and_at_the_first_window_that_agrees() -> None:
    run = _run(MOVING, near=0.2, window=3)
    drawn: list[Masks] = []
    hook = next(hook for hook in run.plan.stages[1].hooks if isinstance(hook, EarlyBird))
    ends = None
    for report in execute(run.plan, run.state, run.env):
        if report.stage == 1 and report.clock % 2 == 0 and report.lap == 0:
            drawn.append(hook._draw(run.state, run.env))
        if report.lap == 0 and report.stage <= 2 and not report.sparsity:
            ends = report.clock
    near = [
        len(seen) == 3 and all(distance(seen[-1], mask) <= 0.2 for mask in seen)
        for seen in (drawn[max(i - 2, 0) : i + 1] for i in range(len(drawn)))
    ]
    if ends < 30:
        assert not any(near[:-1]), "no earlier window agreed"
    assert 6 <= ends <= 30


def test_the_mask_is_the_last_one_drawn_and_the_weights_are_those_of_the_start() -> None:
    run = _run(STILL)
    first = run.state.values()
    stages = run.plan.stages
    assert [type(stage) for stage in stages] == [Snapshot, Train, Prune, SetWeights, Train]
    assert stages[1].may_end_early and "at most until step 30 of 40" in stages[1].describe()
    for report in execute(run.plan, run.state, run.env):
        if report.stage == 2 and report.lap == 0:
            break
    hook = stages[1].hooks[-1]
    masks = hook._draw(run.state, run.env)
    for stage in stages[2:4]:
        list(stage.run(run.state, run.env))
    assert run.state.masks.equal(masks) and run.state.masks.sparsity == pytest.approx(0.9, abs=1e-3)
    assert all(torch.equal(run.state.values()[name], value * masks[name] if name in masks else value) for name, value in first.items())
    assert (stages[4].since, stages[4].until) == (0, 40)


def test_inherit_trains_on_to_the_end_of_the_schedule() -> None:
    run = _run(STILL, weights="inherit")
    assert [type(stage) for stage in run.plan.stages] == [Train, Prune, Train]
    reports = finish(run)
    assert reports[-1].clock == 40 and reports[-1].lap == 0
    assert reports[-1].cost == run.plan.cost == 40 * 32, "one training, wherever the search ends"


def test_the_bill_is_at_most_that_of_the_plan() -> None:
    run = _run(STILL)
    assert finish(run)[-1].cost == (10 + 40) * 32 < run.plan.cost == (30 + 40) * 32


def test_equal_cost_spends_what_an_early_end_leaves() -> None:
    paradigm = {"name": "early_bird", "every": "2it", "until": "50%"}
    run = ready(paradigm, equal_cost=True, train={"optimizer": STILL, "length": "8ep"})
    assert finish(run)[-1].cost == 80 * 32


@pytest.mark.parametrize("weights", ["rewind", "inherit"])
def test_goes_on_from_every_report(weights: str, tmp_path: Any) -> None:
    options: dict[str, Any] = {"weights": weights, "window": 3, "near": 0.1, "until": "20it"}
    run = _run(MOVING, **options)
    reports = []
    for report in execute(run.plan, run.state, run.env):
        reports.append(report)
        run.state.save(tmp_path / f"{report.index}.safetensors")
    for index in [*range(0, 24), len(reports) - 1]:
        again = _run(MOVING, **options)
        again.state.load(tmp_path / f"{index}.safetensors")
        assert finish(again) == reports[index + 1 :]
        assert same(tensors(again), tensors(run)) and again.state.ledger == run.state.ledger


def test_by_slimming_is_about_channels_and_penalises_their_scales() -> None:
    with pytest.raises(UserError, match="paradigm.by: slimming ranks channels, so granularity must be filter or channel, got 'weight'"):
        recipe({"name": "early_bird", "by": "slimming"}).plan(10)
    plan = recipe({"name": "early_bird", "by": "slimming"}, 0.5, granularity="filter", allocator="global").plan(10)
    search, prune = plan.stages[1], plan.stages[2]
    assert isinstance(search, Train) and [type(hook) for hook in search.hooks] == [Slimming, EarlyBird]
    assert isinstance(prune, Prune) and prune.criterion.name == "slimming"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": "0it"}, "paradigm.every must be at least one step, got 0"),
        ({"until": "50it"}, "paradigm.until must be from step 1 to 40 of a training of 40 steps, got step 50"),
        ({"until": "40it", "weights": "inherit"}, "paradigm.until must be from step 1 to 39"),
        ({"near": 2.0}, r"paradigm.near must be in \[0, 1\], got 2.0"),
        ({"window": 1}, "paradigm.window must be at least 2 masks, got 1"),
    ],
    ids=str,
)
def test_options_that_make_no_sense_say_why(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        recipe({"name": "early_bird", **options}).plan(10)


def _after_prune(weights: str) -> Any:
    """A lottery ticket's run after its last SetWeights, and what it was rewound to."""
    run = ready({"name": "lth", "share": 0.9, "rewind_to": "25%", "weights": weights})
    last = max(index for index, stage in enumerate(run.plan.stages) if isinstance(stage, SetWeights))
    for report in execute(run.plan, run.state, run.env):
        if report.stage == last - 1:
            break
    while run.state.stage <= last:
        list(run.plan.stages[run.state.stage].run(run.state, run.env))
        run.state.stage += 1
    return run


def test_lth_signs_have_one_size_a_layer() -> None:
    run = _after_prune("sign")
    for name, mask in run.state.masks.items():
        kept, snapshot = run.state.weights[name].detach()[mask], run.state.snapshots["rewind"][name]
        assert torch.equal(kept.sign(), snapshot[mask].sign()) and len(kept.abs().unique()) == 1
        torch.testing.assert_close(kept.abs()[0], snapshot.std(correction=0))


def test_lth_reinit_is_a_new_draw_trained_from_the_start() -> None:
    run = _after_prune("reinit")
    mask = run.state.masks["6.weight"]
    assert not torch.isclose(run.state.weights["6.weight"].detach()[mask], run.state.snapshots["rewind"]["6.weight"][mask]).any()
    trains = [stage for stage in run.plan.stages if isinstance(stage, Train)]
    assert [(stage.since, stage.until) for stage in trains] == [(None, 10), (None, 40), (0, 40)]


@pytest.mark.parametrize("weights", ["sign", "reinit"])
def test_lth_of_every_kind_keeps_its_bill(weights: str) -> None:
    run = ready({"name": "lth", "share": 0.7, "weights": weights})
    assert finish(run)[-1].cost == run.plan.cost
