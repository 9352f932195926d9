"""What a search came to, in few numbers: the same on its headline and in the captions of its figures."""

from collections.abc import Callable, Sequence
from typing import Any

from distprune.report.data import Data, Row

NEAR = 0.01  # of the best objective: what is within it counts as level


def best(data: Data) -> dict[str, Any] | None:
    """The most accurate trial of the front, the smallest of equals."""
    return data.front[0] if data.front else None


def smallest_near_best(data: Data) -> dict[str, Any] | None:
    """The smallest network of the front within 1% of the best objective."""
    if (top := best(data)) is None:
        return None
    least = top["objective"] - NEAR * abs(top["objective"])
    return min((row for row in data.front if row["objective"] >= least), key=lambda row: row["kept"])


def best_dense(data: Data) -> dict[str, Any] | None:
    """The most accurate network that nothing was removed from."""
    dense = [row for row in data.finished if row["sparsity"] == 0]
    return max(dense, key=lambda row: row["objective"], default=None)


def own(data: Data) -> list[dict[str, Any]]:
    """Trials with a bill of their own: what another's trial came by was billed there."""
    return [row for row in data.rows if row["round_of"] is None]


def total(rows: Sequence[Row], value: Callable[[Row], float | None]) -> float:
    """Of all rows, where there is a value."""
    return float(sum(value(row) or 0.0 for row in rows))
