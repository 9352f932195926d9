"""Warm starts: known-good settings as the parameters of a search's first trials.

A setting is a mapping of what a space names: axes (`criterion: snip`), options with their axis (`paradigm: {name: lth, share: 0.5}`),
`sparsity`, or parameters by their own names (`lth/share: 0.5`). Every key and value is held to the space; what is left open is drawn.
"""

import random
from collections.abc import Mapping, Sequence
from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from distprune.core.options import Choices, Option, PerLayer, Range
from distprune.core.streams import stream_seed
from distprune.errors import UserError, unknown
from distprune.search.candidates import Candidate
from distprune.search.space import ORDER, Space, bounds, within


def settle(space: Space, settings: Sequence[Mapping[str, Any]], *, seed: int) -> list[dict[str, Any]]:
    """The parameters of one trial for each setting: those that it sets, and the axes that these depend on. Raises UserError."""
    parameters = space.parameters()
    return [
        _Setting(space, parameters, setting, f"start[{index}]").settle(random.Random(stream_seed(seed, "start", index)))
        for index, setting in enumerate(settings)
    ]


class _Setting:
    """What one setting asks of a recipe."""

    def __init__(self, space: Space, parameters: Mapping[str, BaseDistribution], setting: Mapping[str, Any], where: str) -> None:
        self._space, self._parameters, self._setting, self._where = space, parameters, setting, where
        self._labels: dict[str, set[str]] = {}  # axis -> the candidates that it allows
        self._values: dict[str, Any] = {}  # parameter -> value
        self._sparsity: float | None = None
        for key, value in setting.items():
            self._read(key, value)

    def _read(self, key: str, value: Any) -> None:
        where = f"{self._where}.{key}"
        if key in ORDER:
            self._axis(key, value, where)
        elif key == "sparsity":
            self._read_sparsity(value, where)
        elif key in self._parameters:
            self._parameter(key, value, where)
        else:
            raise unknown(f"key in {self._where}:", key, {*ORDER, "sparsity", *self._parameters})

    def _axis(self, axis: str, value: Any, where: str) -> None:
        head, options = (dict(value), {}) if isinstance(value, Mapping) else ({"name": value}, {})
        options = {key: head.pop(key) for key in list(head) if key not in ("name", "import")}
        name = f"import:{head['import']}" if "import" in head else head.get("name")
        named = [candidate for candidate in self._space.axes[axis] if name in (candidate.label, candidate.name)]
        if not named:
            raise unknown(f"{axis} in {self._where}, which the space has not:", name, [c.label for c in self._space.axes[axis]])
        for key in options:
            if key not in named[0].choice.entry.options:
                raise unknown(f"option of {where} {name}:", key, named[0].choice.entry.options)
        fitting = [candidate for candidate in named if all(self._fits(candidate, key, item, where) for key, item in options.items())]
        if not fitting:
            fixed = "; ".join(_open(candidate) for candidate in named)
            raise UserError(f"{where} must be within the space, got {dict(value)}. The space has {fixed}.")
        self._allow(axis, {fitting[0].label} if options else {candidate.label for candidate in fitting})
        for key, item in options.items():
            if f"{fitting[0].label}/{key}" in self._parameters:
                self._parameter(f"{fitting[0].label}/{key}", item, f"{where}.{key}")

    def _fits(self, candidate: Candidate, key: str, value: Any, where: str) -> bool:
        if (distribution := self._parameters.get(f"{candidate.label}/{key}")) is not None:
            return within(value, distribution)
        option = candidate.choice.entry.options[key]
        if (searched := candidate.searched.get(key)) is not None:  # one value is no parameter
            return isinstance(searched, Choices) and (searched.values or option.values) == (value,)
        return bool(option.check(value, f"{where}.{key}") == candidate.fixed.get(key, option.default))

    def _read_sparsity(self, value: Any, where: str) -> None:
        low, high = bounds(self._space.sparsities)
        if not isinstance(value, int | float) or isinstance(value, bool) or not low <= value <= high:
            raise UserError(f"{where} must be within space.sparsity, [{low:g}, {high:g}], got {value!r}. Widen that, or leave it out.")
        if isinstance(listed := self._space.sparsities, Choices) and value not in listed.values:
            raise unknown(f"value of {where}:", value, map(str, listed.values))
        self._sparsity = float(value)

    def _parameter(self, name: str, value: Any, where: str) -> None:
        distribution = self._parameters[name]
        if isinstance(distribution, FloatDistribution) and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if not within(value, distribution):
            if isinstance(distribution, CategoricalDistribution):
                raise unknown(f"value of {where}:", value, map(str, distribution.choices))
            assert isinstance(distribution, FloatDistribution | IntDistribution)
            raise UserError(
                f"{where} must be in [{distribution.low:g}, {distribution.high:g}], got {value!r}. Widen the space, or leave it out."
            )
        self._values[name] = value
        for axis in ORDER:  # the parameter of a candidate comes with it
            if owners := {candidate.label for candidate in self._space.axes[axis] if name.startswith(f"{candidate.label}/")}:
                self._allow(axis, owners)

    def _allow(self, axis: str, labels: set[str]) -> None:
        self._labels[axis] = self._labels.get(axis, labels) & labels

    def settle(self, draw: random.Random) -> dict[str, Any]:
        """Parameters of a legal recipe that has all of the setting. Raises UserError if there is none."""
        chosen = self._walk([], draw)
        if chosen is None:
            clash = [key for key in self._setting if len(self._setting) > 1 and self._without(key)]
            way_out = f"Leave out {' or '.join(clash)}." if clash else "See `distprune list` for what goes together."
            raise UserError(f"{self._where} {dict(self._setting)} is no recipe of the space: its keys do not go together. {way_out}")
        found: dict[str, Any] = {}
        for depth, candidate in enumerate(chosen):
            step = self._space.after(chosen[:depth])
            assert step is not None
            if len(step[2]) > 1:
                found[step[1]] = candidate.label
        found |= {name: value for name, value in self._values.items() if name not in found}
        options = self._space.options(chosen)
        if self._sparsity is not None and "sparsity" in options:
            found["sparsity"] = self._sparsity
        elif self._sparsity is not None and "density" in options:
            found["density"] = round(1 - self._sparsity, 6)
        return found

    def _without(self, key: str) -> bool:
        rest = {other: value for other, value in self._setting.items() if other != key}
        return _Setting(self._space, self._parameters, rest, self._where)._walk([], random.Random(0)) is not None

    def _walk(self, chosen: list[Candidate], draw: random.Random) -> list[Candidate] | None:
        """A way through the space on which the setting is used as a whole, taken at random."""
        step = self._space.after(chosen)
        if step is None:
            return chosen if self._used(chosen) else None
        axis, name, legal = step
        if len(chosen) == 1 and not self._labels.keys() <= set(self._space.axes_of(chosen[0])):
            return None
        allowed = self._labels.get(axis)
        candidates = [candidate for candidate in legal if allowed is None or candidate.label in allowed]
        if name in self._values:
            candidates = [candidate for candidate in candidates if candidate.label == self._values[name]]
        for candidate in draw.sample(candidates, len(candidates)):
            if (found := self._walk([*chosen, candidate], draw)) is not None:
                return found
        return None

    def _used(self, chosen: list[Candidate]) -> bool:
        names = {step[1] for depth in range(len(chosen)) if (step := self._space.after(chosen[:depth])) is not None and len(step[2]) > 1}
        if not self._values.keys() <= names | self._space.options(chosen).keys():
            return False
        return self._sparsity is None or self._space.allows(chosen, self._sparsity)


def _open(candidate: Candidate) -> str:
    fixed = ", ".join(f"{key} {value!r}" for key, value in candidate.fixed.items())
    options = candidate.choice.entry.options
    searched = ", ".join(f"{key} in {_shown(options[key], where)}" for key, where in candidate.searched.items())
    return f"{candidate.label} with {', '.join(filter(None, [fixed, searched])) or 'its defaults'}"


def _shown(option: Option, where: Range | Choices | PerLayer) -> str:
    return f"[{', '.join(map(str, where.values or option.values))}]" if isinstance(where, Choices) else str(where)
