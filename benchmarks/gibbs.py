"""Gibbs pruning (Labach & Valaee 2020, arXiv:2006.04981) against gradual magnitude pruning at equal epochs: configs/papers/gibbs.yaml.

    python benchmarks/gibbs.py    # three seeds a row, four minutes of one CPU core; goes on from benchmarks/gibbs.json if there is one

Layers, budgets and training are the same in all rows. Of Gibbs pruning it also says what hardening does: entropy (bits a weight) and the
largest distance of a layer's drawn sparsity from its budget an epoch before the end, and the accuracy on validation then and at the end.
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch

from distprune.core.config import read_yaml
from distprune.core.executor import execute
from distprune.core.hooks.gibbs import Gibbs
from distprune.core.recipe import Recipe
from distprune.core.run import prepare
from distprune.core.stages import Train
from distprune.environment import environment

CONFIG = Path(__file__).parents[1] / "configs/papers/gibbs.yaml"
FILE = Path(__file__).with_suffix(".json")
PARADIGMS: dict[str, Any] = {
    "gibbs, in units of the median": {"name": "gibbs", "temperature": "median"},
    "gibbs, absolute beta": "gibbs",
    "gradual magnitude": "gradual",
    "dense": "dense",
}


def measure(name: str, seed: int, sparsity: float) -> dict[str, Any]:
    """One run, measured on the test split."""
    paradigm = PARADIGMS[name]
    changes = {"paradigm": paradigm, "seed": seed, "sparsity": 0.0 if paradigm == "dense" else sparsity}
    run = prepare(Recipe.read({**read_yaml(CONFIG), **changes}))
    stage, state, row = run.plan.stages[0], run.state, {"name": name, "sparsity": sparsity, "seed": seed}
    hook = next((hook for hook in stage.hooks if isinstance(hook, Gibbs)), None) if isinstance(stage, Train) else None
    for report in execute(run.plan, state, run.env):
        if hook is not None and (memory := state.slots.get("0.Gibbs")):
            moments, masks = hook.moments(memory, state, run.env), hook.draw(memory, state, run.env)
            budgets = {name: memory[f"kept.{name}"] / mask.numel() for name, mask in masks.items()}
            row["entropy"] = sum(found.bits for found in moments.values()) / sum(found.spins for found in moments.values())
            row["distance"] = max(abs(float(mask.float().mean()) - budgets[name]) for name, mask in masks.items())
            row["before"] = report.metrics["accuracy"]
    row["after"] = report.metrics["accuracy"]
    return row | {"accuracy": run.env.task.metrics(state.model, "test")["accuracy"], "achieved": state.sparsity}


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: mean and standard deviation over seeds, in per cent but for the entropy."""
    head = ["", "pruned", "test accuracy", "entropy", "distance from the budget", "validation, an epoch before the end", "at the end", "n"]
    lines = [head, ["---"] * len(head)]
    for name, sparsity in sorted({(row["name"], row["sparsity"]) for row in rows}, key=lambda key: (key[1], list(PARADIGMS).index(key[0]))):
        found = [row for row in rows if (row["name"], row["sparsity"]) == (name, sparsity)]

        def cell(key: str, found: list[dict[str, Any]] = found, scale: float = 100) -> str:
            values = [scale * row[key] for row in found if key in row]
            spread = f" ± {statistics.stdev(values):.2g}" if len(values) > 1 else ""
            return f"{statistics.mean(values):.4g}{spread}" if values else ""

        share = "" if name == "dense" else f"{sparsity:.0%}"
        lines.append(
            [name, share, cell("accuracy"), cell("entropy", scale=1), cell("distance"), cell("before"), cell("after"), str(len(found))]
        )
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--sparsities", type=float, nargs="+", default=[0.9])
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = json.loads(FILE.read_text())["rows"] if FILE.exists() else []
    done = {(row["name"], row["seed"], row["sparsity"]) for row in rows}
    for seed in range(1, options.seeds + 1):
        for sparsity in options.sparsities:
            for name in PARADIGMS:
                if (name, seed, sparsity) not in done:
                    rows.append(measure(name, seed, sparsity))
                    facts = {"hardware": "2 shared CPU cores", "environment": environment()}
                    FILE.write_text(json.dumps({**facts, "rows": rows}, indent=1) + "\n")
                    print(rows[-1], flush=True)
    print(table(rows))


if __name__ == "__main__":
    main()
