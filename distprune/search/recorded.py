"""Curves of trials that were run once, so that another search over the same network and data can be simulated.

A look-up, no model: a proposed recipe is answered by the nearest finished trial of the same paradigm, with its reports, bill and time. Two
searches are compared by it as far as the recorded trials are dense; no network is found that was not recorded.
"""

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from distprune.core.config import read_yaml
from distprune.core.recipe import Recipe
from distprune.core.registry import Choice
from distprune.errors import UserError
from distprune.search.config import Search, differences
from distprune.search.setup import Setup
from distprune.search.trial import Job
from distprune.store.folder import RunFolder
from distprune.store.reports import read
from distprune.store.trials import read_trials

FEWEST = 8  # finished trials of a run that can be simulated from
NEAR = 2.0  # a score stands for one at up to twice or half its cost

Value = float | str


@dataclass(frozen=True)
class Recording:
    """A finished trial: its reports, with time and samples counted over all its attempts."""

    values: Mapping[str, Value]
    rows: Sequence[Mapping[str, Any]]

    def score(self, row: Mapping[str, Any]) -> float | None:
        """What the trial would have scored at a report that may have been at no rung.

        The score of the nearest scored report in cost, if it is near. Without one, the objective, where the network has its final budget
        already; before that the objective says nothing about the end, and the trial is not judged there.
        """
        scored = [other for other in self.rows if other["score"] is not None and not other["final"]]
        nearest = min(scored, key=lambda other: _apart(other, row), default=None)
        if nearest is not None and _apart(nearest, row) <= NEAR:
            return float(nearest["score"])
        return float(row["objective"]) if row["kept"] <= self.rows[-1]["kept"] else None


def _apart(a: Mapping[str, Any], b: Mapping[str, Any]) -> float:
    """How many times the one cost is the other."""
    low, high = sorted((max(a["cost"], 1.0), max(b["cost"], 1.0)))
    return float(high / low)


class Recorded:
    """The finished trials of a run folder. One in which trials were stopped holds their curves cut short: those do not count."""

    def __init__(self, path: str | Path) -> None:
        """Raises UserError if `path` is no run folder, or a simulated one, or has too few finished trials."""
        folder = RunFolder.existing(path)
        folder.check_real("simulated from")
        self.path = str(folder)
        self._shared = Search.of_run(read_yaml(folder.search_yaml).get("search")).shared
        rows = read_trials(folder.trials).to_pylist() if folder.trials.exists() else []
        reports: dict[int, list[dict[str, Any]]] = {}
        for report in read(folder.reports).to_pylist():
            reports.setdefault(report["trial"], []).append(report)
        self.trials = len(rows)
        found: dict[str, list[Recording]] = {}
        for row in rows:
            if row["ended"] != "finished" or row["round_of"] is not None or not (curve := _whole(reports.get(row["number"], []))):
                continue
            recipe = Recipe.read(json.loads(row["recipe"]))
            found.setdefault(recipe.paradigm.name, []).append(Recording(_values(recipe), curve))
        self._recordings = [recording for recordings in found.values() for recording in recordings]
        if self.usable < FEWEST:
            ends = ", ".join(f"{count} {end}" for end, count in Counter(row["ended"] for row in rows).most_common()) or "none"
            raise UserError(
                f"{path} has {self.usable} finished trials, and a simulation needs {FEWEST} ({self.trials} trials: {ends}). "
                "Record a search with scheduler: none."
            )
        spans = _spans(self._recordings)
        self._of = {name: _Paradigm(recordings, spans) for name, recordings in found.items()}

    @property
    def usable(self) -> int:
        """How many trials can be looked up."""
        return len(self._recordings)

    @property
    def scored(self) -> int:
        """How many of them were scored before their end."""
        return sum(any(row["score"] is not None for row in recording.rows[:-1]) for recording in self._recordings)

    @property
    def by(self) -> Literal["cost", "wall_s"]:
        """What time is: the seconds that trials took, or the samples that they billed where one has no seconds."""
        return "wall_s" if all(row["wall_s"] is not None for recording in self._recordings for row in recording.rows) else "cost"

    def check(self, setup: Setup) -> None:
        """Raise UserError for a search whose trials cannot be looked up here."""
        for line in differences(self._shared, setup.search.shared):
            raise UserError(f"{self.path} was recorded with {line}. Write it alike.")
        missing = [c.name for c in setup.space.axes["paradigm"] if c.name not in self._of]
        if missing:
            raise UserError(
                f"{self.path} has no finished trial of paradigm {', '.join(missing)}. "
                f"Write space.paradigm: [{', '.join(sorted(self._of))}]."
            )

    def curve(self, job: Job) -> Iterator[dict[str, Any]]:
        """The reports of the nearest recorded trial, scored at the rungs of the job; those from `job.known` on."""
        recipe = Recipe.read(job.recipe)
        recording = self._of[recipe.paradigm.name].nearest(_values(recipe))
        rung, spent = -1, 0.0
        for row in recording.rows:
            crossed = sum(row["cost"] >= cost for cost in job.rungs) - 1
            score = None
            if row["final"]:
                rung, score = max(crossed, rung), row["objective"]
            elif crossed > rung and (score := recording.score(row)) is not None:
                rung = crossed
            if row["index"] < job.known:
                spent = row["spent"]
                continue
            changes = {"trial": job.number, "attempt": f"s{job.known}", "rung": rung, "score": score}
            yield {**row, **changes, "spent": row["spent"] - spent}


class _Paradigm:
    """The recordings of one paradigm, as columns."""

    def __init__(self, recordings: Sequence[Recording], spans: Mapping[str, float]) -> None:
        self._recordings = recordings
        self._columns: dict[str, np.ndarray[Any, Any]] = {}
        for name in {name for recording in recordings for name in recording.values}:
            column = [recording.values.get(name) for recording in recordings]
            text = any(isinstance(value, str) for value in column)
            self._columns[name] = np.array(column, dtype=object if text else float)  # None becomes nan
        self._spans = spans

    def nearest(self, values: Mapping[str, Value]) -> Recording:
        """By the sum of squared differences over the parameters that both have, in spans; another name is a whole span. Ties: the first."""
        total = np.zeros(len(self._recordings))
        for name, value in values.items():
            if (column := self._columns.get(name)) is None:
                continue
            if column.dtype == object or isinstance(value, str):
                total += np.array([other is not None and other == other and other != value for other in column], dtype=float)
            else:
                total += np.nan_to_num(((column - float(value)) / self._spans[name]) ** 2)
        return self._recordings[int(total.argmin())]


def _spans(recordings: Sequence[Recording]) -> dict[str, float]:
    """Of every numeric parameter over all recordings; 1 where it does not vary."""
    seen: dict[str, list[float]] = {}
    for recording in recordings:
        for name, value in recording.values.items():
            if not isinstance(value, str):
                seen.setdefault(name, []).append(value)
    return {name: max(values) - min(values) or 1.0 for name, values in seen.items()}


def _values(recipe: Recipe) -> dict[str, Value]:
    """The parameters of a recipe, by name; those that are searched in their logarithm as that."""
    facts = recipe.paradigm.entry.facts
    uses = {"regularizer", *facts["uses"]}
    values: dict[str, Value] = {}
    if "sparsity" in uses:
        uses.add("granularity")
        values["density"] = math.log(1 - recipe.sparsity)
    choices = {axis: getattr(recipe, axis) for axis in sorted(uses - {"sparsity"})}
    if facts["trains"]:
        choices["optimizer"] = recipe.train.optimizer
    for axis, choice in choices.items():
        values |= {axis: choice.name, **_options(axis, choice)}
    return values | _options("paradigm", recipe.paradigm)


def _options(axis: str, choice: Choice) -> dict[str, Value]:
    values: dict[str, Value] = {}
    for name, option in choice.entry.options.items():
        value, where = choice.option(name), f"{axis}.{choice.name}.{name}"
        parts = {f"{where}.{key}": part for key, part in value.items()} if isinstance(value, Mapping) else {where: value}
        for key, part in parts.items():
            if isinstance(part, bool) or not isinstance(part, int | float):
                values[key] = str(part)
            else:
                log = getattr(option.search, "log", False) and part > 0
                values[key] = math.log(part) if log else float(part)
    return values


def _whole(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Reports from the first to the final one, their seconds and samples summed over attempts; empty if one is missing."""
    rows = sorted(rows, key=lambda row: row["index"])
    if not rows or not rows[-1]["final"] or [row["index"] for row in rows] != list(range(len(rows))):
        return []
    summed: list[dict[str, Any]] = []
    before = {"wall_s": 0.0, "spent": 0.0}
    for position, row in enumerate(rows):
        if position and row["attempt"] != rows[position - 1]["attempt"]:
            before = {name: summed[-1][name] or 0.0 for name in before}
        changed = {name: None if row[name] is None else row[name] + past for name, past in before.items()}
        summed.append({**row, **changed, "spent": changed["spent"] or 0.0})
    return summed
