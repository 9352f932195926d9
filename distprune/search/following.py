"""Checkpoints and cache of a trial on several ranks: rank 0 alone reads and writes them, and tells the others what it has read."""

import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distprune.core.ranks import Ranks
from distprune.core.run import Run
from distprune.search.sharing import Record, Sharing
from distprune.store.cache import Cache

if TYPE_CHECKING:
    from distprune.search.trial import Memory


def restored(ranks: Ranks, run: Run, memory: "Memory", restore: Callable[[], list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The reports of a trial that goes on, its state in the run's: as rank 0 restores them."""
    if ranks.size == 1:
        return restore()
    if ranks.rank == 0:
        outbox = restore()
        ranks.tell(_packed(run, outbox=outbox, memory=asdict(memory)) if outbox else b"")
        return outbox
    if not (content := ranks.tell(b"")):
        return []
    facts = _unpacked(run, content)
    memory.micro_batch, memory.retries = facts["memory"]["micro_batch"], facts["memory"]["retries"]
    return list(facts["outbox"])


class Following(Sharing):
    """The cache as all ranks of a trial see it; those that follow rank 0 have none of their own, and need none."""

    def __init__(self, cache: Cache, run: Run, rungs: Sequence[float], **options: Any) -> None:
        super().__init__(cache, run, rungs, **options)
        self._ranks = run.env.task.ranks

    def _take(self, records: int, limit: float) -> list[Record] | None:
        if self._ranks.rank == 0:
            found = super()._take(records, limit)
            self._ranks.tell(b"" if found is None else _packed(self._run, found=found))
            return found
        if not (content := self._ranks.tell(b"")):
            return None
        billed = self._run.state.ledger.cost
        found = list(_unpacked(self._run, content)["found"])
        self.served += self._run.state.ledger.cost - billed
        return found

    def _give(self, rows: Sequence[dict[str, Any]], *, crossed: bool = False) -> bool:
        if self._ranks.rank == 0:
            return super()._give(rows, crossed=crossed)
        position = self._prefixes.at(self._run.state)
        return position is not None and self._is_kept(position, crossed)


def opened(ranks: Ranks, run: Run, rungs: Sequence[float], open_cache: Callable[[], Cache | None], **options: Any) -> Sharing | None:
    """The cache of a trial, where it can be opened; on several ranks, where rank 0 can open it."""
    cache = open_cache() if ranks.rank == 0 else None
    if ranks.size == 1:
        return None if cache is None else Sharing(cache, run, rungs, **options)
    there = json.loads(ranks.tell(json.dumps(cache is not None).encode()))
    return Following(cache, run, rungs, **options) if there else None  # type: ignore[arg-type]


def _packed(run: Run, **facts: Any) -> bytes:
    with tempfile.TemporaryDirectory(prefix="distprune-ranks-") as folder:
        path = Path(folder) / "state.safetensors"
        run.state.save(path, **facts)
        return path.read_bytes()


def _unpacked(run: Run, content: bytes) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="distprune-ranks-") as folder:
        path = Path(folder) / "state.safetensors"
        path.write_bytes(content)
        return run.state.load(path)
