"""What is registered, in words: for `distprune list`, and as the page docs/framework.md, which is generated from the tables."""

import importlib
from collections.abc import Iterator
from pathlib import Path

import distprune
from distprune.core import registry
from distprune.core.options import REQUIRED, Choices, LogRange, Option, PerLayer, Range
from distprune.core.registry import Entry, Table

PAGE = "docs/framework.md"
_TABLES = ("criterion", "granularity", "allocator", "regularizer", "task", "model", "optimizer", "sampler")
_HEAD = """# The framework

Generated from the tables by `python -m distprune.report.framework`; a test compares the two.

Every pruning algorithm is three choices (Wang et al. 2022, arXiv:2103.06460): where the **mask** comes from, where the **values** of
what is kept come from, and what is done **afterwards**. With w(k) the weights after k of K training steps:

    m  = f1(w(k1); data)        criterion, granularity and allocator say which weights survive
    w' = f2(w(k2); data)        the weights policy says with which values
    w* = f3(m * w'; data)       the rest of the plan trains them, or does nothing

A **paradigm** is a function that returns these as a list of stages; the criterion, the granularity, the allocator and the regularizer are
separate choices, and each row below is a point of one search space.
"""


def tables() -> dict[str, Table]:
    """Every table by its name, those of the search room included."""
    importlib.import_module("distprune.search.tables")
    return registry.TABLES


def described(entry: Entry) -> Iterator[tuple[str, str]]:
    """(label, text) of what there is to say of an entry besides its summary."""
    if entry.options:
        yield "options", ", ".join(_option(option) for option in entry.options.values())
    if entry.paper:
        yield "paper", entry.paper
    yield "file", _short(entry.file)


def _option(option: Option) -> str:
    default = "" if option.default is REQUIRED else f" = {option.default!r}"
    return f"{option.name}{default}{_range(option)}"


def _range(option: Option) -> str:
    where = option.search
    if where is None:
        return ""
    if isinstance(where, PerLayer):
        return f" (searched for each layer in [{where.range.low:g}, {where.range.high:g}])"
    if isinstance(where, Range):
        return f" (searched in [{where.low:g}, {where.high:g}]{', log' if isinstance(where, LogRange) else ''})"
    assert isinstance(where, Choices)
    return f" (searched: {' | '.join(map(str, option.values))})"


def _short(path: Path) -> str:
    root = Path(distprune.__file__).parent.parent
    return str(path.relative_to(root)) if path.is_relative_to(root) else str(path)


def page() -> str:
    """The page docs/framework.md."""
    paradigms = sorted(registry.paradigm, key=lambda entry: (_BRANCHES.index(entry.facts["branch"]), entry.name))
    lines = [_HEAD, "## The taxonomy in one picture", "", "```mermaid", *_picture(paradigms), "```"]
    lines += ["", "## The paradigms in one table", ""]
    lines += [
        _row(["branch", "paradigm", "mask from (f1)", "values from (f2)", "afterwards (f3)", "granularity", "paper"]),
        "|---" * 7 + "|",
    ]
    for entry in paradigms:
        facts = entry.facts
        cells = [facts["branch"], f"`{entry.name}`", facts["mask"], facts["values"], facts["after"]]
        cells += [", ".join(facts["granularities"]) or ("any" if "sparsity" in facts["uses"] else ""), entry.paper]
        lines.append(_row(cells))
    for axis in _TABLES:
        lines += ["", f"## {axis.capitalize()}", "", "| name | what | options | paper |", "|---|---|---|---|"]
        for entry in tables()[axis]:
            options = dict(described(entry)).get("options", "")
            lines.append(_row([f"`{entry.name}`", entry.summary, options, entry.paper]))
    return "\n".join(lines) + "\n"


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


_BRANCHES = (
    "none",
    "after training",
    "while training",
    "sparse training, static, post-selected",
    "sparse training, static, pre-selected",
    "sparse training, dynamic",
    "sparse selection",
)


def _picture(paradigms: list[Entry]) -> Iterator[str]:
    """A tree: the survey's two questions, its branches, and the paradigms as leaves."""
    yield "graph LR"
    yield '  all["pruning"] --> pat["mask from a trained network, or on the way there"]'
    yield '  all --> pai["pruning at initialization: the kept values come from the start"]'
    yield '  pai --> train["sparse training: weights are trained under masks"]'
    yield '  train --> static["static masks"]'
    parents = {"sparse selection": "pai", "sparse training, dynamic": "train"}
    for index, branch in enumerate(_BRANCHES[1:], 1):
        names = [entry.name for entry in paradigms if entry.facts["branch"] == branch]
        parent = parents.get(branch, "static" if "static" in branch else "pat")
        yield f'  {parent} --> b{index}["{branch.split(", ")[-1]}"]'
        yield f'  b{index} --> l{index}["{"<br/>".join(names)}"]'


if __name__ == "__main__":
    target = Path(distprune.__file__).parent.parent / PAGE
    target.parent.mkdir(exist_ok=True)
    target.write_text(page())
