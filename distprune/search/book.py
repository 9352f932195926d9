"""The book: all state of a search. Ray's searcher, scheduler and callback are thin faces of it, and so is the simulator.

Nothing here knows Ray, reads a clock of its own or draws a number: the same reports in the same order give the same decisions.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from distprune.core.keys import digest
from distprune.search.again import Again
from distprune.search.byproducts import ByProduct, ByProducts
from distprune.search.decisions import Decisions
from distprune.search.entry import NOTED, Assignment, Entry
from distprune.search.failures import MOST_DEATHS, MOST_SILENCES, end_of
from distprune.search.goals import Goals
from distprune.search.known import Known
from distprune.search.more import More
from distprune.search.order import Order
from distprune.search.proposer import MOST_AHEAD, Proposer
from distprune.search.rungs import Rungs
from distprune.search.verdict import verdict
from distprune.store.reports import ReportWriter
from distprune.store.study import Truth


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
        more: More | None = None,
        byproducts: ByProducts | None = None,
    ) -> None:
        self._proposer, self.rungs, self._decisions = proposer, rungs, Decisions(goals, rungs, most_wall=most_wall)
        self._truth, self._reports = truth, reports
        self._most_trials, self._most_cost, self._out_of_time = most_trials, most_cost, out_of_time
        self._goals = goals
        self.entries: list[Entry] = []
        self._requeued: list[int] = []
        self._owed: list[int] = []  # trials that are run again for reports that were lost
        self._turns = 0  # trials told so far
        self._again, self._order, self._more = again or Again(), order or Order(), more or More()
        self._known = Known(byproducts)
        self._busy: set[int] = set()  # trials that were given to a worker and have not ended
        self._finale: list[tuple[Entry, int]] = []  # repeats of finalists that are still to be begun: (original, repeat)
        self._in_finale = False
        self.on_report: Callable[[Mapping[str, Any]], None] = lambda row: None  # hears each report that is new
        self.holds: Callable[[], str] = lambda: ""  # why no trial can be begun for now: full, crowded
        self._ends: Counter[str] = Counter()  # how the trials that were told ended
        self.front = self._decisions.front

    # What Ray's searcher asks.

    def next(self) -> Assignment | None:
        """The next trial to run, or None when none is left. A repeated recipe is answered from the first and never runs again."""
        if self._owed:  # limits were kept to when it was first run
            return self._assign(self._begun_before(self._owed.pop(0)))
        if self.limit_reached or self.gave_up:
            return None
        if self._requeued:
            return self._assign(self._begun_before(self._requeued.pop(0)))
        if (found := self._known.take(self._born_of_a_round)) is not None:
            return self._assign(found)
        if (promoted := self.rungs.promotable()) is not None:
            self._decisions.leave_rung(self.entries[promoted])
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
        return not (self._in_finale or self._known.exhausted or self._known.proposed >= self._most)

    def _propose(self) -> None:
        """Have one more trial wait, if the sampler comes up with a recipe that is new; repeated ones are answered."""
        while self._may_propose:
            entry = self._born()
            if (first := self._known.propose(entry)) == entry.number:
                self._order.wait(entry.number, entry.recipe)
                return
            self._answer(entry, self.entries[first])

    @property
    def is_busy(self) -> bool:
        """Whether a worker has a trial."""
        return bool(self._busy)

    def _born(self) -> Entry:
        number, place = len(self.entries), self._known.proposed
        proposal = self._proposer.ask(number, place=place, last=place == self._most - 1)
        recipe, repeat = self._again.seeded(proposal.recipe)
        entry = Entry(number, recipe, digest(recipe), params=proposal.params, spared=proposal.spared, repeat=repeat)
        self._record(entry, proposal.distributions, proposal.system_attrs)
        return entry

    def _born_again(self, original: Entry, repeat: int) -> Entry:
        recipe = self._again.of_finalist(original.recipe, repeat)
        params, distributions = self._truth.parameters(original.number)
        entry = Entry(len(self.entries), recipe, digest(recipe), params=params, repeat_of=original.number, repeat=repeat)
        self._record(entry, distributions, {})
        return entry

    def _born_of_a_round(self, found: ByProduct) -> Entry:
        _, distributions = self._truth.parameters(found.number)
        entry = Entry(len(self.entries), found.recipe, found.identity, params=found.params, round_of=found.number)
        self._record(entry, distributions, {})
        return entry

    def _record(self, entry: Entry, distributions: Mapping[str, Any], system_attrs: Mapping[str, Any]) -> None:
        attrs: dict[str, Any] = {"recipe": entry.recipe.plain(), "identity": entry.identity}
        attrs |= {key: value for key in NOTED if (value := getattr(entry, key)) is not None and (value or key.endswith("_of"))}
        self._truth.born(entry.number, entry.params, distributions, attrs, system_attrs)
        self.entries.append(entry)

    def prepare(self) -> None:
        """Have a proposal made that will be asked for, while the workers are busy."""
        for ahead in range(MOST_AHEAD):
            number, place = len(self.entries) + ahead, self._known.proposed + ahead
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
        return Assignment(entry.number, entry.recipe, entry.reports, entry.ask, judged=entry.round_of is None)

    # What Ray's scheduler asks.

    def hear(self, row: Mapping[str, Any]) -> bool:
        """Take a report in and say whether the trial goes on."""
        entry: Entry = self.entries[row["trial"]]
        if entry.goes_on and row["index"] >= entry.reports:  # else a zombie's, or sent again after a restart
            if self._more.after_end(entry, row, self._reports):  # in place of its end
                return False
            self._reports.add(dict(row))
            self._decisions.take(entry, row)
            self._order.reached(entry.number, entry.cost)
            if not (entry.decided or entry.owed) and (self.limit_reached if entry.proposed else self._out_of_time()):
                entry.stopped = "limit"
            self.on_report(row)
        return entry.goes_on

    def time_left(self, number: int) -> float:
        """Seconds that a trial may yet run, from its last word on."""
        return self._decisions.time_left(self.entries[number])

    def overdue(self, number: int, silent: float) -> bool:
        """End a trial whose worker has said nothing for `silent` seconds, if its time or that of the search is up; say whether it is."""
        entry = self.entries[number]
        if not entry.goes_on or entry.owed:
            return False
        if self._out_of_time():
            entry.stopped = "limit"
        self._decisions.time_out(entry, silent)
        return entry.decided

    def finish(self, number: int) -> None:
        """Tell how a trial ended. Telling twice is telling once."""
        entry = self.entries[number]
        if entry.told:
            return
        self._busy.discard(number)
        self._order.ended(number)
        if not entry.decided:
            if entry.asking:
                entry.asking = False
                self._queue(number)
            return  # it waits at a rung, or was interrupted: it stays RUNNING in the journal and is gone on with
        self._decisions.leave_rung(entry, goes_on=False)
        ended, state, values, constraints = verdict(entry, len(self.rungs.costs), self._goals)
        entry.reason = entry.stopped or entry.extra.get("reason", "")
        if entry.owed and ended != "finished":
            return  # it had finished: what is left of it is kept, and the next driver tries again
        self._reports.flush(sync=True)  # what is told is never ahead of what was reported, even if the machine dies
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
        if entry.repeat_of is not None:
            constraints = {**constraints, "repeat": 1.0}  # it is not to appear in a front
        if self._truth.tell(number, state, values, constraints, attrs) and entry.proposed:
            self._proposer.tell(number, state, values, constraints, rung=entry.rung)
        entry.ended, entry.told, entry.owed = ended, True, False
        self._ends[ended] += 1
        self._known.told(entry)
        for duplicate in entry.duplicates:
            self._tell_duplicate(self.entries[duplicate], entry)

    # What Ray says of workers.

    def died(self, number: int, cause: str, *, free: bool = False) -> None:
        """Note why a trial's worker died; `free` if that says nothing about the trial."""
        entry = self.entries[number]
        entry.deaths.append(cause)
        entry.stuck += not (self._more.after_death(entry, cause, self._reports) or free)

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
            self._queue(number)
        elif entry.goes_on:
            entry.fail(*end_of(entry.deaths[-entry.stuck :]))
            self.finish(number)
        else:
            self.finish(number)

    def _queue(self, number: int) -> None:
        (self._owed if self.entries[number].owed else self._requeued).append(number)

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
        return (self._most_cost is not None and self._decisions.cost >= self._most_cost and not self._in_finale) or self._out_of_time()

    @property
    def gave_up(self) -> str:
        """Why no more trials are begun though limits allow it: the same error again and again. Empty if all is well."""
        return self._decisions.repeated.verdict

    # After a driver's death.

    def reconcile(self, rows: list[dict[str, Any]]) -> dict[str, int]:
        """Rebuild everything from the journal and the report stream: finished stays, decided is told, running is queued again.

        So is what was told as finished and has lost its last report, to a machine that died or a damaged file: it comes to the same bits.
        Rows are of trials that the journal has. Returns how many trials were found of each kind.
        """
        trials = self._truth.trials()
        ends = {trial.number: trial.user_attrs["end"] for trial in trials if trial.state.is_finished()}
        finished = {row["trial"] for row in rows if row["ended"] == "finished"}
        self.entries = [Entry.of(trial) for trial in trials]
        for entry in self.entries:
            if entry.number in ends:
                entry.owed = ends[entry.number]["ended"] == "finished" and entry.number not in finished
                entry.told = not entry.owed
            if entry.proposed:
                self._known.propose(entry)
            elif entry.round_of is not None:
                self._known.enter(entry, finished=entry.number in ends and ends[entry.number]["ended"] == "finished")
        self._again.restore(self.entries)
        for row in rows:
            entry, index = self.entries[row["trial"]], row["index"]
            if self._more.restore(entry, row):
                continue
            # Of a trial that was told nothing is sent again, and what is left counts; else all that lies after a lost report comes again.
            if index >= entry.reports if entry.told else index == entry.reports and not entry.decided:
                self._decisions.went_on(entry)
                self._decisions.take(entry, row)
        for number, end in ends.items():
            self._turns = max(self._turns, end.get("turn", 0))
            if (entry := self.entries[number]).told:
                self._decisions.leave_rung(entry, goes_on=False)
                entry.ended, entry.reason = end["ended"], end["reason"]
                self._ends[entry.ended] += 1
        for number in sorted(ends, key=lambda number: ends[number].get("turn", 0)):
            if self.entries[number].told:
                self._known.told(self.entries[number])
        self._decisions.repeated.forgive()  # a resumed search tries again
        self._proposer.restore([trial for trial, entry in zip(trials, self.entries, strict=True) if entry.proposed])
        counts = {"ended": sum(entry.told for entry in self.entries), "told now": 0, "queued again": 0}
        for entry in self.entries:
            original = self.entries[self._known.answers_for(entry)] if entry.proposed else entry
            if entry.told:
                continue
            if original is not entry:
                self._answer(entry, original)
            elif entry.decided:
                self.finish(entry.number)
                counts["told now"] += 1
            elif entry.goes_on:
                self._queue(entry.number)
                counts["queued again"] += 1
        return counts

    @property
    def has_work(self) -> bool:
        """Whether a trial is left to run."""
        if self._owed:
            return True
        waiting = self._requeued or self._finale or self._known.has_rounds or self._order.waiting
        return not self.limit_reached and (bool(waiting) or self._may_propose or any(entry.waits for entry in self.entries))

    @property
    def has_rounds(self) -> bool:
        """Whether rounds are left to be entered, of trials that were told when nothing else was left to run."""
        return self._known.has_rounds and not (self.limit_reached or self.gave_up)

    def open_finale(self) -> int:
        """Go over to the repeats of finalists once all that was proposed has ended; returns how many there are to be run.

        A limit of trials or cost is one of the search: finalists are run beyond it. One of time holds for them too.
        """
        if self._out_of_time() or self.gave_up or any(not entry.told for entry in self.entries if entry.repeat_of is None):
            return 0
        self._in_finale = True
        self._finale = self._again.wanted(self.entries, self.front)
        return len(self._finale) + len(self._requeued) + len(self._owed)

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
        over = not waiting and not self._may_propose and self.rungs.promotable() is None
        for entry in self.entries if over or self.limit_reached else ():
            if entry.waits:
                entry.stopped = "rung" if over else "limit"
        for entry in self.entries:
            if entry.decided and not entry.told and not entry.ended == "duplicate":
                self.finish(entry.number)
        self._reports.flush(sync=True)
        self._truth.sync()

    def summary(self) -> dict[str, Any]:
        """Counts and the best so far, for the progress display."""
        ends = self._ends + Counter(running=len(self.entries) - self._ends.total())
        best = max(self.front.values(), default=None)
        return {
            "born": len(self.entries),
            "most": self._most + len(self.entries) - self._known.proposed + len(self._finale),
            "ends": ends,
            "best": best,
            "front": len(self.front),
            "cost": self._decisions.cost,
        }
