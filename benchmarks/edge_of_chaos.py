"""The edge of chaos: what SNIP leaves of each layer of a deep MLP on and off it, what pruning does to the signal, and to training.

    python benchmarks/edge_of_chaos.py      # goes on from benchmarks/edge_of_chaos.json if there is one

Densities: 100 layers of width 100, random data, 90 % of the weights removed by SNIP's scores over all layers; the share of the weights
that is left in the first, middle and last ten layers, and the smallest density of a layer as a share of the largest. Allocators keep one
weight in every layer: layers with only that one are counted. Signals: 30 layers, mean square of the outputs for fresh inputs as a share of
the dense network's. Training: 20 layers on Fashion-MNIST, test accuracy; a run whose loss explodes counts as chance. The learning rate
is the best of 0.0005, 0.002 and 0.01 on validation, for every row alike (three epochs, seed 0). At 0.02 the ReLU network reached 39 % where
it was not rescaled and did not learn with factors of signals (five epochs, seed 0).
"""

import argparse
import functools
import json
import statistics
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

import distprune as dp
from distprune.core import registry
from distprune.core.executor import Env
from distprune.core.initialization import sigma_w
from distprune.core.loop import Diverged
from distprune.core.stages import Prune, SetWeights, Snapshot
from distprune.core.state import State
from distprune.core.tasks.given import GivenBatches
from distprune.environment import environment

FILE = Path(__file__).with_suffix(".json")
# Row -> activation, sigma_w, sigma_b. The third of each is off the edge, but without biases: densities do not tell.
PHASES: dict[str, tuple[Any, float, float]] = {
    "tanh, on the edge": ("tanh", sigma_w("tanh", 0.05), 0.05),
    "tanh, ordered": ("tanh", 0.9, 0.05),
    "tanh, ordered, no biases": ("tanh", 0.9, 0.0),
    "tanh, chaotic": ("tanh", 2.2, 0.3),
    "relu, on the edge": ("relu", sigma_w("relu"), 0.0),
    "relu, ordered": ("relu", 1.0, 0.1),
    "relu, ordered, no biases": ("relu", 1.0, 0.0),
}
SIGNALS = [(activation, criterion) for activation in ("relu", "tanh") for criterion in ("random", "snip", "grasp")]
TRAININGS: dict[str, dict[str, Any]] = {
    f"{activation}, {name}": {"activation": activation, **options}
    for activation in ("tanh", "relu")
    for name, options in (
        ("as torch draws it, not rescaled", {"init": "model"}),
        ("edge, not rescaled", {}),
        ("edge, factors of weights", {"rescale": "weights"}),
        ("edge, factors of signals", {"rescale": "signals"}),
    )
}
RECIPE: dict[str, Any] = {
    "data": {"name": "fashion_mnist", "folder": "data/fashion-mnist", "limit": 10000},
    "allocator": "global",
    "sparsity": 0.9,
    "train": {"length": "5ep", "batch_size": 128, "optimizer": {"name": "sgd", "lr": 0.01}},
}


def drawn(activation: Any, layers: int, sigma: float, sigma_b: float, seed: int) -> tuple[State, Env]:
    """A network of width 100 for 128 random inputs with random labels of ten classes."""
    generator = torch.Generator().manual_seed(seed)
    inputs, labels = torch.randn(128, 1, 10, 10, generator=generator), torch.randint(10, (128,), generator=generator)
    model = registry.model.choose("mlp", hidden=(100,) * (layers - 1), activation=activation)
    build = functools.partial(model, (1, 10, 10), 10)
    device = torch.device("cpu")
    env = Env(task=GivenBatches([(inputs, labels)], F.cross_entropy), build=build, seed=seed, device=device, report_every=1)
    state = State.new(build, seed=seed, device=device)
    list(SetWeights(policy="draw", sigma_w=sigma, sigma_b=sigma_b).run(state, env))
    return state, env


def prune(state: State, env: Env, criterion: str) -> None:
    """90 %, ranked over all layers."""
    choices = {"criterion": registry.criterion.choose(criterion), "allocator": registry.allocator.choose("global")}
    list(Prune(sparsity=0.9, batch_size=128, **choices).run(state, env))


def densities(name: str, seed: int) -> dict[str, Any]:
    """What is left of each layer."""
    activation, sigma, sigma_b = PHASES[name]
    state, env = drawn(activation, 100, sigma, sigma_b, seed)
    prune(state, env, "snip")
    counts = list(state.masks.counts.values())
    found = [count / mask.numel() for count, mask in zip(counts, state.masks.values(), strict=True)]
    parts = {key: statistics.mean(found[at : at + 10]) for key, at in (("first", 0), ("middle", 45), ("last", 90))}
    return {**parts, "smallest_of_largest": min(found) / max(found), "emptied": counts.count(1)}


def signals(activation: Any, criterion: str, seed: int) -> dict[str, Any]:
    """Mean square of the outputs after pruning, and after each rescaling, as a share of before."""
    sigma = sigma_w(activation)
    state, env = drawn(activation, 30, sigma, 0.0, seed)
    fresh = torch.randn(200, 1, 10, 10, generator=torch.Generator().manual_seed(1000 + seed))

    def size() -> float:
        with torch.no_grad():
            return float(state.model(fresh).double().square().mean())

    dense = size()
    list(Snapshot(tag="unpruned").run(state, env))
    prune(state, env, criterion)
    pruned, masked = size() / dense, state.values()
    list(SetWeights(policy="rescale", sigma_w=sigma).run(state, env))
    by_weights = size() / dense
    state.model.load_state_dict(masked)
    list(SetWeights(policy="rescale", tag="unpruned", batches=1, batch_size=128).run(state, env))
    return {"pruned": pruned, "weights": by_weights, "signals": size() / dense}


def trained(name: str, seed: int) -> dict[str, Any]:
    """Test accuracy."""
    options = TRAININGS[name]
    model = {"name": "mlp", "hidden": [100] * 19, "activation": options["activation"]}
    try:
        outcome = dp.run({**RECIPE, "model": model, "paradigm": {"name": "sbp_sr", **options}, "seed": seed})
    except Diverged:
        return {"accuracy": 0.1, "exploded": True}
    return {"accuracy": outcome.run.env.task.metrics(outcome.model, "test")["accuracy"], "exploded": False}


def tables(rows: list[dict[str, Any]]) -> str:
    """Markdown: means over seeds, with standard deviations of what is linear and geometric means of what is not."""
    lines = ["| 100 layers, 90 % | first ten | middle ten | last ten | smallest / largest | emptied layers |", "|---" * 6 + "|"]
    for name in PHASES:
        found = [row for row in rows if row["part"] == "densities" and row["name"] == name]
        cells = [_cell([100 * row[key] for row in found], ".1f") + " %" for key in ("first", "middle", "last")]
        cells += [_cell([row["smallest_of_largest"] for row in found], ".4f"), _cell([row["emptied"] for row in found], ".0f")]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines += ["", "| 30 layers, 90 % | pruned | factors of weights | factors of signals |", "|---" * 4 + "|"]
    for activation, criterion in SIGNALS:
        found = [row for row in rows if row["part"] == "signals" and row["name"] == f"{activation}, {criterion}"]
        cells = [
            f"{statistics.geometric_mean([row[key] for row in found]):.2g}" if found else "" for key in ("pruned", "weights", "signals")
        ]
        lines.append(f"| {activation}, {criterion} | " + " | ".join(cells) + " |")
    lines += ["", "| 20 layers, 90 %, trained | test accuracy | exploded |", "|---" * 3 + "|"]
    for name in TRAININGS:
        found = [row for row in rows if row["part"] == "training" and row["name"] == name]
        lines.append(f"| {name} | {_cell([100 * row['accuracy'] for row in found], '.2f')} | {sum(row['exploded'] for row in found)} |")
    return "\n".join(lines)


def _cell(values: list[float], form: str) -> str:
    spread = f" ± {statistics.stdev(values):{form}}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{form}}{spread}" if values else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = json.loads(FILE.read_text())["rows"] if FILE.exists() else []
    done = {(row["part"], row["name"], row["seed"]) for row in rows}
    for seed in range(options.seeds):
        jobs: list[tuple[str, str, Any]] = [("densities", name, functools.partial(densities, name)) for name in PHASES]
        jobs += [("signals", f"{pair[0]}, {pair[1]}", functools.partial(signals, *pair)) for pair in SIGNALS]
        jobs += [("training", name, functools.partial(trained, name)) for name in TRAININGS]
        for part, name, work in jobs:
            if (part, name, seed) in done:
                continue
            rows.append({"part": part, "name": name, "seed": seed, **work(seed)})
            FILE.write_text(json.dumps({"environment": environment(), "recipe": RECIPE, "rows": rows}, indent=1) + "\n")
            print(rows[-1], flush=True)
    print(tables(rows))


if __name__ == "__main__":
    main()
