"""Per-layer budgets at equal parameters: formulas, rankings, random search under AMC's action wall, TPE, and constrained RL.

    python benchmarks/budgets.py --seeds 3       # goes on from benchmarks/budgets.json if there is one

A small LeNet-5 is trained densely on Fashion-MNIST, once a seed. An episode prunes a copy of it by magnitude to the proposed counts, trains
it for a few steps (the same batches in every episode) and measures validation accuracy. Each searched budget gets the same number of
episodes. In the end every method's budget gets the same longer fine-tuning and is read on test. Random search and TPE hand in the best
episode within the budget; the policy hands in its deterministic end, and its best episode besides.
"""

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import optuna
import torch
from torch import nn

from distprune.core import registry
from distprune.core.allocators.constrained_rl import count
from distprune.core.budgets import allocate, layers_of, top_masks
from distprune.core.costs import price
from distprune.core.executor import execute
from distprune.core.masks import Masks
from distprune.core.recipe import Recipe
from distprune.core.run import Run, prepare
from distprune.core.streams import stream
from distprune.environment import environment
from distprune.search.episodes import Budgets
from distprune.search.policy import Policy, Settings

FILE = Path(__file__).with_suffix(".json")
RECIPE: dict[str, Any] = {
    "model": {"name": "lenet5", "width": 0.25},
    "data": {"name": "fashion_mnist", "folder": "data/fashion-mnist", "limit": 12000},
    "train": {"length": "6ep", "batch_size": 64, "optimizer": {"name": "sgd", "lr": 0.05}},
    "paradigm": "dense",
}
RECOVERY, FINE_TUNING = 10, 250  # steps of 64
VALIDATION = 1000  # images that an episode is measured on
LEARNED = {"constrained_rl": {}, "constrained_rl, PID": {"multiplier": "pid"}, "constrained_rl, wall": {"wall": True}}


class Bench:
    """One trained dense network, and what pruning it to given counts is worth."""

    def __init__(self, seed: int, most: float, cost: str) -> None:
        self.run: Run = prepare(Recipe.read({**RECIPE, "seed": seed}))
        for report in execute(self.run.plan, self.run.state, self.run.env):
            self.dense = report.metrics["accuracy"]
        state = self.run.state
        known, shapes = price(registry.cost.choose(cost), self.run.env.profile), self.run.env.profile.shapes
        self.scores = {name: weight.detach().abs() for name, weight in state.weights.items()}
        self.layers = layers_of(state.units(registry.WEIGHT, self.run.env.task.example).shapes)
        self.budgets = Budgets(self.layers, lambda counts: known.share(counts, shapes), most)
        split = self.run.env.task.dataset.validation  # type: ignore[attr-defined]
        self._inputs, self._labels = self.run.env.task.normalise(split.inputs[:VALIDATION]), split.labels[:VALIDATION]  # type: ignore[attr-defined]

    def trained(self, masks: Masks, steps: int) -> nn.Module:
        """The pruned copy after `steps` of SGD under its masks, at a falling rate."""
        model = copy.deepcopy(self.run.state.model).train()
        weights = [(weight, masks[name].float()) for name, weight in model.named_parameters() if name in masks]
        optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9, weight_decay=5e-4)
        generator = stream(0, "benchmark", steps)
        with torch.no_grad():
            for weight, mask in weights:
                weight.mul_(mask)
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = 0.02 * (1 - step / steps)
            optimizer.zero_grad()
            self.run.env.task.loss(model, self.run.env.task.draw(generator, 64)).backward()
            optimizer.step()
            with torch.no_grad():
                for weight, mask in weights:
                    weight.mul_(mask)
        return model.eval()

    def reward(self, counts: Mapping[str, int]) -> float:
        """Validation accuracy of an episode."""
        model = self.trained(top_masks(self.scores, counts), RECOVERY)
        with torch.no_grad():
            return float((model(self._inputs).argmax(1) == self._labels).double().mean())

    def test(self, counts: Mapping[str, int]) -> float:
        """Test accuracy after the fine-tuning that every method gets."""
        model = self.trained(top_masks(self.scores, counts), FINE_TUNING)
        return self.run.env.task.metrics(model, "test")["accuracy"]

    def formula(self, name: str) -> dict[str, int]:
        """Counts by an allocator: as many weights as the cost allows."""
        choice, units = registry.allocator.choose(name), sum(layer.units for layer in self.layers)
        low, high = len(self.layers), units
        while high - low > 1:
            middle = (low + high) // 2
            fits = self.budgets.cost(allocate(choice, self.layers, middle, self.scores)) <= self.budgets.most
            low, high = (middle, high) if fits else (low, middle)
        return allocate(choice, self.layers, low, self.scores)


Found = list[tuple[str, dict[str, int], list[tuple[float, float]]]]  # (row of the table, counts, (reward, cost) of each episode)


def learned(bench: Bench, seed: int, episodes: int, name: str) -> Found:
    policy, rows, seen = Policy(bench.budgets, seed=seed, settings=Settings(**LEARNED[name])), [], []
    for number in range(episodes):
        episode = policy.ask(number)
        counts = bench.budgets.counts(dict(zip(bench.budgets.whole, episode.keep, strict=True)))
        value, cost = bench.reward(counts), bench.budgets.cost(counts)
        policy.tell(episode, value)
        rows.append((value, cost))
        if cost <= bench.budgets.most:
            seen.append((value, number, counts))
    found: Found = [(name, bench.budgets.counts(policy.end()), rows)]
    return [*found, (f"{name}, best episode", max(seen)[2], rows)] if seen else found


def random_wall(bench: Bench, seed: int, episodes: int, name: str) -> Found:
    """Keep ratios uniform between AMC's least and one, each held below the wall."""
    generator, rows, seen = stream(seed, "random wall"), [], []
    for number in range(episodes):
        counts = bench.budgets.start()
        for step, layer in enumerate(bench.layers):
            keep = bench.budgets.wall(step, counts, float(torch.rand((), generator=generator)))
            counts[layer.name] = count(keep, layer)
        rows.append((bench.reward(counts), bench.budgets.cost(counts)))
        seen.append((rows[-1][0], number, counts))
    return [(name, max(seen)[2], rows)]


def tpe(bench: Bench, seed: int, episodes: int, name: str) -> Found:
    """TPE over the shares of the layers, which `fit` turns into a point on the budget."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(multivariate=True, seed=seed))
    rows, seen = [], []
    for number in range(episodes):
        trial = study.ask()
        logits = [trial.suggest_float(layer.name, -4.0, 4.0) for layer in bench.layers]
        counts = bench.budgets.counts(bench.budgets.fit(logits))
        rows.append((bench.reward(counts), bench.budgets.cost(counts)))
        study.tell(trial, rows[-1][0])
        seen.append((rows[-1][0], number, counts))
    return [(name, max(seen)[2], rows)]


METHODS: dict[str, Callable[[Bench, int, int, str], Found]] = {
    **{name: lambda bench, seed, episodes, name: [(name, bench.formula(name), [])] for name in ("uniform", "erk", "global", "lamp")},
    "random + action wall": random_wall,
    "tpe": tpe,
    **dict.fromkeys(LEARNED, learned),
}


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: mean and standard deviation over seeds."""
    lines = ["| budget of | by | test accuracy | reward | cost / budget | episodes over it |", "|---|---|---|---|---|---|"]
    for cost in sorted({(row["cost_name"], row["most"]) for row in rows}):
        mine = [row for row in rows if (row["cost_name"], row["most"]) == cost]
        for name in sorted({row["method"] for row in mine}, key=lambda name: -_mean(mine, name, "test")):
            own = [row for row in mine if row["method"] == name]
            spread = statistics.stdev(row["test"] for row in own) if len(own) > 1 else 0.0
            over = f"{_mean(mine, name, 'over'):.0%}" if own[0]["episodes"] else ""
            lines.append(
                f"| {cost[1]:.0%} {cost[0]} | {name} | {100 * _mean(mine, name, 'test'):.2f} ± {100 * spread:.2f} "
                f"| {100 * _mean(mine, name, 'reward'):.1f} | {_mean(mine, name, 'cost'):.4f} | {over} |"
            )
    return "\n".join(lines)


def _mean(rows: list[dict[str, Any]], method: str, column: str) -> float:
    return statistics.mean(row[column] for row in rows if row["method"] == method)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--episodes", type=int, default=240)
    parser.add_argument("--cost", default="params")
    parser.add_argument("--most", type=float, default=0.05)
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = json.loads(FILE.read_text()) if FILE.exists() else {"rows": []}
    rows = found["rows"]
    for seed in range(options.seeds):
        done = {row["method"] for row in rows if (row["seed"], row["cost_name"], row["most"]) == (seed, options.cost, options.most)}
        left = [name for name in METHODS if name not in done]
        bench = Bench(seed, options.most, options.cost) if left else None
        for method in left:
            assert bench is not None
            began = time.monotonic()
            for name, counts, episodes in METHODS[method](bench, seed, options.episodes, method):
                row = {"method": name, "seed": seed, "cost_name": options.cost, "most": options.most, "episodes": len(episodes)}
                row |= {"test": bench.test(counts), "reward": bench.reward(counts), "dense": bench.dense, "counts": counts}
                row |= {"cost": bench.budgets.cost(counts) / options.most, "wall_s": round(time.monotonic() - began, 1)}
                row["over"] = sum(cost > options.most for _, cost in episodes) / max(len(episodes), 1)
                row["curve"] = [[round(value, 4), round(cost / options.most, 4)] for value, cost in episodes]
                rows.append(row)
                print(f"seed {seed} {name}: test {row['test']:.4f}, {row['wall_s']} s", flush=True)
            text = json.dumps({"machine": "2 shared CPU cores", "environment": environment(), "rows": rows}) + "\n"
            FILE.write_text(text)
    print(table(rows))


if __name__ == "__main__":
    main()
