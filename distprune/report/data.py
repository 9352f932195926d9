"""What a page about a search is made of, read from its run folder; the search may still be running."""

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from safetensors import SafetensorError, safe_open

from distprune.core import registry
from distprune.core.config import read_yaml
from distprune.core.costs import label
from distprune.errors import UserError
from distprune.report.reading import Curve, read_checks, read_curves, signs_of_life
from distprune.store.folder import RunFolder
from distprune.store.trials import FAILED, SCHEMA, read_trials

_HEAVY = ("recipe", "parameters", "layers", "deaths")  # JSON that is read of some trials only

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Data:
    """All that figures and tables are drawn from."""

    folder: RunFolder
    facts: Mapping[str, Any]  # what search.yaml holds
    table: pa.Table  # a row a trial
    curves: Mapping[int, Curve]
    objective: str  # the name of what is maximized on validation
    running: bool
    silent: float | None = None  # for how long a driver that cannot be asked has written nothing (s)
    sanity: tuple[tuple[str, Mapping[str, Any]], ...] = ()  # (file, what it holds) of sanity checks, the newest first

    @classmethod
    def read(cls, folder: RunFolder) -> "Data":
        """What lies in a run folder now. Raises UserError for a search.yaml that is none."""
        facts = read_yaml(folder.search_yaml)
        table = read_trials(folder.trials) if folder.trials.exists() else SCHEMA.empty_table()
        curves, name = read_curves(folder)
        return cls(folder, facts, table, curves, name, *signs_of_life(folder, table), read_checks(folder.path))

    @property
    def name(self) -> str:
        """What the search is called."""
        return str(self.search.get("name") or self.folder.path.name)

    @property
    def search(self) -> Mapping[str, Any]:
        """The search as its file says it."""
        found = self.facts.get("search")
        return found if isinstance(found, Mapping) else {}

    @property
    def simulated(self) -> Mapping[str, Any] | None:
        """What a simulated search says of itself; None for a real one."""
        found = self.facts.get("simulated")
        return found if isinstance(found, Mapping) else None

    @functools.cached_property
    def rungs(self) -> list[float]:
        """Their bills (samples)."""
        return [float(cost) for cost in self.facts.get("rungs") or []]

    @functools.cached_property
    def rows(self) -> list[dict[str, Any]]:
        """Every trial, without what is long."""
        return list(self.table.drop_columns(list(_HEAVY)).to_pylist())

    def long(self, number: int, column: str) -> Any:
        """What is long, of one trial; None where it is empty."""
        text = self.table[column][number].as_py()
        return json.loads(text) if text else None

    @functools.cached_property
    def finished(self) -> list[dict[str, Any]]:
        """Trials that came to their end, repeats of finalists and rounds of others among them."""
        return [row for row in self.rows if row["ended"] == "finished" and row["objective"] is not None]

    @functools.cached_property
    def front(self) -> list[dict[str, Any]]:
        """The front on validation, the most accurate first."""
        found = [row for row in self.finished if row["pareto"]]
        return sorted(found, key=lambda row: (-row["objective"], row["kept"]))

    @functools.cached_property
    def stopped(self) -> list[dict[str, Any]]:
        """Trials that were stopped."""
        return [row for row in self.rows if row["ended"] == "stopped"]

    @functools.cached_property
    def failed(self) -> list[dict[str, Any]]:
        """Trials without a result."""
        return [row for row in self.rows if row["ended"] in FAILED]

    @functools.cached_property
    def died(self) -> frozenset[int]:
        """Trials of which a worker died, as far as a driver saw it."""
        pairs = zip(self.table["number"].to_pylist(), self.table["deaths"].to_pylist(), strict=True)
        return frozenset(number for number, text in pairs if json.loads(text or "[]"))

    @functools.cached_property
    def costs(self) -> list[str]:
        """The costs that the search minimizes, as its table calls them."""
        return [label_of(cost) for cost in self.search.get("minimize") or []]

    def cost(self, row: Row, name: str) -> float | None:
        """A cost of a finished trial, as a share of the dense network's."""
        found = json.loads(row["costs"] or "{}").get(name)
        if found is None and name == "params" and row["sparsity"] is not None:
            return 1 - float(row["sparsity"])
        return None if found is None else float(found)

    def layers(self, number: int) -> dict[str, tuple[int, int]]:
        """Of each layer of a trial: (kept weights, weights as far as is known)."""
        kept, sizes = self.long(number, "layers") or {}, self._sizes
        return {name: (count, max(sizes.get(name, 0), count)) for name, count in kept.items()}

    @functools.cached_property
    def sized(self) -> bool:
        """Whether the weights of all layers are known, as what a trial kept and its sparsity say how many there are in all."""
        found = [row["kept"] / (1 - row["sparsity"]) for row in self.finished if row["kept"] and row["sparsity"] is not None]
        return sum(self._sizes.values()) >= 0.999 * max(found, default=0.0)

    @functools.cached_property
    def _sizes(self) -> dict[str, int]:
        """Weights of each layer: as masks are shaped, else the most that any trial kept there, which a dense one makes exact."""
        most: dict[str, int] = {}
        for row in self.front:
            try:
                with safe_open(str(self.folder.masks_file(row["number"])), framework="np") as file:
                    shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}
            except (OSError, SafetensorError):
                continue
            most.update({name: int(np.prod(shape)) for name, shape in shapes.items()})
        for row in sorted(self.finished, key=lambda row: -(row["kept"] or 0))[: 1 if most else 200]:
            for name, count in (self.long(row["number"], "layers") or {}).items():
                most[name] = max(most.get(name, 0), count)
        return most


def label_of(cost: Any) -> str:
    """What a cost is called, as YAML writes it."""
    try:
        return label(registry.cost.read(cost, "cost"))
    except (UserError, ImportError, AttributeError):  # the user's own, and its module is not here
        return str(cost.get("name") or cost.get("import")) if isinstance(cost, Mapping) else str(cost)
