"""The survey's paradigms against each other: the best recipe of each at each sparsity, trained again under other seeds, and read on test.

    distprune search configs/survey.yaml       # chooses the recipes, on validation
    python benchmarks/survey.py runs/survey    # three seeds each; goes on from benchmarks/survey.json if there is one

A second table is of controls: the paradigms of the survey's ordering by plain magnitude, and pruning at initialization by every criterion
in turn, all at the search's median learning rate. A search samples criteria, so a comparison of them needs runs of its own.
Every run bills the same samples; `equal_cost` is in the recipes.
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

# Row of the table -> paradigm, criterion, allocator.
CONTROLS: dict[str, tuple[Any, str, str]] = {
    "finetune, one-shot": ({"name": "finetune", "share": 1.0}, "magnitude", "global"),
    "gradual": ("gradual", "magnitude", "global"),
    "lth, late rewinding": ({"name": "lth", "share": 0.5, "rewind_to": "10%"}, "magnitude", "global"),
    "lth, rewinding to 0": ({"name": "lth", "share": 0.5}, "magnitude", "global"),
    **{f"at_init, {name}": ("at_init", name, "global") for name in ("snip", "grasp", "synflow")},
    "at_init, magnitude": ("at_init", "magnitude", "lamp"),
    "at_init, random": ("at_init", "random", "uniform"),
}
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


def controls(result: Result) -> Iterator[tuple[str, float, dict[str, Any]]]:
    """CONTROLS at each sparsity of the search, all else equal."""
    recipes = [trial.recipe for trial in result.rows()]
    rate = statistics.median(recipe["train"]["optimizer"]["lr"] for recipe in recipes)
    base = next(recipe for recipe in recipes if _name(recipe["paradigm"]) == "at_init")
    base = {**base, "granularity": "weight", "train": {**base["train"], "optimizer": {"name": "sgd", "lr": round(rate, 4)}}}
    for sparsity in sorted({recipe["sparsity"] for recipe in recipes} - {0.0}):
        for name, (paradigm, criterion, allocator) in CONTROLS.items():
            choices = {"paradigm": paradigm, "criterion": criterion, "allocator": allocator, "sparsity": sparsity}
            yield f"control: {name}", sparsity, {**base, **choices}


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
    chosen = {axis: recipe[axis] for axis in ("paradigm", "granularity", "criterion", "allocator")}
    return {"name": name, "sparsity": sparsity, "seed": seed, "accuracy": accuracy, "achieved": state.masks.sparsity, **chosen, **bill}


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
    found = json.loads(FILE.read_text()) if FILE.exists() else {"rows": []}
    done = {(row["name"], row["sparsity"], row["seed"]) for row in found["rows"]}
    seeds = range(1, options.seeds + 1)  # the search had seed 0
    jobs = [(*job, seed) for job in [*finalists(result), *controls(result)] for seed in seeds]
    left = [job for job in jobs if (job[0], job[1], job[3]) not in done]
    rows = found["rows"]
    with multiprocessing.get_context("spawn").Pool(options.workers) as pool:
        for row in pool.imap(measure, left):
            rows.append(row)
            FILE.write_text(json.dumps({"seeds": options.seeds, "environment": environment(), "rows": rows}, indent=1) + "\n")
            print(f"{len(rows)}/{len(jobs)} {row['name']} at {row['sparsity']}: {row['accuracy']:.4f}", flush=True)
    fixed = [row for row in rows if row["name"].startswith("control: ")]
    print(table([row for row in rows if row not in fixed]), "", table(fixed), sep="\n")


if __name__ == "__main__":
    main()
