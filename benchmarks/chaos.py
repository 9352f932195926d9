"""Chaos: workers, nodes and drivers killed at seeded moments under a real Ray, and the laws counted afterwards.

    python benchmarks/chaos.py              # 50 kills; goes on from benchmarks/chaos.json if there is one
    python benchmarks/chaos.py --kills 10

Every leg is one search of small networks on a cluster of two nodes of this machine, killed a few times on its way and then compared with
undisturbed work: each trial with the same trial alone, all decisions with a replay of the report stream, and where trials are drawn at
random and none is stopped the whole search with one that nobody killed. The last table is of two searches at once on that cluster.
"""

import argparse
import itertools
import json
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

sys.path.extend(str(Path(__file__).parents[1] / folder) for folder in ("tests", "tests/search"))

from laws import COLUMNS, LAWS, alone, broken, front, masks, told
from searches import reports, search, start, trials
from toys import BASE
from victims import KINDS, Driver, Nodes, seeded, torment

from distprune.environment import environment
from distprune.search.config import Search
from distprune.search.trial import run_trial
from distprune.store.folder import RunFolder
from distprune.store.trials import read_trials

FILE = Path(__file__).with_suffix(".json")
TRIALS, KILLS = 6, 6  # of a leg
RECIPE = {**BASE, "train": {**BASE["train"], "length": "30ep"}}
CASES: dict[str, dict[str, Any]] = {
    "random, no stopping": {"scheduler": "none"},
    "random, stopping": {},
    "TPE, stopping": {"sampler": {"name": "tpe", "startup": 2}},
    "TPE, promoting": {"sampler": {"name": "tpe", "startup": 2}, "scheduler": {"name": "pareto_halving", "variant": "promote"}},
    "random, no stopping, no cache": {"scheduler": "none", "cache": False},
    "TPE, one objective, finalists": {
        "sampler": {"name": "tpe", "startup": 2},
        "scheduler": "halving",
        "minimize": [],
        "finalists": {"count": 1, "seeds": 2},
    },
}


def leg(number: int, nodes: Nodes, folder: Path) -> dict[str, Any]:
    """One search with its kills: what was killed, what was broken, how long each recovery took."""
    case = list(CASES)[number % len(CASES)]
    seed = f"leg {number}"
    value = search(folder / "runs", trials=TRIALS, recipe=RECIPE, **CASES[case])
    config, run = folder / "search.yaml", RunFolder(value.folder)
    config.write_text(yaml.safe_dump(value.plain()))
    kinds = random.Random(seed).choices(KINDS, k=KILLS)
    began = time.monotonic()
    done = torment(config, run, nodes, seeded(seed, kinds, rows=(15 if value.scheduler.name != "none" else 25) * TRIALS), seed=seed)
    wall_s = time.monotonic() - began
    whole = None
    if value.sampler.name == "random":
        whole = start(search(folder / "whole", trials=TRIALS, recipe=RECIPE, scheduler="none"), using=run_trial)
    reference = alone(run, run_trial, folder / "alone", cache=False)
    born = len(trials(run))
    most = born if value.finalists else TRIALS
    found = broken(run, most=most, reference=reference, aside=folder / "aside", undisturbed=whole)
    ends = Counter(trial.user_attrs["end"]["ended"] for trial in trials(run))
    deaths = Counter(cause for trial in trials(run) for cause in trial.user_attrs["end"].get("deaths", []))
    attempts = {(row["trial"], row["attempt"]) for rows in reports(run).values() for row in rows}
    facts = {
        "trials": born,
        "ends": dict(ends),
        "deaths": dict(deaths),
        "again": len(attempts) - len(reports(run)),
        "reports": sum(map(len, reports(run).values())),
    }
    return {"leg": number, "case": case, "kills": [kill.plain() for kill in done], **facts, "broken": found, "wall_s": round(wall_s, 1)}


def pair(number: int, nodes: Nodes, folder: Path) -> dict[str, Any]:
    """Two searches at once on the cluster and one cache, against each alone: trials that differ, and samples spent."""

    def searches(storage: Path) -> list[Search]:
        space = {"paradigm": ["finetune", "lth", "dense"], "criterion": ["magnitude"], "regularizer": ["none", "l2"]}
        changes: dict[str, Any] = {"trials": TRIALS, "recipe": RECIPE, "scheduler": "none", "workers": {"most": 1}, "seed": number}
        return [search(storage, name=name, space={**space, "sparsity": at}, **changes) for name, at in (("a", 0.8), ("b", 0.9))]

    apart = [start(value, workers=1, using=run_trial) for place in range(2) for value in [searches(folder / f"alone {place}")[place]]]
    drivers, together = [], searches(folder / "together")
    for value in together:
        config = folder / f"{value.name}.yaml"
        config.write_text(yaml.safe_dump(value.plain()))
        drivers.append(Driver(nodes.address, "search", str(config), log=config.with_suffix(".log")))
    for driver in drivers:
        driver.check()
    found = [RunFolder(value.folder) for value in together]
    differing = sum(
        a != b for one, other in zip(found, apart, strict=True) for a, b in itertools.zip_longest(_results(one), _results(other))
    )
    billed = sum(sum(read_trials(run.trials)["cost"].to_pylist()) for run in apart)
    return {
        "pair": number,
        "trials": 2 * TRIALS,
        "differing": differing,
        "billed": billed,
        "apart": _spent(apart),
        "together": _spent(found),
    }


def _results(run: RunFolder) -> list[Any]:
    work = [[[row[name] for name in COLUMNS] for row in rows] for _, rows in sorted(reports(run).items())]
    return [*told(run), *work, front(run), masks(run)]


def _spent(runs: Sequence[RunFolder]) -> float:
    return sum(sum(read_trials(run.trials)["spent"].to_pylist()) for run in runs)


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: a row a case, and all of them."""
    head = ["", "searches", "kills (worker, node, driver)", "trials", "begun again", *LAWS]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for name in [*CASES, "all"]:
        if chosen := [row for row in rows if name in (row["case"], "all")]:
            kinds = Counter(kill["kind"] for row in chosen for kill in row["kills"])
            counts = [sum(row["broken"][law] for row in chosen) for law in LAWS]
            kills = f"{kinds.total()} ({', '.join(str(kinds[kind]) for kind in KINDS)})"
            cells = [name, len(chosen), kills, sum(row["trials"] for row in chosen), sum(row["again"] for row in chosen), *counts]
            lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def recoveries(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: seconds until what was interrupted had reported again."""
    lines = ["| killed | n | median s | most s |", "|---|---|---|---|"]
    for kind in KINDS:
        found = [kill["recovery_s"] for row in rows for kill in row["kills"] if kill["kind"] == kind and kill["recovery_s"] is not None]
        if found:
            lines.append(f"| {kind} | {len(found)} | {statistics.median(found):.1f} | {max(found):.1f} |")
    return "\n".join(lines)


def pairs(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: two searches at once."""
    lines = ["| pair | trials | results differing | samples billed | run apart | run together |", "|---|---|---|---|---|---|"]
    lines += [
        f"| {row['pair']} | {row['trials']} | {row['differing']} | {row['billed']:,.0f} | {row['apart']:,.0f} | {row['together']:,.0f} |"
        for row in rows
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no search after that")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = json.loads(FILE.read_text()) if FILE.exists() else {"legs": [], "pairs": []}
    legs, two = found["legs"], found["pairs"]
    end = time.monotonic() + 60 * options.minutes
    nodes = Nodes()
    try:
        while time.monotonic() < end:
            with tempfile.TemporaryDirectory(prefix="chaos-") as name:
                if len(two) < min(options.pairs, len(legs) // 2):
                    two.append(pair(len(two), nodes, Path(name)))
                    print(two[-1], flush=True)
                elif sum(len(row["kills"]) for row in legs) < options.kills:
                    legs.append(leg(len(legs), nodes, Path(name)))
                    print(legs[-1], flush=True)
                else:
                    break
            FILE.write_text(json.dumps({"environment": environment(), "legs": legs, "pairs": two}, indent=1) + "\n")
    finally:
        nodes.close()
    print(table(legs), recoveries(legs), pairs(two), sep="\n\n")


if __name__ == "__main__":
    main()
