"""How far does a search get for the samples that it trains on? distprune against the script that a user of Ray Tune would write.

    python benchmarks/search_efficiency.py --columns baseline distprune --seeds 3    # goes on from benchmarks/search_efficiency.json
    python benchmarks/search_efficiency.py --columns                                 # prints the tables of what is there
    python benchmarks/search_efficiency.py --columns --figure docs/figures/search_efficiency.svg

The same space, number of trials, length of training, images and seeds for all: LeNet-5 at a quarter of its width, Fashion-MNIST (2,560
images, 2,400 for validation), 4 epochs. `baseline_ray.py` is run as it is, under Ray; distprune's columns are driven by its own driver
over real trials, one after another in one process, as the baseline's run one at a time. The other columns are distprune with one part
switched off.

A column is worth the hypervolume of the front of its finished networks, between REFERENCE and BEST: validation accuracy, and the
logarithm of 1 / density. The samples are those that were really trained on, those of stopped trials too, with scoring and recovery at
rungs included.
"""

import argparse
import contextlib
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from distprune.core.projection import Projection
from distprune.environment import environment
from distprune.search import driver, trial
from distprune.search.config import Search
from distprune.search.rungs import Rungs, Vector, boundaries
from distprune.search.simulate import Simulator
from distprune.search.tables import scheduler
from distprune.search.volume import hypervolume
from distprune.store.folder import RunFolder
from distprune.store.reports import read
from distprune.store.study import Truth

FILE = Path(__file__).with_suffix(".json")
BASELINE = Path(__file__).with_name("baseline_ray.py")
REFERENCE = (0.5, 0.0)  # accuracy, and log10 of 1 / density: a network that is half wrong, and one that is not pruned
BEST = (1.0, math.log10(50))
TRIALS, IMAGES, EPOCHS, WIDTH, VALIDATION = 40, 2560, 4, 0.25, 0.04
SHARES = (0.2, 0.5, 1.0)  # of the samples that the baseline processed

# As in baseline_ray.py. Lists of values in place of ranges for the rates: that prefixes are equal needs equal rates.
RECIPE: dict[str, Any] = {
    "model": {"name": "lenet5", "width": WIDTH},
    "data": {"name": "fashion_mnist", "folder": "data/fashion-mnist", "limit": IMAGES, "validation": VALIDATION},
    "train": {"length": f"{EPOCHS}ep", "optimizer": {"name": "sgd", "lr": 0.05}},
}
SPACE: dict[str, Any] = {
    "paradigm": [
        "at_init",
        {"name": "gradual", "begin": "25%", "end": "75%", "updates": 10},
        {"name": "finetune", "share": [0.6, 0.8, 1.0], "tune": "50%", "rate": "replay", "weights": "inherit"},
        {"name": "lth", "share": [0.6, 0.8, 1.0], "rewind_to": ["0%", "25%"], "weights": "rewind"},
    ],
    "criterion": ["magnitude", "random"],
    "allocator": ["global", "uniform"],
    "regularizer": ["none", {"name": "l1", "strength": 1e-4}],
    "sparsity": [0.5, 0.98],
    "optimizer": [{"name": "sgd", "lr": [0.02, 0.05, 0.1]}],
}


class _ByScore(Rungs):
    """Rungs that look at the score alone."""

    def goes_on(self, number: int, rung: int, vector: Vector) -> bool:
        return super().goes_on(number, rung, vector[:1])

    def note(self, number: int, rung: int, vector: Vector) -> None:
        super().note(number, rung, vector[:1])

    def at(self, costs: Sequence[int]) -> Rungs:
        return _ByScore(costs, self.reduction)


@scheduler("halving_by_score")
def halving_by_score(least: int, most: int, objectives: int, *, reduction: int = 3, first: float = 0.5) -> Rungs:
    """ASHA on the score alone, whatever the search minimizes besides."""
    return _ByScore(boundaries(round(least * first), most, reduction), reduction)


def _plain(state: Any, recipe: Any, plan: Any, env: Any, **options: Any) -> Projection:
    """In place of a projection: the objective as it is."""
    return Projection(env.task.metrics(state.model, "validation")[env.task.objective], 0, {})


@dataclass(frozen=True)
class Column:
    """What is changed in distprune's search, or which options the baseline is run with."""

    title: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    options: Sequence[str] | None = None  # of the baseline
    plain_scores: bool = False
    uncovered: bool = False


COLUMNS = {
    "baseline": Column("Ray Tune, OptunaSearch, ASHA on accuracy", options=()),
    "baseline_unstopped": Column("the same without ASHA", options=("--scheduler", "none")),
    "distprune": Column("**distprune**"),
    "no_cache": Column("no cache", {"cache": False}),
    "plain_score": Column("plain accuracy at rungs", plain_scores=True),
    "by_accuracy": Column("ASHA on the score alone", {"scheduler": "halving_by_score"}),
    "unstopped": Column("no stopping", {"scheduler": "none"}),
    "unstopped_no_cache": Column("no stopping, no cache", {"scheduler": "none", "cache": False}),
    "random": Column("random in place of TPE", {"sampler": "random"}),
    "floor": Column("with a floor of 0.5", {"floor": 0.5}),
    "no_rounds": Column("rounds are no results", {"rounds": False}),
    "uncovered": Column("no covering of the space first", uncovered=True),
    "promote": Column("promotion in place of stopping", {"scheduler": {"name": "pareto_halving", "variant": "promote"}}),
    "rates": Column(
        "learning rate from a range", {"space": {**SPACE, "optimizer": [{"name": "sgd", "lr": [0.02, 0.1]}]}}
    ),
}  # fmt: skip


def run(name: str, seed: int, *, trials: int, workers: int, batch: int) -> dict[str, Any]:
    """One search: every report as (samples of the whole search so far, accuracy, density, whether the network is finished)."""
    column = COLUMNS[name]
    with tempfile.TemporaryDirectory(prefix="distprune-efficiency-") as folder:
        if column.options is not None:
            return _run_baseline(column, seed, trials, workers, batch, Path(folder))
        return _run_search(column, seed, trials, workers, batch, Path(folder))


def _run_baseline(column: Column, seed: int, trials: int, workers: int, batch: int, folder: Path) -> dict[str, Any]:
    log = folder / "log.json"
    options = {"--trials": trials, "--seed": seed, "--workers": workers, "--images": IMAGES, "--epochs": EPOCHS, "--width": WIDTH}
    options |= {"--validation": VALIDATION, "--batch": batch, "--log": log}
    command = [sys.executable, str(BASELINE), *(str(part) for pair in options.items() for part in pair), *(column.options or ())]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    found = json.loads(log.read_text())
    ended = Counter("finished" for row in found["rows"] if row[4])
    ended["stopped"] = len(found["configs"]) - ended["finished"]
    paradigms = Counter(found["configs"][row[1]]["method"] for row in found["rows"] if row[4])
    reports = [(row[0], round(row[2], 5), round(row[3], 6), row[4]) for row in found["rows"]]
    return {"ended": ended, "finished_by": paradigms, "samples": reports[-1][0], "billed": reports[-1][0], "reports": reports}


def _run_search(column: Column, seed: int, trials: int, workers: int, batch: int, folder: Path) -> dict[str, Any]:
    recipe = {**RECIPE, "train": {**RECIPE["train"], "batch_size": batch}}
    value = {"name": "search", "recipe": recipe, "space": SPACE, "limits": {"trials": trials}, "seed": seed, "storage": str(folder)}
    search = Search.read({**value, "workers": {"cpus": 1}, **column.changes})
    with contextlib.ExitStack() as stack:
        if column.plain_scores:
            stack.enter_context(mock.patch.object(trial, "project", _plain))
        if column.uncovered:
            stack.enter_context(mock.patch("distprune.search.proposer.covering", lambda space: []))
        done = driver.start(search, engine=Simulator(trial.run_trial, workers=workers), listen=lambda event, facts: None)
    return _trace(done, search)


def _trace(folder: RunFolder, search: Search) -> dict[str, Any]:
    spent: dict[tuple[int, str], float] = {}
    cost: dict[int, float] = {}
    paradigms: dict[int, str] = {}
    finished: Counter[str] = Counter()
    reports, scores = [], 0
    trials = Truth.open(folder.journal, search.name, ("maximize", "minimize")).trials()
    for one in trials:
        choice = one.user_attrs["recipe"]["paradigm"]
        paradigms[one.number] = choice if isinstance(choice, str) else choice["name"]
    for row in read(folder.reports).to_pylist():
        if row["ended"] not in ("", "finished"):
            continue  # a failure: it was no network
        spent[row["trial"], row["attempt"]] = row["spent"]
        cost[row["trial"]] = row["cost"]
        finished[paradigms[row["trial"]]] += row["final"]
        scores += row["score"] is not None and not row["final"]
        reports.append((round(sum(spent.values())), round(row["objective"], 5), round(1 - row["sparsity"], 6), row["final"]))
    ended = Counter(one.user_attrs["end"]["ended"] for one in trials)
    counts = {"ended": ended, "finished_by": +finished, "scores": scores}
    return {**counts, "samples": reports[-1][0], "billed": round(sum(cost.values())), "reports": reports}


# What a column came to.


def curve(row: Mapping[str, Any], *, every: bool = False) -> list[tuple[int, float]]:
    """(samples, hypervolume) after each network that is finished, or after `every` network that was reported, stopped ones too."""
    front: list[tuple[float, float]] = []
    volume, found = 0.0, []
    whole = math.prod(best - least for best, least in zip(BEST, REFERENCE, strict=True))
    for samples, accuracy, density, final in row["reports"]:
        point = (accuracy, -math.log10(max(density, 1e-6)))
        if (final or every) and not any(a >= point[0] and b >= point[1] for a, b in front):
            front = [other for other in front if not (point[0] >= other[0] and point[1] >= other[1])] + [point]
            volume = hypervolume(front, REFERENCE) / whole
            found.append((samples, volume))
    return found


def at(points: Sequence[tuple[int, float]], samples: float) -> float:
    """The hypervolume after so many samples."""
    return max((volume for reached, volume in points if reached <= samples), default=0.0)


def reached(points: Sequence[tuple[int, float]], volume: float) -> float | None:
    """The samples after which a hypervolume is reached."""
    return next((samples for samples, found in points if found >= volume), None)


def table(rows: list[dict[str, Any]], *, every: bool = False) -> str:
    """Markdown: a line a column; mean and standard deviation over the seeds that the baseline has too."""
    baselines = {row["seed"]: row for row in rows if row["column"] == "baseline"}
    lines = [
        "| column | n | finished | samples (thousands) | at 1/5 | at 1/2 | at 1 | at its end | to the baseline's end |",
        "|---" * 9 + "|",
    ]
    for name, column in COLUMNS.items():
        own = [row for row in rows if row["column"] == name and row["seed"] in baselines]
        if not own:
            continue
        curves = [curve(row, every=every) for row in own]
        base = [baselines[row["seed"]]["samples"] for row in own]
        cells = [_cell([at(points, share * most) for points, most in zip(curves, base, strict=True)]) for share in SHARES]
        ends = [points[-1][1] if points else 0.0 for points in curves]
        goals = [curve(baselines[row["seed"]], every=every)[-1][1] for row in own]
        ratios = [_ratio(reached(points, goal), most) for points, goal, most in zip(curves, goals, base, strict=True)]
        counts = _cell([row["ended"].get("finished", 0) for row in own], 0)
        samples = _cell([row["samples"] / 1000 for row in own], 0)
        ratio = _cell([one for one in ratios if one is not None], 2)
        missed = sum(one is None for one in ratios)
        ratio = " ".join([ratio, *([f"(not reached: {missed})"] if missed else [])]).strip()
        lines.append(f"| {column.title} | {len(own)} | {counts} | {samples} | {' | '.join(cells)} | {_cell(ends)} | {ratio} |")
    return "\n".join(lines)


def budgets(rows: list[dict[str, Any]], samples: Sequence[int]) -> str:
    """Markdown: hypervolume after so many samples, where stopping and sharing pay. Empty where a search was shorter."""
    lines = ["| column | n | " + " | ".join(f"{count // 1000}k" for count in samples) + " |", "|---" * (len(samples) + 2) + "|"]
    for name, column in COLUMNS.items():
        own = [row for row in rows if row["column"] == name]
        if own:
            enough = [[row for row in own if row["samples"] >= count] for count in samples]
            cells = [_cell([at(curve(row), count) for row in some]) for some, count in zip(enough, samples, strict=True)]
            lines.append(f"| {column.title} | {len(own)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _ratio(samples: float | None, whole: float) -> float | None:
    return None if samples is None else samples / whole


def _cell(values: Sequence[float], digits: int = 3) -> str:
    if not values:
        return ""
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Hypervolume over samples: mean over seeds of the main pair with the range between them, and of the others the mean."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.rcParams.update({"svg.hashsalt": "distprune", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    figure, axes = pyplot.subplots(figsize=(7.2, 4.2))
    colours = {"baseline": "#b2182b", "baseline_unstopped": "#ef8a62", "distprune": "#2166ac", "unstopped": "#1b7837"}
    for name, colour in colours.items():
        own = [row for row in rows if row["column"] == name]
        if not own:
            continue
        curves, most = [curve(row) for row in own], min(row["samples"] for row in own)
        grid = [most * step / 400 for step in range(401)]
        values = [[at(points, samples) for points in curves] for samples in grid]
        title = COLUMNS[name].title.strip("*")
        label = f"{'distprune, ' if name == 'unstopped' else ''}{title} (n = {len(own)})"
        axes.step([samples / 1000 for samples in grid], [statistics.mean(row) for row in values], where="post", color=colour, label=label)
        low, high = [min(row) for row in values], [max(row) for row in values]
        axes.fill_between([samples / 1000 for samples in grid], low, high, color=colour, alpha=0.15, step="post", linewidth=0)
    axes.set_xlabel("training samples processed (thousands)")
    axes.set_ylabel("hypervolume of the finished networks")
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, loc="lower right")
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None, dpi=130)


def jobs(columns: Sequence[str], seeds: int, trials: int, batch: int, rows: list[dict[str, Any]]) -> Iterator[tuple[str, int]]:
    """What is left to run: all columns of a seed before the next seed."""
    done = {(row["column"], row["seed"]) for row in rows if row["trials"] >= trials and row["batch"] == batch}
    yield from ((name, seed) for seed in range(seeds) for name in columns if (name, seed) not in done)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--columns", nargs="*", choices=list(COLUMNS), default=list(COLUMNS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--trials", type=int, default=TRIALS)
    parser.add_argument("--batch", type=int, default=64, help="batch size: smaller ones make trainings of more steps for the same samples")
    parser.add_argument("--workers", type=int, default=1, help="trials at once; 1 leaves nothing to chance")
    parser.add_argument("--figure", type=Path)
    parser.add_argument("--file", type=Path, default=FILE)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = json.loads(options.file.read_text())["rows"] if options.file.exists() else []
    for name, seed in list(jobs(options.columns, options.seeds, options.trials, options.batch, rows)):
        before, cpu = time.monotonic(), time.process_time()
        found = run(name, seed, trials=options.trials, workers=options.workers, batch=options.batch)
        times = {"cpu_s": round(time.process_time() - cpu, 1), "wall_s": round(time.monotonic() - before, 1)}
        place = {"column": name, "seed": seed, "batch": options.batch}
        rows = [row for row in rows if not place.items() <= row.items()]
        rows.append({**place, "trials": options.trials, "workers": options.workers, **times, **found})
        text = ",\n".join(json.dumps(row, separators=(",", ":")) for row in rows)
        options.file.write_text(f'{{"environment": {json.dumps(environment())}, "rows": [\n{text}\n]}}\n')
        points = curve(rows[-1])
        print(f"{name} {seed}: {points[-1][1] if points else 0:.4f} after {found['samples']} samples, {times['wall_s']} s", flush=True)
    for batch in sorted({row["batch"] for row in rows}, reverse=True):
        own = [row for row in rows if row["batch"] == batch]
        most = max(row["samples"] for row in own)
        print(f"Batches of {batch}. Finished networks:", "", table(own), "", "Every network that was reported:", "", sep="\n")
        print(table(own, every=True), "", budgets(own, [count for count in range(100_000, most, 100_000)]), "", sep="\n")
    if options.figure:
        draw([row for row in rows if row["batch"] == options.batch], options.figure)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
