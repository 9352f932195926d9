"""The book: all state of a search. Ray's searcher, scheduler and callback are thin faces of it, and so is the simulator.

Nothing here knows Ray, reads a clock of its own or draws a number: the same reports in the same order give the same decisions.
"""

import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from optuna.trial import FrozenTrial, TrialState

from distprune.core.keys import digest
from distprune.core.recipe import Recipe
from distprune.search.config import Budget
from distprune.search.proposer import Proposer
from distprune.search.rungs import Rungs, Vector, dominates
from distprune.search.space import Space
from distprune.store.reports import ReportWriter
from distprune.store.study import Truth

DIRECTIONS: tuple[Literal["maximize", "minimize"], ...] = ("maximize", "minimize")  # objective on validation, kept weights
MOST_DUPLICATES = 50  # in a row: then the space is exhausted


@dataclass
class Entry:
    """What is known of one trial."""

    number: int
    recipe: Recipe
    identity: str  # of the recipe
    attempts: list[str] = field(default_factory=list)  # ids of the workers' attempts, in the order in which they were first heard
    reports: int = 0  # heard so far: the driver knows those with a lower index
    rung: int = -1
    best: float | None = None  # highest score so far: right after a rewind the current one means nothing
    last: dict[str, Any] = field(default_factory=dict)  # latest report
    ended: str = ""  # finished, stopped, error, nan, oom, duplicate; empty while it runs
    stopped: str = ""  # why the driver stopped it: rung, limit
    reason: str = ""  # why it ended, once told
    spent: float = 0.0  # samples really run in earlier attempts
    spent_now: float = 0.0  # and in the latest
    told: bool = False
    params: Mapping[str, Any] = field(default_factory=dict)
    duplicates: list[int] = field(default_factory=list)  # trials that wait for this one's result
    closes: bool = False  # what a policy came to in the end: it is not stopped at a rung

    @property
    def cost(self) -> float:
        """Billed samples so far."""
        return float(self.last.get("cost") or 0.0)

    @property
    def target(self) -> float:
        """Weights that the recipe keeps in the end."""
        total = float(self.last["kept"]) / (1 - float(self.last["sparsity"]))
        return float(round(total * (1 - self.recipe.sparsity)))

    @property
    def decided(self) -> bool:
        """Whether its end is known, told or not."""
        return self.told or bool(self.ended or self.stopped)


@dataclass(frozen=True)
class Assignment:
    """A trial to be run now."""

    number: int
    recipe: Recipe
    known: int


class Book:
    """Decides what runs next, what goes on, and how each trial's end is told."""

    def __init__(
        self,
        *,
        space: Space,
        proposer: Proposer,
        rungs: Rungs,
        truth: Truth,
        reports: ReportWriter,
        most_trials: int,
        most_cost: float | None = None,
        budget: Budget | None = None,
        out_of_time: Callable[[], bool] = lambda: False,
    ) -> None:
        self._space, self._proposer, self.rungs = space, proposer, rungs
        self._truth, self._reports = truth, reports
        self._most_trials, self._most_cost, self._out_of_time = most_trials, most_cost, out_of_time
        self._covering, self._budget = space.covering(), budget
        self.entries: list[Entry] = []
        self._requeued: list[int] = []
        self._first_of: dict[str, int] = {}  # recipe identity -> the trial that runs it
        self._cost = 0.0  # billed samples of all trials
        self._turns = 0  # trials told so far
        self.front: dict[int, Vector] = {}  # finished trials within the budget that no other such trial dominates

    # What Ray's searcher asks.

    def next(self) -> Assignment | None:
        """The next trial to run, or None when none is left. A repeated recipe is answered from the first and never runs again."""
        if self.limit_reached:
            return None
        if self._requeued:
            return self._assign(self.entries[self._requeued.pop(0)])
        for _ in range(MOST_DUPLICATES):
            if len(self.entries) >= self._most_trials:
                return None
            entry = self._born()
            first = self._first_of.setdefault(entry.identity, entry.number)
            if first == entry.number:
                return self._assign(entry)
            self._answer(entry, self.entries[first])
        return None

    def _born(self) -> Entry:
        number = len(self.entries)
        covering = self._covering[number] if number < len(self._covering) else None
        proposal = self._proposer.ask(number, covering, last=number == self._most_trials - 1)
        entry = Entry(number, proposal.recipe, digest(proposal.recipe), params=proposal.params, closes=proposal.closes)
        attrs = {"recipe": entry.recipe.plain(), "identity": entry.identity, **({"closes": True} if entry.closes else {})}
        self._truth.born(number, proposal.params, proposal.distributions, attrs, proposal.system_attrs)
        self.entries.append(entry)
        return entry

    def _assign(self, entry: Entry) -> Assignment:
        return Assignment(entry.number, entry.recipe, entry.reports)

    # What Ray's scheduler asks.

    def hear(self, row: Mapping[str, Any]) -> bool:
        """Take a report in and say whether the trial goes on."""
        entry = self.entries[row["trial"]]
        if not entry.decided and row["index"] >= entry.reports:  # else a zombie's, or sent again after a restart
            self._reports.add(dict(row))
            self._decide(entry, row)
            if not entry.decided and self.limit_reached:
                entry.stopped = "limit"
        return not entry.decided

    def _decide(self, entry: Entry, row: Mapping[str, Any]) -> None:
        """Decide on a report. A pure function of the reports so far: a resumed driver repeats it from the stream."""
        entry.reports = row["index"] + 1
        if row["attempt"] not in entry.attempts:
            entry.attempts.append(row["attempt"])
            entry.spent, entry.spent_now = entry.spent + entry.spent_now, 0.0
        if row["ended"] not in ("", "finished"):
            entry.ended, entry.last = row["ended"], {**entry.last, "extra": row["extra"]}
            return
        self._cost += float(row["cost"]) - entry.cost
        entry.last, entry.spent_now = dict(row), row["spent"]
        if row["final"]:
            entry.ended = "finished"
            vector = (row["objective"], -float(row["kept"]))
            self.rungs.finished(entry.number, entry.rung, vector)
            if self._budget is None or _within(self._budget, entry):
                self._enter_front(entry.number, vector)
            return
        if row["score"] is not None:
            entry.best = max(row["score"], entry.best if entry.best is not None else row["score"])
        if row["rung"] > entry.rung:
            entry.rung = row["rung"]
            assert entry.best is not None, "a report at a rung has a score"
            if not self.rungs.goes_on(entry.number, entry.rung, (entry.best, -entry.target)) and not entry.closes:
                entry.stopped = "rung"

    def _enter_front(self, number: int, vector: Vector) -> None:
        if not any(dominates(other, vector) for other in self.front.values()):
            self.front = {n: other for n, other in self.front.items() if not dominates(vector, other)}
            self.front[number] = vector

    def finish(self, number: int, *, lost: str = "") -> None:
        """Tell how a trial ended; `lost` says why its worker is gone without a word. Telling twice is telling once."""
        entry = self.entries[number]
        if entry.told:
            return
        if lost and not entry.decided:
            entry.ended, entry.last = "error", {**entry.last, "extra": json.dumps({"reason": lost})}
        if not entry.decided:
            return  # interrupted: it stays RUNNING in the journal and is resumed
        self._reports.flush()
        ended, state, values, constraints = verdict(entry, len(self.rungs.costs), self._budget)
        entry.reason = entry.stopped or json.loads(entry.last.get("extra") or "{}").get("reason", "")
        attrs = {
            "ended": ended,
            "reason": entry.reason,
            "rung": entry.rung,
            "cost": entry.cost,
            "spent": entry.spent + entry.spent_now,
            "attempts": len(entry.attempts),
            "turn": self._turn(),
        }
        self._truth.tell(number, state, values, constraints, attrs)
        self._proposer.tell(number, state, values, constraints)
        entry.ended, entry.told = ended, True
        for duplicate in entry.duplicates:
            self._tell_duplicate(self.entries[duplicate], entry)

    def _turn(self) -> int:
        """The order in which trials are told: a sampler that learns is taught in it again."""
        self._turns += 1
        return self._turns

    def _answer(self, entry: Entry, original: Entry) -> None:
        """Answer a repeated recipe with the result of the trial that runs it, now or when that ends."""
        entry.ended = "duplicate"
        if original.told:
            self._tell_duplicate(entry, original)
        else:
            original.duplicates.append(entry.number)

    def _tell_duplicate(self, entry: Entry, original: Entry) -> None:
        _, state, values, constraints = verdict(original, len(self.rungs.costs), self._budget)
        attrs = {
            "ended": "duplicate",
            "duplicate_of": original.number,
            "reason": original.ended,
            "rung": original.rung,
            "cost": 0.0,
            "spent": 0.0,
            "turn": self._turn(),
        }
        constraints = {**constraints, "duplicate": 1.0}  # known already: it must not appear twice in a front
        self._truth.tell(entry.number, state, values, constraints, attrs)
        self._proposer.tell(entry.number, state, values, constraints)
        entry.told = True

    # Limits.

    @property
    def limit_reached(self) -> bool:
        """Whether cost or time is used up; running trials are stopped at their next report."""
        return (self._most_cost is not None and self._cost >= self._most_cost) or self._out_of_time()

    # After a driver's death.

    def reconcile(self, rows: list[dict[str, Any]]) -> dict[str, int]:
        """Rebuild everything from the journal and the report stream: finished stays, decided is told, running is queued again.

        Returns how many trials were found of each kind.
        """
        trials = self._truth.trials()
        self.entries = [_entry_of(trial) for trial in trials]
        for entry in self.entries:
            self._first_of.setdefault(entry.identity, entry.number)
        for row in rows:
            entry = self.entries[row["trial"]]
            if not entry.decided and row["index"] == entry.reports:  # what lies after a lost report is sent again
                self._decide(entry, row)
        for entry, trial in zip(self.entries, trials, strict=True):
            if trial.state.is_finished():
                end = trial.user_attrs["end"]
                entry.ended, entry.reason, entry.told = end["ended"], end["reason"], True
                self._turns = max(self._turns, end.get("turn", 0))
        self._proposer.restore(trials)
        counts = {"ended": sum(entry.told for entry in self.entries), "told now": 0, "queued again": 0}
        for entry in self.entries:
            original = self.entries[self._first_of[entry.identity]]
            if entry.told:
                continue
            if original is not entry:
                self._answer(entry, original)
            elif entry.decided:
                self.finish(entry.number)
                counts["told now"] += 1
            else:
                self._requeued.append(entry.number)
                counts["queued again"] += 1
        return counts

    @property
    def has_work(self) -> bool:
        """Whether a trial is left to run."""
        return not self.limit_reached and (bool(self._requeued) or len(self.entries) < self._most_trials)

    def settle(self) -> None:
        """Tell what is decided and was not told: Ray drops running trials without a word when it is interrupted.

        Under a limit, trials that wait to be run again will not be: they are stopped as the running ones were.
        """
        if self.limit_reached:
            for number in self._requeued:
                self.entries[number].stopped = "limit"
            self._requeued = []
        for entry in self.entries:
            if entry.decided and not entry.told and not entry.ended == "duplicate":
                self.finish(entry.number)
        self._reports.flush()

    def summary(self) -> dict[str, Any]:
        """Counts and the best so far, for the progress display."""
        ends = Counter(entry.ended if entry.told else "running" for entry in self.entries)
        best = max(self.front.values(), default=None)
        return {
            "born": len(self.entries),
            "most": self._most_trials,
            "ends": ends,
            "best": best,
            "front": len(self.front),
            "cost": self._cost,
        }


def _entry_of(trial: FrozenTrial) -> Entry:
    recipe = Recipe.read(trial.user_attrs["recipe"])
    closes = trial.user_attrs.get("closes", False)
    return Entry(trial.number, recipe, trial.user_attrs["identity"], params=trial.params, closes=closes)


def _share(budget: Budget, entry: Entry) -> float | None:
    """What a finished trial costs as a share of the dense network; None where that could not be measured."""
    found = json.loads(entry.last.get("extra") or "{}").get("costs", {}).get(budget.cost.name)
    return None if found is None else float(found)


def _excess(budget: Budget | None, entry: Entry) -> dict[str, float]:
    if budget is None:
        return {}
    share = _share(budget, entry)
    if share is None:
        return {"unmeasured": 1.0}
    excess = share / budget.most - 1
    return {"budget": min(excess, 0.0) if _within(budget, entry) else excess}


def _within(budget: Budget, entry: Entry) -> bool:
    """Whether a finished trial is known to keep to the budget."""
    share = _share(budget, entry)
    return share is not None and share <= budget.most * (1 + 1e-9)


def verdict(entry: Entry, rungs: int, budget: Budget | None = None) -> tuple[str, TrialState, list[float] | None, dict[str, float]]:
    """(ended, Optuna state, values, constraints) of an ended trial.

    A stopped trial is told as complete with its values at the rung and the violated constraint `unfinished`, the share of rungs that it
    did not reach: Optuna's PRUNED carries no values with several objectives, and complete without a constraint would be a lie.
    The constraint `budget` is the excess in budgets, of finished trials only: no other's cost is known.
    """
    if entry.ended and entry.ended not in ("finished", "stopped"):
        return entry.ended, TrialState.FAIL, None, {}
    if entry.ended == "finished":
        return "finished", TrialState.COMPLETE, [float(entry.last["objective"]), float(entry.last["kept"])], _excess(budget, entry)
    if entry.best is None:  # stopped by a limit before it was scored: nothing to learn from
        return "stopped", TrialState.FAIL, None, {}
    unfinished = (rungs - entry.rung) / (rungs + 1)
    return "stopped", TrialState.COMPLETE, [entry.best, entry.target], {"unfinished": max(unfinished, 1e-3)}
