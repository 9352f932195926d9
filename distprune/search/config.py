"""One search as frozen plain data, read from YAML."""

import dataclasses
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from distprune.core import registry
from distprune.core.config import read_fields, read_yaml
from distprune.core.costs import label
from distprune.core.lengths import Length, check_length
from distprune.core.recipe import Recipe
from distprune.core.registry import Choice
from distprune.errors import UserError
from distprune.search import tables
from distprune.search.loggers import read_loggers
from distprune.store import place
from distprune.store.address import check_address
from distprune.store.copies import here

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
MOST_WORKERS = 10_000  # trials at once
MOST_RANKS = 1024  # of a trial
_LEAST_RESOURCE = 0.0001  # Ray's own unit
_RAYS_OWN = ("cpu", "gpu", "memory", "object_store_memory")
_MOST_SEED = 2**32 - 1  # that samplers take
_MOST_SEEDS = 100  # of a finalist
_SEARCHED = ("paradigm", "sparsity", "criterion", "allocator", "granularity", "regularizer", "seed")  # recipe keys that a space may set


def read_size(value: Any, where: str) -> Any:
    """Bytes from a text such as '20GB'; anything else is left to the reader of the field."""
    if not isinstance(value, str):
        return value
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]*)?(?:e[0-9]{1,2})?)\s*([KMGT]?B?)", value.strip(), re.IGNORECASE)
    unit = found and found[2].upper()
    if not found or unit not in _UNITS:
        raise UserError(f"{where} must be a size in bytes, got {value!r}. Write 20GB or 500MB.")
    return round(float(found[1]) * _UNITS[unit])


@dataclass(frozen=True, kw_only=True)
class Limits:
    """When a search ends, whichever comes first, and what its trials may use. Sizes are in bytes; in YAML '20GB' will do."""

    trials: int = 30
    cost: float | None = None  # billed samples of all trials together
    wall: float | None = None  # seconds of one driver
    trial_wall: float | None = None  # seconds of one trial, over all its attempts
    silence: float | None = None  # seconds without a report after which a worker is given up; it reads its data before the first
    disk: int | None = None  # of all checkpoints together
    free: int = 10**9  # with less on the disk, no new trial is begun

    @classmethod
    def read(cls, value: Any, where: str) -> "Limits":
        if isinstance(value, Mapping):
            value = {key: read_size(item, f"{where}.{key}") if key in ("disk", "free") else item for key, item in value.items()}
        limits = cls(**read_fields(cls, value, where))
        for name in ("trials", "cost", "wall", "trial_wall", "silence", "disk"):
            number = getattr(limits, name)
            if number is not None and number <= 0:
                raise UserError(
                    f"{where}.{name} must be above 0, got {number}. Leave it out for {'30' if name == 'trials' else 'no limit'}."
                )
        if limits.free < 0:
            raise UserError(f"{where}.free must be at least 0, got {limits.free}. Write 1GB, or 0 to fill the disk.")
        return limits


@dataclass(frozen=True, kw_only=True)
class Workers:
    """What one trial gets, and how many run at once. Of a trial on several ranks, each gets that much."""

    cpus: int = 1  # threads of a trial
    gpus: float = 0.0  # 1, 2, ... or a share of one such as 0.25, which is also the most of its memory that a trial may take
    most: int | None = None  # trials at once; by default as many as fit
    memory: int | None = None  # bytes that a trial sets aside on its node; in YAML '8GB' will do
    accelerator: str | None = None  # type of GPU, as Ray calls it: H100
    ranks: int = 1  # processes that share the batches of one trial
    resources: Mapping[str, float] = field(default_factory=dict)  # Ray's custom ones: {spot: 0.01}

    @classmethod
    def read(cls, value: Any, where: str) -> "Workers":
        if isinstance(value, Mapping) and "memory" in value:
            value = {**value, "memory": read_size(value["memory"], f"{where}.memory")}
        workers = cls(**read_fields(cls, value, where))
        if workers.cpus < 1:
            raise UserError(f"{where}.cpus must be at least 1, got {workers.cpus}. Leave it out for 1.")
        if workers.most is not None:
            check_workers(workers.most, f"{where}.most")
        if workers.gpus < 0 or (workers.gpus > 1 and workers.gpus != int(workers.gpus)):
            raise UserError(f"{where}.gpus must be a whole number or a share below 1, got {workers.gpus}. Write 1 or 0.25.")
        if workers.memory is not None and workers.memory < 1:
            raise UserError(f"{where}.memory must be above 0, got {workers.memory}. Write 8GB, or leave it out to set nothing aside.")
        if workers.accelerator is not None and not (workers.gpus and _is_word(workers.accelerator)):
            raise UserError(
                f"{where}.accelerator is the type of GPU that a trial gets, in one word, got {workers.accelerator!r} with gpus: "
                f"{workers.gpus:g}. Write gpus: 1 and accelerator: H100, or leave it out."
            )
        if not 1 <= workers.ranks <= MOST_RANKS:
            raise UserError(f"{where}.ranks must be in [1, {MOST_RANKS}], got {workers.ranks}. Leave it out for one process a trial.")
        if workers.ranks > 1 and workers.gpus not in (0, 1):
            raise UserError(
                f"{where}.gpus is that of each rank and must be 1, or 0 for the CPU, with ranks: {workers.ranks}, got {workers.gpus:g}. "
                "Write gpus: 1."
            )
        _check_resources(workers.resources, f"{where}.resources")
        return workers


def _is_word(text: str) -> bool:
    return bool(text) and text.isprintable() and not any(letter.isspace() for letter in text)


def _check_resources(resources: Mapping[str, float], where: str) -> None:
    """Raise UserError for names that are Ray's own and amounts that it does not know."""
    for name, amount in resources.items():
        if name.lower() in _RAYS_OWN or not _is_word(name):
            raise UserError(
                f"{where} are custom resources of Ray, by name, and {name!r} is none. Write cpus, gpus, memory or accelerator for those."
            )
        if amount < _LEAST_RESOURCE or (amount > 1 and amount != int(amount)):
            raise UserError(
                f"{where}.{name} must be a whole number or a share in [{_LEAST_RESOURCE}, 1], got {amount:g}. "
                "Write 1, or 0.01 to ask for a node that has it."
            )


def check_workers(number: int, where: str) -> None:
    """Raise UserError for a number of trials at once that makes no sense."""
    if not 1 <= number <= MOST_WORKERS:
        raise UserError(f"{where} must be in [1, {MOST_WORKERS}], got {number}. Leave it out for as many as fit.")


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

    def plain(self) -> dict[str, Any]:
        """As YAML writes it."""
        return {"cost": self.cost.plain(), "most": self.most}


def read_costs(value: Any, where: str) -> tuple[Choice, ...]:
    """The costs that are minimized besides the objective: a list of names or mappings."""
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise UserError(f"{where} must be a list of costs, got {value!r}. Write {where.rpartition('.')[2]}: [params]; [] is for none.")
    costs = tuple(registry.cost.read(item, where) for item in value)
    _check_once(costs, where)
    return costs


def read_budgets(value: Any, where: str) -> tuple[Budget, ...]:
    """One budget or a list of them."""
    if value is None:
        return ()
    several = isinstance(value, Sequence) and not isinstance(value, str)
    budgets = tuple(Budget.read(item, f"{where}[{index}]") for index, item in enumerate(value)) if several else (Budget.read(value, where),)
    _check_once(tuple(budget.cost for budget in budgets), where)
    return budgets


def _check_once(costs: tuple[Choice, ...], where: str) -> None:
    names = [label(cost) for cost in costs]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"{where} must name a cost once, got '{twice[0]}' {names.count(twice[0])} times. Leave the others out.")


@dataclass(frozen=True, kw_only=True)
class Caching:
    """Where prefixes of trials are kept for others, and how much of them."""

    path: str | None = None  # a folder that all workers see, or a URL such as s3://bucket/cache; by default one in the storage
    size: int = 20 * 10**9  # bytes; in YAML '20GB' will do

    @classmethod
    def read(cls, value: Any, where: str) -> "Caching | None":
        """From a mapping; true is all defaults, false no cache."""
        if isinstance(value, bool):
            return cls() if value else None
        if isinstance(value, Mapping) and "size" in value:
            value = {**value, "size": read_size(value["size"], f"{where}.size")}
        elif not isinstance(value, Mapping | cls):
            raise UserError(f"{where} must be true, false or a mapping, got {value!r}. Write {where}: {{path: /shared/cache, size: 20GB}}.")
        caching = cls(**read_fields(cls, value, where))
        if caching.path == "":
            raise UserError(f"{where}.path must be a folder or a URL, got ''. Leave it out for one in the storage.")
        if caching.path is not None and place.is_url(caching.path) and not caching.path.startswith("file:"):
            place.check_url(caching.path, f"{where}.path")
        if caching.size <= 0:
            raise UserError(f"{where}.size must be above 0, got {caching.size}. Write 20GB, or {where}: false for no cache.")
        return caching


@dataclass(frozen=True, kw_only=True)
class Finalists:
    """What is done with the best of the front once all other trials have ended: they are run again over further seeds."""

    count: int = 3
    seeds: int = 3  # of each, besides the one that it was found with

    @classmethod
    def read(cls, value: Any, where: str) -> "Finalists":
        finalists = cls(**read_fields(cls, value, where))
        if finalists.count < 1 or finalists.seeds < 2:
            raise UserError(
                f"{where}.count must be at least 1 and {where}.seeds at least 2, got {finalists.count} and {finalists.seeds}: "
                "one seed has no spread. Leave finalists out for none."
            )
        if finalists.seeds > _MOST_SEEDS:
            raise UserError(f"{where}.seeds must be at most {_MOST_SEEDS}, got {finalists.seeds}. Each is a training; write seeds: 3.")
        return finalists


@dataclass(frozen=True, kw_only=True)
class Search:
    """What is searched, how, and for how long."""

    name: str
    recipe: Mapping[str, Any]  # what all trials share, as a recipe is written
    space: Mapping[str, Any] = field(default_factory=dict)  # see space.py; axes left out are searched over their whole table
    sampler: Choice = field(default_factory=lambda: tables.sampler.choose("tpe"))
    scheduler: Choice = field(default_factory=lambda: tables.scheduler.choose("pareto_halving"))
    start: tuple[Mapping[str, Any], ...] = ()  # settings of the first trials, see starts.py
    learn_from: tuple[str, ...] = ()  # run folders whose ended trials the sampler learns from, see learned.py
    duplicates: Literal["known", "new_seed"] = "known"  # a repeated recipe is answered from the first, or run with a seed of its own
    finalists: Finalists | None = None
    minimize: tuple[Choice, ...] = (registry.PARAMS,)  # costs, besides the task's objective, which is maximized
    budget: tuple[Budget, ...] = ()  # in YAML one mapping or a list of them; a policy is bound by the first
    floor: float | None = None  # the least objective on validation of a network that counts
    limits: Limits = field(default_factory=Limits)
    workers: Workers = field(default_factory=Workers)
    report_every: Length = "1ep"  # in epochs or steps
    recovery: Length | None = None  # training of the copy that is scored at a rung; by default 40it, but at most 10% of the training
    seed: int = 0  # of every trial, so that equal prefixes of trials are equal work
    cache: Caching | None = field(default_factory=Caching)  # what trials share of that work
    rounds: bool = True  # whether networks at the ends of a trial's rounds, which the cache has, are trials of their own
    storage: str = "runs"  # folder of run folders, or a URL such as s3://bucket/runs
    study: str | None = None  # URL of the database that keeps the truth about trials; by default study.journal in the run folder
    log: tuple[Choice, ...] = ()  # where reports are shown besides: tensorboard, mlflow, wandb

    @classmethod
    def read(cls, value: Any, where: str = "search") -> "Search":
        """From a mapping, checked but for what needs the data and the network. Raises UserError."""
        plain = dict(value) if isinstance(value, Mapping) else value
        if isinstance(value, Mapping) and value.get("study") is not None:
            check_address(value["study"], f"{where}.study")  # before anything else could repeat a password that is written there
        several: dict[str, Any] = {}
        for key, read in (("minimize", read_costs), ("budget", read_budgets), ("log", read_loggers)) if isinstance(value, Mapping) else ():
            if key in plain:
                several[key] = read(plain.pop(key), f"{where}.{key}")
        search = cls(**read_fields(cls, plain, where), **several)
        if not search.name or Path(search.name).name != search.name or search.name.startswith(".") or not search.name.isprintable():
            raise UserError(f"{where}.name must be the name of a new folder, got {search.name!r}. Write name: digits.")
        _check_sampler(search, where)
        if place.is_url(search.storage):
            place.check_url(search.storage, f"{where}.storage")
        if not 0 <= search.seed <= _MOST_SEED:
            raise UserError(f"{where}.seed must be in [0, {_MOST_SEED}], got {search.seed}. Leave it out for 0.")
        check_length(search.report_every, f"{where}.report_every", relative=False, zero=False)
        if search.recovery is not None:
            check_length(search.recovery, f"{where}.recovery")
        for key in ("paradigm", "sparsity", "criterion", "allocator", "regularizer"):
            if key in search.recipe:
                raise UserError(f"recipe.{key} must not be set in a search, got {search.recipe[key]!r}. Write it as space.{key}.")
        if "seed" in search.recipe:
            raise UserError(f"recipe.seed must not be set in a search, got {search.recipe['seed']!r}. Write seed beside recipe.")
        Recipe.read({**search.recipe, "paradigm": "dense"})  # unknown keys, names and types fail here
        return search

    @classmethod
    def of_run(cls, value: Any) -> "Search":
        """From what a run's search.yaml holds, for those who do not log: a logger of the user's own need not be importable."""
        return cls.read({key: item for key, item in value.items() if key != "log"} if isinstance(value, Mapping) else value)

    @classmethod
    def load(
        cls, source: "str | Path | Mapping[str, Any] | Search", *, limits: Mapping[str, Any] | None = None, **changes: Any
    ) -> "Search":
        """From a YAML file or a mapping, with `limits` and other keys changed where they are given."""
        value = source.plain() if isinstance(source, Search) else dict(source) if isinstance(source, Mapping) else read_yaml(source)
        value |= {key: item for key, item in changes.items() if item is not None}
        given = value.get("limits") or {}
        if limits and isinstance(given, Mapping):  # else it is refused below
            value["limits"] = {**given, **limits}
        return cls.read({key: item for key, item in value.items() if item is not None})

    def plain(self) -> dict[str, Any]:
        """As YAML writes it, defaults included; `read` is the inverse."""
        plain = {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}
        plain |= {"limits": dataclasses.asdict(self.limits), "workers": dataclasses.asdict(self.workers)}
        plain |= {"sampler": self.sampler.plain(), "scheduler": self.scheduler.plain()}
        plain |= {"start": [dict(setting) for setting in self.start], "learn_from": list(self.learn_from)}
        plain["cache"] = False if self.cache is None else dataclasses.asdict(self.cache)
        plain["log"] = [choice.plain() for choice in self.log]
        plain["finalists"] = self.finalists and dataclasses.asdict(self.finalists)
        budgets = [budget.plain() for budget in self.budget]
        plain |= {"minimize": [cost.plain() for cost in self.minimize], "budget": budgets[0] if len(budgets) == 1 else budgets or None}
        return plain

    @property
    def shared(self) -> dict[str, Any]:
        """What the recipes of all trials have alike, whatever the space is."""
        plain = Recipe.read({**self.recipe, "paradigm": "dense"}).plain()
        found = {key: value for key, value in plain.items() if key not in _SEARCHED}
        return {**found, "train": {key: value for key, value in plain["train"].items() if key != "optimizer"}}

    @property
    def url(self) -> str | None:
        """The URL of the run; None for one in a folder."""
        return place.join(self.storage, self.name) if place.is_url(self.storage) else None

    @property
    def folder(self) -> Path:
        """The run folder; of a run at a URL, the folder of this machine from which a driver writes it."""
        return here(self.url, "runs") if self.url else Path(os.path.expanduser(self.storage)) / self.name

    @property
    def cache_at(self) -> str | None:
        """Folder or URL of the cache. In the storage it has a name that no search can have."""
        if self.cache is None:
            return None
        path = self.cache.path or (place.join(self.storage, ".cache") if self.url else str(self.folder.parent / ".cache"))
        return path if place.is_url(path) else str(Path(os.path.expanduser(path)).absolute())


def _check_sampler(search: Search, where: str) -> None:
    """Raise UserError for a search that its sampler is of no use for."""
    most = search.sampler.entry.facts["most_trials"]
    if most is not None and search.limits.trials > most:
        raise UserError(
            f"{where}.sampler '{search.sampler.name}' is for at most {most} trials, as its cost grows with the cube of their number, and "
            f"limits.trials is {search.limits.trials}. Write sampler: tpe, or trials: {most}."
        )
    if search.sampler.entry.facts["objectives"] == "one" and search.minimize:
        costs = ", ".join(label(cost) for cost in search.minimize)
        raise UserError(
            f"{where}.sampler '{search.sampler.name}' is for one objective, and {where}.minimize adds {costs} to it. "
            "Write minimize: [], or sampler: tpe."
        )
    if search.learn_from and search.sampler.entry.facts["blind"]:
        raise UserError(f"{where}.learn_from needs a sampler that learns from trials, got '{search.sampler.name}'. Write sampler: tpe.")


def differences(earlier: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Where what the recipes of an earlier search share (`Search.shared`) is not what those of this one do, a line each."""
    return [f"recipe.{key} {earlier[key]!r}, and this search has {now[key]!r}" for key in now if earlier[key] != now[key]]
