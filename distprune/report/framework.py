"""What is registered, in words: for `distprune list`, and as the page docs/framework.md."""

import importlib
from collections.abc import Iterator
from pathlib import Path

import distprune
from distprune.core import registry
from distprune.core.options import REQUIRED, Choices, Option, PerLayer
from distprune.core.registry import Entry, Table
from distprune.report.prose import table, text

PAGE = "docs/framework.md"
# Table -> page of the manual.
PLURALS = {"criterion": "criteria", "granularity": "granularities", "decay": "schedules", "data": "data"} | {
    name: f"{name}s"
    for name in ("paradigm", "allocator", "regularizer", "optimizer", "task", "cost", "model", "sampler", "scheduler", "format", "logger")
}
# The survey's branches, in its order.
BRANCHES = (
    "none",
    "after training",
    "while training",
    "sparse training, static, post-selected",
    "sparse training, static, pre-selected",
    "sparse training, dynamic",
    "sparse selection",
)
_TABLES = ("criterion", "granularity", "allocator", "regularizer", "task", "model", "optimizer", "sampler")
_HEAD = """# The framework

Every pruning algorithm is three choices (Wang et al. 2022, arXiv:2103.06460): where the **mask** comes from, where the **values** of
what is kept come from, and what is done **afterwards**. With w(k) the weights after k of K training steps:

    m  = f1(w(k1); data)        criterion, granularity and allocator say which weights survive
    w' = f2(w(k2); data)        the weights policy says with which values
    w* = f3(m * w'; data)       the rest of the plan trains them, or does nothing

A **paradigm** is a function that returns these as a list of stages; the criterion, the granularity, the allocator and the regularizer are
separate choices, and each row below is a point of one search space."""


def tables() -> dict[str, Table]:
    """Every table by its name, those of the search and export rooms included."""
    importlib.import_module("distprune.search.tables")
    importlib.import_module("distprune.export.tables")
    return registry.TABLES


def described(entry: Entry) -> Iterator[tuple[str, str]]:
    """(label, text) of what there is to say of an entry besides its summary."""
    if entry.options:
        yield "options", ", ".join(_option(option) for option in entry.options.values())
    if entry.paper:
        yield "paper", entry.paper
    yield "file", short(entry.file)


def _option(option: Option) -> str:
    default = "" if option.default is REQUIRED else f" = {option.default!r}"
    where = searched(option)
    return f"{option.name}{default}{f' (searched over {where})' if where else ''}"


def searched(option: Option, *, mark: str = "") -> str:
    """Over what a search varies an option, its values between `mark`s; empty where it does not."""
    where = option.search
    if where is None:
        return ""
    if isinstance(where, Choices):
        return ", ".join(f"{mark}{value}{mark}" for value in option.values)
    interval = where.range if isinstance(where, PerLayer) else where
    return f"{where}{', log' if interval.log else ''}"


def short(path: Path) -> str:
    """A file from the root of the repository; one outside of it as it is."""
    root = Path(distprune.__file__).parent.parent
    return str(path.relative_to(root)) if path.is_relative_to(root) else str(path)


def page() -> str:
    """The page docs/framework.md."""
    blocks = [_HEAD, "## The taxonomy in one picture", "![The paradigms as leaves of the survey's tree](figures/taxonomy.svg)"]
    rows = []
    for entry in paradigms():
        facts = entry.facts
        cells = [facts["branch"], _link(entry), facts["mask"], facts["values"], facts["after"]]
        rows.append([*cells, ", ".join(facts["granularities"]) or ("any" if "sparsity" in facts["uses"] else ""), text(entry.paper)])
    head = ["branch", "paradigm", "mask from (f1)", "values from (f2)", "afterwards (f3)", "granularity", "paper"]
    blocks += ["## The paradigms in one table", table(head, rows)]
    for axis in _TABLES:
        rows = [
            [_link(entry), text(entry.summary), dict(described(entry)).get("options", ""), text(entry.paper)] for entry in tables()[axis]
        ]
        blocks += [f"## {axis.capitalize()}", table(["name", "what", "options", "paper"], rows)]
    return "\n\n".join(blocks) + "\n"


def paradigms() -> list[Entry]:
    """All paradigms in the order of their branches."""
    return sorted(registry.paradigm, key=lambda entry: (BRANCHES.index(entry.facts["branch"]), entry.name))


def _link(entry: Entry) -> str:
    return f"[`{entry.name}`](methods/{PLURALS[entry.table]}.md#{entry.name})"
