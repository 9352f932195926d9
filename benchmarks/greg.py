"""GReg-1 against one-shot removal of the same filters (Wang et al. 2021, arXiv:2012.09243, table 1), on Fashion-MNIST.

    python benchmarks/greg.py    # 3 seeds; goes on from benchmarks/greg.json if there is one

A small ResNet is trained once for each seed. From these very weights the same filters, those of the smallest L1 norm, are removed at once
or after an L2 penalty on them has grown, and the rest is fine-tuned alike: at a tenth of the learning rate, then at a hundredth. A third
arm removes them at once and stretches the fine-tuning until its bill is that of GReg-1. The images are halved to 14x14, for speed.
"""

import argparse
import json
import math
import statistics
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from distprune.core.data.dataset import Dataset, Split
from distprune.core.data.mnist import fashion_mnist
from distprune.core.executor import execute
from distprune.core.keys import keys
from distprune.core.plan import Plan
from distprune.core.recipe import Recipe
from distprune.core.run import Run, prepare
from distprune.core.stages import Train
from distprune.core.units import Units
from distprune.environment import environment

FILE = Path(__file__).with_suffix(".json")
RATIOS = (0.5, 0.7, 0.9, 0.95)  # of the filters of each layer
GREG = {"name": "greg", "grow": "8ep", "stabilise": "1ep", "tune": "50%", "lr": 1e-2, "ceiling": 3.0}
STRETCHED = "one-shot, cost of GReg-1"
ARMS: dict[str, dict[str, Any]] = {
    "one-shot": {"name": "finetune", "tune": "50%"},
    "GReg-1": GREG,
    STRETCHED: {"name": "finetune", "tune": "50%"},
}
BASE: dict[str, Any] = {
    "model": {"name": "resnet_cifar", "depth": 8, "width": 8},
    "data": {"import": "greg:halved"},
    "granularity": "filter",
    "allocator": "uniform",
    "train": {"length": "12ep", "batch_size": 64, "optimizer": {"name": "sgd", "lr": 0.1}, "decay": "steps"},
}
Rows = list[dict[str, Any]]


def halved(*, limit: int = 3000, folder: str = str(FILE.parents[1] / "data/fashion-mnist")) -> Dataset:
    """Fashion-MNIST with the mean of every 2x2 pixels, and `limit` images to train on."""
    whole = fashion_mnist(folder=folder, limit=limit, validation=0.02)

    def half(split: Split) -> Split:
        return Split(F.avg_pool2d(split.inputs.float(), 2).round().byte(), split.labels)

    return replace(whole, train=half(whole.train), validation=half(whole.validation), test=half(whole.test))


def sparsity_of(units: Units, ratio: float) -> float:
    """The share of all weights that goes with ceil(ratio * n) filters of each layer, all but one at most: the paper's plan."""
    counts = {layer.name: layer.units - min(math.ceil(ratio * layer.units), layer.units - 1) for layer in units.layers()}
    return 1 - units.weights(counts) / units.total


def ready(paradigm: dict[str, Any], sparsity: float, seed: int) -> Run:
    """A recipe of the benchmark, prepared; it reports at its end alone."""
    return prepare(Recipe.read({**BASE, "paradigm": paradigm, "sparsity": sparsity, "seed": seed}), report_every="1000ep")


def stretched(plan: Plan, steps: int) -> Plan:
    """The plan with a last training of `steps`, over the last half of a schedule twice as long, as it was before."""
    last = plan.stages[-1]
    assert isinstance(last, Train)
    return Plan([*plan.stages[:-1], replace(last, config=replace(last.config, length=2 * steps), since=steps, until=2 * steps)])


def measure(seed: int, rows: Rows) -> Iterator[dict[str, Any]]:
    """All that `rows` do not have of a seed, from one training."""
    done = {(row["ratio"], row["arm"]): row for row in rows if row["seed"] == seed}
    left = [(ratio, arm) for ratio in RATIOS for arm in ARMS if (ratio, arm) not in done]
    if not left:
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trained.safetensors")
        base = ready(ARMS["one-shot"], 0.5, seed)
        next(execute(base.plan, base.state, base.env))  # to the end of the training
        base.state.save(path)
        dense, units = _test(base), base.state.units(base.recipe.granularity, base.env.task.example)
        for ratio, arm in left:
            run = ready(ARMS[arm], sparsity_of(units, ratio), seed)
            assert keys("", run.plan)[0] == keys("", base.plan)[0], "the same training"
            run.state.load(path)
            plan = run.plan
            if arm == STRETCHED:
                plan = stretched(plan, (done[ratio, "GReg-1"]["cost"] - run.state.ledger.cost) // run.recipe.train.batch_size)
            for _ in execute(plan, run.state, run.env):
                pass
            filters = {name: alive.tolist() for name, alive in units.alive(run.state.masks).items()}
            assert filters == done.get((ratio, "one-shot"), {"filters": filters})["filters"], "the same filters"
            row = {"seed": seed, "ratio": ratio, "arm": arm, "accuracy": _test(run), "dense": dense}
            done[ratio, arm] = {**row, "sparsity": run.state.sparsity, "cost": run.state.ledger.cost, "filters": filters}
            yield done[ratio, arm]


def _test(run: Run) -> float:
    return run.env.task.metrics(run.state.model, "test")["accuracy"]


def table(rows: Rows) -> str:
    """Markdown: test accuracy, mean and standard deviation over seeds, a line a ratio; and what GReg-1 gains on each seed."""

    def values(ratio: float, arm: str) -> dict[int, float]:
        return {row["seed"]: 100 * row["accuracy"] for row in rows if (row["ratio"], row["arm"]) == (ratio, arm)}

    def gain(ratio: float, over: str) -> str:
        own, other = values(ratio, "GReg-1"), values(ratio, over)
        return _spread([own[seed] - other[seed] for seed in own if seed in other], "+.2f")

    arms = [arm for arm in ARMS if any(row["arm"] == arm for row in rows)]
    head = ["filters removed", "weights removed", *arms, "GReg-1 over one-shot", "over one-shot of its cost"]
    lines = [head, ["---"] * len(head)]
    for ratio in RATIOS:
        sparsity = next((row["sparsity"] for row in rows if row["ratio"] == ratio), math.nan)
        cells = [_spread(list(values(ratio, arm).values()), ".2f") for arm in arms]
        lines.append([f"{ratio:.1%}", f"{sparsity:.1%}", *cells, gain(ratio, "one-shot"), gain(ratio, STRETCHED)])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _spread(values: list[float], form: str) -> str:
    if len(values) < 2:
        return "".join(f"{value:{form}}" for value in values)
    return f"{statistics.mean(values):{form}} ± {statistics.stdev(values):.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows: Rows = json.loads(FILE.read_text())["rows"] if FILE.exists() else []
    for seed in range(options.seeds):
        for row in measure(seed, list(rows)):
            rows.append(row)
            FILE.write_text(json.dumps({"environment": environment(), "hardware": HARDWARE, "rows": rows}, indent=1) + "\n")
            print(
                f"seed {seed}, {row['ratio']:.0%} of the filters, {row['arm']}: {row['accuracy']:.4f} (dense {row['dense']:.4f})",
                flush=True,
            )
    print(table(rows))


HARDWARE = "2 shared CPU cores, one thread"

if __name__ == "__main__":
    main()
