"""What tests of the search room share."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from distprune.search import driver


@pytest.fixture
def no_finale(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Made-up curves leave no networks to measure on the test split."""
    monkeypatch.setattr(driver, "finalize", lambda folder, book: None)
    yield


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """In a folder of the test's own, and back: a trial changes the working directory."""
    monkeypatch.chdir(tmp_path)
