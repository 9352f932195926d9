"""The first trials of a search: every paradigm as it is usually run, then whatever candidates of the space these left out."""

from collections.abc import Sequence
from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from distprune.core.options import Choices
from distprune.search.candidates import Candidate
from distprune.search.space import ORDER, Space, fixes_sparsity

FEW = 8  # paradigms: a quarter of the trials that a search has if it says nothing
_GOLDEN = (5**0.5 - 1) / 2
_Place = tuple[str, str]  # an axis and the label of a candidate


def covering(space: Space) -> list[dict[str, Any]]:
    """Parameters of the first trials: every candidate of every axis is in one, and every paradigm at every listed sparsity.

    The first trial of a paradigm has the defaults of recipes and entries wherever the space has them: they are known to work, and equal
    rates make equal beginnings, which are trained once. Of a range of sparsities, densities are spread evenly in the logarithm from the
    sparsest on, which bounds the front, by multiples of the golden ratio; where paradigms are few, the first trial of each is at the
    sparsest: there they differ most, and those in rounds come by all others on the way.
    """
    return _Covering(space).trials()


def spared(space: Space) -> int:
    """How many of the first trials no rung may stop: one of each paradigm, where these are few, so that none is given up on a guess."""
    paradigms = len(space.axes["paradigm"])
    return paradigms if paradigms <= FEW else 0


class _Covering:
    """What the trials so far have left out."""

    def __init__(self, space: Space) -> None:
        self._space = space
        values = space.sparsities.values if isinstance(space.sparsities, Choices) else ()
        self._waiting = {(axis, candidate.label) for axis in ORDER for candidate in space.axes[axis]}
        self._crossed = [(paradigm.label, value) for paradigm in space.axes["paradigm"] for value in values]
        self._found: list[dict[str, Any]] = []
        self._bounds = spared(space)

    def trials(self) -> list[dict[str, Any]]:
        paradigms = self._space.axes["paradigm"]
        for paradigm in paradigms:
            self._add(self._complete([paradigm], usual=True), defaults=True)
        before = 0
        while before < len(self._found):
            before = len(self._found)
            for paradigm in paradigms:
                self._add(self._complete([paradigm]))
        for place in sorted(self._waiting):  # what is legal in few places only
            if place in self._waiting and (way := self._way([], place)) is not None:
                self._add(self._complete(way))
        return self._found

    def _add(self, chosen: Sequence[Candidate], *, defaults: bool = False) -> None:
        """The trial with these candidates, if it covers what waits."""
        axes = self._space.axes_of(chosen[0])
        places = list(zip(axes, [candidate.label for candidate in chosen], strict=True))
        options = self._space.options(chosen)
        crossed = next((pair for pair in self._crossed if pair[0] == chosen[0].label), None) if "sparsity" in options else None
        if crossed is None and not self._waiting & set(places):
            return
        found: dict[str, Any] = {}
        for depth, candidate in enumerate(chosen):
            step = self._space.after(chosen[:depth])
            if step is not None and len(step[2]) > 1:  # with one candidate there is nothing to choose, and no parameter
                found[step[1]] = candidate.label
        if crossed is not None:
            found["sparsity"] = crossed[1]
            self._crossed.remove(crossed)
        if isinstance(where := options.get("density"), FloatDistribution):
            place = 0.0 if defaults and self._bounds else sum("density" in other for other in self._found) * _GOLDEN % 1
            found["density"] = min(max(round(where.low * (where.high / where.low) ** place, 6), where.low), where.high)
        if defaults:
            found |= self._defaults(axes, chosen, options)
        self._waiting -= set(places)
        self._found.append(found)

    def _complete(self, chosen: list[Candidate], *, usual: bool = False) -> list[Candidate]:
        """With a candidate of every axis: the usual one, else one that waits, else in turn.

        Those that fix the sparsity come only once, as they cannot be crossed with it.
        """
        while (step := self._space.after(chosen)) is not None:
            axis, _, legal = step
            first = [candidate for candidate in legal if usual and candidate.name == self._space.usual(axis).name]
            first = first or [candidate for candidate in legal if (axis, candidate.label) in self._waiting]
            rest = [candidate for candidate in legal if not fixes_sparsity(axis, candidate)] or legal
            chosen = [*chosen, first[0] if first else rest[len(self._found) % len(rest)]]
        return chosen

    def _way(self, chosen: list[Candidate], place: _Place) -> list[Candidate] | None:
        """Candidates that end with the one at a place, if there is a way to it."""
        step = self._space.after(chosen)
        if step is None:
            return None
        axis, _, legal = step
        if axis == place[0]:
            return next(([*chosen, candidate] for candidate in legal if candidate.label == place[1]), None)
        ways = (self._way([*chosen, candidate], place) for candidate in legal)
        return next((way for way in ways if way is not None), None)

    def _defaults(self, axes: Sequence[str], chosen: Sequence[Candidate], options: dict[str, BaseDistribution]) -> dict[str, Any]:
        """The defaults of searched options, where the space has them."""
        found = {}
        for axis, candidate in zip(axes, chosen, strict=True):
            usual = self._space.usual(axis)
            choice = usual if usual.name == candidate.name else candidate.choice
            for name in candidate.searched:
                path, value = f"{candidate.label}/{name}", choice.option(name)
                if path in options and _contains(options[path], value):
                    found[path] = value
        return found


def _contains(where: BaseDistribution, value: Any) -> bool:
    if isinstance(where, CategoricalDistribution):
        return value in where.choices
    return isinstance(where, FloatDistribution | IntDistribution) and isinstance(value, int | float) and where.low <= value <= where.high
