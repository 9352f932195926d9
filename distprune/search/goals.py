"""What a search is after: which numbers of a network are to be large or small, and which it may not exceed."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from distprune.core import registry
from distprune.core.costs import is_measured, label
from distprune.core.registry import PARAMS, Choice
from distprune.search.config import Budget, Search
from distprune.search.entry import Entry
from distprune.search.rungs import Vector

_CLOSE = 1e-9  # of a limit: what sums of shares are off by
_LEAST = 1e-9  # share of a cost


@dataclass(frozen=True)
class Goals:
    """The objective on validation is maximized and costs are minimized, each as a share of the dense network's.

    A finished network is feasible if it keeps to all budgets, is not below `floor`, and what it costs is known.
    """

    minimize: tuple[Choice, ...] = (PARAMS,)
    budgets: tuple[Budget, ...] = ()
    floor: float | None = None  # of the objective

    @classmethod
    def of(cls, search: Search) -> "Goals":
        """As a search states them."""
        return cls(search.minimize, search.budget, search.floor)

    @property
    def costs(self) -> tuple[Choice, ...]:
        """All costs that matter, each once."""
        every = (*self.minimize, *(budget.cost for budget in self.budgets))
        return tuple({label(choice): choice for choice in every}.values())

    @property
    def directions(self) -> tuple[Literal["maximize", "minimize"], ...]:
        """Of what Optuna is told."""
        of_a_cost: Literal["minimize"] = "minimize"
        return ("maximize", *[of_a_cost for _ in self.minimize])

    def reached(self, entry: Entry) -> Vector:
        """What a finished trial came to; larger is better in each. An unknown cost counts as the dense network's."""
        return (float(entry.last["objective"]), *[-_reached(entry, choice) for choice in self.minimize])

    def expected(self, entry: Entry) -> Vector:
        """What an unfinished trial is expected to come to: its best score, at the costs of the network projected onto its final budget."""
        assert entry.best is not None, "a trial that is compared has a score"
        return (entry.best, *[-_expected(entry, choice) for choice in self.minimize])

    def ranked(self, entry: Entry) -> Vector:
        """How a trial competes at rungs: as it is expected to come out or came out, and by how far it is above each budget.

        Where the budget's cost is minimized that says it already; elsewhere the best score would always be that of a network too large.
        Costs are logarithms: from 4 % to 2 % is as far as from 100 % to 50 %.
        """
        vector, cost = (self.reached(entry), _reached) if entry.ended == "finished" else (self.expected(entry), _expected)
        known = {label(choice) for choice in self.minimize}
        others = [budget for budget in self.budgets if label(budget.cost) not in known]
        score, *costs = vector
        return (
            score,
            *[-logarithm(-value) for value in costs],
            *[-max(cost(entry, budget.cost) / budget.most - 1, 0.0) for budget in others],
        )

    def values(self, vector: Vector) -> list[float]:
        """As Optuna is told."""
        return [value if direction == "maximize" else -value for value, direction in zip(vector, self.directions, strict=True)]

    def violations(self, entry: Entry) -> dict[str, float]:
        """Constraints of a finished trial: above 0 is violated, relative to the limit, so that different ones can be summed.

        The first budget is called `budget`, for the policies that are bound by it; `unmeasured` counts the costs that are not known.
        """
        found = {}
        for index, budget in enumerate(self.budgets):
            if (share := _share(entry, budget.cost)) is not None:
                found[f"budget:{label(budget.cost)}" if index else "budget"] = _relative(share - budget.most, budget.most)
        if self.floor is not None:
            found["floor"] = _relative(self.floor - float(entry.last["objective"]), abs(self.floor) or 1.0)
        if unknown := sum(_share(entry, choice) is None for choice in self.costs):
            found["unmeasured"] = float(unknown)
        return found

    def met(self, entry: Entry) -> bool:
        """Whether a finished trial is known to be feasible."""
        return not any(violation > 0 for violation in self.violations(entry).values())


def logarithm(share: float) -> float:
    """Of a cost; finite for one of nothing."""
    return math.log(max(share, _LEAST))


def _relative(excess: float, limit: float) -> float:
    return 0.0 if 0 < excess <= limit * _CLOSE else excess / limit


def _share(entry: Entry, choice: Choice) -> float | None:
    """What a finished trial costs; None where that could not be counted or measured."""
    found: Any = entry.extra.get("costs", {}).get(label(choice))
    if found is None and choice == PARAMS:
        return 1 - float(entry.last["sparsity"])
    return None if found is None else float(found)


def _reached(entry: Entry, choice: Choice) -> float:
    """What a finished trial costs; as much as the dense network where that is not known."""
    share = _share(entry, choice)
    return 1.0 if share is None else share


def _expected(entry: Entry, choice: Choice) -> float:
    """What an unfinished trial will cost: what is measured later is in proportion to FLOPs, and what is not counted to the budget."""
    costs: Mapping[str, Any] = entry.costs
    found = costs.get(label(registry.cost.choose("flops") if is_measured(choice) else choice))
    return 1 - entry.recipe.sparsity if found is None else float(found)
