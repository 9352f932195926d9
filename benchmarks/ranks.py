"""Which number at a rung predicts the end? Random recipes run to their ends and scored in four ways on the way.

    python benchmarks/ranks.py --trials 72     # goes on from benchmarks/ranks.json if there is one
    python benchmarks/ranks.py --trials 0      # prints the tables of what is there
    python benchmarks/ranks.py --setting short --trials 60

Fashion-MNIST, LeNet-5, 90 to 98 % sparsity, learning rates drawn log-uniformly; the paradigms of PARADIGMS in turn. At the reports that
first come to a bill of SCORED epochs: the plain objective, and the score of the network projected onto its final budget after some steps of
recovery. Trainings are of 750 steps, or `short`, of 160: how much recovery does a score need there?

A trial is judged at rungs of half a dense training and `reduction` times as far each, once the first round of a plan in rounds is over; by
the best of what was measured at the rungs so far, as in a search. The agreement of ranks is Spearman's, between the first rung at which a
trial is judged and its end. Whether the front would have been stopped is asked of the scheduler: the trials come in random orders, one
after the other, drawn with replacement; intervals are 95 % of these draws.
"""

import argparse
import bisect
import itertools
import json
import math
import random
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import torch

from distprune.core.executor import execute
from distprune.core.loop import Diverged
from distprune.core.projection import project
from distprune.core.recipe import Recipe
from distprune.core.run import prepare
from distprune.environment import environment
from distprune.search.rungs import Rungs, dominates
from distprune.search.space import Space
from distprune.search.trial import grace_cost
from distprune.search.volume import hypervolume

SCORED = (1, 2, 3, 4, 6, 9, 12, 18, 24)  # epochs billed
PARADIGMS: list[Any] = [
    "at_init",
    {"name": "lth", "share": [0.6, 0.9]},
    "gradual",
    {"name": "finetune", "share": [0.7, 1.0]},
    "rigl",
    "greg",
    "edge_popup",
    "admm",
    "supermask",
]
SPACE: dict[str, Any] = {
    "paradigm": PARADIGMS,
    "criterion": ["magnitude", "snip", "synflow"],
    "allocator": ["global", "erk", "uniform"],
    "regularizer": ["none", "growing_l2"],
    "sparsity": [0.9, 0.98],
    "optimizer": [{"name": "sgd", "lr": [0.01, 0.2]}],
}
DRAWS = 200
LEVELS = 8  # more than are ever reached


@dataclass(frozen=True)
class Setting:
    """What is trained, and with how many steps of recovery it is scored."""

    epochs: int
    images: int
    width: float
    recoveries: tuple[int, ...]
    file: Path

    @property
    def base(self) -> dict[str, Any]:
        """What all recipes share."""
        data = {"name": "fashion_mnist", "folder": "data/fashion-mnist", "limit": self.images}
        train = {"length": f"{self.epochs}ep", "batch_size": 64, "optimizer": "sgd"}
        return {"model": {"name": "lenet5", "width": self.width}, "data": data, "train": train}

    @property
    def signals(self) -> dict[str, str]:
        """What trials may be judged by."""
        return {"objective": "plain objective"} | {str(steps): f"projected, {steps} steps" for steps in self.recoveries}


SETTINGS = {
    "long": Setting(6, 8000, 0.4, (0, 20, 40, 80), Path(__file__).with_suffix(".json")),
    "short": Setting(4, 2560, 0.25, (0, 8, 16, 24, 40), Path(__file__).with_name("ranks_short.json")),
}


def recipes(setting: Setting, count: int) -> Iterator[Recipe]:
    """The first `count` recipes: random, the paradigms in turn."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    space = Space(setting.base, SPACE, seed=0)
    labels = itertools.cycle([candidate.label for candidate in space.axes["paradigm"]])
    for number in range(count):
        study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=number))
        study.enqueue_trial({"paradigm": next(labels)})
        yield space.build(study.ask())


def measure(setting: Setting, recipe: Recipe) -> dict[str, Any]:
    """One recipe to its end: its reports, each with the scores that were measured there."""
    run = prepare(recipe, report_every="1ep")
    epoch = run.env.task.steps_per_epoch(recipe.train.batch_size) * recipe.train.batch_size
    waiting, reports, ended = [epochs * epoch for epochs in SCORED], [], "finished"
    try:
        for report in execute(run.plan, run.state, run.env):
            due = bool(waiting) and report.cost >= waiting[0]
            waiting = [cost for cost in waiting if cost > report.cost]
            scores = None
            if due and not report.final:
                scores = {str(steps): project(run.state, run.recipe, run.plan, run.env, recovery=steps)[0] for steps in setting.recoveries}
            objective = report.metrics[run.env.task.objective]
            facts = {"index": report.index, "final": report.final, "step": report.clock, "cost": report.cost, "kept": report.kept}
            reports.append({**facts, "sparsity": round(report.sparsity, 6), "objective": round(objective, 5), "scores": scores})
    except Diverged:
        ended = "nan"
    return {
        "paradigm": recipe.paradigm.name,
        "recipe": recipe.plain(),
        "ended": ended,
        "total": run.state.total,
        "grace": grace_cost(run.plan),
        "dense_cost": setting.epochs * epoch,
        "plan_cost": run.plan.cost,
        "reports": reports,
    }


# Reading what was measured.


Judged = list[tuple[int, float]]  # (rung, best of what was measured at rungs so far)


def at(row: Mapping[str, Any], reduction: int) -> list[float]:
    """The bills of the rungs of a trial, in samples."""
    return [0.5 * row["dense_cost"] * reduction**k for k in range(LEVELS)]


def judged(row: Mapping[str, Any], signal: str, costs: Sequence[float]) -> Judged:
    """Where a trial is judged, and by what."""
    found: Judged = []
    best = -math.inf
    for report in row["reports"]:
        rung = sum(report["cost"] >= cost for cost in costs) - 1
        if report["final"] or report["scores"] is None or report["cost"] < row["grace"] or rung <= (found[-1][0] if found else -1):
            continue
        best = max(best, report["objective"] if signal == "objective" else report["scores"][signal])
        found.append((rung, best))
    return found


def spearman(pairs: Sequence[tuple[float, float]]) -> float:
    """Rank correlation; equal values share their mean rank. NaN where one side has no ranks."""
    if len(pairs) < 3:
        return math.nan
    ranks = [_ranks([pair[side] for pair in pairs]) for side in (0, 1)]
    return float(np.corrcoef(ranks)[0, 1]) if all(len(set(side)) > 1 for side in ranks) else math.nan


def _ranks(values: Sequence[float]) -> list[float]:
    ordered = sorted(values)
    return [(bisect.bisect_left(ordered, value) + bisect.bisect_right(ordered, value)) / 2 for value in values]


def vector(row: Mapping[str, Any], score: float) -> tuple[float, float]:
    """What trials are compared by: a score, and the logarithm of the share of weights kept in the end."""
    return score, -math.log(row["reports"][-1]["kept"] / row["total"])


def replay(rows: Sequence[Mapping[str, Any]], signal: str, reduction: int, front: float) -> dict[str, float]:
    """What the scheduler would have done with the trials, in the order in which they stand."""
    rungs = Rungs(range(LEVELS), reduction, front=front)
    ends = [vector(row, row["reports"][-1]["objective"]) for row in rows]
    eventual = [end for end in ends if not any(dominates(other, end) for other in ends)]
    lost, survivors, billed, whole = 0, [], 0.0, 0.0
    for number, (row, end) in enumerate(zip(rows, ends, strict=True)):
        costs = at(row, reduction)
        last, stopped = -1, None
        for last, score in judged(row, signal, costs):
            if not rungs.goes_on(number, last, vector(row, score)):
                stopped = last
                break
        bill = row["reports"][-1]["cost"]
        whole += bill
        billed += bill if stopped is None else max(costs[stopped], row["grace"])
        if stopped is None:
            rungs.finished(number, last, end)
            survivors.append(end)
        lost += stopped is not None and end in eventual
    reference = (0.1, -math.log(0.105))
    kept = hypervolume(survivors, reference) / hypervolume(ends, reference)
    stops = 1 - len(survivors) / len(rows)
    return {"front": lost / len(eventual), "stopped": stops, "volume": kept, "bill": billed / whole}


def interval(draws: Sequence[float]) -> tuple[float, float, float]:
    """(mean, low, high) of what was drawn and is a number."""
    found = [value for value in draws if not math.isnan(value)]
    low, high = np.quantile(found, [0.025, 0.975])
    return statistics.mean(found), float(low), float(high)


def agreement(setting: Setting, rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: rank correlation between the first rung and the end, over all and within each paradigm."""
    names = sorted({row["paradigm"] for row in rows})
    counts = {name: sum(row["paradigm"] == name and bool(judged(row, "0", at(row, 2))) for row in rows) for name in names}
    header = " | ".join(f"{name} ({counts[name]})" for name in names)
    lines = [f"| at the first rung | all ({sum(counts.values())}) | within paradigms | {header} |", "|---" * (len(names) + 3) + "|"]
    for signal, label in setting.signals.items():
        found = [(row, judged(row, signal, at(row, 2))) for row in rows]
        pairs = [(row["paradigm"], (seen[0][1], row["reports"][-1]["objective"])) for row, seen in found if seen]

        def within(sample: Sequence[tuple[str, tuple[float, float]]]) -> float:
            of = {name: [pair for owner, pair in sample if owner == name] for name in names}
            values = [(spearman(group), len(group)) for group in of.values()]
            known = [(value, size) for value, size in values if not math.isnan(value)]
            return sum(value * size for value, size in known) / sum(size for _, size in known) if known else math.nan

        samples = [random.Random(seed).choices(pairs, k=len(pairs)) for seed in range(DRAWS)]
        _, low, high = interval([spearman([pair for _, pair in sample]) for sample in samples])
        _, least, most = interval([within(sample) for sample in samples])
        cells = [f"{spearman([pair for _, pair in pairs]):.2f} [{low:.2f}, {high:.2f}]", f"{within(pairs):.2f} [{least:.2f}, {most:.2f}]"]
        cells += [f"{spearman([pair for owner, pair in pairs if owner == name]):.2f}" for name in names]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def stopping(setting: Setting, rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: how much of the eventual front the scheduler would have stopped."""
    lines = [
        "| judged by | reduction | front stopped | the net alone | hypervolume kept | trials stopped | samples billed |",
        "|---" * 7 + "|",
    ]
    for signal, label in setting.signals.items():
        for reduction in (2, 3):
            found = [
                {front: replay(order, signal, reduction, front) for front in (0.75, 0.0)}
                for order in (random.Random(seed).choices(rows, k=len(rows)) for seed in range(DRAWS))
            ]
            cells = []
            for front, what, digits in ((0.75, "front", 0), (0.0, "front", 0), (0.75, "volume", 1)):
                mean, low, high = interval([draw[front][what] for draw in found])
                cells.append(f"{mean:.{digits}%} [{low:.{digits}%}, {high:.{digits}%}]")
            cells += [f"{statistics.mean(draw[0.75][what] for draw in found):.0%}" for what in ("stopped", "bill")]
            lines.append(f"| {label} | {reduction} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--trials", type=int, default=72)
    parser.add_argument("--setting", choices=list(SETTINGS), default="long")
    parser.add_argument("--cpu", type=float, default=35 * 60, help="stop after so many seconds of CPU")
    options = parser.parse_args()
    torch.set_num_threads(1)
    setting = SETTINGS[options.setting]
    found = json.loads(setting.file.read_text()) if setting.file.exists() else {"rows": []}
    rows = found["rows"]
    started = time.process_time()
    for number, recipe in enumerate(recipes(setting, options.trials)):
        if number < len(rows):
            continue
        if time.process_time() - started > options.cpu:
            break
        before = time.process_time()
        row = measure(setting, recipe)
        rows.append({"number": number, "cpu_s": round(time.process_time() - before, 1), **row})
        text = ",\n".join(json.dumps(row, separators=(",", ":")) for row in rows)
        setting.file.write_text(f'{{"environment": {json.dumps(environment())}, "scored": {json.dumps(SCORED)}, "rows": [\n{text}\n]}}\n')
        last = row["reports"][-1]["objective"] if row["reports"] else math.nan
        print(f"{len(rows)}/{options.trials} {row['paradigm']} {last:.4f} {rows[-1]['cpu_s']} s", flush=True)
    finished = [row for row in rows if row["ended"] == "finished"]
    print(
        f"{len(rows)} trials, {len(rows) - len(finished)} diverged", agreement(setting, finished), stopping(setting, finished), sep="\n\n"
    )


if __name__ == "__main__":
    main()
