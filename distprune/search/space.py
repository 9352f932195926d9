"""The search space: from the parameters that a sampler proposes to a legal recipe.

    space:
      paradigm: [dense, {name: lth, share: [0.4, 0.8]}]     a list in place of a value is a range, or for names a choice
      criterion, allocator, regularizer: likewise; left out, every entry of the table is searched
      granularity, optimizer: likewise; left out, the recipe's is used
      sparsity: [0.5, 0.98]                                  searched as density, uniform in its logarithm
      sparsity: [0.9, 0.95, 0.98]                            three and more are values; the first trials cross them with the paradigms

An allocator that sets the sparsity (constrained_rl) has no such parameter: its recipes have the sparsity that its ratios give, which may
lie outside of space.sparsity, and the search's budget is what holds them.

Options are searched where their annotation holds a range; a value fixes them, a list of the space narrows them. Axes are chosen in the
order of ORDER, each among those that are legal with what was chosen before and leave something legal for what comes after.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from distprune.core import registry
from distprune.core.legality import fixed_sparsity, violations
from distprune.core.options import Choices, Option, PerLayer, Range
from distprune.core.recipe import Recipe
from distprune.core.registry import Choice
from distprune.errors import UserError, unknown
from distprune.search.candidates import Candidate, read_axis, read_sparsities

ORDER = ("paradigm", "granularity", "criterion", "allocator", "regularizer", "optimizer")
KEYS = (*ORDER, "sparsity")
_Labels = tuple[str, ...]


class Suggest(Protocol):
    """What the space asks of a sampler: the part of an Optuna trial that it uses."""

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float: ...
    def suggest_int(self, name: str, low: int, high: int, *, log: bool = False) -> int: ...
    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any: ...


class Recorder:
    """Answers what a space asks from given parameters, where there are none with the lowest; keeps the distributions it was asked for.

    Raises KeyError for a parameter that is not given, ValueError for a value outside of its distribution.
    """

    def __init__(self, given: Mapping[str, Any] | None = None) -> None:
        self.distributions: dict[str, BaseDistribution] = {}
        self._given = given

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        return float(self._answer(name, FloatDistribution(low, high, log=log), low))

    def suggest_int(self, name: str, low: int, high: int, *, log: bool = False) -> int:
        return int(self._answer(name, IntDistribution(low, high, log=log), low))

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        return self._answer(name, CategoricalDistribution(choices), choices[0])

    def _answer(self, name: str, distribution: BaseDistribution, lowest: Any) -> Any:
        self.distributions[name] = distribution
        if self._given is None:
            return lowest
        if not within(self._given[name], distribution):
            raise ValueError(name)
        return self._given[name]


def within(value: Any, distribution: BaseDistribution) -> bool:
    """Whether a value is one of a distribution's."""
    if isinstance(distribution, CategoricalDistribution):
        return any(value == choice and isinstance(value, bool) == isinstance(choice, bool) for choice in distribution.choices)
    assert isinstance(distribution, FloatDistribution | IntDistribution)
    kinds = int if isinstance(distribution, IntDistribution) else int | float
    return isinstance(value, kinds) and not isinstance(value, bool) and distribution.low <= value <= distribution.high


class Space:
    """All recipes of a search."""

    def __init__(
        self,
        recipe: Mapping[str, Any],
        space: Mapping[str, Any],
        *,
        seed: int,
        layers: Callable[[Choice], Sequence[str]] = lambda granularity: (),
        sparsity_of: Callable[[Choice, Mapping[str, float]], float] | None = None,
    ) -> None:
        """`layers` gives the names of what a granularity budgets for, `sparsity_of` the sparsity of a granularity's layers at keep ratios;
        without it no allocator that sets the sparsity is proposed. Raises UserError for unknown keys, names and empty ranges.
        """
        if wrong := [key for key in space if key not in KEYS]:
            raise unknown("key in space:", wrong[0], KEYS)
        self._base = Recipe.read({**recipe, "paradigm": "dense", "seed": seed})
        self._layers, self._sparsity_of = layers, sparsity_of
        own = {"granularity": self._base.granularity.plain(), "optimizer": self._base.train.optimizer.plain()}
        self.axes = {axis: read_axis(registry.TABLES[axis], space.get(axis, own.get(axis)), f"space.{axis}") for axis in ORDER}
        if "optimizer" not in space:
            self.axes["optimizer"] = [replace(only, searched={}) for only in self.axes["optimizer"]]
        for candidate in self.axes["granularity"]:
            if candidate.searched:
                raise UserError(
                    f"space.granularity.{candidate.name}.{min(candidate.searched)} must be one value: the sparsity depends on it. "
                    "List the granularity once for each."
                )
        self.sparsities = read_sparsities(space.get("sparsity", [0.5, 0.98]))
        self.excluded: list[str] = []  # what is never proposed, and why
        self._drop_allocators("allocator" in space)
        self._legal: dict[_Labels, list[Candidate]] = {}  # labels of the axes chosen so far -> candidates of the next
        self._names: dict[tuple[str, _Labels], str] = {}
        self._listed = "paradigm" in space
        for paradigm in self.axes["paradigm"]:
            before = len(self.excluded)
            if not self._grow([paradigm]) and self._listed:
                raise _never(paradigm, self.excluded[before])
        self.axes["paradigm"] = [paradigm for paradigm in self.axes["paradigm"] if (paradigm.label,) in self._legal]
        if not self.axes["paradigm"]:
            raise UserError(f"space: no paradigm is legal. {self.excluded[0]}")

    @property
    def granularities(self) -> list[Choice]:
        """Those that a recipe may have."""
        legal = {c.label for paradigm in self.axes["paradigm"] for c in self._legal[(paradigm.label,)] if c in self.axes["granularity"]}
        return [candidate.choice for candidate in self.axes["granularity"] if candidate.label in legal]

    @property
    def highest(self) -> float:
        """The highest sparsity that is searched."""
        return bounds(self.sparsities)[1]

    @property
    def budgeted(self) -> Choice | None:
        """The granularity whose layers' keep ratios are proposed, if they are."""
        searched = [c for legal in self._legal.values() for c in legal if sets_sparsity(c) and "keep" in c.searched]
        return self._free_granularities()[0].choice if searched else None

    def _free_granularities(self) -> list[Candidate]:
        return [candidate for candidate in self.axes["granularity"] if fixed_sparsity(candidate.choice) is None]

    def _drop_allocators(self, listed: bool) -> None:
        """Take out the allocators that set the sparsity where they cannot: the search has no budget, or not one set of layers."""
        free = self._free_granularities()
        why = None
        if self._sparsity_of is None:
            why = "it sets the sparsity itself, so the search needs a budget. Write budget: {cost: params, most: 0.1}, or take per_layer."
        elif len(free) > 1:
            names = ", ".join(candidate.label for candidate in free)
            why = f"its ratios are of the layers of one granularity, and space.granularity has {names}. List one of them."
        for candidate in [candidate for candidate in self.axes["allocator"] if why and sets_sparsity(candidate)]:
            if listed:
                raise UserError(f"space.allocator {candidate.label}: {why}")
            self.axes["allocator"].remove(candidate)
            self.excluded.append(f"allocator {candidate.label}: {why}")

    def leave_out(self, paradigm: Choice, reason: str) -> None:
        """Never propose a paradigm that the network cannot be pruned by. Raises UserError if the space lists it."""
        for candidate in [candidate for candidate in self.axes["paradigm"] if candidate.name == paradigm.name]:
            if self._listed:
                raise _never(candidate, reason)
            self.axes["paradigm"].remove(candidate)
            self.excluded.append(f"paradigm {candidate.label}: {reason}")

    def build(self, trial: Suggest) -> Recipe:
        """The recipe of a trial."""
        chosen: list[Candidate] = []
        while (step := self.after(chosen)) is not None:
            chosen.append(self._pick(trial, step[1], step[2]))
        return self._finish(trial, chosen)

    def after(self, chosen: Sequence[Candidate]) -> tuple[str, str, list[Candidate]] | None:
        """What is chosen after `chosen`: (axis, parameter, candidates); None where all axes are. One candidate is no parameter."""
        if not chosen:
            return "paradigm", "paradigm", self.axes["paradigm"]
        axes = self.axes_of(chosen[0])
        if len(chosen) == len(axes):
            return None
        return axes[len(chosen)], self._parameter(chosen, axes[len(chosen)]), self._legal[_labels(chosen)]

    def options(self, chosen: Sequence[Candidate]) -> dict[str, BaseDistribution]:
        """The parameters of a recipe whose axes are `chosen`, besides the axes themselves."""
        recorder = Recorder()
        self._finish(recorder, chosen)
        return recorder.distributions

    def allows(self, chosen: Sequence[Candidate], sparsity: float) -> bool:
        """Whether a recipe with these candidates may have that sparsity."""
        picked = dict(zip(self.axes_of(chosen[0]), chosen, strict=True))
        if "granularity" not in picked or ("allocator" in picked and sets_sparsity(picked["allocator"])):
            return False
        fixed = fixed_sparsity(picked["granularity"].choice)
        return _within(sparsity, self.sparsities) if fixed is None else abs(sparsity - fixed) < 1e-6

    def searches(self, sparsity: float) -> bool:
        """Whether a sparsity is one that trials may have."""
        return sparsity in self.sparsities.values if isinstance(self.sparsities, Choices) else _within(sparsity, self.sparsities)

    def usual(self, axis: str) -> Choice:
        """What a recipe has that says nothing of the axis."""
        return self._base.train.optimizer if axis == "optimizer" else getattr(self._base, axis)

    def parameters(self) -> dict[str, BaseDistribution]:
        """All parameters that a proposal may have; each has some of them."""
        recorder = Recorder()
        paradigms = self.axes["paradigm"]
        if len(paradigms) > 1:
            recorder.suggest_categorical("paradigm", _labels(paradigms))
        found = {("paradigm", candidate.label): candidate for candidate in paradigms}
        for labels, legal in self._legal.items():
            if (paradigm := found.get(("paradigm", labels[0]))) is not None:  # else it was left out
                axis = self.axes_of(paradigm)[len(labels)]
                found |= {(axis, candidate.label): candidate for candidate in legal}
                if len(legal) > 1:
                    recorder.suggest_categorical(self._names[axis, _labels(legal)], _labels(legal))
        granularities = [candidate for (axis, _), candidate in found.items() if axis == "granularity"]
        for candidate in found.values():
            for names in [self._layers(granularity.choice) for granularity in granularities] or [()]:
                self._choice(recorder, candidate, names)
        for granularity in granularities:
            self._sparsity(recorder, granularity)
        return recorder.distributions

    def _finish(self, trial: Suggest, chosen: Sequence[Candidate]) -> Recipe:
        picked = dict(zip(self.axes_of(chosen[0]), chosen, strict=True))
        names = self._layers(picked["granularity"].choice) if "granularity" in picked else ()
        choices: dict[str, Any] = {axis: self._choice(trial, candidate, names) for axis, candidate in picked.items()}
        train = replace(self._base.train, optimizer=choices.pop("optimizer", self._base.train.optimizer))
        sparsity = 0.0
        if "allocator" in picked and sets_sparsity(picked["allocator"]):
            assert self._sparsity_of is not None
            sparsity = self._sparsity_of(picked["granularity"].choice, choices["allocator"].option("keep"))
        elif "granularity" in picked:
            sparsity = self._sparsity(trial, picked["granularity"])
        return replace(self._base, sparsity=sparsity, train=train, **choices)

    def axes_of(self, paradigm: Candidate) -> list[str]:
        """The axes that a paradigm looks at, in the order in which they are chosen."""
        facts = paradigm.choice.entry.facts
        axes = {"paradigm", "regularizer", *facts["uses"]} | ({"optimizer"} if facts["trains"] else set())
        if "sparsity" in facts["uses"]:
            axes.add("granularity")  # also where only one is legal
        return [axis for axis in ORDER if axis in axes]

    def _grow(self, chosen: list[Candidate]) -> bool:
        """Enter the legal candidates that can follow `chosen`, and those that follow them; False if there is no way to a whole recipe."""
        axes = self.axes_of(chosen[0])
        if len(chosen) == len(axes):
            return True
        axis = axes[len(chosen)]
        legal = []
        for candidate in self.axes[axis]:
            if problem := self._problem([*chosen, candidate], axis):
                line = f"{axis} {candidate.label}: {problem}"
                self.excluded += [line] if line not in self.excluded else []
            elif self._grow([*chosen, candidate]):
                legal.append(candidate)
        if legal:
            self._legal[_labels(chosen)] = legal
            self._name(chosen, axis, legal)
        return bool(legal)

    def _problem(self, chosen: list[Candidate], axis: str) -> str | None:
        if axis == "optimizer":
            return None
        choices = {name: candidate.choice for name, candidate in zip(self.axes_of(chosen[0]), chosen, strict=False)}
        prunes = "sparsity" in chosen[0].choice.entry.facts["uses"]
        fixed = fixed_sparsity(choices["granularity"]) if prunes else 0.0
        sparsity = fixed if fixed is not None else self.highest
        if axis == "granularity" and fixed is not None and not _within(fixed, self.sparsities):
            return f"it allows sparsity {fixed:.6g} only, which space.sparsity does not have. Add it there."
        return violations(replace(self._base, sparsity=sparsity, **choices)).get(axis)  # type: ignore[arg-type]

    def _name(self, chosen: list[Candidate], axis: str, legal: list[Candidate]) -> None:
        """Optuna wants one set of values for one name, so a set that is not the whole axis is named after where it comes up first."""
        key = (axis, _labels(legal))
        if key not in self._names:
            taken, whole = set(self._names.values()), legal == self.axes[axis]
            names = [axis] if whole else ["/".join([axis, *_labels(chosen)[:depth]]) for depth in range(1, len(chosen) + 1)]
            self._names[key] = next(name for name in names if name not in taken)

    def _parameter(self, chosen: Sequence[Candidate], axis: str) -> str:
        return self._names[axis, _labels(self._legal[_labels(chosen)])]

    def _sparsity(self, trial: Suggest, granularity: Candidate) -> float:
        if (fixed := fixed_sparsity(granularity.choice)) is not None:
            return fixed
        if isinstance(self.sparsities, Choices):
            values = self.sparsities.values
            return float(values[0] if len(values) == 1 else trial.suggest_categorical("sparsity", list(values)))
        least, most = self._densities()
        return round(1 - trial.suggest_float("density", least, most, log=True), 5)

    def _densities(self) -> tuple[float, float]:
        low, high = bounds(self.sparsities)
        return round(1 - high, 6), round(1 - low, 6)

    def _pick(self, trial: Suggest, name: str, candidates: Sequence[Candidate]) -> Candidate:
        if len(candidates) == 1:
            return candidates[0]
        label = trial.suggest_categorical(name, [candidate.label for candidate in candidates])
        return next(candidate for candidate in candidates if candidate.label == label)

    def _choice(self, trial: Suggest, candidate: Candidate, layers: Sequence[str]) -> Choice:
        options = dict(candidate.fixed)
        for name, where in candidate.searched.items():
            path, option = f"{candidate.label}/{name}", candidate.choice.entry.options[name]
            if isinstance(where, PerLayer):
                options[name] = {layer: _suggest(trial, f"{path}/{layer}", where.range, option) for layer in layers}
            else:
                options[name] = _suggest(trial, path, where, option)
        return candidate.table.choose(candidate.name, **options)


def _never(paradigm: Candidate, reason: str) -> UserError:
    return UserError(f"space: paradigm '{paradigm.label}' can never be proposed. {reason}")


def sets_sparsity(candidate: Candidate) -> bool:
    """Whether an allocator's options say what each layer keeps, and so the sparsity."""
    return bool(candidate.choice.entry.facts.get("sets_sparsity"))  # a fact of allocators alone


def fixes_sparsity(axis: str, candidate: Candidate) -> bool:
    """Whether a candidate of an axis leaves no choice of the sparsity."""
    return sets_sparsity(candidate) if axis == "allocator" else axis == "granularity" and fixed_sparsity(candidate.choice) is not None


def _labels(chosen: Sequence[Candidate]) -> _Labels:
    return tuple(candidate.label for candidate in chosen)


def bounds(sparsities: Range | Choices) -> tuple[float, float]:
    """The lowest and the highest."""
    if isinstance(sparsities, Choices):
        return min(sparsities.values), max(sparsities.values)
    return sparsities.low, sparsities.high


def _within(sparsity: float, sparsities: Range | Choices) -> bool:
    low, high = bounds(sparsities)
    return any(abs(sparsity - value) < 1e-6 for value in sparsities.values) if isinstance(sparsities, Choices) else low <= sparsity <= high


def _suggest(trial: Suggest, name: str, where: Range | Choices, option: Option) -> Any:
    if isinstance(where, Choices):
        values = where.values or option.values
        return values[0] if len(values) == 1 else trial.suggest_categorical(name, list(values))
    if option.type is int:
        return trial.suggest_int(name, int(where.low), int(where.high), log=where.log)
    # Six digits: a recipe that is written down is the recipe that ran.
    return float(f"{trial.suggest_float(name, where.low, where.high, log=where.log):.6g}")
