"""What a trial takes from the stage cache and gives to it, so that no prefix of a plan is run twice.

A trial runs in hops. Before each it looks for the farthest position of its plan that is in the cache and is not beyond the next report
that it has to score itself; if there is none, it becomes the producer of the next position that is worth keeping, or waits for who is.
"""

import json
import math
import time
from collections.abc import Callable, Generator, Sequence
from typing import Any

from torch import Tensor

from distprune.core import prefix
from distprune.core.executor import Report, walk
from distprune.core.prefix import Position, Prefixes
from distprune.core.run import Run, root_key
from distprune.errors import UserError
from distprune.store.cache import Cache
from distprune.store.lease import STALE_S, Lease, Watch, is_own

SHARE_OF_SILENCE = 0.25  # that a trial waits at most between two reports, of the time after which its worker is given up
UNKNOWN_S = 60.0  # that a trial waits for a producer who does not know yet how fast it is
_POLL_S = 0.2
_PACES: dict[str, float] = {}  # root key -> seconds a sample in this process, as latest measured

_END = object()

Record = dict[str, Any]  # a report as plans share it: plain data


class Sharing:
    """The cache, as one trial sees it. `clock` and `sleep` are for waiting only."""

    def __init__(
        self,
        cache: Cache,
        run: Run,
        rungs: Sequence[float],
        *,
        least: int | None = None,
        silence: float | None = None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._cache, self._run, self._rungs, self._clock, self._sleep = cache, run, rungs, clock, sleep
        batch_size = run.recipe.train.batch_size
        self._least = prefix.worth(run.env.task.steps_per_epoch(batch_size), batch_size) if least is None else least
        self._root = root_key(run.recipe, run.env.device, ranks=run.env.task.ranks.size)
        self._prefixes = Prefixes(self._root, run.plan, run.env.report_every)
        self._stops = self._prefixes.stops(rungs, self._least)
        self._lease: tuple[str, Lease] | None = None
        self._waited: set[str] = set()  # keys that were waited for
        self.served = 0  # samples that were billed and not run
        self._begun, self._at = clock(), run.state.ledger.cost  # since when, and since which bill, this process trains
        self._most_wait = math.inf if silence is None else SHARE_OF_SILENCE * silence
        self._heard = clock()  # when something was reported

    def reports(self, rows: Sequence[dict[str, Any]], limit: Callable[[], float]) -> Generator[Report | dict[str, Any], None, None]:
        """What is left of the run: its reports as they are made, and rows of those that come with a state from the cache.

        `rows` are the trial's reports so far, entered as they come; `limit` says the bill from which the next report must be scored.
        """
        run = self._run
        steps, look, crossed = walk(run.plan, run.state, run.env), True, 0
        try:
            while True:
                if look and (taken := self._take(len(rows), limit())) is not None:
                    yield from map(self._row, taken)
                    if taken:
                        self._heard = self._clock()
                    steps = walk(run.plan, run.state, run.env, arriving=True)
                report = next(steps, _END)
                if report is _END:
                    return
                if isinstance(report, Report):
                    reached, due = sum(report.cost >= cost for cost in self._rungs), limit()
                    look = self._give(rows, crossed=reached > crossed)
                    crossed = reached
                    yield report
                    self._heard = self._clock()
                    look |= limit() != due  # it was scored
                else:
                    look = self._give(rows) or self._remembers
        finally:
            self.close()

    @property
    def _remembers(self) -> bool:
        """Whether a snapshot was just taken."""
        state = self._run.state
        return not state.entered and bool(self._run.plan.stages[state.stage - 1].writes)

    # Taking.

    def _take(self, records: int, limit: float) -> list[Record] | None:
        """Put the run's state as far as the cache has it and return the reports on the way, after the `records` that were made.

        None if it stays where it is. The last report before the new place is below `limit` (cost); the one that is due there may not be.
        """
        state = self._run.state
        if state.edits:  # states are loaded into networks as they are built
            return None
        self._measure()
        billed, found = state.ledger.cost, None
        try:
            while (found := self._load(records, limit)) is None and self._await(limit):
                pass
        except OSError:  # the cache is a help: where it cannot be read, the trial goes on without
            pass
        self.served += state.ledger.cost - billed
        self._begun, self._at = self._clock(), state.ledger.cost
        return found

    def _ahead(self, limit: float) -> list[Position]:
        """The positions up to the first whose report must be scored, as far as costs are known beforehand."""
        found = []
        for position in self._prefixes.beyond(self._run.state):
            found.append(position)
            if position.exact and position.reports and position.most >= limit:
                break
        return found

    def _load(self, records: int, limit: float) -> list[Record] | None:
        ahead = self._ahead(limit)
        there = self._cache.have(map(self._prefixes.key, ahead))
        for position in reversed(ahead):
            key = self._prefixes.key(position)
            if key in there and (snapshots := self._snapshots(position)) is not None:
                found = self._load_one(key, position, records, limit, snapshots)
                if found is not None:
                    return found
        return None

    def _load_one(
        self, key: str, position: Position, records: int, limit: float, snapshots: dict[str, dict[str, Tensor]]
    ) -> list[Record] | None:
        with self._cache.reading(key) as path:
            if path is None:
                return None
            try:
                new = prefix.reports_of(path, key, position)[records:]
                if any(record["cost"] >= limit for record in new):
                    return None
                prefix.load(path, self._run.state, position, snapshots)
            except UserError:  # whole, and yet not what its name says
                self._cache.discard(key)
                return None
            return new

    def _snapshots(self, position: Position) -> dict[str, dict[str, Tensor]] | None:
        """The snapshots that are read after a position; None if one cannot be had."""
        state, found = self._run.state, {}
        for tag, need in self._prefixes.needs(position).items():
            if need.stage < state.stage:
                found[tag] = state.snapshots[tag]
            elif need.key == self._prefixes.root:  # which is where the state stands
                found[tag] = state.values()
            else:
                with self._cache.reading(need.key) as path:
                    if path is None or not need.found:
                        return None
                    found[tag] = prefix.values_of(path, self._run.env.device)
        return found

    # One producer.

    def _await(self, limit: float) -> bool:
        """Become the producer of the next stop, or wait for who is: whether something to load has come."""
        stop = self._next_stop(limit)
        key = None if stop is None else self._prefixes.key(stop)
        if self._lease is not None and self._lease[0] != key:
            self.close()
        if stop is None or key is None or self._lease is not None or key in self._waited:
            return False
        path = self._cache.lease(key)
        if path is None:
            return False
        began, watch = self._clock(), Watch(path, stale=STALE_S, clock=self._clock)
        samples = stop.most - self._run.state.ledger.cost
        while True:
            try:
                lease = Lease.take(path)
            except OSError:  # a full disk, a folder that nobody may write to, a file system without links
                return False
            if lease is not None:
                self._lease = (key, lease)
                self._measure()
            if self._cache.have([key]):
                self.close()
                self._waited.add(key)
                return True
            if lease is not None:
                return False
            content, now = watch.look() or {}, self._clock()
            if is_own(content) or now - began >= self._patience(content, samples) or now - self._heard >= self._most_wait:
                return False
            self._sleep(_POLL_S)

    def _next_stop(self, limit: float) -> Position | None:
        ahead = {position.order for position in self._ahead(limit)}
        stop = next((stop for stop in self._stops if stop.order in ahead), None)
        needed = self._prefixes.needs(stop).values() if stop else ()
        written = all(need.stage < self._run.state.stage or need.key == self._prefixes.root for need in needed)
        return stop if written else None  # what could not be loaded is not waited for

    def _patience(self, content: dict[str, Any], samples: int) -> float:
        """Seconds that producing would take: by this process's own pace, else by what the producer notes."""
        pace = _PACES.get(self._root, content.get("pace"))
        return UNKNOWN_S if pace is None else samples * float(pace)

    def _measure(self) -> None:
        run = self._run.state.ledger.cost - self._at
        if run > 0:
            _PACES[self._root] = (self._clock() - self._begun) / run
        if self._lease is not None and self._root in _PACES:
            self._lease[1].note = {"pace": _PACES[self._root]}

    # Giving.

    def _give(self, rows: Sequence[dict[str, Any]], *, crossed: bool = False) -> bool:
        """Keep the state where it stands, if that is a stop, and say whether it is; `rows` are the reports before, `crossed` a rung."""
        self._measure()
        position = self._prefixes.at(self._run.state)
        if position is None or not self._is_kept(position, crossed):
            return False
        key = self._prefixes.key(position)
        try:
            self._cache.publish(key, lambda path: prefix.save(path, self._run.state, key, self._records(rows)))
        except Exception:  # a full disk, a server that is away; safetensors has errors of its own
            pass  # the cache is a help: where it cannot be written, the trial goes on without
        if self._lease is not None and self._lease[0] == key:
            self.close()
        return True

    def _is_kept(self, position: Position, crossed: bool) -> bool:
        return position in self._stops or (crossed and not position.exact)

    def _records(self, rows: Sequence[dict[str, Any]]) -> list[Record]:
        extras = [json.loads(row["extra"]) for row in rows]
        places = self._prefixes.places([extra["stage"] for extra in extras])
        return [
            {name: row[name] for name in ("step", "cost", "sparsity", "kept", "objective")}
            | {"metrics": extra["metrics"], "lap": extra["lap"], "place": list(place)}
            for row, extra, place in zip(rows, extras, places, strict=True)
        ]

    def _row(self, record: Record) -> dict[str, Any]:
        """A shared report as this trial's own."""
        stage = self._prefixes.stage_of(record["place"], record["step"])
        extra = {"metrics": record["metrics"], "stage": stage, "clock": record["step"], "lap": record["lap"]}
        columns = {name: record[name] for name in ("step", "cost", "sparsity", "kept", "objective")}
        return {"final": False, "ended": "", **columns, "score": None, "extra": json.dumps(extra)}

    def close(self) -> None:
        """Give back the lease, if there is one."""
        if self._lease is not None:
            self._lease[1].release()
            self._lease = None
