"""A space whose parameters all have listed values, as the sequence of its combinations."""

import bisect
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from distprune.core.streams import stream_seed
from distprune.errors import UserError
from distprune.search.candidates import Candidate
from distprune.search.space import Space

_Axis = tuple[str, Sequence[Any]]  # a parameter and its values


class Grid:
    """Every combination of a space's values once, in an order that is drawn from the seed: a search that ends early has seen all parts."""

    def __init__(self, space: Space, *, seed: int) -> None:
        """Raises UserError for a space with a continuous parameter."""
        self._chains = [_axes(space, chosen) for chosen in _chains(space, [])]
        self._ends = list(itertools.accumulate(math.prod(len(values) for _, values in axes) for axes in self._chains))
        self.size = self._ends[-1]
        self._seed = seed
        self._order: list[int] = []  # of the places so far: Fisher and Yates' shuffle, as far as it is needed
        self._moved: dict[int, int] = {}

    def __getitem__(self, place: int) -> dict[str, Any]:
        """The parameters of a combination, `place` in [0, size)."""
        while len(self._order) <= place:
            here = len(self._order)
            there = here + stream_seed(self._seed, "grid", here) % (self.size - here)
            self._order.append(self._moved.pop(there, there))
            if there != here:
                self._moved[there] = self._moved.pop(here, here)
        index = self._order[place]
        chain = bisect.bisect_right(self._ends, index)
        index -= self._ends[chain - 1] if chain else 0
        found = {}
        for name, values in self._chains[chain]:
            index, digit = divmod(index, len(values))
            found[name] = values[digit]
        return found


def _chains(space: Space, chosen: list[Candidate]) -> Iterator[list[Candidate]]:
    step = space.after(chosen)
    if step is None:
        yield chosen
        return
    for candidate in step[2]:
        yield from _chains(space, [*chosen, candidate])


def _axes(space: Space, chosen: list[Candidate]) -> list[_Axis]:
    """The parameters of the recipes with these candidates: those that choose the candidates have one value here."""
    axes: list[_Axis] = []
    for depth, candidate in enumerate(chosen):
        step = space.after(chosen[:depth])
        assert step is not None
        if len(step[2]) > 1:
            axes.append((step[1], (candidate.label,)))
    for name, distribution in space.options(chosen).items():
        if isinstance(distribution, FloatDistribution):
            raise UserError(_continuous(name, distribution))
        if isinstance(distribution, CategoricalDistribution):
            axes.append((name, distribution.choices))
        else:
            assert isinstance(distribution, IntDistribution)
            axes.append((name, range(distribution.low, distribution.high + 1)))
    return axes


def _continuous(name: str, distribution: FloatDistribution) -> str:
    if name == "density":
        low, high = round(1 - distribution.high, 6), round(1 - distribution.low, 6)
        return f"sampler 'grid' needs listed values, and space.sparsity is a range, [{low:g}, {high:g}]. List one value, or three and more."
    return (
        f"sampler 'grid' needs listed values, and parameter '{name}' is continuous in [{distribution.low:g}, {distribution.high:g}]. "
        "Give its option one value in the space, or three and more."
    )
