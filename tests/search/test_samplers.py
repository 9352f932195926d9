"""Samplers: what each may be asked for, that proposals are functions of seed, place and fit set, and that they cost the same for ever."""

import math
import random
from collections import Counter
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState
from searches import outcome, resume, search, start, trials
from toys import BASE

from distprune.core import registry
from distprune.errors import UserError
from distprune.search import driver, tables
from distprune.search.branches import _groups, at
from distprune.search.config import Search
from distprune.search.enumeration import Grid
from distprune.search.fitset import FitSet
from distprune.search.proposer import Proposal, Proposer
from distprune.search.space import Recorder, Space

pytestmark = pytest.mark.usefixtures("no_finale")

TUNED = {option: registry.paradigm.get("finetune").options[option].default for option in ("tune", "rate", "weights")}
LISTED = {
    "paradigm": ["dense", "at_init", {"name": "finetune", "share": [0.5, 0.6, 0.7], **TUNED}],
    "criterion": ["magnitude", "random"],
    "allocator": ["erk", "uniform"],
    "regularizer": ["none"],
    "sparsity": [0.5, 0.75, 0.9],
}
OPEN = {"paradigm": ["dense", "at_init", "gradual"], "criterion": ["magnitude", "snip"], "allocator": ["erk", "uniform"]}
TWO: Any = ("maximize", "minimize")


def _proposer(name: str, space: Any = OPEN, *, one: bool = False, **options: Any) -> Proposer:
    sampler = tables.sampler.choose(name, **options.pop("sampler", {}))
    return Proposer(sampler, Space(BASE, space, seed=0), directions=TWO[: 1 if one else 2], seed=0, **options)


def _values(proposal: Proposal, one: bool = False) -> list[float]:
    """A smooth objective: sparse is cheap, density is worth its logarithm."""
    density = 1 - proposal.recipe.sparsity
    return [0.5 + 0.1 * math.log(density) - 0.05 * (proposal.recipe.criterion.name == "snip"), density][: 1 if one else 2]


def _frozen(number: int, proposal: Proposal, turn: int, state: TrialState, values: Any, constraints: dict[str, float]) -> Any:
    """As a journal holds a trial."""
    system = {**proposal.system_attrs, **{f"constraints:{key}": value for key, value in constraints.items()}}
    finished = state.is_finished()
    return optuna.trial.FrozenTrial(
        number=number,
        trial_id=number,
        state=state,
        value=None,
        values=values if finished else None,
        datetime_start=None,
        datetime_complete=None,
        params=dict(proposal.params),
        distributions=dict(proposal.distributions),
        user_attrs={"end": {"turn": turn}} if finished else {},
        system_attrs=system if finished else dict(proposal.system_attrs),
        intermediate_values={},
    )


@pytest.mark.parametrize("name", ["tpe", "nsga2", "nsga3", "cmaes", "qmc", "random"])
def test_a_restored_proposer_goes_on_as_if_nothing_had_happened(name: str) -> None:
    """Through trims, running trials, failed and stopped ones, told in another order than they were born."""
    one, draw = name == "cmaes", random.Random(1)
    options = {"one": one, "fit_set": 12, "sampler": {"startup": 5} if name == "tpe" else {}}
    if name.startswith("nsga"):
        options["sampler"] = {"population": 4}
    proposer, journal, running = _proposer(name, **options), {}, {}
    turn = 0
    for number in range(24 if one else 40):
        running[number] = proposer.ask(number)
        journal[number] = _frozen(number, running[number], 0, TrialState.RUNNING, None, {})
        while len(running) > 2:
            ended = draw.choice(sorted(running))
            proposal, turn = running.pop(ended), turn + 1
            state = TrialState.FAIL if ended % 7 == 3 else TrialState.COMPLETE
            values = None if state == TrialState.FAIL else _values(proposal, one)
            constraints = {"unfinished": 0.5} if ended % 3 == 0 and state == TrialState.COMPLETE and not one else {}
            proposer.tell(ended, state, values, constraints)
            journal[ended] = _frozen(ended, proposal, turn, state, values, constraints)
        if number % 9 == 8:  # the journal alone is enough
            restored = _proposer(name, **options)
            restored.restore([journal[key] for key in sorted(journal)])
            proposer, old = restored, proposer
            a, b = old.ask(number + 1), proposer.ask(number + 1)
            assert a.params == b.params and a.system_attrs.keys() == b.system_attrs.keys()
            proposer = _proposer(name, **options)
            proposer.restore([journal[key] for key in sorted(journal)])


def test_the_fit_set_is_a_function_of_the_told_order_and_holds_best_and_latest() -> None:
    draw, proposer = random.Random(0), _proposer("random")
    rows = []
    for number in range(100):
        proposal = proposer.ask(number)
        quality = draw.random()
        values = [quality, 1 - quality + 0.3 * draw.random()]  # a small front
        rows.append((number, _frozen(number, proposal, number, TrialState.COMPLETE, values, {"x": 1.0} if number % 4 == 0 else {})))
    fitted = FitSet(TWO, 16)
    sizes = []
    for number, trial in rows:
        fitted.add(number, trial)
        sizes.append(len(fitted))
    kept = [number for number, _ in fitted]
    assert max(sizes) == 20 and kept == sorted(kept)
    feasible = [(n, t.values) for n, t in rows[:88] if not t.constraints]
    front = {n for n, v in feasible if not any(o[0] >= v[0] and o[1] <= v[1] and o != v for _, o in feasible)}
    assert front and front <= set(kept), "what nothing dominates is never forgotten"
    assert set(range(96, 100)) <= set(kept)
    again = FitSet(TWO, 16)
    for number, trial in rows:
        again.add(number, trial)
    assert [number for number, _ in again] == kept


def test_groups_are_those_of_optuna() -> None:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    space = Space(BASE, {"sparsity": [0.5, 0.9]}, seed=0)
    for _ in range(60):
        trial = study.ask()
        space.build(trial)
        study.tell(trial, 0.0)
    expected = optuna.search_space._GroupDecomposedSearchSpace().calculate(study).search_spaces
    found = {tuple(group) for group in _groups(study.trials).values()}
    assert found == {tuple(sorted(name for name in group if not group[name].single())) for group in expected} - {()}
    assert len(found) > 20


def test_tpe_learns_in_a_branch() -> None:
    """Two thirds of the later proposals lie where the values are best; of random ones one third do."""

    def share(name: str) -> float:
        proposer, late = _proposer(name, {**OPEN, "paradigm": ["at_init"]}, one=True), []
        for number in range(90):
            proposal = proposer.ask(number)
            good = -abs(math.log((1 - proposal.recipe.sparsity) / 0.1)) - (proposal.recipe.criterion.name == "snip")
            proposer.tell(number, TrialState.COMPLETE, [good], {})
            late.append(0.06 < 1 - proposal.recipe.sparsity < 0.17 and proposal.recipe.criterion.name == "magnitude")
        return sum(late[40:]) / 50

    assert share("tpe") > 0.6 > 0.3 > share("random")


def test_a_stopped_trial_of_one_objective_is_told_with_its_rung() -> None:
    proposer = _proposer("tpe", one=True)
    for number in range(14):
        proposer.ask(number)
        proposer.tell(number, TrialState.PRUNED, [0.1 * number], {}, rung=number % 3)
    stored = proposer._study.get_trials(deepcopy=False)
    assert [trial.intermediate_values for trial in stored[:4]] == [{0: 0.0}, {1: 0.1}, {2: 0.2}, {0: pytest.approx(0.3)}]
    rows = [t for t in proposer._study.get_trials(deepcopy=False) if t.state == TrialState.PRUNED]
    journal = []
    for trial in rows:  # the journal has the values alone
        end = {"turn": trial.number, "rung": trial.number % 3}
        row = optuna.trial.FrozenTrial(
            **{"number": trial.number, "trial_id": 0, "state": TrialState.PRUNED, "value": None, "values": trial.values},
            **{"datetime_start": None, "datetime_complete": None, "params": trial.params, "distributions": trial.distributions},
            **{"user_attrs": {"end": end}, "system_attrs": {}, "intermediate_values": {}},
        )
        journal.append(row)
    restored = _proposer("tpe", one=True)
    restored.restore(journal)
    assert restored.ask(14).params == proposer.ask(14).params


def test_a_restored_gaussian_process_goes_on_as_if_nothing_had_happened() -> None:
    options = {"one": True, "sampler": {"startup": 4}}
    proposer, journal = _proposer("gp", {**OPEN, "paradigm": ["at_init"], "criterion": ["magnitude"]}, **options), []
    for number in range(5):
        proposal = proposer.ask(number)
        constraints = {"unfinished": 0.5} if number == 2 else {"budget": -0.1} if number == 1 else {}
        proposer.tell(number, TrialState.COMPLETE, _values(proposal, True), constraints)
        journal.append(_frozen(number, proposal, number, TrialState.COMPLETE, _values(proposal, True), constraints))
    restored = _proposer("gp", {**OPEN, "paradigm": ["at_init"], "criterion": ["magnitude"]}, **options)
    restored.restore(journal)
    assert {tuple(trial.constraints.items()) for trial in restored._study.trials} == {
        (("violation", 0.0),),
        (("violation", -0.1),),
        (("violation", 0.5),),
    }, "every trial has the one constraint"
    assert proposer.ask(5).params == restored.ask(5).params


# Order of the space: grid and quasi-Monte-Carlo.


def test_a_grid_is_every_combination_once() -> None:
    grid = Grid(Space(BASE, LISTED, seed=0), seed=0)
    # dense; at_init and finetune with 2 criteria, 2 allocators, 3 sparsities, and 3 shares.
    assert grid.size == 1 + 2 * 2 * 3 + 2 * 2 * 3 * 3
    found = [tuple(sorted(grid[place].items())) for place in range(grid.size)]
    assert len(set(found)) == grid.size
    assert Counter(dict(row)["paradigm"] for row in found) == {"dense": 1, "at_init": 12, "finetune": 36}
    assert [grid[place] for place in range(8)] != [Grid(Space(BASE, LISTED, seed=0), seed=1)[place] for place in range(8)]
    halves = Counter(dict(row).get("sparsity") for row in found[: grid.size // 2])
    assert all(halves[value] >= 6 for value in LISTED["sparsity"]), "a search that ends early has seen all of the space"


def test_a_grid_search_ends_when_nothing_is_left_and_goes_on_where_it_was(tmp_path: Path) -> None:
    space = {**LISTED, "paradigm": ["dense", "at_init"]}
    whole = start(search(tmp_path / "a", trials=100, sampler="grid", space=space, scheduler="none"))
    ended = trials(whole)
    assert len(ended) == 13 and {trial.user_attrs["end"]["ended"] for trial in ended} == {"finished"}
    assert len({tuple(sorted(trial.params.items())) for trial in ended}) == 13
    part = start(search(tmp_path / "b", trials=5, sampler="grid", space=space, scheduler="none"))
    assert [trial.params for trial in trials(part)] == [trial.params for trial in ended[:5]]
    assert outcome(resume(part.path, trials=200)) == outcome(whole)


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({**LISTED, "sparsity": [0.5, 0.9]}, r"space.sparsity is a range, \[0.5, 0.9\]. List one value, or three and more."),
        ({**LISTED, "paradigm": ["finetune"]}, r"parameter 'finetune/share' is continuous in \["),
    ],
)
def test_a_grid_needs_listed_values(space: Any, message: str) -> None:
    with pytest.raises(UserError, match=f"sampler 'grid' needs listed values, and {message}"):
        Grid(Space(BASE, space, seed=0), seed=0)


def test_quasi_monte_carlo_is_a_function_of_the_place_and_fills_every_parameter_evenly() -> None:
    space = {**OPEN, "paradigm": ["at_init", "gradual"]}
    proposer = _proposer("qmc", space)
    first = len(proposer._first)
    proposals = [proposer.ask(number) for number in range(first, first + 64)]
    later = _proposer("qmc", space)
    assert later.ask(first + 50).params == proposals[50].params
    counts = Counter(proposal.params["paradigm"] for proposal in proposals)
    assert counts == {"at_init": 32, "gradual": 32}, "64 points of a Sobol sequence halve every coordinate"
    cells = Counter(int(8 * math.log(p.params["density"] / 0.02) / math.log(0.5 / 0.02) - 1e-9) for p in proposals)
    assert [cells[cell] for cell in range(8)] == [8] * 8
    gradual = [name for name in proposals[0].params | proposals[1].params if name.startswith("gradual/")]
    assert all(name in p.params for p in proposals if p.params["paradigm"] == "gradual" for name in gradual)


def test_shares_of_distributions_by_hand() -> None:
    assert at(0.5, FloatDistribution(1, 3)) == 2 and at(0.5, FloatDistribution(0.01, 1, log=True)) == pytest.approx(0.1)
    assert Counter(at(i / 90, IntDistribution(1, 3)) for i in range(90)) == {1: 30, 2: 30, 3: 30}
    assert [at(share, CategoricalDistribution(("a", "b"))) for share in (0, 0.49, 0.5, 0.99)] == ["a", "a", "b", "b"]


# What a space has.


@pytest.mark.parametrize("value", [OPEN, LISTED, {"granularity": ["weight", "kernel", "n_m", "filter"], "sparsity": [0.5, 0.75, 0.9]}])
def test_a_space_knows_all_of_its_parameters(value: Any) -> None:
    space = Space(BASE, value, seed=0)
    known, study, seen = space.parameters(), optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0)), set()
    for _ in range(300):
        trial = study.ask()
        space.build(trial)
        assert all(known[name] == where for name, where in trial.distributions.items())
        seen |= trial.distributions.keys()
    assert len(seen) > 0.9 * len(known)


# Flat samplers.


def test_what_a_recipe_has_not_is_proposed_to_the_model_and_to_nobody_else() -> None:
    proposer = _proposer("nsga2", sampler={"population": 4})
    every = Space(BASE, OPEN, seed=0).parameters().keys()
    for number in range(30):
        proposal = proposer.ask(number)
        idle = {name for name in every if name not in proposal.params}
        built = Space(BASE, OPEN, seed=0)
        assert proposal.params.keys() == proposal.distributions.keys() and not idle & proposal.params.keys()
        recorder = Recorder(proposal.params)
        assert built.build(recorder) == proposal.recipe and recorder.distributions.keys() == proposal.params.keys()
        proposer.tell(number, TrialState.COMPLETE, _values(proposal), {})
    assert all(trial.params.keys() == every for trial in proposer._study.trials)


# Rules.


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sampler": "cmaes"}, r"sampler 'cmaes' is for one objective, and search.minimize adds params to it. Write minimize: \[\]"),
        ({"sampler": "gp", "limits": {"trials": 301}}, "sampler 'gp' is for at most 300 trials, .* and limits.trials is 301"),
        ({"sampler": {"name": "nsga2", "population": 500}}, r"sampler.population must be in \[2, 60\], got 500"),
        ({"sampler": "random", "learn_from": ["x"]}, "learn_from needs a sampler that learns from trials, got 'random'"),
        ({"finalists": {"seeds": 1}}, "finalists.seeds at least 2, got 3 and 1"),
        ({"duplicates": "again"}, "Unknown value for search.duplicates: 'again'. Known: known, new_seed"),
    ],
)
def test_what_a_sampler_is_of_no_use_for_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        start(search(tmp_path, **{"trials": 5, **changes}))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("sampler", ["nsga3", "qmc"])
def test_more_samplers_live_through_a_search_and_a_resume(sampler: str, tmp_path: Path) -> None:
    one = start(search(tmp_path / "a", trials=16, sampler=sampler), workers=1)
    two = start(search(tmp_path / "b", trials=13, sampler=sampler), workers=1)
    resume(two.path, workers=1, trials=16)
    assert outcome(one) == outcome(two)


def test_one_objective_by_cmaes(tmp_path: Path) -> None:
    value = search(tmp_path / "a", trials=24, sampler="cmaes", minimize=[], scheduler="none")
    found = Search.read(value.plain())
    assert found == value
    ended = trials(start(value, workers=1))
    assert all(len(trial.values) == 1 for trial in ended)
    attrs = [key for trial in ended for key in trial.system_attrs]
    assert sum(key.startswith("cma:generation") for key in attrs) > 10, "most were the model's"


# Ahead.


def test_prepared_proposals_are_taken_thrown_away_or_never_made() -> None:
    proposer, alone = _proposer("tpe"), _proposer("tpe")
    for number in range(12):
        proposer.tell(number, TrialState.COMPLETE, _values(proposer.ask(number)), {})
        alone.tell(number, TrialState.COMPLETE, _values(alone.ask(number)), {})
    assert not proposer.prepare(12, beside=0), "one worker: what it runs would be missed"
    assert proposer.prepare(12, beside=1) and not proposer.prepare(12, beside=1)
    ready = proposer._ready[12][0]
    assert proposer.ask(12) is ready and ready.params == alone.ask(12).params
    made = [proposer.ask(13), alone.ask(13)]
    assert made[0].params == made[1].params
    assert proposer.prepare(14, beside=1)
    stale = proposer._ready[14][0]
    for each, proposal in ((proposer, made[0]), (alone, made[1])):
        each.tell(13, TrialState.COMPLETE, _values(proposal), {})
        each.tell(12, TrialState.COMPLETE, [0.9, 0.01], {})
    fresh = proposer.ask(14)
    assert fresh is not stale and fresh.params == alone.ask(14).params, "as if it had never been"
    assert not proposer._ready and 14 in proposer._ids


def test_a_driver_prepares_and_one_worker_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    original = Proposer.prepare

    def counting(self: Proposer, number: int, **facts: Any) -> bool:
        done = original(self, number, **facts)
        made.extend([number] if done else [])
        return done

    monkeypatch.setattr(Proposer, "prepare", counting)
    one = start(search(tmp_path / "a", trials=16, sampler="tpe"), workers=1)
    assert not made
    three = trials(start(search(tmp_path / "b", trials=16, sampler="tpe"), workers=3))
    assert made and [trial.number for trial in three] == list(range(16))
    monkeypatch.setattr(driver.Book, "prepare", lambda self: None)
    assert outcome(start(search(tmp_path / "c", trials=16, sampler="tpe"), workers=1)) == outcome(one)
