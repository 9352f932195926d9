"""What a search is after: shares of the dense network as objectives and budgets, floors, and costs that could not be measured."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from searches import TOTAL, curve, reports, resume, search, start
from torch import nn
from toys import BASE, recipe

from distprune.core import registry
from distprune.core.recipe import Recipe
from distprune.core.run import prepare
from distprune.errors import UserError
from distprune.report.tables import infeasible
from distprune.result import Result
from distprune.search import driver
from distprune.search.config import Budget, Search
from distprune.search.entry import Entry
from distprune.search.finale import close_tables
from distprune.search.goals import Goals
from distprune.search.setup import set_up
from distprune.search.trial import Job, run_trial
from distprune.store.folder import RunFolder
from distprune.store.study import Truth

PARAMS, FLOPS, MEMORY, LATENCY = (registry.cost.choose(name) for name in ("params", "flops", "memory", "latency"))
FILTERS = {
    "paradigm": ["at_init"],
    "criterion": ["magnitude"],
    "allocator": ["uniform"],
    "regularizer": ["none"],
    "granularity": "filter",
    "sparsity": [0.3, 0.8],
}


@pytest.fixture
def tables_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Made-up trials have no networks to hand out."""
    monkeypatch.setattr(driver, "finalize", close_tables)


def _trials(folder: RunFolder, value: Search) -> list[Any]:
    return Truth.open(folder.journal, value.name, Goals.of(value).directions).trials()


def _entry(reached: dict[str, Any], objective: float = 0.5, **changes: Any) -> Entry:
    last = {"objective": objective, "kept": 100, "sparsity": 0.9, "extra": json.dumps({"costs": reached})}
    return Entry(0, recipe(sparsity=0.95), "", last=last, **changes)


def _budget(cost: str, most: float) -> Budget:
    return Budget(cost=registry.cost.choose(cost), most=most)


def costed(job: Job) -> Iterator[dict[str, Any]]:
    """The made-up curve with costs: FLOPs fall more slowly than weights, and networks below a tenth of these cannot be measured."""
    for row in curve(job):
        share = row["kept"] / TOTAL
        costs: dict[str, Any] = {"params": share, "flops": share**0.5, "memory": 0.1 + 0.9 * share}
        if row["final"] and any(cost == "latency" for cost in job.costs):
            costs["latency"] = share**0.3 if share > 0.1 else None
        yield {**row, "extra": json.dumps({"costs": costs})} if row["score"] is not None else row


def test_values_are_the_objective_and_shares() -> None:
    goals = Goals((FLOPS, PARAMS))
    entry = _entry({"flops": 0.3, "params": 0.1}, best=0.7, costs={"flops": 0.2})
    assert goals.directions == ("maximize", "minimize", "minimize")
    assert goals.reached(entry) == (0.5, -0.3, -0.1) and goals.values(goals.reached(entry)) == [0.5, 0.3, 0.1]
    assert goals.expected(entry) == pytest.approx((0.7, -0.2, -0.05)), "what a rung did not count is the budget"
    assert Goals(()).reached(entry) == (0.5,) and Goals(()).directions == ("maximize",)
    assert Goals().reached(_entry({})) == pytest.approx((0.5, -0.1)), "the weights of a finished network are always known"


def test_a_measured_cost_is_in_proportion_to_flops_until_it_is_measured() -> None:
    entry = _entry({"latency": 0.6}, best=0.7, costs={"flops": 0.2, "params": 0.1})
    assert Goals((LATENCY,)).expected(entry) == (0.7, -0.2) and Goals((LATENCY,)).reached(entry) == (0.5, -0.6)


def test_at_a_rung_a_network_too_large_is_not_better_for_its_score_alone() -> None:
    goals = Goals((), (_budget("flops", 0.5),))
    large, small = (_entry({}, best=best, costs={"flops": flops}) for best, flops in ((0.9, 1.0), (0.8, 0.4)))
    assert goals.ranked(large) == (0.9, -1.0) and goals.ranked(small) == (0.8, 0.0)
    assert Goals((FLOPS,), (_budget("flops", 0.5),)).ranked(large) == (0.9, 0.0), "its share says so already"
    assert goals.ranked(_entry({"flops": 0.75}, ended="finished")) == (0.5, -0.5)
    assert goals.ranked(_entry({"flops": None}, ended="finished")) == (0.5, -1.0)


def test_costs_are_compared_by_their_logarithms() -> None:
    scores = [Goals((FLOPS,)).ranked(_entry({}, best=0.7, costs={"flops": share})) for share in (0.02, 0.04, 0.5, 1.0)]
    assert scores[0][1] - scores[1][1] == pytest.approx(scores[2][1] - scores[3][1]) == pytest.approx(math.log(2))
    assert math.isfinite(Goals((FLOPS,)).ranked(_entry({}, best=0.7, costs={"flops": 0.0}))[1])


def test_violations_are_relative_to_their_limits() -> None:
    goals = Goals(budgets=(_budget("params", 0.2), _budget("flops", 0.1)), floor=0.8)
    found = goals.violations(_entry({"params": 0.1, "flops": 0.3}, objective=0.6))
    assert found == pytest.approx({"budget": -0.5, "budget:flops": 2.0, "floor": 0.25}) and not goals.met(
        _entry({"params": 0.1, "flops": 0.3})
    )
    assert goals.met(_entry({"params": 0.2 * (1 + 1e-12), "flops": 0.1}, objective=0.8)), "sums of shares are off by a rounding"
    assert not goals.met(_entry({"params": 0.2, "flops": 0.1}, objective=0.79))
    assert Goals(floor=-20.0).violations(_entry({}, objective=-25.0))["floor"] == pytest.approx(0.25)


@pytest.mark.parametrize(
    "goals", [Goals((LATENCY,)), Goals((), (_budget("latency", 0.5),)), Goals((FLOPS,)), Goals((), (_budget("flops", 0.5),))]
)
@pytest.mark.parametrize("costs", [{}, {"latency": None, "flops": None}])
def test_what_is_not_known_is_infeasible(goals: Goals, costs: dict[str, Any]) -> None:
    entry = _entry(costs)
    assert goals.violations(entry) == {"unmeasured": 1.0} and not goals.met(entry)
    assert len(goals.minimize) == 0 or goals.reached(entry) == (0.5, -1.0), "and never small"


def test_two_unknown_costs_are_worse_than_one_and_one_is_counted_once() -> None:
    assert Goals((LATENCY, FLOPS)).violations(_entry({})) == {"unmeasured": 2.0}
    assert Goals((LATENCY,), (_budget("latency", 0.5),)).violations(_entry({})) == {"unmeasured": 1.0}
    eight = registry.cost.choose("latency", batch=8)
    goals = Goals((LATENCY, eight))
    assert goals.reached(_entry({"latency": 0.5, "latency(batch=8)": 0.25})) == (0.5, -0.5, -0.25), "other options are another cost"


@pytest.mark.usefixtures("tables_only")
@pytest.mark.parametrize("minimize", [[], ["params", "flops", "memory"]], ids=str)
@pytest.mark.parametrize("sampler", ["random", {"name": "constrained_rl", "batch": 4}], ids=str)
def test_any_number_of_costs_goes_through_a_search_and_a_resume(minimize: list[str], sampler: Any, tmp_path: Path) -> None:
    space = {
        "paradigm": ["finetune", "at_init"],
        "criterion": ["magnitude", "snip"],
        "allocator": ["erk", "constrained_rl"],
        "regularizer": ["none"],
        "sparsity": [0.5, 0.95],
    }
    common = {
        "minimize": minimize,
        "sampler": sampler,
        "space": space,
        "budget": [{"cost": "flops", "most": 0.5}, {"cost": "params", "most": 0.4}],
    }
    whole, half = (search(tmp_path / name, trials=trials, **common) for name, trials in (("a", 14), ("b", 9)))
    folders = [start(whole, workers=1, using=costed), start(half, workers=1, using=costed)]
    rows = _trials(folders[0], whole)
    for trial in rows:
        end, values = trial.user_attrs["end"], trial.values
        if end["ended"] == "finished":
            last = reports(folders[0])[trial.number][-1]
            costs = json.loads(last["extra"])["costs"]
            assert values == [last["objective"], *(costs[name] for name in minimize)]
            assert trial.constraints == pytest.approx({"budget": costs["flops"] / 0.5 - 1, "budget:params": costs["params"] / 0.4 - 1})
    front = [row for row in Result(folders[0].path).trials.to_pylist() if row["pareto"]]
    assert front and all(row["kept"] / TOTAL <= 0.25 + 1e-9 for row in front), "both budgets: half of the FLOPs is a quarter of the weights"
    if not minimize:
        fits = [t.values[0] for t in rows if t.user_attrs["end"]["ended"] == "finished" and max(t.constraints.values()) <= 0]
        assert {row["objective"] for row in front} == {max(fits)}, "with one objective the front is the best"
    if sampler != SAMPLER:
        resume(half.folder, workers=1, using=costed, trials=14)
        assert [t.params for t in _trials(folders[1], half)] == [t.params for t in rows]


SAMPLER = {"name": "constrained_rl", "batch": 4}  # an extended search has two ends


@pytest.mark.usefixtures("tables_only")
def test_the_floor_keeps_the_worse_half_off_the_front(tmp_path: Path) -> None:
    plain = search(tmp_path / "a", trials=12, scheduler="none")
    objectives = sorted(row["objective"] for row in Result(start(plain, workers=1).path).trials.to_pylist())
    floor = objectives[len(objectives) // 2]
    value = search(tmp_path / "b", trials=12, scheduler="none", floor=floor)
    folder = start(value, workers=1)
    front = [row for row in Result(folder.path).trials.to_pylist() if row["pareto"]]
    assert front and all(row["objective"] >= floor for row in front)
    for trial in _trials(folder, value):
        if trial.user_attrs["end"]["ended"] == "finished":
            assert trial.constraints["floor"] == pytest.approx((floor - trial.values[0]) / floor)
    assert any(trial.constraints["floor"] > 0 for trial in _trials(folder, value))


@pytest.mark.usefixtures("tables_only")
def test_a_latency_that_cannot_be_measured_is_never_feasible(tmp_path: Path) -> None:
    value = search(tmp_path, trials=12, scheduler="none", sampler="random", space=FILTERS, minimize=["latency"])

    def restless(job: Job) -> Iterator[dict[str, Any]]:
        for row in costed(job):
            extra = json.loads(row["extra"])
            if row["final"] and row["kept"] / TOTAL < 0.4:
                extra["costs"]["latency"] = None
            yield {**row, "extra": json.dumps(extra)}

    folder = start(value, workers=1, using=restless)
    rows = Result(folder.path).trials.to_pylist()
    unknown = {row["number"] for row in rows if row["kept"] / TOTAL < 0.4}
    told = {trial.number: trial for trial in _trials(folder, value) if trial.user_attrs["end"]["ended"] == "finished"}
    assert unknown & told.keys() and told.keys() - unknown
    for number, trial in told.items():
        assert trial.constraints == ({"unmeasured": 1.0} if number in unknown else {}) and (trial.values[1] == 1.0) is (number in unknown)
    assert not unknown & {row["number"] for row in rows if row["pareto"]}


def test_a_rung_has_the_costs_of_the_network_that_the_trial_ends_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is pruned at its end: before, the run is dense, and its projected copy is not. Which filters go changes no cost."""
    monkeypatch.chdir(tmp_path)
    value = recipe(
        "finetune", sparsity=0.6, granularity="filter", allocator="uniform", sparsity_of="flops", train={"length": "2ep"}
    ).plain()
    common = {"report_every": "1ep", "recovery": "1it", "known": 0, "threads": 1, "device": "cpu", "costs": ["memory"]}
    rows = list(run_trial(Job(number=0, recipe=value, folder=str(tmp_path), rungs=[300], working_dir=str(tmp_path), **common)))
    assert rows[-1]["ended"] == "finished", rows[-1]
    rung = next(row for row in rows if row["score"] is not None)
    costs, last = (json.loads(row["extra"])["costs"] for row in (rung, rows[-1]))
    assert rung["sparsity"] == 0.0 and costs == last and 0 < costs["flops"] <= 0.4 and set(costs) == {"params", "flops", "memory"}


class Timed(nn.Module):
    """Takes time by its weights on a clock of its own; `restless` ones vary."""

    now, restless = 0.0, False

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self._passes = inner, 0

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        self._passes += 1
        noise = (self._passes % 3) / 2 if Timed.restless else 0.0
        Timed.now += sum(parameter.numel() for parameter in self.inner.parameters()) * (1 + noise) * 1e-6
        return self.inner(inputs)


@pytest.mark.parametrize("restless", [False, True])
def test_latency_through_a_trial_on_a_clock_of_its_own(restless: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from distprune.core.latency import compare

    def on_own_clock(dense: nn.Module, small: nn.Module, inputs: torch.Tensor, **options: Any) -> float | None:
        return compare(Timed(dense), Timed(small), inputs, **options, clock=lambda: Timed.now)

    monkeypatch.setattr("distprune.core.costs.compare", on_own_clock)
    monkeypatch.setattr(Timed, "restless", restless)
    monkeypatch.chdir(tmp_path)
    value = search(
        tmp_path,
        trials=3,
        recipe={**BASE, "train": {**BASE["train"], "length": "1ep"}},
        space=FILTERS,
        minimize=["latency"],
        budget={"cost": "latency", "most": 0.6},
        scheduler="none",
        sampler="random",
    )
    folder = start(value, workers=1, using=run_trial)
    rows, told = Result(folder.path).trials.to_pylist(), _trials(folder, value)
    dense = sum(parameter.numel() for parameter in prepare(Recipe.read({**BASE, "paradigm": "dense"})).state.model.parameters())
    for row, trial in zip(rows, told, strict=True):
        if restless:
            assert trial.constraints == {"unmeasured": 1.0} and not row["pareto"]
        else:
            small = sum(p.numel() for p in _smaller(folder, row).parameters()) if row["pareto"] else None
            assert small is None or trial.values[1] == pytest.approx(small / dense, rel=1e-6)
            assert trial.constraints["budget"] == pytest.approx(trial.values[1] / 0.6 - 1)
    assert any(row["pareto"] for row in rows) is (not restless and any(trial.values[1] <= 0.6 for trial in told))


def _smaller(folder: RunFolder, row: dict[str, Any]) -> nn.Module:
    from distprune.core.edits.shrink import shrink
    from distprune.search.finale import load_trial

    run = load_trial(folder, row["number"], json.loads(row["recipe"]))
    units = run.state.units(run.recipe.granularity, run.env.task.example)
    return shrink(run.state.model, units.channels, units.alive(run.state.masks))


def test_latency_for_real(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hundredth of the work takes less time than all of it; on a machine too busy to say so, nothing is said."""
    monkeypatch.chdir(tmp_path)
    value = recipe(
        "at_init",
        sparsity=0.98,
        granularity="filter",
        allocator="uniform",
        model={"import": "toys:network", "hidden": 4096},
        train={"length": "1it"},
    ).plain()
    common = {"rungs": [], "report_every": "4ep", "recovery": "1it", "known": 0, "threads": 1, "device": "cpu"}
    cost = {"name": "latency", "batch": 16, "spread": 0.5}
    job = Job(number=0, recipe=value, folder=str(tmp_path), working_dir=str(tmp_path), costs=[cost], **common)
    costs = json.loads(list(run_trial(job))[-1]["extra"])["costs"]
    (share,) = (found for name, found in costs.items() if name.startswith("latency"))
    assert costs["flops"] < 0.05 and (share is None or 0 < share < 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"minimize": ["energy"]}, "Unknown cost 'energy'"),
        ({"minimize": "params"}, r"minimize must be a list of costs, got 'params'. Write minimize: \[params\]"),
        ({"minimize": ["params", "flops", "params"]}, "minimize must name a cost once, got 'params' 2 times"),
        ({"minimize": [{"name": "latency", "batches": 3}]}, "Unknown option of search.minimize latency: 'batches'"),
        ({"budget": [{"cost": "flops", "most": 0.5}, {"cost": "flops", "most": 0.4}]}, "budget must name a cost once, got 'flops' 2 times"),
        ({"budget": [{"cost": "flops", "most": 0.5}, {"cost": "params", "most": 2.0}]}, r"search.budget\[1\].most must be a share"),
        ({"minimize": ["latency"]}, "minimize 'latency' is measured on a network that is really smaller"),
        (
            {"budget": [{"most": 0.5}, {"cost": "latency", "most": 0.5}]},
            "budget.cost 'latency' is measured on a network that is really smaller",
        ),
        (
            {"budget": {"most": 0.1}, "space": {"paradigm": ["at_init"], "allocator": ["erk"], "sparsity": [0.5, 0.8]}},
            "budget.most of 'params' is 0.1, and no trial keeps less than 0.2: space.sparsity ends at 0.8",
        ),
        ({"floor": 85.0}, "floor must be above 0 and at most 1, as accuracy is, got 85. Write it as a share"),
        ({"floor": 0.0}, "floor must be above 0 and at most 1"),
        ({"floor": float("nan")}, "floor must be a number or null, got nan"),
        ({"floor": "high"}, "floor"),
        ({"recipe": {**BASE, "sparsity_of": "latency"}}, "'latency' is measured: masks would depend on noise"),
        ({"recipe": {**BASE, "sparsity_of": "flops"}, "space": {"paradigm": ["dsr"]}}, "paradigm 'dsr' moves weights between layers"),
        (
            {"recipe": {**BASE, "sparsity_of": "memory"}},
            "got 0.98 of the network's memory. The largest feasible sparsity of memory is 0.85",
        ),
    ],
)
def test_mistakes_are_one_line(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message) as caught:
        start(search(tmp_path, trials=2, **changes))
    assert "\n" not in str(caught.value) and not (tmp_path / "s").exists()


def test_a_space_leaves_out_what_cannot_keep_to_a_budget_in_flops(tmp_path: Path) -> None:
    value = search(
        tmp_path,
        recipe={**BASE, "sparsity_of": "flops"},
        space={"granularity": ["weight", "n_m"], "criterion": ["magnitude"], "sparsity": 0.5},
    )
    space = set_up(value).space
    assert not {"snfs", "dsr"} & {candidate.name for candidate in space.axes["paradigm"]}
    assert [granularity.name for granularity in space.granularities] == ["weight"]
    assert any(line.startswith("granularity n_m: ") for line in space.excluded)


def test_goals_are_written_as_they_are_read(tmp_path: Path) -> None:
    for budget in (None, {"cost": "flops", "most": 0.5}, [{"cost": "flops", "most": 0.5}, {"cost": "memory", "most": 0.6}]):
        value = search(tmp_path, minimize=["flops", {"name": "latency", "batch": 4}], budget=budget, floor=0.3)
        again = Search.read(json.loads(json.dumps(value.plain())))
        assert Goals.of(again) == Goals.of(value) and len(again.minimize) == 2 and value.plain() == again.plain()
    assert search(tmp_path, minimize=[]).minimize == () and search(tmp_path).minimize == (PARAMS,)


@pytest.mark.usefixtures("tables_only")
def test_what_keeps_finished_networks_from_the_front_is_said(tmp_path: Path) -> None:
    result = Result(start(search(tmp_path, trials=6, floor=0.99, scheduler="none")).path)
    assert [row.row["violated"] for row in result.rows()] == [["floor"]] * 6 and not result.pareto()
    assert infeasible(result) == ["6 finished trials cannot be on the front: floor (6)."]
    assert infeasible(Result(start(search(tmp_path, name="free", trials=2)).path)) == []
