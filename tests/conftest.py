"""What all tests share."""

import os

# Before ray is imported anywhere: tests keep Ray's token out of the user's home, and its child processes quiet.
os.environ.setdefault("RAY_AUTH_MODE", "disabled")

import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Bits depend on the thread count."""
    torch.set_num_threads(1)
