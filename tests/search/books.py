"""A book on its own, for tests of what it decides on reports and deaths."""

import inspect
from pathlib import Path
from typing import Any

import pytest
from searches import TOTAL
from toys import recipe

from distprune.search.book import Book
from distprune.search.entry import Entry
from distprune.search.goals import Goals
from distprune.search.rungs import Rungs


class Nothing:
    """Takes the place of what a test does not look at."""

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments, **options: None


def book_of(tmp_path: Path, entries: int = 1, **changes: Any) -> Book:
    """A book that was told of so many trials of one recipe, none of which has begun."""
    due = [name for name, parameter in inspect.signature(Book).parameters.items() if parameter.default is parameter.empty]
    parts: dict[str, Any] = {name: Nothing() for name in due}
    book = Book(**{**parts, "goals": Goals(), "rungs": Rungs([], 3), "most_trials": 9, **changes})
    book.entries = [Entry(number, recipe("dense"), str(number)) for number in range(entries)]
    book._proposer.size, book._known.proposed = 0, 9  # type: ignore[misc]
    return book


def row_of(number: int, index: int, *, attempt: str = "a", wall_s: float = 0.0, **changes: Any) -> dict[str, Any]:
    """A report of a trial."""
    row = {"trial": number, "attempt": attempt, "index": index, "rung": -1, "final": False, "ended": "", "cost": 10.0 * index}
    row |= {"spent": 10.0, "sparsity": 0.5, "kept": TOTAL // 2, "objective": 0.5, "score": None, "wall_s": wall_s, "extra": "{}"}
    return row | changes


def dies(book: Book, cause: str = "worker process died", *, free: bool = False) -> bool:
    """Whether trial 0 is begun again when its worker has died."""
    book.died(0, cause, free=free)
    book.gone(0)
    return (again := book.next()) is not None and again.number == 0


def on_ray(test: Any) -> Any:
    """A test that starts Ray, or uses what is made for it."""
    for mark in (pytest.mark.ray, pytest.mark.slow):
        test = mark(test)
    for warning in ("DeprecationWarning", "FutureWarning", "ResourceWarning"):
        test = pytest.mark.filterwarnings(f"ignore::{warning}")(test)
    return test
