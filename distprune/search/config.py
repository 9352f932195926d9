"""One search as frozen plain data, read from YAML."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distprune.core import registry
from distprune.core.config import read_fields, read_yaml
from distprune.core.lengths import check_length
from distprune.core.recipe import Recipe
from distprune.core.registry import Choice
from distprune.errors import UserError
from distprune.search import tables


@dataclass(frozen=True, kw_only=True)
class Limits:
    """When a search ends, whichever comes first."""

    trials: int = 30
    cost: float | None = None  # billed samples of all trials together
    wall: float | None = None  # seconds of one driver

    @classmethod
    def read(cls, value: Any, where: str) -> "Limits":
        limits = cls(**read_fields(cls, value, where))
        for name in ("trials", "cost", "wall"):
            number = getattr(limits, name)
            if number is not None and number <= 0:
                raise UserError(f"{where}.{name} must be above 0, got {number}. Leave it out for no limit.")
        return limits


@dataclass(frozen=True, kw_only=True)
class Workers:
    """What one trial gets, and how many run at once."""

    cpus: int = 1  # threads of a trial
    gpus: float = 0.0  # 1, 2, ... or a share of one such as 0.25
    most: int | None = None  # trials at once; by default as many as fit

    @classmethod
    def read(cls, value: Any, where: str) -> "Workers":
        workers = cls(**read_fields(cls, value, where))
        if workers.cpus < 1 or (workers.most is not None and workers.most < 1):
            raise UserError(f"{where}.cpus and {where}.most must be at least 1, got {workers.cpus} and {workers.most}.")
        if workers.gpus < 0 or (workers.gpus > 1 and workers.gpus != int(workers.gpus)):
            raise UserError(f"{where}.gpus must be a whole number or a share below 1, got {workers.gpus}. Write 1 or 0.25.")
        return workers


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What every network that a search hands out may cost at most; others are told as infeasible."""

    cost: Choice = field(default_factory=lambda: registry.cost.choose("params"))
    most: float  # share of the dense network's cost

    @classmethod
    def read(cls, value: Any, where: str) -> "Budget":
        budget = cls(**read_fields(cls, value, where))
        if not 0 < budget.most < 1:
            raise UserError(f"{where}.most must be a share of the dense cost in (0, 1), got {budget.most}. For a tenth write 0.1.")
        return budget

    @property
    def measured(self) -> bool:
        """Whether the cost is measured where the trial runs."""
        return bool(self.cost.entry.facts["measured"])


@dataclass(frozen=True, kw_only=True)
class Search:
    """What is searched, how, and for how long."""

    name: str
    recipe: Mapping[str, Any]  # what all trials share, as a recipe is written
    space: Mapping[str, Any] = field(default_factory=dict)  # see space.py; axes left out are searched over their whole table
    sampler: Choice = field(default_factory=lambda: tables.sampler.choose("tpe"))
    scheduler: Choice = field(default_factory=lambda: tables.scheduler.choose("pareto_halving"))
    budget: Budget | None = None
    limits: Limits = field(default_factory=Limits)
    workers: Workers = field(default_factory=Workers)
    report_every: str = "1ep"
    recovery: str = "20it"  # training of the copy that is scored at a rung
    seed: int = 0  # of every trial, so that equal prefixes of trials are equal work
    storage: str = "runs"  # folder of run folders

    @classmethod
    def read(cls, value: Any, where: str = "search") -> "Search":
        """From a mapping, checked but for what needs the data and the network. Raises UserError."""
        search = cls(**read_fields(cls, value, where))
        if not search.name or Path(search.name).name != search.name or search.name.startswith("."):
            raise UserError(f"{where}.name must be the name of a new folder, got {search.name!r}. Write name: digits.")
        check_length(search.report_every, f"{where}.report_every", relative=False)
        check_length(search.recovery, f"{where}.recovery", relative=False)
        for key in ("paradigm", "sparsity", "criterion", "allocator", "regularizer"):
            if key in search.recipe:
                raise UserError(f"recipe.{key} must not be set in a search, got {search.recipe[key]!r}. Write it as space.{key}.")
        if "seed" in search.recipe:
            raise UserError(f"recipe.seed must not be set in a search, got {search.recipe['seed']!r}. Write seed beside recipe.")
        Recipe.read({**search.recipe, "paradigm": "dense"})  # unknown keys, names and types fail here
        return search

    @classmethod
    def load(
        cls, source: "str | Path | Mapping[str, Any] | Search", *, limits: Mapping[str, Any] | None = None, **changes: Any
    ) -> "Search":
        """From a YAML file or a mapping, with `limits` and other keys changed where they are given."""
        value = source.plain() if isinstance(source, Search) else dict(source) if isinstance(source, Mapping) else read_yaml(source)
        value |= {key: item for key, item in changes.items() if item is not None}
        if limits:
            value["limits"] = {**(value.get("limits") or {}), **limits}
        return cls.read({key: item for key, item in value.items() if item is not None})

    def plain(self) -> dict[str, Any]:
        """As YAML writes it, defaults included; `read` is the inverse."""
        plain = {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}
        plain |= {"limits": dataclasses.asdict(self.limits), "workers": dataclasses.asdict(self.workers)}
        plain |= {"sampler": self.sampler.plain(), "scheduler": self.scheduler.plain()}
        plain["budget"] = self.budget and {"cost": self.budget.cost.plain(), "most": self.budget.most}
        return plain

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.storage) / self.name
