"""What a book knows of one trial."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from optuna.trial import FrozenTrial

from distprune.core.recipe import Recipe

if TYPE_CHECKING:
    from distprune.search.more import Ask

NOTED = ("spared", "repeat_of", "repeat", "round_of")  # what the journal keeps of an entry, where it is not the default


@dataclass
class Entry:
    """What is known of one trial."""

    number: int
    recipe: Recipe
    identity: str  # of the recipe
    attempts: list[str] = field(default_factory=list)  # ids of the workers' attempts, in the order in which they were first heard
    reports: int = 0  # heard so far: the driver knows those with a lower index
    rung: int = -1
    paused: int = -1  # rung at which it waits to go on
    best: float | None = None  # highest score so far: right after a rewind the current one means nothing
    costs: Mapping[str, float | None] = field(default_factory=dict)  # shares that go with the latest score, of the final network
    last: dict[str, Any] = field(default_factory=dict)  # latest report
    ended: str = ""  # finished, stopped, error, nan, oom, timeout, lost, duplicate; empty while it runs
    stopped: str = ""  # why the driver stopped it: rung, limit
    reason: str = ""  # why it ended, once told
    spent: float = 0.0  # samples really run in earlier attempts
    spent_now: float = 0.0  # and in the latest
    wall: float = 0.0  # seconds of earlier attempts, up to the last report of each
    wall_now: float = 0.0  # and of the latest
    deaths: list[str] = field(default_factory=list)  # why its workers died, while this driver looked
    stuck: int = 0  # deaths since the last report that was new, preemption aside
    silences: int = 0  # times since then that a worker was given up for its silence
    ask: "Ask | None" = None  # what it gets, once it was given more memory
    asking: bool = False  # its worker came to an end for which it was given more, and it is not queued again yet
    told: bool = False
    owed: bool = False  # it was told as finished and its last report was lost: it is run again for that, and nothing is decided on it
    params: Mapping[str, Any] = field(default_factory=dict)
    duplicates: list[int] = field(default_factory=list)  # trials that wait for this one's result
    spared: bool = False  # it is not stopped at a rung: the usual recipe of a paradigm, or what a policy came to in the end
    repeat_of: int | None = None  # the finalist that it repeats with another seed: it is no proposal, and is compared with nothing
    repeat: int = 0  # how often its recipe was run before, each time with another seed
    round_of: int | None = None  # the trial that came by its result on the way: it is no proposal either, and costs nothing

    @property
    def proposed(self) -> bool:
        """Whether a sampler proposed it."""
        return self.repeat_of is None and self.round_of is None

    @property
    def cost(self) -> float:
        """Billed samples so far."""
        return float(self.last.get("cost") or 0.0)

    @property
    def waits(self) -> bool:
        """Whether it stands at a rung and may yet go on."""
        return self.paused >= 0 and not self.decided

    @property
    def goes_on(self) -> bool:
        """Whether it runs, or is to."""
        return self.paused < 0 and not self.decided

    @property
    def extra(self) -> dict[str, Any]:
        """What the latest report says besides its columns."""
        return dict(json.loads(self.last.get("extra") or "{}"))

    def fail(self, ended: str, reason: str) -> None:
        """End it for a reason that no report tells."""
        self.ended, self.last = ended, {**self.last, "extra": json.dumps({**self.extra, "reason": reason})}

    @property
    def decided(self) -> bool:
        """Whether its end is known, told or not."""
        return self.told or bool(self.ended or self.stopped)

    @classmethod
    def of(cls, trial: FrozenTrial) -> "Entry":
        """As the journal knows a trial, before its reports are read."""
        attrs = trial.user_attrs
        told = {key: attrs[key] for key in NOTED if key in attrs}
        return cls(trial.number, Recipe.read(attrs["recipe"]), attrs["identity"], params=trial.params, **told)


@dataclass(frozen=True)
class Assignment:
    """A trial to be run now."""

    number: int
    recipe: Recipe
    known: int
    ask: "Ask | None" = None
    judged: bool = True  # whether it is scored at rungs
