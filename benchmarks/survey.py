"""The survey's paradigms against each other: the best recipe of each at each sparsity, trained again under other seeds, and read on test.

    distprune search configs/survey.yaml       # chooses the recipes, on validation
    python benchmarks/survey.py runs/survey    # three seeds each; results go to benchmarks/survey.json

A second table prunes at initialization by every criterion in turn, all else equal, at the search's median learning rate: a search samples
its criteria, so a comparison of them needs runs of its own. Every run bills the same samples; `equal_cost` is in the recipes.
"""

import argparse
import json
import multiprocessing
import statistics
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

import distprune as dp
from distprune.environment import environment
from distprune.result import Result

CRITERIA = {"random": "uniform", "magnitude": "lamp", "snip": "global", "grasp": "global", "synflow": "global"}  # with its allocator
FILE = Path(__file__).with_suffix(".json")


def finalists(result: Result) -> Iterator[tuple[str, float, dict[str, Any]]]:
    """(row of the table, sparsity asked for, recipe): the best finished trial on validation of each paradigm at each sparsity."""
    best: dict[tuple[str, float], Any] = {}
    for trial in result.rows():
        recipe, value = trial.recipe, trial.row["objective"]
        key = (_name(recipe["paradigm"]), recipe["sparsity"])
        if trial.row["ended"] == "finished" and (key not in best or value > best[key].row["objective"]):
            best[key] = trial
    for (name, sparsity), trial in sorted(best.items()):
        yield name, sparsity, trial.recipe


def at_init(result: Result) -> Iterator[tuple[str, float, dict[str, Any]]]:
    """Pruning at initialization by each criterion, at each sparsity of the search."""
    recipes = [trial.recipe for trial in result.rows()]
    rate = statistics.median(recipe["train"]["optimizer"]["lr"] for recipe in recipes)
    base = next(recipe for recipe in recipes if _name(recipe["paradigm"]) == "at_init")
    train = {**base["train"], "optimizer": {"name": "sgd", "lr": round(rate, 4)}}
    for sparsity in sorted({recipe["sparsity"] for recipe in recipes} - {0.0}):
        for criterion, allocator in CRITERIA.items():
            choices = {"criterion": criterion, "allocator": allocator, "granularity": "weight", "sparsity": sparsity, "train": train}
            yield f"at_init: {criterion}, {allocator}", sparsity, {**base, **choices}


def _name(value: str | Mapping[str, Any]) -> str:
    return value if isinstance(value, str) else str(value["name"])


def measure(job: tuple[str, float, dict[str, Any], int]) -> dict[str, Any]:
    """One run: accuracy on test, what is kept, and the bill."""
    name, sparsity, recipe, seed = job
    torch.set_num_threads(1)
    outcome = dp.run({**recipe, "seed": seed})
    state = outcome.run.state
    accuracy = outcome.run.env.task.metrics(outcome.model, "test")["accuracy"]
    bill = {"cost": state.ledger.cost, "flops": state.ledger.flops, "sparse_flops": state.ledger.sparse_flops}
    return {"name": name, "sparsity": sparsity, "seed": seed, "accuracy": accuracy, "achieved": state.masks.sparsity, **bill}


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: mean and standard deviation of test accuracy over seeds, a column a sparsity."""
    sparsities = sorted({row["sparsity"] for row in rows} - {0.0})
    lines = ["| | " + " | ".join(f"{sparsity:.0%}" for sparsity in sparsities) + " |", "|---" * (len(sparsities) + 1) + "|"]
    names = sorted({row["name"] for row in rows}, key=lambda name: -_mean(rows, name, sparsities[-1]))
    for name in names:
        cells = [_cell([row["accuracy"] for row in rows if row["name"] == name and row["sparsity"] in (at, 0.0)]) for at in sparsities]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _mean(rows: list[dict[str, Any]], name: str, sparsity: float) -> float:
    found = [row["accuracy"] for row in rows if row["name"] == name and row["sparsity"] in (sparsity, 0.0)]
    return statistics.mean(found) if found else 0.0


def _cell(values: list[float]) -> str:
    spread = f" ± {100 * statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{100 * statistics.mean(values):.2f}{spread}" if values else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    result = Result(options.run)
    jobs = [(*job, seed) for job in [*finalists(result), *at_init(result)] for seed in range(1, options.seeds + 1)]  # the search had seed 0
    rows = []
    with multiprocessing.get_context("spawn").Pool(options.workers) as pool:
        for row in pool.imap(measure, jobs):
            rows.append(row)
            print(f"{len(rows)}/{len(jobs)} {row['name']} at {row['sparsity']}: {row['accuracy']:.4f}", flush=True)
    FILE.write_text(json.dumps({"seeds": options.seeds, "environment": environment(), "rows": rows}, indent=1) + "\n")
    controls = [row for row in rows if row["name"].startswith("at_init:")]
    print(table([row for row in rows if row not in controls]), "", table(controls), sep="\n")


if __name__ == "__main__":
    main()
