"""A trial that ran out of memory asks for more of what ran out before it fails: twice the share of a GPU, or twice the memory of a node.

What it was given is noted in the stream of reports, so that a resumed driver knows it: a note is a row with a negative index.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from distprune.search.config import Workers
from distprune.search.entry import Entry
from distprune.search.failures import OF_MEMORY
from distprune.store.reports import ReportWriter

_OF_A_GPU = ("CUDA", "CUBLAS", "CUDNN", "OutOfMemoryError")  # in the reason of a trial's end
_OF_THE_HOST = ("allocate", "MemoryError")  # in one that has none of the former


@dataclass(frozen=True, kw_only=True)
class Ask:
    """What a trial gets besides CPUs."""

    times: int = 0  # that it was given more
    gpus: float = 0.0
    memory: int | None = None  # bytes

    @classmethod
    def of(cls, workers: Workers) -> "Ask":
        """Of a trial that has not asked for more."""
        return cls(gpus=workers.gpus, memory=workers.memory)

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


class More:
    """Answers trials that ran out of memory. `largest` is the memory (bytes) of the largest node, None where that is not known."""

    def __init__(self, workers: Workers | None = None, largest: Callable[[], float | None] = lambda: None) -> None:
        self._workers, self._largest = workers or Workers(), largest

    def after_end(self, entry: Entry, row: Mapping[str, Any], reports: ReportWriter) -> bool:
        """Whether a trial that says that it ran out of memory is given more; if not, or if it says something else, that counts."""
        extra, now = json.loads(row["extra"] or "{}"), self._now(entry)
        if row["ended"] != "oom" or extra.get("asked", 0) != now.times:
            return False
        of_a_gpu = _of_a_gpu(extra.get("reason", ""), now)
        entry.asking = self._give(entry, self._more_of_a_gpu(entry) if of_a_gpu else self._more_memory(entry), reports)
        return entry.asking

    def after_death(self, entry: Entry, cause: str, reports: ReportWriter) -> bool:
        """Whether a trial is given more whose worker was killed."""
        return cause == OF_MEMORY and entry.goes_on and self._give(entry, self._more_memory(entry), reports)

    def restore(self, entry: Entry, row: Mapping[str, Any]) -> bool:
        """Whether a row of the stream is a note, which is taken."""
        if row["index"] >= 0:
            return False
        ask = Ask(**json.loads(row["extra"])["ask"])
        if ask.times > self._now(entry).times:
            entry.ask = ask
        return True

    def _now(self, entry: Entry) -> Ask:
        return entry.ask or Ask.of(self._workers)

    def _more_of_a_gpu(self, entry: Entry) -> Ask | None:
        now = self._now(entry)
        return Ask(times=now.times + 1, gpus=min(2 * now.gpus, 1.0), memory=now.memory) if 0 < now.gpus < 1 else None

    def _more_memory(self, entry: Entry) -> Ask | None:
        now = self._now(entry)
        if now.memory is None or now.memory >= (most := int(self._largest() or 0)):
            return None
        return Ask(times=now.times + 1, gpus=now.gpus, memory=min(2 * now.memory, most))

    def _give(self, entry: Entry, ask: Ask | None, reports: ReportWriter) -> bool:
        if ask is None:
            return False
        entry.ask = ask
        reports.add({"trial": entry.number, "attempt": "driver", "index": -ask.times, "extra": json.dumps({"ask": ask.plain()})})
        return True


def _of_a_gpu(reason: str, now: Ask) -> bool:
    """Whether it was a GPU's memory that ran out. Where nothing is said, as of a batch that cannot be split, it is if there is one."""
    if any(words in reason for words in _OF_A_GPU):
        return True
    return now.gpus > 0 and not any(words in reason for words in _OF_THE_HOST)
