"""Checkpoints of made-up sizes, and what is left of them, for tests of the disk."""

import json
from typing import Any

from books import row_of

from distprune.store.folder import RunFolder


class Held:
    """A retention that is or is not crowded."""

    total, crowded = 5 * 10**9, False


def checkpoint_of(folder: RunFolder, number: int, attempt: str, index: int, size: int = 100) -> dict[str, Any]:
    """Write one as a worker does, and what it then reports."""
    path = folder.checkpoint(number, attempt, index)
    path.mkdir(parents=True)
    (path / "state.safetensors").write_bytes(b"x" * size)
    return row_of(number, index, attempt=attempt, extra=json.dumps({"checkpoint": size}))


def on_disk(folder: RunFolder) -> set[str]:
    return {path.parent.relative_to(folder.checkpoints).as_posix() for path in folder.checkpoints.rglob("state.safetensors")}
