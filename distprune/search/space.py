"""The search space: from the parameters that a sampler proposes to a legal recipe.

    space:
      paradigm: [dense, {name: lth, share: [0.4, 0.8]}]     a list in place of a value is a range, or for names a choice
      criterion, allocator, regularizer: likewise; left out, every entry of the table is searched
      optimizer: likewise; left out, the recipe's is used
      sparsity: [0.5, 0.98]                                  searched as density, uniform in its logarithm

Options are searched where their annotation holds a range; a value fixes them, a list of the space narrows them.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from distprune.core import registry
from distprune.core.budgets import check_sparsity
from distprune.core.options import Choices, LogRange, Option, PerLayer, Range
from distprune.core.recipe import Recipe, violations
from distprune.core.registry import Choice, Table
from distprune.errors import UserError, unknown

AXES = ("paradigm", "criterion", "allocator", "regularizer")
KEYS = (*AXES, "optimizer", "sparsity")


class Suggest(Protocol):
    """What the space asks of a sampler: the part of an Optuna trial that it uses."""

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float: ...
    def suggest_int(self, name: str, low: int, high: int, *, log: bool = False) -> int: ...
    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any: ...


@dataclass(frozen=True)
class Candidate:
    """An entry that may be chosen, the options that are fixed, and the ranges of those that are searched."""

    label: str  # what the parameter's value is
    name: str
    fixed: Mapping[str, Any]
    searched: Mapping[str, Range | Choices | PerLayer]


class Space:
    """All recipes of a search."""

    def __init__(self, recipe: Mapping[str, Any], space: Mapping[str, Any], *, seed: int, layers: Sequence[str] = ()) -> None:
        """`layers` are the names of the model's prunable weights. Raises UserError for unknown keys, names and empty ranges."""
        if wrong := [key for key in space if key not in KEYS]:
            raise unknown("key in space:", wrong[0], KEYS)
        self._base = Recipe.read({**recipe, "paradigm": "dense", "seed": seed})
        self._layers = tuple(layers)
        self.axes = {axis: _candidates(registry.TABLES[axis], space.get(axis), f"space.{axis}") for axis in AXES}
        if "optimizer" in space:
            self.axes["optimizer"] = _candidates(registry.optimizer, space["optimizer"], "space.optimizer")
        self.sparsities = _sparsities(space.get("sparsity", [0.5, 0.98]))
        self._legal: dict[tuple[str, str], list[Candidate]] = {}
        self.excluded: list[str] = []  # what is never proposed, and why
        for paradigm in self.axes["paradigm"]:
            for axis in self._used(paradigm):
                self._legal[paradigm.label, axis] = self._legal_candidates(paradigm, axis)

    def build(self, trial: Suggest) -> Recipe:
        """The recipe of a trial."""
        paradigm = self._pick(trial, "paradigm", self.axes["paradigm"])
        choices: dict[str, Any] = {"paradigm": self._choice(trial, "paradigm", paradigm)}
        for axis in self._used(paradigm):
            legal = self._legal[paradigm.label, axis]
            choices[axis] = self._choice(trial, axis, self._pick(trial, self._parameter(axis, paradigm, legal), legal))
        train = self._base.train
        if "optimizer" in choices:
            train = replace(train, optimizer=choices.pop("optimizer"))
        sparsity = 0.0
        if "sparsity" in paradigm_uses(paradigm):
            sparsity = self._sparsity(trial)
        return replace(self._base, sparsity=sparsity, train=train, **choices)

    def covering(self) -> list[dict[str, Any]]:
        """Parameters of the first trials, so that every candidate of every axis is in one; what they leave open is sampled."""
        waiting = {axis: [candidate.label for candidate in candidates] for axis, candidates in self.axes.items()}
        first: list[dict[str, Any]] = []
        while True:
            before = len(first)
            for paradigm in self.axes["paradigm"]:
                chosen = {"paradigm": (paradigm, self.axes["paradigm"])}
                for axis in self._used(paradigm):
                    legal = self._legal[paradigm.label, axis]
                    if new := [candidate for candidate in legal if candidate.label in waiting[axis]]:
                        chosen[axis] = (new[0], legal)
                if any(candidate.label in waiting[axis] for axis, (candidate, _) in chosen.items()):
                    for axis, (candidate, _) in chosen.items():
                        waiting[axis] = [label for label in waiting[axis] if label != candidate.label]
                    # With one candidate there is nothing to choose, and no parameter.
                    first.append(
                        {
                            self._parameter(axis, paradigm, legal): candidate.label
                            for axis, (candidate, legal) in chosen.items()
                            if len(legal) > 1
                        }
                    )
            if len(first) == before:
                return first

    def _parameter(self, axis: str, paradigm: Candidate, legal: list[Candidate]) -> str:
        """Optuna wants one set of values for one name, so an axis that a paradigm narrows has a name of its own."""
        return axis if legal == self.axes[axis] else f"{axis}/{paradigm.label}"

    def _used(self, paradigm: Candidate) -> list[str]:
        uses = paradigm_uses(paradigm)
        return [axis for axis in self.axes if axis in uses or axis in ("regularizer", "optimizer")]

    def _legal_candidates(self, paradigm: Candidate, axis: str) -> list[Candidate]:
        legal = []
        for candidate in self.axes[axis]:
            recipe = replace(self._base, paradigm=Choice("paradigm", paradigm.name))
            changed: dict[str, Any] = {} if axis == "optimizer" else {axis: Choice(axis, candidate.name)}
            problem = violations(replace(recipe, **changed)).get(axis) if changed else None
            if problem:
                self.excluded.append(f"{paradigm.label} with {axis} {candidate.label}: {problem}")
            else:
                legal.append(candidate)
        if not legal:
            raise UserError(f"space: paradigm '{paradigm.label}' has no legal {axis}. {self.excluded[-1]}")
        return legal

    def _sparsity(self, trial: Suggest) -> float:
        low, high = self.sparsities
        if low == high:
            return low
        return round(1 - trial.suggest_float("density", round(1 - high, 6), round(1 - low, 6), log=True), 5)

    def _pick(self, trial: Suggest, name: str, candidates: Sequence[Candidate]) -> Candidate:
        if len(candidates) == 1:
            return candidates[0]
        label = trial.suggest_categorical(name, [candidate.label for candidate in candidates])
        return next(candidate for candidate in candidates if candidate.label == label)

    def _choice(self, trial: Suggest, axis: str, candidate: Candidate) -> Choice:
        options = dict(candidate.fixed)
        for name, where in candidate.searched.items():
            path = f"{candidate.label}/{name}"
            option = registry.TABLES[axis].get(candidate.name).options[name]
            if isinstance(where, PerLayer):
                options[name] = {layer: _suggest(trial, f"{path}/{layer}", where.range, option) for layer in self._layers}
            else:
                options[name] = _suggest(trial, path, where, option)
        return registry.TABLES[axis].choose(candidate.name, **options)


def paradigm_uses(paradigm: Candidate) -> Sequence[str]:
    """The axes that a paradigm looks at."""
    uses: Sequence[str] = registry.paradigm.get(paradigm.name).facts["uses"]
    return uses


def _suggest(trial: Suggest, name: str, where: Range | Choices, option: Option) -> Any:
    if isinstance(where, Choices):
        values = where.values or option.values
        return values[0] if len(values) == 1 else trial.suggest_categorical(name, list(values))
    if option.type is int:
        return trial.suggest_int(name, int(where.low), int(where.high), log=where.log)
    # Six digits: a recipe that is written down is the recipe that ran.
    return float(f"{trial.suggest_float(name, where.low, where.high, log=where.log):.6g}")


def _candidates(table: Table, value: Any, where: str) -> list[Candidate]:
    if value is None:
        value = table.names()
    if isinstance(value, str | Mapping):
        value = [value]
    if not isinstance(value, list | tuple) or not value:
        raise UserError(f"{where} must be a list of names, got {value!r}. Leave it out to search all: {', '.join(table.names())}.")
    found: list[Candidate] = []
    for item in value:
        options = {key: item[key] for key in item if key not in ("name", "import")} if isinstance(item, Mapping) else {}
        head = {key: item[key] for key in item if key in ("name", "import")} if isinstance(item, Mapping) else item
        entry = table.get(_name(table, head, where))
        for key in options:
            if key not in entry.options:
                raise unknown(f"option of {where} {entry.name}:", key, entry.options)
        fixed, searched = {}, {}
        for key, option in entry.options.items():
            place = f"{where}.{entry.name}.{key}"
            if key not in options:
                if option.search is not None:
                    searched[key] = option.search
            elif isinstance(options[key], list) and option.type not in (tuple, list) and not _is_sequence(option):
                searched[key] = _narrowed(option, options[key], place)
            else:
                fixed[key] = option.check(options[key], place)
        label = entry.name if not any(other.label == entry.name for other in found) else f"{entry.name} {json.dumps(options)}"
        found.append(Candidate(label, entry.name, fixed, searched))
    return found


def _name(table: Table, head: Any, where: str) -> str:
    if isinstance(head, str):
        return head
    if len(head) != 1:
        raise UserError(f"{where} entries must be a name or a mapping with 'name' or 'import', got {head!r}.")
    return f"import:{head['import']}" if "import" in head else str(head["name"])


def _is_sequence(option: Option) -> bool:
    return getattr(option.type, "__origin__", None) in (tuple, list)


def _narrowed(option: Option, values: list[Any], where: str) -> Range | Choices | PerLayer:
    checked = [option.check(value, where) for value in values] if not isinstance(option.search, PerLayer) else values
    if isinstance(option.search, Choices) or option.type not in (int, float) or isinstance(option.search, PerLayer):
        if isinstance(option.search, PerLayer):
            raise UserError(f"{where} is searched for each layer; fix it with a mapping of layer names to shares or leave it out.")
        return Choices(*checked)
    if len(checked) != 2 or not checked[0] < checked[1]:
        raise UserError(f"{where} must be [low, high] with low < high, got {values}.")
    return LogRange(*checked) if getattr(option.search, "log", False) else Range(*checked)


def _sparsities(value: Any) -> tuple[float, float]:
    bounds = (value, value) if isinstance(value, int | float) else value
    numbers = isinstance(bounds, list | tuple) and len(bounds) == 2 and all(isinstance(bound, int | float) for bound in bounds)
    if not numbers or bounds[0] > bounds[1]:
        raise UserError(f"space.sparsity must be a number or [low, high], got {value!r}. Write [0.5, 0.98].")
    low, high = (check_sparsity(float(bound), "space.sparsity") for bound in bounds)
    if not low:
        raise UserError(
            f"space.sparsity must start above 0, got {value}: paradigm 'dense' is the network without pruning. Write [0.5, 0.98]."
        )
    return low, high
