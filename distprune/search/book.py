"""The book: all state of a search. Ray's searcher, scheduler and callback are thin faces of it, and so is the simulator.

Nothing here knows Ray, reads a clock of its own or draws a number: the same reports in the same order give the same decisions.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from distprune.core.keys import digest
from distprune.search.again import Again
from distprune.search.entry import Assignment, Entry
from distprune.search.failures import MOST_DEATHS, MOST_SILENCES, Repeated
from distprune.search.goals import Goals
from distprune.search.order import Order
from distprune.search.proposer import MOST_AHEAD, Proposer
from distprune.search.rungs import Rungs, Vector, dominates
from distprune.search.verdict import verdict
from distprune.store.reports import ReportWriter
from distprune.store.study import Truth

MOST_DUPLICATES = 50  # in a row: then the space is exhausted


class Book:
    """Decides what runs next, what goes on, and how each trial's end is told."""

    def __init__(
        self,
        *,
        goals: Goals,
        proposer: Proposer,
        rungs: Rungs,
        truth: Truth,
        reports: ReportWriter,
        most_trials: int,
        most_cost: float | None = None,
        most_wall: float | None = None,
        out_of_time: Callable[[], bool] = lambda: False,
        again: Again | None = None,
        order: Order | None = None,
    ) -> None:
        self._proposer, self.rungs = proposer, rungs
        self._truth, self._reports = truth, reports
        self._most_trials, self._most_cost, self._out_of_time = most_trials, most_cost, out_of_time
        self._goals = goals
        self.entries: list[Entry] = []
        self._requeued: list[int] = []
        self._first_of: dict[str, int] = {}  # recipe identity -> the trial that runs it
        self._cost = 0.0  # billed samples of all trials
        self._exhausted = False  # the space, of recipes that were not proposed before
        self._turns = 0  # trials told so far
        self._again, self._order = again or Again(), order or Order()
        self._proposed = 0  # trials that were proposed: all but repeats of finalists
        self._busy: set[int] = set()  # trials that were given to a worker and have not ended
        self._finale: list[tuple[Entry, int]] = []  # repeats of finalists that are still to be begun: (original, repeat)
        self._in_finale = False
        self._most_wall, self._repeated = most_wall, Repeated()
        self.on_report: Callable[[Mapping[str, Any]], None] = lambda row: None  # hears each report that is new
        self.holds: Callable[[], str] = lambda: ""  # why no trial can be begun for now: full, crowded
        self._ends: Counter[str] = Counter()  # how the trials that were told ended
        self.front: dict[int, Vector] = {}  # finished trials within the budget that no other such trial dominates

    # What Ray's searcher asks.

    def next(self) -> Assignment | None:
        """The next trial to run, or None when none is left. A repeated recipe is answered from the first and never runs again."""
        if self.limit_reached or self.gave_up:
            return None
        if self._requeued:
            return self._assign(self._begun_before(self._requeued.pop(0)))
        if (promoted := self.rungs.promotable()) is not None:
            self._leave_rung(self.entries[promoted])
            return self._assign(self._begun_before(promoted))
        if self._finale:
            return self._assign(self._born_again(*self._finale.pop(0)))
        while (number := self._order.take(more=self._may_propose)) is None:
            if not self._may_propose:
                return None
            self._propose()
        return self._assign(self.entries[number])

    @property
    def _may_propose(self) -> bool:
        """Whether a new recipe may be proposed."""
        return not (self._in_finale or self._exhausted or self._proposed >= self._most)

    def _propose(self) -> None:
        """Have one more trial wait, if the sampler comes up with a recipe that is new; repeated ones are answered."""
        for _ in range(MOST_DUPLICATES):
            if not self._may_propose:
                return
            entry = self._born()
            first = self._first_of.setdefault(entry.identity, entry.number)
            if first == entry.number:
                self._order.wait(entry.number, entry.recipe)
                return
            self._answer(entry, self.entries[first])
        self._exhausted = True

    @property
    def waits(self) -> bool:
        """Whether a worker for which there is no trial may get one later: one that runs may yet let another go on."""
        return self.rungs.promotes and bool(self._busy) and not self.limit_reached and not self.gave_up

    @property
    def is_busy(self) -> bool:
        """Whether a worker has a trial."""
        return bool(self._busy)

    def _born(self) -> Entry:
        number, place = len(self.entries), self._proposed
        proposal = self._proposer.ask(number, place=place, last=place == self._most - 1)
        recipe, repeat = self._again.seeded(proposal.recipe)
        entry = Entry(number, recipe, digest(recipe), params=proposal.params, closes=proposal.closes, repeat=repeat)
        self._record(entry, proposal.distributions, proposal.system_attrs)
        self._proposed += 1
        return entry

    def _born_again(self, original: Entry, repeat: int) -> Entry:
        recipe = self._again.of_finalist(original.recipe, repeat)
        params, distributions = self._truth.parameters(original.number)
        entry = Entry(len(self.entries), recipe, digest(recipe), params=params, repeat_of=original.number, repeat=repeat)
        self._record(entry, distributions, {})
        return entry

    def _record(self, entry: Entry, distributions: Mapping[str, Any], system_attrs: Mapping[str, Any]) -> None:
        attrs: dict[str, Any] = {"recipe": entry.recipe.plain(), "identity": entry.identity}
        attrs |= {key: value for key in ("closes", "repeat_of", "repeat") if (value := getattr(entry, key)) not in (False, None, 0)}
        if entry.repeat_of is not None:
            attrs["repeat_of"] = entry.repeat_of  # trial 0 too
        self._truth.born(entry.number, entry.params, distributions, attrs, system_attrs)
        self.entries.append(entry)

    def prepare(self) -> None:
        """Have a proposal made that will be asked for, while the workers are busy."""
        for ahead in range(MOST_AHEAD):
            number, place = len(self.entries) + ahead, self._proposed + ahead
            if self._in_finale or place >= self._most or self.limit_reached:
                return
            if self._proposer.prepare(number, place=place, beside=len(self._busy) - 1):
                return

    @property
    def _most(self) -> int:
        """Trials that are proposed at most."""
        return self._most_trials if self._proposer.size is None else min(self._most_trials, self._proposer.size)

    def _begun_before(self, number: int) -> Entry:
        entry = self.entries[number]
        self._order.again(number, entry.recipe)
        return entry

    def _assign(self, entry: Entry) -> Assignment:
        self._busy.add(entry.number)
        return Assignment(entry.number, entry.recipe, entry.reports)

    # What Ray's scheduler asks.

    def hear(self, row: Mapping[str, Any]) -> bool:
        """Take a report in and say whether the trial goes on."""
        entry: Entry = self.entries[row["trial"]]
        if entry.goes_on and row["index"] >= entry.reports:  # else a zombie's, or sent again after a restart
            self._reports.add(dict(row))
            self._decide(entry, row)
            self._order.reached(entry.number, entry.cost)
            if not entry.decided and (self.limit_reached if entry.repeat_of is None else self._out_of_time()):
                entry.stopped = "limit"
            self.on_report(row)
        return entry.goes_on

    def _decide(self, entry: Entry, row: Mapping[str, Any]) -> None:
        """Decide on a report. A pure function of the reports so far: a resumed driver repeats it from the stream."""
        entry.reports = row["index"] + 1
        if row["attempt"] not in entry.attempts:
            entry.attempts.append(row["attempt"])
            entry.spent, entry.spent_now = entry.spent + entry.spent_now, 0.0
            entry.wall, entry.wall_now = entry.wall + entry.wall_now, 0.0
        entry.stuck = entry.silences = 0
        if row["ended"] not in ("", "finished"):
            entry.ended, entry.last = row["ended"], {**entry.last, "extra": row["extra"]}
            if entry.ended == "error":
                self._repeated.failed(entry.extra.get("reason", ""), row["index"])
            return
        self._repeated.went_on(row["index"])
        self._cost += float(row["cost"]) - entry.cost
        entry.last, entry.spent_now, entry.wall_now = dict(row), row["spent"], float(row.get("wall_s") or 0.0)
        if row["final"]:
            entry.ended = "finished"
            vector = self._goals.reached(entry)
            if entry.repeat_of is not None:
                return
            self.rungs.finished(entry.number, entry.rung, self._goals.ranked(entry))
            if self._goals.met(entry):
                self._enter_front(entry.number, vector)
            return
        if row["score"] is not None and math.isfinite(row["score"]):
            entry.best = max(row["score"], entry.best if entry.best is not None else row["score"])
            entry.costs = entry.extra.get("costs", entry.costs)
        if row["rung"] > entry.rung:
            entry.rung = row["rung"]
            self._compare(entry)
        if self._most_wall is not None and not entry.decided and entry.wall + entry.wall_now >= self._most_wall:
            entry.fail("timeout", f"it ran for {entry.wall + entry.wall_now:.0f} s, and limits.trial_wall is {self._most_wall:g}")

    def _compare(self, entry: Entry) -> None:
        """Let a trial compete at the rung that it came to: it goes on, waits there or is stopped."""
        if entry.repeat_of is not None:
            return
        vector = None if entry.best is None else self._goals.ranked(entry)
        if entry.closes:
            if vector is not None:
                self.rungs.note(entry.number, entry.rung, vector)
        elif vector is None or not self.rungs.goes_on(entry.number, entry.rung, vector):
            if self.rungs.promotes and vector is not None:
                entry.paused = entry.rung
            else:
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
            entry.fail("lost", lost)
        if not entry.decided:
            if entry.paused >= 0:
                self._busy.discard(number)
                self._order.ended(number)
            return  # it waits at a rung, or was interrupted: it stays RUNNING in the journal and is gone on with
        self._leave_rung(entry, goes_on=False)
        self._reports.flush()
        ended, state, values, constraints = verdict(entry, len(self.rungs.costs), self._goals)
        entry.reason = entry.stopped or entry.extra.get("reason", "")
        attrs = {
            "ended": ended,
            "reason": entry.reason,
            "rung": entry.rung,
            "cost": entry.cost,
            "spent": entry.spent + entry.spent_now,
            "attempts": len(entry.attempts),
            "deaths": entry.deaths,
            "turn": self._turn(),
        }
        if entry.repeat_of is None:
            self._truth.tell(number, state, values, constraints, attrs)
            self._proposer.tell(number, state, values, constraints, rung=entry.rung)
        else:
            self._truth.tell(number, state, values, {**constraints, "repeat": 1.0}, attrs)  # it is not to appear in a front
        entry.ended, entry.told = ended, True
        self._ends[ended] += 1
        self._busy.discard(number)
        self._order.ended(number)
        for duplicate in entry.duplicates:
            self._tell_duplicate(self.entries[duplicate], entry)

    # What Ray says of workers.

    def died(self, number: int, cause: str, *, free: bool = False) -> None:
        """Note why a trial's worker died; `free` if that says nothing about the trial."""
        entry = self.entries[number]
        entry.deaths.append(cause)
        entry.stuck += not free

    def silent(self, number: int, seconds: float) -> None:
        """Note that a trial's worker is given up for its silence."""
        entry = self.entries[number]
        entry.silences += 1
        if entry.silences >= MOST_SILENCES and not entry.decided:
            entry.fail("timeout", f"its workers said nothing for {seconds:g} s, {entry.silences} times without a report in between")

    def gone(self, number: int) -> None:
        """A trial's worker is gone: the trial is queued again, unless it has come to its end or its workers die without getting on."""
        entry = self.entries[number]
        if entry.goes_on and entry.stuck < MOST_DEATHS:
            self._busy.discard(number)
            self._order.ended(number)
            self._requeued.append(number)
        elif entry.goes_on:
            causes = ", ".join(entry.deaths[-entry.stuck :])
            self.finish(number, lost=f"its workers died {entry.stuck} times without a report in between: {causes}")
        else:
            self.finish(number)

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
        _, state, values, constraints = verdict(original, len(self.rungs.costs), self._goals)
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
        self._proposer.tell(entry.number, state, values, constraints, rung=original.rung)
        entry.told = True
        self._ends[entry.ended] += 1

    # Limits.

    @property
    def limit_reached(self) -> bool:
        """Whether cost or time is used up; running trials are stopped at their next report."""
        return (self._most_cost is not None and self._cost >= self._most_cost and not self._in_finale) or self._out_of_time()

    @property
    def gave_up(self) -> str:
        """Why no more trials are begun though limits allow it: the same error again and again. Empty if all is well."""
        return self._repeated.verdict

    # After a driver's death.

    def reconcile(self, rows: list[dict[str, Any]]) -> dict[str, int]:
        """Rebuild everything from the journal and the report stream: finished stays, decided is told, running is queued again.

        Returns how many trials were found of each kind.
        """
        trials = self._truth.trials()
        self.entries = [Entry.of(trial) for trial in trials]
        for entry in self.entries:
            if entry.repeat_of is None:
                self._first_of.setdefault(entry.identity, entry.number)
                self._proposed += 1
        self._again.restore(self.entries)
        for row in rows:
            entry = self.entries[row["trial"]]
            if not entry.decided and row["index"] == entry.reports:  # what lies after a lost report is sent again
                self._leave_rung(entry)  # a trial that waited and reports was promoted
                self._decide(entry, row)
        for entry, trial in zip(self.entries, trials, strict=True):
            if trial.state.is_finished():
                end = trial.user_attrs["end"]
                entry.ended, entry.reason, entry.told = end["ended"], end["reason"], True
                self._ends[entry.ended] += 1
                self._turns = max(self._turns, end.get("turn", 0))
        self._repeated.forgive()  # a resumed search tries again
        self._proposer.restore([trial for trial, entry in zip(trials, self.entries, strict=True) if entry.repeat_of is None])
        counts = {"ended": sum(entry.told for entry in self.entries), "told now": 0, "queued again": 0}
        for entry in self.entries:
            original = self.entries[self._first_of[entry.identity]] if entry.repeat_of is None else entry
            if entry.told:
                continue
            if original is not entry:
                self._answer(entry, original)
            elif entry.decided:
                self.finish(entry.number)
                counts["told now"] += 1
            elif entry.goes_on:
                self._requeued.append(entry.number)
                counts["queued again"] += 1
        return counts

    def _leave_rung(self, entry: Entry, *, goes_on: bool = True) -> None:
        if entry.paused >= 0:
            self.rungs.leaves(entry.number, entry.paused, goes_on=goes_on)
            entry.paused = -1

    @property
    def has_work(self) -> bool:
        """Whether a trial is left to run."""
        more = bool(self._finale) if self._in_finale else self._proposed < self._most
        waiting = self._requeued or self._order.waiting
        return not self.limit_reached and (bool(waiting) or more or any(entry.waits for entry in self.entries))

    def open_finale(self) -> int:
        """Go over to the repeats of finalists once all that was proposed has ended; returns how many there are to be run.

        A limit of trials or cost is one of the search: finalists are run beyond it. One of time holds for them too.
        """
        if self._out_of_time() or self.gave_up or any(not entry.told for entry in self.entries if entry.repeat_of is None):
            return 0
        self._in_finale = True
        self._finale = self._again.wanted(self.entries, self.front)
        return len(self._finale) + len(self._requeued)

    def violated(self, entry: Entry) -> list[str]:
        """The constraints that a finished trial does not keep to, for which it is not on the front."""
        return [name for name, excess in self._goals.violations(entry).items() if excess > 0] if entry.ended == "finished" else []

    def repeats(self) -> dict[int, list[Entry]]:
        """Finalist -> its finished repeats."""
        found: dict[int, list[Entry]] = {}
        for entry in self.entries:
            if entry.repeat_of is not None and entry.told and entry.ended == "finished":
                found.setdefault(entry.repeat_of, []).append(entry)
        return found

    def settle(self) -> None:
        """Tell what is decided and was not told: Ray drops running trials without a word when it is interrupted.

        Under a limit, trials that wait to be run again will not be: they are stopped as the running ones were. Those that wait at rungs
        are stopped when nothing is left that could let them go on.
        """
        if self.limit_reached:
            for number in [*self._requeued, *self._order.drop()]:
                if self.entries[number].repeat_of is None:
                    self.entries[number].stopped = "limit"
            self._requeued = [number for number in self._requeued if not self.entries[number].stopped]
        waiting = self._busy or self._requeued or self._order.waiting
        over = not waiting and (self._exhausted or self._proposed >= self._most)
        over = over and self.rungs.promotable() is None
        for entry in self.entries if over or self.limit_reached else ():
            if entry.waits:
                entry.stopped = "rung" if over else "limit"
        for entry in self.entries:
            if entry.decided and not entry.told and not entry.ended == "duplicate":
                self.finish(entry.number)
        self._reports.flush()

    def summary(self) -> dict[str, Any]:
        """Counts and the best so far, for the progress display."""
        ends = self._ends + Counter(running=len(self.entries) - self._ends.total())
        best = max(self.front.values(), default=None)
        return {
            "born": len(self.entries),
            "most": self._most + len(self.entries) - self._proposed + len(self._finale),
            "ends": ends,
            "best": best,
            "front": len(self.front),
            "cost": self._cost,
        }
