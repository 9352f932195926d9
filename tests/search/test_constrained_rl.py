"""Budgets in a search: derived sparsities, a policy in the driver that a resume gives back, and nothing over the budget at the end."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from searches import TOTAL, curve, outcome, resume, search, start, trials
from torch import nn
from toys import BASE, network, recipe

from distprune.core import registry
from distprune.core.allocators.constrained_rl import count
from distprune.core.budgets import allocate, layers_of
from distprune.core.executor import execute
from distprune.core.latency import compare
from distprune.core.recipe import Recipe
from distprune.core.run import prepare
from distprune.errors import UserError
from distprune.result import Result
from distprune.search import driver
from distprune.search.config import Search
from distprune.search.rungs import Rungs
from distprune.search.setup import set_up
from distprune.search.simulate import Curve
from distprune.search.trial import Job, run_trial
from distprune.store.folder import RunFolder

MIXED = {
    "paradigm": ["finetune", "at_init"],
    "criterion": ["magnitude", "snip"],
    "allocator": ["global", "erk", "per_layer", "constrained_rl"],
}
SAMPLER = {"name": "constrained_rl", "batch": 4}
BUDGET = {"cost": "params", "most": 0.1}


def budgeted(storage: Path, **changes: Any) -> Search:
    """A search of mixed allocators under a tenth of the parameters."""
    value = {"space": {**MIXED, "sparsity": [0.85, 0.95]}, "sampler": SAMPLER, "budget": BUDGET, "scheduler": "none"}
    return search(storage, **{**value, **changes})


def costed(job: Job) -> Iterator[dict[str, Any]]:
    """The made-up curve, with what a worker says of costs at its end; networks that keep more of the last layer are better."""
    for row in curve(job):
        if row["final"]:
            keep = job.recipe["allocator"].get("keep", {}) if isinstance(job.recipe["allocator"], dict) else {}
            better = {"objective": row["objective"] + 0.1 * keep.get("8.weight", 0.0)}
            row = {**row, **better, "extra": json.dumps({"costs": {"params": row["kept"] / TOTAL}})}
        yield row


def learns(trial: Any) -> bool:
    return any(name.startswith("constrained_rl/keep/") for name in trial.params)


@pytest.mark.parametrize("of", ["params", "flops", "memory"])
@pytest.mark.parametrize("granularity", ["weight", "kernel", "filter"])
def test_the_derived_sparsity_gives_the_counts_that_were_proposed(granularity: str, of: str, tmp_path: Path) -> None:
    import optuna

    value = {"paradigm": ["at_init"], "criterion": ["magnitude"], "allocator": ["constrained_rl"], "granularity": granularity}
    value |= {"sparsity": [0.3, 0.5]}
    space = set_up(budgeted(tmp_path, space=value, recipe={**BASE, "sparsity_of": of}, budget={"cost": "params", "most": 0.3})).space
    run = prepare(recipe(sparsity=0.5, sparsity_of=of))
    units = run.state.units(registry.granularity.choose(granularity), run.env.task.example)
    scores = units.reduce({name: weight.detach().abs() for name, weight in run.state.weights.items()}, "mean")
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    for _ in range(20):
        found = space.build(study.ask())
        masks = units.choose(scores, found.sparsity, found.allocator, None)
        keep = found.allocator.option("keep")
        proposed = {layer.name: count(keep[layer.name], layer) for layer in units.layers()}
        assert masks.equal(units.expand(units.alive(masks)))
        kept = {name: int(alive.sum()) for name, alive in units.alive(masks).items()}
        if of == "memory":  # units that take no memory are kept besides: of a layer that is stored dense, and where another sets the most
            assert all(kept[name] >= proposed[name] for name in kept)
            assert units.share(kept) == pytest.approx(units.share(proposed), abs=1e-9)
        else:
            assert kept == proposed and masks.kept == units.weights(proposed)


def test_on_the_way_to_its_sparsity_the_ratios_are_proportions() -> None:
    layers = layers_of({"a": (100,), "b": (10, 30)})
    choice = registry.allocator.choose("constrained_rl", keep={"a": 0.105, "b": 0.1})
    assert allocate(choice, layers, 41) == {"a": 11, "b": 30}, "halves are rounded up, and the counts are kept as they are"
    assert allocate(choice, layers, 82) == allocate(registry.allocator.choose("per_layer", shares={"a": 0.105, "b": 0.1}), layers, 82)
    with pytest.raises(UserError, match="Unknown layer in allocator.keep: 'c'. .*Known: a, b"):
        allocate(registry.allocator.choose("constrained_rl", keep={"c": 1.0}), layers, 41)


def test_ratios_of_layers_that_are_not_there_are_refused_before_anything_is_trained(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="Unknown layer in allocator.keep: 'c'"):
        prepare(recipe(allocator={"name": "constrained_rl", "keep": {"c": 0.1}}))
    space = {**MIXED, "allocator": ["constrained_rl", {"name": "per_layer", "shares": {"c": 0.1}}]}
    with pytest.raises(UserError, match="Unknown layer in allocator.shares: 'c'"):
        start(budgeted(tmp_path, space=space))


def test_a_mixed_search_ends_on_the_budget_and_hands_out_nothing_above_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    handed_out: list[dict[int, Any]] = []
    monkeypatch.setattr(driver, "finalize", lambda folder, book: handed_out.append(book.front))
    folder = start(budgeted(tmp_path, trials=24), workers=2, using=costed)
    rows = trials(folder)
    used = {Recipe.read(trial.user_attrs["recipe"]).allocator.name for trial in rows}
    assert used == {"global", "erk", "per_layer", "constrained_rl"}, "the base sampler chooses among the allocators"
    for trial in rows:
        assert trial.constraints["budget"] == pytest.approx(trial.values[1] / 0.1 - 1)
    assert any(trial.constraints["budget"] > 0 for trial in rows)
    last = rows[-1]
    assert learns(last) and last.user_attrs["spared"] and 0.98 * 0.1 <= last.values[1] <= 0.1
    best = max((t for t in rows[:-1] if learns(t)), key=lambda t: (t.constraints["budget"] <= 0, t.values[0]))
    others = {name: value for name, value in last.params.items() if "/keep/" not in name}
    assert others == {name: value for name, value in best.params.items() if "/keep/" not in name}, "the choices of the best episode"
    (front,) = handed_out
    within = [trial for trial in rows if trial.values[1] <= 0.1]
    assert front and all(-vector[1] <= 0.1 for vector in front.values())
    assert max(vector[0] for vector in front.values()) == max(trial.values[0] for trial in within)


def _stops_after(number: int) -> Curve:
    def dying(job: Job) -> Iterator[dict[str, Any]]:
        if job.number == number:
            raise KeyboardInterrupt
        yield from costed(job)

    return dying


@pytest.mark.usefixtures("no_finale")
@pytest.mark.parametrize("number", [3, 9, 14])
def test_a_killed_search_goes_on_with_the_same_policy(number: int, tmp_path: Path) -> None:
    space = {**MIXED, "allocator": ["constrained_rl"]}
    whole = start(budgeted(tmp_path / "whole", trials=16, space=space), workers=1, using=costed)
    value = budgeted(tmp_path / "killed", trials=16, space=space)
    with pytest.raises(KeyboardInterrupt):
        start(value, workers=1, using=_stops_after(number))
    assert outcome(resume(value.folder, workers=1, using=costed)) == outcome(whole)
    versions = [json.loads(t.system_attrs["distprune:episode"])["version"] for t in trials(whole)[:-1]]
    assert versions == [at // 4 for at in range(15)], "the policy changes with every batch of four"


@pytest.mark.usefixtures("no_finale")
def test_the_policy_is_taught_in_the_order_of_the_ends_and_not_of_the_births(tmp_path: Path) -> None:
    value = budgeted(tmp_path, trials=13, space={**MIXED, "allocator": ["constrained_rl"]})
    folder = start(value, workers=3, using=costed)
    turns = [trial.user_attrs["end"]["turn"] for trial in trials(folder)]
    assert sorted(turns) == list(range(1, 14))
    resume(folder.path, workers=1, using=costed, trials=20)
    resume(folder.path, workers=1, using=costed, trials=20)
    ended = trials(folder)
    assert len(ended) == 20 and [t.user_attrs["end"]["turn"] for t in ended[13:]] == list(range(14, 21))
    paradigms = len(MIXED["paradigm"])
    ends = [trial.number for trial in ended if trial.user_attrs.get("spared") and trial.number >= paradigms]
    assert ends == [12, 19], "a search that is extended ends again"


@pytest.mark.usefixtures("no_finale")
def test_the_end_of_the_policy_is_not_stopped_at_a_rung(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Rungs, "goes_on", lambda self, number, rung, vector: number not in (5, 7, 11))
    folder = start(budgeted(tmp_path, trials=12, scheduler="pareto_halving"), workers=1, using=costed)
    ends = [trial.user_attrs["end"]["ended"] for trial in trials(folder)]
    assert ends[5] == ends[7] == "stopped" and ends[11] == "finished" and trials(folder)[11].user_attrs["spared"]
    before = outcome(folder)
    resume(folder.path, workers=1, using=costed)
    assert outcome(folder) == before


@pytest.mark.usefixtures("no_finale")
def test_a_trial_whose_cost_is_not_known_is_told_so_and_stays_off_the_front(tmp_path: Path) -> None:
    folder = start(budgeted(tmp_path, trials=8, budget={"cost": "flops", "most": 0.1}), workers=1)
    assert all(trial.constraints["unmeasured"] == 1 for trial in trials(folder))
    assert not any(row["pareto"] for row in Result(folder.path).trials.to_pylist())


@pytest.mark.parametrize("sampler", ["tpe", "random", "nsga2"])
@pytest.mark.usefixtures("no_finale")
def test_other_samplers_draw_the_ratios_one_by_one(sampler: str, tmp_path: Path) -> None:
    rows = trials(start(budgeted(tmp_path, trials=14, sampler=sampler), workers=1, using=costed))
    assert any(map(learns, rows)) and not rows[-1].user_attrs.get("spared")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"budget": None}, "space.allocator constrained_rl: it sets the sparsity itself, so the search needs a budget"),
        ({"budget": None, "space": {"paradigm": ["dense"]}}, "sampler 'constrained_rl' keeps to a budget, and the search has none"),
        ({"space": {**MIXED, "allocator": ["erk"]}}, "sampler 'constrained_rl' proposes the ratios of allocator 'constrained_rl'"),
        ({"space": {**MIXED, "granularity": ["weight", "filter"]}}, "are of the layers of one granularity, .* has weight, filter"),
        ({"budget": {"cost": "params", "most": 1.5}}, r"search.budget.most must be a share of the dense cost in \(0, 1\), got 1.5"),
        ({"budget": {"cost": "params", "most": 0.0005}}, "budget.most must be at least 0.00.*, got 0.0005. Raise it"),
        ({"budget": {"cost": "energy", "most": 0.5}}, "Unknown cost 'energy'"),
        ({"budget": {"cost": "latency", "most": 0.5}}, "is measured on a network that is really smaller"),
        ({"sampler": {"name": "constrained_rl", "batch": 1}}, "sampler.batch must be at least 2"),
        (
            {
                "budget": {"cost": "latency", "most": 0.5},
                "space": {**MIXED, "granularity": "filter"},
                "sampler": {"name": "constrained_rl", "wall": True},
            },
            "sampler.wall needs a cost that is known beforehand, got 'latency'",
        ),
    ],
)
def test_mistakes_are_one_line(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message) as caught:
        start(budgeted(tmp_path, trials=2, **changes))
    assert "\n" not in str(caught.value) and not (tmp_path / "s").exists()


def test_a_space_without_a_budget_leaves_the_allocator_out_and_says_why(tmp_path: Path) -> None:
    space = set_up(search(tmp_path, space={"paradigm": ["finetune"], "criterion": ["magnitude"]})).space
    assert "constrained_rl" not in [candidate.label for candidate in space.axes["allocator"]]
    assert any(line.startswith("allocator constrained_rl: it sets the sparsity itself") for line in space.excluded)


class Timed(nn.Module):
    """Takes as long as it says, on a clock of its own."""

    now = 0.0

    def __init__(self, *takes: float) -> None:
        super().__init__()
        self._takes, self._passes = takes, 0

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        Timed.now += self._takes[self._passes % len(self._takes)]
        self._passes += 1
        return inputs


def test_latency_is_a_ratio_that_a_slow_machine_does_not_change_and_a_restless_one_does_not_give() -> None:
    def compared(dense: nn.Module, small: nn.Module) -> float | None:
        return compare(dense, small, torch.zeros(1), spread=0.1, attempts=2, clock=lambda: Timed.now)

    assert compared(Timed(2.0), Timed(0.5)) == pytest.approx(0.25)
    assert compared(Timed(2.0), Timed(0.1, 0.9, 0.5)) is None
    dense = network((1, 8, 8), 10).train()
    compare(dense, network((1, 8, 8), 10, hidden=4), torch.zeros(1, 1, 8, 8), spread=0.0, attempts=1)
    assert dense.training


def test_a_trial_reports_its_costs_and_measures_the_network_that_is_really_smaller(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, int, torch.Size]] = []

    def measured(dense: nn.Module, small: nn.Module, inputs: torch.Tensor, **options: Any) -> float:
        seen.append((sum(p.numel() for p in dense.parameters()), sum(p.numel() for p in small.parameters()), inputs.shape))
        small(inputs)
        return 0.37

    monkeypatch.setattr("distprune.core.costs.compare", measured)
    monkeypatch.chdir(tmp_path)
    value = recipe("at_init", sparsity=0.5, granularity="filter").plain()
    common = {"rungs": [], "report_every": "4ep", "recovery": "1it", "known": 0, "threads": 1, "device": "cpu"}
    job = Job(number=0, recipe=value, folder=str(tmp_path), working_dir=str(tmp_path), costs=[{"name": "latency", "batch": 3}], **common)
    costs = json.loads(list(run_trial(job))[-1]["extra"])
    total = prepare(recipe("dense")).state.masks.total
    assert costs["costs"]["latency(batch=3)"] == 0.37 and costs["costs"]["params"] == pytest.approx(sum(costs["layers"].values()) / total)
    assert costs["costs"]["flops"] == pytest.approx(costs["flops"] / costs["dense_flops"])
    ((dense, small, shape),) = seen
    assert small < dense and shape == (3, 1, 8, 8)


def test_a_real_search_exports_within_its_budget(tmp_path: Path) -> None:
    """At the end of everything: masks, front and best of a small search on the toys, with FLOPs of filters as the cost."""
    value = budgeted(
        tmp_path,
        trials=7,
        recipe={**BASE, "train": {**BASE["train"], "length": "1ep"}},
        space={"paradigm": ["at_init", "dense"], "criterion": ["magnitude"], "granularity": "filter", "regularizer": ["none"]}
        | {"allocator": ["uniform", "constrained_rl"], "sparsity": [0.3, 0.8]},
        budget={"cost": "flops", "most": 0.5},
        sampler={"name": "constrained_rl", "batch": 2, "wall": True},
    )
    result = Result(start(value, workers=1, using=run_trial).path)
    front = result.pareto()
    assert front and all(trial.row["flops"] <= 0.5 * _dense_flops(value) for trial in front)
    assert {int(path.stem) for path in RunFolder(value.folder).masks.iterdir()} == {trial.number for trial in front}
    assert not any(trial.row["paradigm"] == "dense" for trial in front), "the dense network is over any budget"


def _dense_flops(value: Search) -> int:
    run = prepare(recipe("dense"))
    next(execute(run.plan, run.state, run.env))
    return sum(run.env.flops.values())
