"""What a suggestion costs after 100, 1,000 and 10,000 trials, and what a bounded fit set costs in quality.

    python benchmarks/suggestions.py speed      ms of CPU a suggestion, for each sampler, against Optuna with all trials
    python benchmarks/suggestions.py quality    hypervolume of TPE after 1,000 trials of a made-up objective, by size of the fit set

The space of `speed` is the whole default space on a small network. The objective of `quality` is conditional: each paradigm has a branch
with an optimum of its own. It is a stand-in for pruning: sparser costs accuracy, the more the worse the branch's options are.
Rows go to `suggestions.json`; what is there is not measured again.
"""

import json
import math
import statistics
import sys
import time
import warnings
import zlib
from pathlib import Path
from typing import Any

import optuna
import torch
from optuna.trial import TrialState

from distprune.core.recipe import Recipe
from distprune.environment import environment
from distprune.search import tables
from distprune.search.fitset import FIT_SET
from distprune.search.proposer import Proposal, Proposer
from distprune.search.space import Space
from distprune.search.volume import hypervolume

FILE = Path(__file__).with_suffix(".json")
BASE = {"data": "digits", "model": "mlp", "train": {"length": "2ep"}}
WHOLE: dict[str, Any] = {"granularity": ["weight", "filter"]}
SOME = {
    "paradigm": ["at_init", "finetune", "gradual", "lth", "rigl"],
    "criterion": ["magnitude", "snip", "random"],
    "allocator": ["erk", "uniform"],
    "regularizer": ["none", "l1", "l2"],
    "sparsity": [0.5, 0.995],
}
COUNTS, SAMPLERS, OPTUNA = (100, 1000, 10000), ("tpe", "random", "qmc", "nsga2", "nsga3"), ("optuna tpe",)
SIZES, SEEDS, TRIALS = (100, 200, 400, 10**9), range(10), 1000
TWO: Any = ("maximize", "minimize")


def number(text: str) -> float:
    """A fixed pseudo-random number in [0, 1) of a text."""
    return zlib.crc32(text.encode()) / 2**32


def quality(proposal: Proposal) -> list[float]:
    """(accuracy, density): each parameter has an optimum in each branch, and being off it costs accuracy."""
    recipe: Recipe = proposal.recipe
    density, lost = 1 - recipe.sparsity, 0.0
    branch = recipe.paradigm.name
    for name, where in proposal.distributions.items():
        value = proposal.params[name]
        if name == "density":
            continue
        if isinstance(where, optuna.distributions.CategoricalDistribution):
            lost += 0.3 * number(f"{branch}/{name}/{value}") if name != "paradigm" else 0.2 * number(f"{name}/{value}")
        else:
            assert isinstance(where, optuna.distributions.FloatDistribution | optuna.distributions.IntDistribution)
            low, high, at = (math.log(x) if where.log else x for x in (where.low, where.high, value))
            lost += abs((at - low) / (high - low) - number(f"{branch}/{name}"))
    return [1 - (0.05 + 0.1 * lost) * density**-0.25, density]


def filled(space: Space, count: int) -> list[Any]:
    """`count` finished random trials, as a journal holds them, six of ten stopped."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(directions=TWO, sampler=optuna.samplers.RandomSampler(seed=0))
    rows = []
    for index in range(count):
        trial = study.ask()
        recipe = space.build(trial)
        values = [number(f"{index}"), 1 - recipe.sparsity]
        constraints = {"unfinished": 0.5} if number(f"stopped/{index}") < 0.6 else {}
        rows.append(
            optuna.trial.create_trial(
                values=values,
                params=trial.params,
                distributions=trial.distributions,
                constraints=constraints or None,
                user_attrs={"end": {"turn": index}},
            )
        )
        rows[-1].number = index
        if index % 200 == 199:
            study = optuna.create_study(directions=TWO, sampler=optuna.samplers.RandomSampler(seed=index))
    return rows


def speed(space: Space, rows: list[Any], name: str) -> list[float]:
    """Seconds of CPU of some suggestions after `rows`."""
    found = []
    if name in OPTUNA:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            sampler = optuna.samplers.TPESampler(multivariate=True, group=True, seed=0)
        study = optuna.create_study(directions=TWO, sampler=sampler)
        study.add_trials(rows)
        for _ in range(2 if len(rows) > 1000 else 5):
            begun = time.process_time()
            space.build(trial := study.ask())
            found.append(time.process_time() - begun)
            study.tell(trial, [0.5, 0.5])
        return found
    proposer = Proposer(tables.sampler.choose(name), space, directions=TWO, seed=0)
    proposer.restore(rows)
    first = len(proposer._first)
    for index in range(60):
        begun = time.process_time()
        proposer.ask(len(rows) + index, place=len(rows) + first + index)
        found.append(time.process_time() - begun)
        proposer.tell(len(rows) + index, TrialState.COMPLETE, [number(f"new/{index}"), 0.5], {})
    return found


def points_of(space: Space, seed: int, trials: int, *, size: int = FIT_SET) -> list[tuple[float, float]]:
    """(accuracy, logarithm of 1 / density) of the trials of a search."""
    proposer = Proposer(tables.sampler.choose("tpe"), space, directions=TWO, seed=seed, fit_set=size)
    points = []
    for index in range(trials):
        values = quality(proposer.ask(index))
        proposer.tell(index, TrialState.COMPLETE, values, {})
        points.append((values[0], -math.log10(values[1])))
    return points


def search(space: Space, size: int, seed: int) -> float:
    """Hypervolume of a search, density in its logarithm."""
    points = points_of(space, seed, TRIALS, size=size)
    best = [p for p in set(points) if not any(q[0] >= p[0] and q[1] >= p[1] and q != p for q in points)]
    return hypervolume(best, (0.0, 0.0))


def main(what: str) -> None:
    torch.set_num_threads(1)
    rows = json.loads(FILE.read_text()) if FILE.exists() else []

    def add(row: dict[str, Any]) -> None:
        rows.append({**row, "environment": environment()})
        FILE.write_text(json.dumps(rows, indent=1) + "\n")

    done = {(row["what"], row.get("sampler"), row.get("trials"), row.get("size"), row.get("seed")) for row in rows}
    if what == "speed":
        space = Space(BASE, WHOLE, seed=0)
        for count in COUNTS:
            trials = filled(space, count)
            for name in (*SAMPLERS, *OPTUNA):
                if ("speed", name, count, None, None) in done:
                    continue
                found = sorted(1000 * value for value in speed(space, trials, name))
                middle = {"median_ms": statistics.median(found), "low_ms": found[0], "high_ms": found[-1], "n": len(found)}
                add({"what": "speed", "sampler": name, "trials": count, "parameters": len(space.parameters()), **middle})
    if what == "quality":
        space = Space(BASE, SOME, seed=0)
        for size in SIZES:
            for seed in SEEDS:
                if ("quality", None, TRIALS, size, seed) not in done:
                    begun = time.process_time()
                    volume = search(space, size, seed)
                    add(
                        {
                            "what": "quality",
                            "trials": TRIALS,
                            "size": size,
                            "seed": seed,
                            "hypervolume": volume,
                            "cpu_s": time.process_time() - begun,
                        }
                    )
    show(rows)


def show(rows: list[dict[str, Any]]) -> None:
    print("| sampler | trials | ms a suggestion, median (lowest to highest) | n |\n|---|---|---|---|")
    for row in rows:
        if row["what"] == "speed":
            low, high = row["low_ms"], row["high_ms"]
            print(f"| {row['sampler']} | {row['trials']:,} | {row['median_ms']:.1f} ({low:.1f} to {high:.1f}) | {row['n']} |")
    print(f"\n| fit set | hypervolume after {TRIALS:,} trials | against {FIT_SET} | n | CPU ms a trial |\n|---|---|---|---|---|")
    quality_rows = [row for row in rows if row["what"] == "quality"]
    base = {row["seed"]: row["hypervolume"] for row in quality_rows if row["size"] == FIT_SET}
    for size in SIZES:
        own = {row["seed"]: row for row in quality_rows if row["size"] == size}
        if len(own) > 1:
            volumes = [row["hypervolume"] for row in own.values()]
            paired = [row["hypervolume"] - base[seed] for seed, row in own.items() if seed in base]
            gap = f"{statistics.fmean(paired):+.4f} ± {statistics.stdev(paired):.4f}" if size != FIT_SET and len(paired) > 1 else ""
            cpu = statistics.fmean(row["cpu_s"] for row in own.values()) / TRIALS * 1000
            name = "all" if size > 10**6 else size
            print(f"| {name} | {statistics.fmean(volumes):.4f} ± {statistics.stdev(volumes):.4f} | {gap} | {len(own)} | {cpu:.1f} |")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "show")
