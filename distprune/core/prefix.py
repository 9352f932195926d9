"""Where plans meet: positions at which the state of a plan has a content key that other plans may come to as well.

A position lies after each stage that is not a Train, and in a Train wherever it may report and where it ends; its key there is that of the
same training up to its clock. A Train's state is taken before the stage is left, so that whoever loads it goes on or leaves as its own
plan says. What a plan alone knows is left out: snapshots, which have positions of their own, and what its observers spent.

The reports before a position belong to it, as they are a function of the same stages and of `report_every`, which is part of the root key.
The report that is due at the position does not: whether there is one, and whether it is made before the stage is left or after, is a
matter of the plan.

Left out are trainings that end at a bill (`spend`), and the middle of those that a hook may end: `until` does not say what was done.
"""

import functools
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from distprune.core.keys import chain, digest
from distprune.core.lengths import to_steps
from distprune.core.plan import Plan
from distprune.core.recipe import Recipe
from distprune.core.run import root_key
from distprune.core.stages import Train
from distprune.core.state import State
from distprune.errors import UserError

VERSION = 1  # of what is written at a position: a change of it is a change of every key


@dataclass(frozen=True, kw_only=True)
class Position:
    """A place in a plan."""

    stage: int  # that runs, or that comes next where `clock` is None
    clock: int | None  # of a Train that was begun and is not left
    most: int  # billed samples, or as many as there can be
    exact: bool  # whether they are just as many
    reports: bool  # whether a report is due
    ends: bool  # whether a stage or a trajectory ends here, and another begins

    @property
    def order(self) -> tuple[int, int]:
        """Where it comes among the positions of its plan."""
        return self.stage, -1 if self.clock is None else self.clock


@dataclass(frozen=True)
class Need:
    """A snapshot that is read after a position and was written before it."""

    stage: int  # that writes it
    key: str  # of the state that it was taken of
    found: bool  # whether the state at that key's position holds its values; else hooks have changed them at the end of a stage


class Prefixes:
    """The positions of a plan, in order, whose state before the first stage has the key `root`."""

    def __init__(self, root: str, plan: Plan, report_every: int) -> None:
        self.plan = plan
        self.root = digest("prefix", VERSION, root, report_every)
        self._chain = chain(self.root, plan)
        self._every = report_every
        self.positions = self._positions()
        self._orders = [position.order for position in self.positions]
        self._keys: dict[tuple[int, int], str] = {}

    def _positions(self) -> list[Position]:
        found: list[Position] = []
        cost, clock, least, exact = 0, 0, 0, True  # `clock` is at most, `least` at least where the plan stands
        for index, stage in enumerate(self.plan.stages):
            if stage.writes:
                continue
            measured, end = self.plan.is_measured(index), stage.advance(clock)
            last = index + 1 == len(self.plan.stages)
            place = functools.partial(Position, stage=index + 1, clock=None, reports=measured or last, ends=True)
            if not isinstance(stage, Train):
                cost += stage.samples(clock)
                found.append(place(most=cost, exact=exact))
            elif stage.spend is not None:
                cost, exact = max(cost, stage.spend), False
            elif stage.may_end_early:
                cost, exact = cost + stage.samples(clock), False
                found.append(place(most=cost, exact=False))
            else:
                if stage.since is not None:
                    clock = least = stage.since
                part = replace(stage, since=None)
                first = least - least % self._every + self._every
                for at in (*range(first, end, self._every), end):
                    cost += replace(part, until=at).samples(clock) if at > clock else 0
                    clock = max(at, clock)
                    due, ends = at % self._every == 0 or measured, at == end and measured
                    found.append(Position(stage=index, clock=at, most=cost, exact=exact, reports=due, ends=ends))
                least = end
            clock = end
        return found

    def key(self, position: Position) -> str:
        """The content key of the state at a position."""
        if position.order not in self._keys:
            link = self._chain[position.stage - (position.clock is None)]
            train = link.whole
            whole = replace(train, until=position.clock) if position.clock is not None and isinstance(train, Train) else train
            self._keys[position.order] = link.at(whole)
        return self._keys[position.order]

    def at(self, state: State) -> Position | None:
        """The position where a state stands, if it is one."""
        order = (state.stage, state.clock if state.entered else -1)
        index = bisect_right(self._orders, order) - 1
        return self.positions[index] if index >= 0 and self._orders[index] == order else None

    def beyond(self, state: State) -> list[Position]:
        """The positions that a state has not come to."""
        return self.positions[bisect_right(self._orders, (state.stage, state.clock if state.entered else -1)) :]

    def needs(self, position: Position) -> dict[str, Need]:
        """What must be had besides the state at a position: tag -> snapshot."""
        stages, needs = self.plan.stages, {}
        written = {stage.writes: index for index, stage in enumerate(stages[: position.stage]) if stage.writes}
        for tag, index in written.items():
            later = next((stage for stage in stages[position.stage :] if tag in (stage.reads, stage.writes)), None)
            if later is not None and later.reads == tag:
                needs[tag] = self._need(index)
        return needs

    def _need(self, index: int) -> Need:
        stages = self.plan.stages
        before = next((i for i in reversed(range(index)) if not stages[i].writes), None)
        stage = None if before is None else stages[before]
        ended = isinstance(stage, Train) and before is not None and not self.plan.is_continued(before) and not stage.may_end_early
        found = not (isinstance(stage, Train) and (stage.spend is not None or (ended and stage.hooks)))
        return Need(index, self._chain[index].after, found)

    def stops(self, rungs: Sequence[float], least: int) -> list[Position]:
        """Where the state is worth keeping, `least` samples or more apart: at the first report of each rung (cost) and where stages end.

        The same in all plans that come by, as far as they are the same. Snapshots that are read later are kept however short they are.
        """
        remembered = {self._latest(i) for i, stage in enumerate(self.plan.stages) if stage.writes and self._is_read(i)}
        found: list[Position] = []
        crossed = kept = 0
        for position in self.positions:
            reached = sum(position.most >= cost for cost in rungs) if position.reports else crossed
            due = position.ends or (position.exact and reached > crossed)
            crossed = max(crossed, reached)
            worth_it = due and position.most - kept >= least
            if worth_it or position in remembered:
                found.append(position)
            if worth_it:  # a snapshot is this plan's own, and must not move what all keep
                kept = position.most
        return found

    def _latest(self, index: int) -> Position | None:
        """The position that a Snapshot at stage `index` is taken at; None at the start."""
        before = [position for position in self.positions if position.order < (index, 0)]
        return before[-1] if before else None

    def _is_read(self, index: int) -> bool:
        """Whether the snapshot that a stage writes is read before it is written anew."""
        tag = self.plan.stages[index].writes
        later = next((stage for stage in self.plan.stages[index + 1 :] if tag in (stage.reads, stage.writes)), None)
        return later is not None and later.reads == tag

    # Reports name a stage of their plan; where plans share them, they name the trajectory.

    @functools.cached_property
    def _trajectories(self) -> list[list[int]]:
        found: list[list[int]] = []
        for index, stage in enumerate(self.plan.stages):
            if stage.writes:
                continue
            if self.plan.joined(index) is None:
                found.append([])
            found[-1].append(index)
        return found

    def places(self, stages: Sequence[int]) -> list[tuple[int, bool]]:
        """(trajectory, whether after its end) of each report of this plan, which name `stages`."""
        found, before = [], None
        for stage in stages:
            after = stage != before and stage > 0 and self.plan.is_measured(stage - 1)
            found.append((next(i for i, members in enumerate(self._trajectories) if stage - after in members), after))
            before = stage
        return found

    def stage_of(self, place: Sequence[int], clock: int) -> int:
        """The stage of this plan that a report at a place names."""
        members, stages = self._trajectories[place[0]], self.plan.stages
        if place[1]:
            return members[-1] + 1
        return next((i for i in members if clock < getattr(stages[i], "until", 0)), members[-1])


def save(path: str | Path, state: State, key: str, reports: Sequence[Mapping[str, Any]]) -> None:
    """Write the state at a position, without what its plan alone knows, and the reports before it, which are plain data."""
    own = (state.snapshots, state.ledger.observing, state.stage, state.entered, state.reports)
    state.snapshots, state.ledger.observing, state.stage, state.entered, state.reports = {}, 0, 0, False, len(reports)
    try:
        state.save(path, key=key, clock=state.clock, reports=list(reports), torch=torch.__version__)
    finally:
        state.snapshots, state.ledger.observing, state.stage, state.entered, state.reports = own


def reports_of(path: str | Path, key: str, position: Position) -> list[dict[str, Any]]:
    """The reports before a position, from its file. Raises UserError if it is another's."""
    facts = State.facts(path)
    if facts.get("key") != key or position.clock not in (None, facts["clock"]):
        raise UserError(f"{path} is not the state at clock {position.clock} with key {key}.")
    return list(facts["reports"])


def load(path: str | Path, state: State, position: Position, snapshots: Mapping[str, dict[str, Tensor]]) -> None:
    """Put a state at a position of its plan, with the snapshots that are read after it. Raises UserError if the file does not fit."""
    observing = state.ledger.observing
    state.load(path)
    state.ledger.observing = observing
    state.stage, state.entered = position.stage, position.clock is not None
    state.snapshots = dict(snapshots)


def values_of(path: str | Path, device: torch.device) -> dict[str, Tensor]:
    """Parameters and buffers in the file of a position: the values of a snapshot that was taken there."""
    with safe_open(str(path), framework="pt", device=str(device)) as file:
        return {name.removeprefix("model/"): file.get_tensor(name) for name in file.keys() if name.startswith("model/")}


def shared_keys(
    recipe: Recipe,
    steps_per_epoch: int,
    *,
    device: torch.device | str,
    threads: int,
    ranks: int = 1,
    report_every: str,
    rungs: Sequence[float] = (),
    least: int | None = None,
) -> list[tuple[str, int]]:
    """(key, bill in samples) of where a recipe's run takes states from a cache and gives them, in order, without building its network.

    The bill is the most that it can be.
    """
    every = max(to_steps(report_every, steps_per_epoch=steps_per_epoch), 1)
    root = root_key(recipe, torch.device(device), threads, ranks)
    prefixes = Prefixes(root, recipe.plan(steps_per_epoch), every)
    least = worth(steps_per_epoch, recipe.train.batch_size) if least is None else least
    return [(prefixes.key(position), position.most) for position in prefixes.stops(rungs, least)]


def worth(steps_per_epoch: int, batch_size: int) -> int:
    """Samples below which a prefix is run again sooner than it is kept: an epoch."""
    return steps_per_epoch * batch_size
