"""What tests of the search room share."""

from collections.abc import Iterator

import pytest

from distprune.search import driver


@pytest.fixture
def no_finale(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Made-up curves leave no networks to measure on the test split."""
    monkeypatch.setattr(driver, "finalize", lambda folder, book: None)
    yield
