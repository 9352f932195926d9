"""Progressive skeletonization: SNIP, Iterative SNIP and FORCE at 98, 99 and 99.5 % on Fashion-MNIST, with random masks below them.

    python benchmarks/skeletonization.py      # goes on from benchmarks/skeletonization.json if there is one

A deep MLP and a shallow one, without batch norm, and six convolutions with it. Everything but the masks is equal: Kaiming-normal weights,
the training, and for one seed the weights themselves; SNIP is FORCE in one step. Progressive masks see 59 batches more, which `cost` bills.
Allocators keep at least one weight in every layer, which softens the collapse that the paper shows for SNIP: a layer that SNIP would empty
has one weight here.
`severed` counts the runs whose masks let no signal from input to output.
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch

import distprune as dp
from distprune.core.initialization import sigma_w
from distprune.core.metrics import collapsed
from distprune.core.plan import Plan
from distprune.core.recipe import Recipe
from distprune.core.registry import criterion
from distprune.core.stages import SetWeights
from distprune.environment import environment

FILE = Path(__file__).with_suffix(".json")
SPARSITIES = (0.98, 0.99, 0.995)
NETWORKS: dict[str, dict[str, Any]] = {
    "mlp, 8 hidden layers of 200": {"name": "mlp", "hidden": [200] * 8},
    "mlp, 3 hidden layers of 300": {"name": "mlp", "hidden": [300] * 3},
    "6 convolutions": {"name": "plain_conv", "channels": [16, 16, 32, 32, 64, 64], "pool_every": 2, "batch_norm": True},
}


def at_random(recipe: Recipe) -> Plan:
    """The control: random masks, each layer at the density of the network, on Kaiming-normal weights."""
    prune = recipe.prune(recipe.sparsity, criterion=criterion.choose("random"))
    return Plan([SetWeights(policy="draw", sigma_w=sigma_w("relu")), prune, recipe.training(until=recipe.train.length)])


def progressive(**options: Any) -> dict[str, Any]:
    """FORCE with options."""
    return {"paradigm": {"name": "force", "init": "kaiming", **options}, "allocator": "global"}


# Row of the table -> what of the recipe it sets.
METHODS: dict[str, dict[str, Any]] = {
    "random": {"paradigm": {"import": "skeletonization:at_random"}, "allocator": "uniform"},
    "SNIP": progressive(steps=1),
    "Iterative SNIP": progressive(variant="iterative_snip"),
    "FORCE": progressive(),
    "SNIP, nll_logits": progressive(steps=1, loss="nll_logits"),
    "Iterative SNIP, nll_logits": progressive(variant="iterative_snip", loss="nll_logits"),
    "FORCE, nll_logits": progressive(loss="nll_logits"),
}
RECIPE: dict[str, Any] = {
    "data": {"name": "fashion_mnist", "folder": "data/fashion-mnist", "limit": 10000},
    "train": {"length": "5ep", "batch_size": 128, "optimizer": {"name": "sgd", "lr": 0.05}},
}


def measure(network: str, method: str, sparsity: float, seed: int) -> dict[str, Any]:
    """One run: accuracy on test, the bill, and what the thinnest layer keeps."""
    outcome = dp.run({**RECIPE, "model": NETWORKS[network], **METHODS[method], "sparsity": sparsity, "seed": seed})
    state, task = outcome.run.state, outcome.run.env.task
    found = {"accuracy": task.metrics(outcome.model, "test")["accuracy"], "cost": state.ledger.cost, "achieved": state.masks.sparsity}
    silent = collapsed(state.model, state.masks, task.example())
    found |= {"thinnest": min(state.masks.counts.values()), "severed": len(silent) == len(state.masks)}
    return {"network": network, "method": method, "sparsity": sparsity, "seed": seed, **found}


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: mean and standard deviation of test accuracy over seeds, and of the paired difference to SNIP of the same loss and seed."""
    lines = []
    for network in NETWORKS:
        lines += [f"{network}:", "", "| | " + " | ".join(f"{at:.1%} | - SNIP" for at in SPARSITIES) + " |"]
        lines += ["|---" * (2 * len(SPARSITIES) + 1) + "|"]
        for method in METHODS:
            snip = "SNIP, nll_logits" if method.endswith("nll_logits") else "SNIP"
            cells = []
            for at in SPARSITIES:
                own, other = (_by_seed(rows, network, name, at) for name in (method, snip))
                severed = sum(row["severed"] for row in _found(rows, network, method, at))
                cells.append(_cell(list(own.values())) + (f" ({severed} severed)" if severed else ""))
                cells.append("" if method == snip else _cell([own[seed] - other[seed] for seed in own if seed in other], "+"))
            lines.append(f"| {method} | " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


def _found(rows: list[dict[str, Any]], network: str, method: str, sparsity: float) -> list[dict[str, Any]]:
    return [row for row in rows if (row["network"], row["method"], row["sparsity"]) == (network, method, sparsity)]


def _by_seed(rows: list[dict[str, Any]], network: str, method: str, sparsity: float) -> dict[int, float]:
    return {row["seed"]: row["accuracy"] for row in _found(rows, network, method, sparsity)}


def _cell(values: list[float], sign: str = "") -> str:
    spread = f" ± {100 * statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{100 * statistics.mean(values):{sign}.2f}{spread}" if values else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--networks", nargs="*", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--sparsities", nargs="*", type=float, default=list(SPARSITIES), choices=SPARSITIES)
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=list(METHODS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = json.loads(FILE.read_text())["rows"] if FILE.exists() else []
    done = {(row["network"], row["method"], row["sparsity"], row["seed"]) for row in rows}
    for seed in range(options.seeds):
        for network in options.networks:
            for sparsity in options.sparsities:
                for method in options.methods:
                    if (network, method, sparsity, seed) in done:
                        continue
                    rows.append(measure(network, method, sparsity, seed))
                    FILE.write_text(json.dumps({"environment": environment(), "recipe": RECIPE, "rows": rows}, indent=1) + "\n")
                    print(f"{network}, {method} at {sparsity}, seed {seed}: {rows[-1]['accuracy']:.4f}", flush=True)
    print(table(rows))


if __name__ == "__main__":
    main()
