"""Which recipes a search has: those that were proposed, and the rounds of others that were entered as trials."""

from collections.abc import Callable

from distprune.search.byproducts import ByProduct, ByProducts
from distprune.search.entry import Entry

MOST_DUPLICATES = 50  # in a row: then the space is exhausted


class Known:
    """Says which trial answers for a recipe, and what ended trials came by that no trial has yet."""

    def __init__(self, byproducts: ByProducts | None = None) -> None:
        self._byproducts = byproducts
        self._answers: dict[str, int] = {}  # recipe identity -> the trial that runs it, or a round that has it
        self._rounds: set[str] = set()  # identities of rounds that were entered
        self._found: list[ByProduct] = []  # what no trial has yet
        self._repetitions = 0  # recipes proposed in a row that were proposed before
        self.proposed = 0  # trials

    @property
    def exhausted(self) -> bool:
        """Whether the sampler comes up with nothing new."""
        return self._repetitions >= MOST_DUPLICATES

    @property
    def has_rounds(self) -> bool:
        """Whether something was found that no trial has yet."""
        return bool(self._found)

    def propose(self, entry: Entry) -> int:
        """Note a proposed trial; returns the number of the one that answers for its recipe, its own where that is new."""
        first = self._answers.setdefault(entry.identity, entry.number)
        self.proposed += 1
        self._repetitions = 0 if first == entry.number else self._repetitions + 1
        return first

    def answers_for(self, entry: Entry) -> int:
        """The number of the trial whose result is that of a proposed one."""
        return self._answers[entry.identity]

    def enter(self, entry: Entry, *, finished: bool = False) -> None:
        """Note a trial of a round; once it has finished it answers for its recipe: one that came to nothing answers for none."""
        self._rounds.add(entry.identity)
        if finished:
            self._answers.setdefault(entry.identity, entry.number)

    def told(self, entry: Entry) -> None:
        """Remember what a trial that was told came by."""
        if entry.round_of is not None:
            self.enter(entry, finished=entry.ended == "finished")
        elif self._byproducts is not None and entry.proposed and entry.ended in ("finished", "stopped"):
            self._found += self._byproducts.of(entry, self._has)

    def take(self, use: Callable[[ByProduct], Entry]) -> Entry | None:
        """The trial that `use` makes of the next that is new; None if there is none."""
        while self._found:
            found = self._found.pop(0)
            if not self._has(found.identity):
                entry = use(found)
                self.enter(entry)
                return entry
        return None

    def _has(self, identity: str) -> bool:
        return identity in self._answers or identity in self._rounds
