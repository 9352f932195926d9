"""A recipe run again with another seed: where a sampler proposes it twice, and where the best of a search are repeated."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Literal

from distprune.core.keys import digest
from distprune.core.recipe import Recipe
from distprune.core.streams import stream_seed
from distprune.search.config import Finalists
from distprune.search.entry import Entry
from distprune.search.volume import contributions


class Again:
    """Which seed a repetition has. It depends on its index alone, so that equal prefixes of different recipes stay equal work."""

    def __init__(self, *, seed: int = 0, duplicates: Literal["known", "new_seed"] = "known", finalists: Finalists | None = None) -> None:
        self._seed, self._new_seed, self._finalists = seed, duplicates == "new_seed", finalists
        self._times: Counter[str] = Counter()  # recipe -> how often it was proposed

    def restore(self, entries: Iterable[Entry]) -> None:
        """Start from what was proposed so far."""
        self._times = Counter(digest(replace(entry.recipe, seed=self._seed)) for entry in entries if entry.proposed)

    def seeded(self, recipe: Recipe) -> tuple[Recipe, int]:
        """A proposed recipe as it is to be run, and how often it was proposed before."""
        if not self._new_seed:
            return recipe, 0
        identity = digest(recipe)
        repeat = self._times[identity]
        self._times[identity] += 1
        return (recipe, 0) if repeat == 0 else (self._with_seed(recipe, "again", repeat), repeat)

    def of_finalist(self, recipe: Recipe, repeat: int) -> Recipe:
        """A finalist's recipe with the seed of its repetition, from 1."""
        return self._with_seed(recipe, "finalist", repeat)

    def _with_seed(self, recipe: Recipe, purpose: str, repeat: int) -> Recipe:
        return replace(recipe, seed=stream_seed(self._seed, purpose, repeat) % 2**31)

    def wanted(self, entries: Sequence[Entry], front: Mapping[int, Sequence[float]]) -> list[tuple[Entry, int]]:
        """(finalist, repetition) that are still to be run: of those on the front that add most to its hypervolume."""
        if self._finalists is None:
            return []
        worth = contributions(front)
        best = sorted(front, key=lambda number: (-worth[number], number))[: self._finalists.count]
        run = {(entry.repeat_of, entry.repeat) for entry in entries if entry.reason != "limit"}
        return [(entries[n], k) for k in range(1, self._finalists.seeds + 1) for n in sorted(best) if (n, k) not in run]
