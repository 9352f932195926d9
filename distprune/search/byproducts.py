"""The networks at the ends of a trial's rounds: each is the whole result of a recipe with a lower sparsity, and lies in the cache.

A trial that prunes in rounds trains all that the same recipe with a nearer target would, and nothing else, before it goes on. Such a
target is entered as a trial of its own: it reads its network from the cache and runs no sample.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from distprune.core.keys import digest
from distprune.core.recipe import Recipe
from distprune.core.stages import Prune
from distprune.search.entry import Entry

Prefixes = Callable[[Recipe], Sequence[tuple[str, int]]]  # as of `core.prefix.shared_keys`: (key, bill in samples), in order


@dataclass(frozen=True)
class ByProduct:
    """A recipe whose result trial `number` came by, in the parameters of the search."""

    number: int
    recipe: Recipe
    identity: str
    params: Mapping[str, Any]


class ByProducts:
    """Finds them. `prefixes` says what a recipe's run leaves in the cache, `searched` whether a sparsity is one of the space."""

    def __init__(self, prefixes: Prefixes, searched: Callable[[float], bool], *, steps_per_epoch: int) -> None:
        self._prefixes, self._searched, self._steps_per_epoch = prefixes, searched, steps_per_epoch

    def of(self, entry: Entry, known: Callable[[str], bool]) -> Iterator[ByProduct]:
        """What an ended trial came by, stopped or finished, the least sparse first, but for recipes whose identities are `known`."""
        if not {"density", "sparsity"} & entry.params.keys():  # the sparsity is not the sampler's choice
            return
        plan, made = entry.recipe.plan(self._steps_per_epoch), None
        for sparsity in (stage.sparsity for stage in plan.stages if isinstance(stage, Prune)):
            if sparsity >= entry.recipe.sparsity or not self._searched(sparsity):
                continue
            recipe = replace(entry.recipe, sparsity=sparsity)
            cost = recipe.plan(self._steps_per_epoch).cost
            if cost > entry.cost or known(identity := digest(recipe)):
                continue
            made = made or {key for key, _ in self._prefixes(entry.recipe)}
            keys = self._prefixes(recipe)
            if keys and keys[-1][0] in made and keys[-1][1] == cost:
                yield ByProduct(entry.number, recipe, identity, _at(sparsity, entry.params))


def _at(sparsity: float, params: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters of the search at another sparsity."""
    other = {"density": round(1 - sparsity, 12), "sparsity": sparsity}
    return {name: other.get(name, value) for name, value in params.items()}
