"""Costs by hand and by what torch holds, and budgets in FLOPs and memory: met from below, with no room for another unit."""

import copy
import functools
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn
from toys import PARADIGMS, finish, ready, recipe, same, tensors

from distprune.core import registry
from distprune.core.costs import Subject, counted, label, price, subject_of
from distprune.core.hooks.regrow import RegrowByMomentum
from distprune.core.hooks.updates import Gradual
from distprune.core.legality import check_plan
from distprune.core.masks import Masks, prunable
from distprune.core.metrics import Profile, profile
from distprune.core.models.resnet_cifar import resnet_cifar
from distprune.core.plan import Plan
from distprune.core.prune import shrink
from distprune.core.registry import Choice
from distprune.core.run import Run
from distprune.core.stages import Prune, Train
from distprune.core.units import CLOSE, Network, Units
from distprune.errors import UserError

FLOPS, MEMORY, PARAMS, LATENCY = (registry.cost.choose(name) for name in ("flops", "memory", "params", "latency"))


def _units(granularity: str, of: Choice = FLOPS, model: nn.Module | None = None) -> Units:
    units = copy.copy(_found(granularity, model or _resnet()))
    units.price = price(of, profile(units.model, torch.zeros(1, 1, 8, 8), prunable(units.model)))  # type: ignore[attr-defined]
    return units


@functools.cache
def _resnet() -> nn.Module:
    torch.manual_seed(0)
    return resnet_cifar((1, 8, 8), 10, depth=8, width=4)


@functools.cache
def _found(granularity: str, model: nn.Module) -> Units:
    units: Units = registry.granularity.choose(granularity)(Network(model, prunable(model), lambda: torch.zeros(1, 1, 8, 8)))
    units.model = model  # type: ignore[attr-defined]
    return units


def _scores(units: Units, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return units.reduce({name: torch.rand(shape, generator=generator) for name, shape in units.shapes.items()}, "mean")


def _fitting(units: Units, counts: dict[str, int], sparsity: float, room: dict[str, int]) -> list[str]:
    """Layers of which one more unit would fit into the budget."""
    return [
        name
        for name, most in room.items()
        if counts[name] < most and units.share({**counts, name: counts[name] + 1}) <= 1 - sparsity + CLOSE
    ]


def test_costs_are_shares_of_the_dense_network() -> None:
    dense = Profile({"a": (10, 10), "b": (6, 10)}, {"a": 1000, "b": 200}, {"a": 10, "b": 10}, {"a": 10, "b": 6})
    subject = Subject({"a": 10, "b": 30}, dense, dense)
    assert PARAMS(subject) == 40 / 160 and FLOPS(subject) == (100 + 100) / 1200
    # a: 13 bytes of bitmap and 10 values; b: 8 bytes and 30 values. Dense: 400 + 240. The larger layer reads and writes 20 numbers.
    assert MEMORY(subject) == (13 + 40 + 8 + 120 + 80) / (400 + 240 + 80)
    # Below one removed weight in 32 the bitmap does not pay.
    assert dense.memory({"a": 98, "b": 60}) == 400 + 240 + 80 and dense.memory({"a": 96, "b": 60}) == 13 + 384 + 240 + 80
    assert dense.memory({"a": 0, "b": 60}) == 240 + 64, "a layer of which nothing is kept is not run"
    assert dense.memory({"a": 30, "b": 18}, {"a": (3, 10), "b": (6, 3)}) == 120 + 72 + 4 * 13


def test_what_cannot_be_counted_is_none_and_no_budget() -> None:
    shapes = Profile({"a": (2, 2)})
    assert counted(Subject({"a": 2}, shapes, shapes)) == {"params": 0.5, "flops": None, "memory": None}
    with pytest.raises(UserError, match="sparsity_of 'flops' cannot be counted on this network. Write sparsity_of: params."):
        price(FLOPS, shapes).share({"a": 2}, {"a": (2, 2)})


class Mixed(nn.Module):
    """Depthwise, transposed and strided convolutions, batch norm, a layer that is used twice, a linear one."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 8, 3, padding=1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.norm = nn.BatchNorm2d(8)
        self.point = nn.Conv2d(8, 12, 1, stride=2)
        self.up = nn.ConvTranspose2d(12, 6, 2, stride=2)
        self.head = nn.Linear(6 * 64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.depthwise(self.first(x).relu())).relu()
        return self.head(self.up(self.point(x).relu()).relu().flatten(1))


@functools.cache
def _mixed() -> nn.Module:
    torch.manual_seed(0)
    return Mixed()


def _held(model: nn.Module, example: torch.Tensor) -> int:
    """Bytes of what `memory` is about, as torch holds it."""
    names, most = {id(weight) for weight in prunable(model).values()}, [0]

    def hear(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        most[0] = max(most[0], inputs[0].nbytes + output.nbytes)

    hooks = [m.register_forward_hook(hear) for m in model.modules() if id(getattr(m, "weight", None)) in names]
    with torch.inference_mode():
        model.eval()(example)
    for hook in hooks:
        hook.remove()
    return sum(weight.nbytes for weight in prunable(model).values()) + most[0]


@pytest.mark.parametrize("build", [lambda: _mixed(), _resnet], ids=["mixed", "resnet"])
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.7])
def test_memory_is_what_torch_holds_of_the_smaller_network(build: Any, sparsity: float) -> None:
    model, example = build(), torch.zeros(1, 1, 8, 8)
    units = _units("filter", MEMORY, model)
    masks = units.choose(_scores(units), sparsity, registry.allocator.choose("uniform"), None)
    small = shrink(model, masks, example)
    assert 1 - units.sparsity(masks) == pytest.approx(_held(small, example) / _held(model, example), rel=1e-12)


def test_flops_of_channels_are_those_of_the_smaller_network() -> None:
    model, example = _mixed(), torch.zeros(1, 1, 8, 8)
    units = _units("filter", FLOPS, model)
    masks = units.choose(_scores(units), 0.6, registry.allocator.choose("global"), None)
    small = shrink(model, masks, example)
    before, after = (sum(profile(net, example, prunable(net)).flops.values()) for net in (model, small))
    assert 1 - units.sparsity(masks) == pytest.approx(after / before, rel=1e-12) and after <= 0.4 * before


@pytest.mark.parametrize("of", [FLOPS, MEMORY], ids=label)
@pytest.mark.parametrize("granularity", ["weight", "kernel", "filter", "channel"])
@pytest.mark.parametrize("allocator", registry.allocator.names())
def test_a_budget_is_met_from_below_and_no_unit_more_fits(granularity: str, allocator: str, of: Choice) -> None:
    units = _units(granularity, of)
    needed = [name for name in ("shares", "keep") if name in registry.allocator.get(allocator).options]
    choice = registry.allocator.choose(allocator, **{name: {units.layers()[0].name: 0.5} for name in needed})
    whole = {layer.name: layer.units for layer in units.layers()}
    alive = None
    for step, sparsity in enumerate((0.3, 0.5)):
        scores = _scores(units, step)
        counts = units.counts(sparsity, choice, scores)
        assert units.share(counts) <= 1 - sparsity + CLOSE and not _fitting(units, counts, sparsity, whole)
        nested = units.choose(scores, sparsity, choice, alive)
        left = {name: int(kept.sum()) for name, kept in units.alive(nested).items()}
        room = whole if alive is None else {name: int(kept.sum()) for name, kept in units.alive(alive).items()}
        assert alive is None or nested.nested_in(alive)
        assert 1 - units.sparsity(nested) <= 1 - sparsity + CLOSE and not _fitting(units, left, sparsity, room)
        alive = nested


@pytest.mark.parametrize("of", [FLOPS, MEMORY], ids=label)
def test_the_units_of_a_network_at_one_density_are_its_flops(of: Choice) -> None:
    units = _units("weight", of)
    counts = units.counts(0.5, registry.allocator.choose("uniform"))
    densities = [counts[layer.name] / layer.units for layer in units.layers()]
    assert max(densities) - min(densities) < 0.03, "what the allocator leaves is less than a unit of the dearest layer"
    assert (sum(densities) / len(densities) == pytest.approx(0.5, abs=0.01)) is (of is FLOPS)


@pytest.mark.parametrize("of", [FLOPS, MEMORY], ids=label)
@pytest.mark.parametrize("granularity", ["weight", "filter", "layer"])
def test_the_largest_feasible_sparsity_is_named_and_is_feasible(granularity: str, of: Choice) -> None:
    units = _units(granularity, of)
    with pytest.raises(
        UserError, match=rf"got 0.99999 of the network's {of.name}. The largest feasible sparsity of {of.name} is"
    ) as caught:
        units.check(0.99999)
    assert "\n" not in str(caught.value)
    largest = float(str(caught.value).rstrip(".").split()[-1])
    allocator = registry.allocator.choose("global")
    assert units.sparsity(units.choose(_scores(units), largest, allocator, None)) >= largest - CLOSE
    with pytest.raises(UserError, match="largest feasible"):
        units.check(largest + 1e-5)


def test_blocks_are_removed_until_the_flops_are_saved() -> None:
    units = _units("layer")
    masks = units.choose(_scores(units), 0.4, registry.allocator.choose("global"), None)
    assert 0.4 <= units.sparsity(masks) < 1 and units.sparsity(masks) != masks.sparsity


def test_without_a_price_masks_are_what_they_were() -> None:
    units, erk = _units("weight", PARAMS), registry.allocator.choose("erk")
    whole = 1 - 500 / units.total  # a number of weights: elsewhere the budget is rounded, and a share is not
    priced = units.counts(whole, erk)
    units.price = None
    assert units.counts(whole, erk) == priced and sum(priced.values()) == 500, "the share of the weights is the budget in weights"


OBEYING = [name for name in PARADIGMS if "sparsity" in (facts := registry.paradigm.get(name).facts)["uses"] and not facts["moves"]]


def _nested(run: Run) -> bool:
    """Whether masks are reached in several steps, each of which can only remove."""
    prunes = [stage for stage in run.plan.stages if isinstance(stage, Prune)]
    hooks = [hook for stage in run.plan.stages if isinstance(stage, Train) for hook in stage.hooks]
    return len(prunes) > 1 or any(p.steps > 1 and p.nested for p in prunes) or any(isinstance(hook, Gradual) for hook in hooks)


@pytest.mark.parametrize("paradigm", OBEYING)
def test_every_paradigm_leaves_its_share_of_the_flops(paradigm: str) -> None:
    run = ready(paradigm, sparsity_of="flops", train={"length": "2ep"})
    finish(run)
    units = run.state.units(run.recipe.granularity, run.env.task.example)
    kept = {name: int(alive.sum()) for name, alive in units.alive(run.state.masks).items()}
    share, most = FLOPS(subject_of(run.state, run.recipe, run.env)), 1 - run.recipe.sparsity
    assert share == pytest.approx(units.share(kept)) and share <= most + CLOSE
    whole = {layer.name: layer.units for layer in units.layers()}
    dearest = max(units.share({**kept, name: kept[name] + 1}) - share for name in whole if kept[name] < whole[name])
    assert most - share < dearest + CLOSE, "within one unit"
    if not _nested(run):  # where masks can only lose units, those of cheap layers may be gone
        assert not _fitting(units, kept, run.recipe.sparsity, whole)
    weights = run.env.profile.total
    assert abs(run.state.sparsity - run.recipe.sparsity) * weights > 1, "FLOPs are not weights, and sparsity goes on counting these"


@pytest.mark.parametrize("granularity", ["weight", "filter"])
def test_a_share_of_the_memory(granularity: str) -> None:
    run = ready("finetune", sparsity=0.4, sparsity_of="memory", granularity=granularity, train={"length": "1ep"})
    finish(run)
    assert 0.5 < MEMORY(subject_of(run.state, run.recipe, run.env)) <= 0.6 + CLOSE


def test_a_run_in_flops_is_gone_on_with_the_same_bits(tmp_path: Any) -> None:
    whole, half, later = (ready("gradual", sparsity_of="flops") for _ in range(3))
    finish(whole)
    from distprune.core.executor import execute

    for report in execute(half.plan, half.state, half.env):
        if report.index == 1:
            half.state.save(tmp_path / "s", key=half.key)
            break
    later.state.load(tmp_path / "s")
    finish(later)
    assert same(tensors(whole), tensors(later))


def test_what_sparsity_is_of_is_part_of_the_key_where_it_is_not_the_default() -> None:
    plain, stated, flops = ready(), ready(sparsity_of="params"), ready(sparsity_of="flops")
    assert plain.key == stated.key != flops.key and len({plain.key, flops.key, ready(sparsity=0.8, sparsity_of="memory").key}) == 3


@pytest.mark.parametrize(
    ("paradigm", "changes", "message"),
    [
        ("at_init", {"sparsity_of": "latency"}, "'latency' is measured: masks would depend on noise, and a resumed run would not have"),
        ("dense", {"sparsity_of": "latency"}, "'latency' is measured"),
        ("at_init", {"sparsity_of": "energy"}, "Unknown cost 'energy'"),
        ("snfs", {"sparsity_of": "flops"}, "paradigm 'snfs' moves weights between layers while their number stays"),
        ("dsr", {"sparsity_of": "memory"}, "paradigm 'dsr' moves weights between layers .* a budget of 'memory'"),
        (
            "finetune",
            {"sparsity_of": "flops", "granularity": "n_m", "allocator": "uniform", "sparsity": 0.5},
            "granularity 'n_m' keeps a pattern of each layer's weights",
        ),
    ],
)
def test_what_cannot_obey_is_refused_in_one_line(paradigm: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        recipe(paradigm, **changes)
    assert "\n" not in str(caught.value)


def test_a_users_own_plan_is_held_to_it_too() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Mine(RegrowByMomentum):
        pass

    hook = Mine(begin=1, end_at=2, every=1, share=0.1, beta=0.9)
    plan = Plan([Train(config=None, until=3, hooks=(hook,))])
    assert check_plan(plan, "mine") is plan
    with pytest.raises(UserError, match="paradigm 'mine' moves weights between layers"):
        check_plan(plan, "mine", FLOPS)


def test_profile_counts_a_sample() -> None:
    model, example = Mixed(), torch.zeros(1, 1, 8, 8)
    found = profile(model, example, prunable(model))
    assert found.total == sum(weight.numel() for weight in prunable(model).values()) == Masks.ones(prunable(model)).total
    assert found.inputs == {"first.weight": 64, "depthwise.weight": 512, "point.weight": 512, "up.weight": 192, "head.weight": 384}
    assert found.outputs == {"first.weight": 512, "depthwise.weight": 512, "point.weight": 192, "up.weight": 384, "head.weight": 10}
    assert found.transposed == {"up.weight"}
