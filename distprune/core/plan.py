"""Plans: what a paradigm returns. A list of frozen stages that one executor runs."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from distprune.core.executor import Env
    from distprune.core.state import State


@dataclass(frozen=True, kw_only=True)
class Stage(ABC):
    """One step of a plan: plain data that says all its result depends on. It prints nothing, writes no file and knows no Ray."""

    version: ClassVar[int] = 1  # part of the key: raised when the same fields give another result
    measured: ClassVar[bool] = False  # the executor reports after it

    @property
    def reads(self) -> str | None:
        """Tag of the snapshot that the stage reads."""
        return None

    @property
    def writes(self) -> str | None:
        """Tag of the snapshot that the stage makes; such a stage changes nothing else."""
        return None

    @property
    def is_empty(self) -> bool:
        """Whether the stage does nothing; a plan leaves it out."""
        return False

    def joined(self, before: "Stage") -> "Stage | None":
        """The one stage that does what `before` and then this does, or None if no stage does."""
        return None

    def enter(self, state: "State", env: "Env") -> None:
        """Called once, before the stage first runs."""
        return

    @abstractmethod
    def run(self, state: "State", env: "Env") -> Iterator[None]:
        """Do the work, yielding where a report is due. Must go on from any yield when called again on the saved state."""

    def leave(self, state: "State", env: "Env") -> None:
        """Called once, when the stage is done."""
        return

    def reports_now(self, state: "State", env: "Env") -> bool:
        """Whether `run`, having come to where the state stands, reports there."""
        return False

    def viewing(self, state: "State", env: "Env") -> AbstractContextManager[None]:
        """The context in which the network is measured while the stage runs."""
        return nullcontext()

    def advance(self, clock: int) -> int:
        """The clock after the stage."""
        return clock

    def samples(self, clock: int) -> int:
        """Samples that the stage bills when it begins at `clock`; the upper bound where it may end early."""
        return 0

    def describe(self) -> str:
        """One line for `distprune plan`."""
        return ""


@dataclass(frozen=True)
class Plan:
    """Stages in order."""

    stages: tuple[Stage, ...]

    def __init__(self, stages: Sequence[Stage]) -> None:
        object.__setattr__(self, "stages", tuple(stage for stage in stages if not stage.is_empty))

    def joined(self, index: int) -> Stage | None:
        """The stage at `index` joined with the trajectory that it continues, Snapshots aside; None if it begins a new one."""
        before = next((i for i in reversed(range(index)) if not self.stages[i].writes), None)
        return None if before is None else self.stages[index].joined(self.joined(before) or self.stages[before])

    def is_continued(self, index: int) -> bool:
        """Whether a later stage continues this one."""
        later = next((i for i in range(index + 1, len(self.stages)) if not self.stages[i].writes), None)
        return later is not None and self.joined(later) is not None

    def is_measured(self, index: int) -> bool:
        """Whether there is a report after the stage: not where a later one continues it, which reports as the whole would."""
        return self.stages[index].measured and not self.is_continued(index)

    def costs(self) -> list[int]:
        """Samples billed by each stage."""
        clock, costs = 0, []
        for stage in self.stages:
            costs.append(stage.samples(clock))
            clock = stage.advance(clock)
        return costs

    @property
    def cost(self) -> int:
        """Samples billed by the whole plan."""
        return sum(self.costs())
