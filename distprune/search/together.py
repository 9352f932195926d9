"""A trial on several ranks: what each does, and how who leads them makes one trial of it.

All ranks go from report to report in step, so that at each of them the trial can be stopped, and its ranks take the next one. A rank that
fails says so in plain data. Then the others may wait for it in a sum that never comes, and on a GPU sums may be on their way still: all
are dismissed, and new ones take over. Only a loss that is not finite is seen by all of them at one place.
"""

from collections.abc import Generator
from dataclasses import asdict
from typing import Any, Protocol

from distprune.core.allocation import OutOfMemory, Unsplittable, is_shortage
from distprune.core.loop import Diverged
from distprune.core.ranks import Lost, Together
from distprune.errors import UserError
from distprune.search.trial import Job, Memory, Rows, attempts, free_memory, rows_of

Answer = dict[str, Any]


class Rank:
    """One of the processes of a trial. A torch.distributed group must be there."""

    _rows: Generator[dict[str, Any], None, None] | None = None

    def begin(self, job: dict[str, Any], base: dict[str, Any], memory: dict[str, Any]) -> Answer:
        """Take a trial, which begins with the first step."""
        found = Job(**job)
        self._rows = rows_of(found, base, Memory(**memory), Together(found.device))
        return {}

    def step(self) -> Answer:
        """Go on to the next report."""
        assert self._rows is not None
        try:
            return {"row": next(self._rows)}
        except StopIteration:
            return {"over": True}
        except Exception as error:  # whatever a user's model, data or loss may raise
            return {"failed": _told(error)}

    def close(self) -> Answer:
        """Leave the trial where it is."""
        if self._rows is not None:
            self._rows.close()
            self._rows = None
        free_memory()
        return {}


class Crew(Protocol):
    """The ranks of a trial."""

    def all(self, method: str, *arguments: Any) -> list[Answer]:
        """What all ranks answer, or some of them if one has failed. Raises Lost if one is gone, after which `dismiss` is due."""

    def dismiss(self) -> None:
        """End the ranks; others take their place when they are needed."""


def run_together(job: Job, crew: Crew) -> Generator[dict[str, Any], None, None]:
    """As `run_trial`, on the ranks of `crew`. Raises Lost if one of them is gone."""
    return attempts(job, _rows_of(crew))


def _rows_of(crew: Crew) -> Rows:
    def rows(job: Job, base: dict[str, Any], memory: Memory) -> Generator[dict[str, Any], None, None]:
        in_step = False
        try:
            crew.all("begin", job.plain(), base, asdict(memory))
            while True:
                answers = crew.all("step")
                if failures := [answer["failed"] for answer in answers if "failed" in answer]:
                    in_step = [failure["kind"] for failure in failures] == ["diverged"] * job.ranks
                    raise _error(min(failures, key=lambda failure: failure["kind"] == "lost"))
                in_step = True
                if "over" in answers[0]:
                    return
                yield answers[0]["row"]
                in_step = False
        finally:
            try:
                if in_step:
                    crew.all("close")
            except Lost:
                in_step = False
            if not in_step:
                crew.dismiss()

    return rows


def _told(error: Exception) -> dict[str, Any]:
    """An exception as plain data: its class as far as it matters."""
    kinds = {Lost: "lost", Diverged: "diverged", Unsplittable: "unsplittable", UserError: "user"}
    kind = "shortage" if is_shortage(error) else next((name for cls, name in kinds.items() if isinstance(error, cls)), "other")
    text = str(error) if kind not in ("other", "shortage") else f"{type(error).__name__}: {error}"
    return {"kind": kind, "text": text, "samples": getattr(error, "samples", None)}


def _error(failure: dict[str, Any]) -> Exception:
    kind, text = failure["kind"], failure["text"]
    if kind == "shortage":
        return OutOfMemory(failure["samples"], RuntimeError(text)) if failure["samples"] else MemoryError(text)
    return {"lost": Lost, "diverged": Diverged, "unsplittable": Unsplittable}.get(kind, UserError)(text)
