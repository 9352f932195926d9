"""Run folders as searches leave them, made up: every number of them is known."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from distprune.store.folder import RunFolder
from distprune.store.reports import ReportWriter, to_parquet
from distprune.store.trials import write_trials

LAYERS = {"conv.weight": 200, "fc1.weight": 9000, "fc2.weight": 800}
TOTAL = sum(LAYERS.values())
RUNGS = [1000, 2000]
WHOLE = 4000.0  # samples that a finished trial bills
PARADIGMS = ("gradual", "lth", "at_init", "finetune")

Row = dict[str, Any]


def trial(number: int, **changes: Any) -> Row:
    """A finished trial: the denser the better, gradual best of all."""
    paradigm = PARADIGMS[number % len(PARADIGMS)]
    density = round(0.5 * 0.9 ** (number % 40), 6)
    kept = {
        name: max(1, round(size * min(1.0, density * factor))) for (name, size), factor in zip(LAYERS.items(), (4, 0.8, 2), strict=True)
    }
    total = sum(kept.values())
    recipe = {
        "model": "lenet5",
        "data": "digits",
        "paradigm": {"name": paradigm, "share": 0.2},
        "sparsity": 1 - density,
        "criterion": "magnitude",
    }
    row = {
        "number": number,
        "ended": "finished",
        "reason": "",
        "pareto": False,
        "violated": [],
        "paradigm": paradigm,
        "granularity": "weight",
        "criterion": "magnitude",
        "allocator": "erk",
        "regularizer": "none",
        "sparsity": 1 - total / TOTAL,
        "kept": total,
        "objective": round(0.95 - 0.05 * (number % len(PARADIGMS)) - 0.002 / density, 6),
        "cost": WHOLE,
        "spent": WHOLE + 100,
        "saved": 0,
        "costs": json.dumps({"params": total / TOTAL, "flops": (total / TOTAL) ** 0.5}),
        "rung": 1,
        "attempts": 1,
        "deaths": "[]",
        "wall_s": 10.0,
        "recipe": json.dumps(recipe),
        "parameters": json.dumps(
            {"paradigm": paradigm, f"{paradigm}/share": 0.2 + 0.01 * (number % 7), "density": density, "sgd/lr": 0.05}
        ),
        "layers": json.dumps(kept),
    }
    return {**row, **changes}


def stopped(number: int, **changes: Any) -> Row:
    """A trial that was stopped at the first rung."""
    return trial(number, **{"ended": "stopped", "reason": "rung", "rung": 0, "cost": 1000.0, "spent": 1050.0, "layers": "{}", **changes})


def failed(number: int, reason: str, **changes: Any) -> Row:
    """A trial that came to nothing."""
    return trial(
        number, **{"ended": "error", "reason": reason, "rung": -1, "cost": 0.0, "spent": 300.0, "objective": None, "kept": None, **changes}
    )


def dense(number: int, **changes: Any) -> Row:
    """A network that nothing was removed from."""
    own = {
        "paradigm": "dense",
        "granularity": None,
        "criterion": None,
        "allocator": None,
        "sparsity": 0.0,
        "kept": TOTAL,
        "objective": 0.96,
    }
    return trial(number, **{**own, "costs": json.dumps({"params": 1.0, "flops": 1.0}), "layers": json.dumps(LAYERS), **changes})


def fronted(rows: Sequence[Row]) -> list[Row]:
    """The same rows, those on the front marked: no other is better with as few weights."""
    found = {id(row): row for row in rows}
    best = -1.0
    for row in sorted(
        (row for row in rows if row["ended"] == "finished" and not row["violated"]), key=lambda row: (row["kept"], -row["objective"])
    ):
        if row["objective"] > best:
            best = row["objective"]
            found[id(row)] = {**row, "pareto": True, "test": round(best - 0.01, 6)}
    return list(found.values())


def reports(row: Row) -> list[Row]:
    """What a trial reported: at its rungs and at its end, growing to its objective."""
    costs = [cost for cost in (*map(float, RUNGS), WHOLE) if cost <= (row["cost"] or 0.0)]
    value = row["objective"] if row["objective"] is not None else 0.1
    return [
        {
            "trial": row["number"],
            "attempt": "a",
            "index": index,
            "rung": min(index, len(RUNGS) - 1),
            "final": cost == WHOLE,
            "ended": "finished" if cost == WHOLE else "",
            "cost": cost,
            "spent": cost,
            "sparsity": row["sparsity"],
            "kept": row["kept"] or TOTAL,
            "objective": value - 0.1 * (len(costs) - 1 - index),
            "score": value - 0.1 * (len(costs) - 1 - index),
            "extra": json.dumps({"metrics": {"accuracy": value - 0.1 * (len(costs) - 1 - index)}}),
        }
        for index, cost in enumerate(costs)
    ]


def run_folder(
    path: Path,
    rows: Sequence[Row],
    *,
    ended: bool = True,
    facts: Mapping[str, Any] | None = None,
    curve: Callable[[Row], list[Row]] = reports,
    **search: Any,
) -> RunFolder:
    """Write a run folder of these trials; `search` goes into its search.yaml, `facts` beside it."""
    folder = RunFolder(path)
    folder.masks.mkdir(parents=True)
    value = {
        "name": path.name,
        "recipe": {"model": {"name": "lenet5", "width": 0.5}, "data": "digits"},
        "minimize": ["params"],
        "limits": {"trials": len(rows)},
        "workers": {"cpus": 1},
        "seed": 0,
        **search,
    }
    environment = {"distprune": "0.1.0", "torch": "2.15.0", "python": "3.11.7", "machine": "x86_64", "commit": "abc1234"}
    folder.search_yaml.write_text(yaml.safe_dump({"search": value, "rungs": RUNGS, "environment": environment, **(facts or {})}))
    with ReportWriter(folder.reports, clock=lambda: 0.0) as writer:
        for row in rows:
            for report in curve(row):
                writer.add(report)
    if rows:
        write_trials(folder.trials, rows)
    if ended and rows:
        to_parquet(folder.reports, folder.reports_parquet)
    return folder


def usual(count: int = 40, **changes: Any) -> list[Row]:
    """Trials of all kinds: every fourth stopped, every tenth failed, a dense one with `changes` first."""
    rows = [dense(0, **changes)]
    for number in range(1, count):
        kind = (
            failed(number, "ValueError: batch of 3 is too small")
            if number % 10 == 9
            else stopped(number)
            if number % 4 == 2
            else trial(number)
        )
        rows.append(kind)
    return fronted(rows)
