"""A fused start against a random one (Ghods et al. 2020, arXiv:2001.10509): the paper's Fashion-MNIST protocol, small.

    python benchmarks/fusion.py    # goes on from benchmarks/fusion.json if there is one

A network of four blocks with 2-4-8-16 channels is trained, its last convolution and its linear layer become one linear layer, and the
network of three blocks is trained on for as long. Against it: the same three blocks from their initialization for as many epochs, and for
as many samples as deep training, fusion and retraining bill together; and a fusion whose linear layer is drawn instead of fitted, which
tells what the fitted map does apart from the blocks that are kept. Learning rate and its cosine are the same in every training.
Accuracy is on test; "start" is before the first step of the three blocks, "first epoch" after one epoch of theirs.
"""

import argparse
import json
import multiprocessing
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch

from distprune.core.edits.fuse import Fuse
from distprune.core.executor import execute
from distprune.core.recipe import Recipe
from distprune.core.run import Run, prepare
from distprune.environment import environment

EPOCHS, LIMIT, BATCH, SEEDS, INITS = 5, 5000, 64, 7, ("torch", "he")
FILE = Path(__file__).with_suffix(".json")
DEEP, SHALLOW = [2, 4, 8, 16], [2, 4, 8]
FITTED, DRAWN = "fused", "fused layer drawn"
ARMS = ("four blocks", FITTED, DRAWN, "from scratch", "from scratch, equal cost")


def ready(channels: list[int], init: str, seed: int, form: str = "", length: str = f"{EPOCHS}ep") -> Run:
    """A run that is fused by `form`, or trained from scratch."""
    recipe = {
        "model": {"name": "plain_conv", "channels": channels, "init": init},
        "data": {"name": "fashion_mnist", "folder": "data/fashion-mnist", "limit": LIMIT},
        "paradigm": {"name": "fusion", "pick": "last", "tune": "100%", "form": form} if form else "dense",
        "train": {"length": length, "batch_size": BATCH, "optimizer": {"name": "rmsprop", "lr": 2e-3, "weight_decay": 1e-4}},
        "seed": seed,
    }
    return prepare(Recipe.read(recipe), report_every="1ep")


def accuracy(run: Run) -> float:
    """On test."""
    return float(run.env.task.metrics(run.state.model, "test")["accuracy"])


def train(run: Run) -> dict[str, Any]:
    """Accuracy at the start, after an epoch and at the end of the last training of a run."""
    last = len(run.plan.stages) - 1
    found = {"start": accuracy(run)}
    for report in execute(run.plan, run.state, run.env):
        if report.stage == last and not run.state.entered:  # fused, and not trained yet
            found["start"] = accuracy(run)
        elif report.stage == last and "epoch" not in found:
            found["epoch"] = accuracy(run)
    return {**found, "end": accuracy(run), "cost": run.state.ledger.cost, "kept": run.state.masks.kept}


def measure(job: tuple[str, int]) -> list[dict[str, Any]]:
    """All arms of an initialization and a seed; the deep network is trained once."""
    torch.set_num_threads(1)
    run = ready(DEEP, *job, form="data")
    rows: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for report in execute(run.plan, run.state, run.env):
            if isinstance(run.plan.stages[report.stage], Fuse):
                break
        rows["four blocks"] = {"end": accuracy(run), "cost": run.state.ledger.cost, "kept": run.state.masks.kept}
        run.state.save(Path(folder, "deep"))
        for arm, form in ((FITTED, "data"), (DRAWN, "random")):
            run = ready(DEEP, *job, form=form)
            run.state.load(Path(folder, "deep"))
            rows[arm] = {**train(run), "residual": run.state.edits[0]["residual"]}
    rows["from scratch"] = train(ready(SHALLOW, *job))
    rows["from scratch, equal cost"] = train(ready(SHALLOW, *job, length=f"{run.plan.cost // BATCH}it"))
    return [{"arm": arm, "init": job[0], "seed": job[1], **row} for arm, row in rows.items()]


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: mean and standard deviation over seeds."""
    lines = ["| init | network | n | start | first epoch | end | worst end | samples |", "|---" * 8 + "|"]
    for init in INITS:
        for arm in ARMS:
            some = [row for row in rows if (row["arm"], row["init"]) == (arm, init)]
            if some:
                cells = [_cell([row[when] for row in some if when in row]) for when in ("start", "epoch", "end")]
                worst = f"{100 * min(row['end'] for row in some):.1f}"
                lines.append(f"| {init} | {arm} | {len(some)} | {' | '.join(cells)} | {worst} | {some[0]['cost']:,} |")
    return "\n".join(lines)


def _cell(values: list[float]) -> str:
    spread = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * statistics.mean(values):.1f}{spread}" if values else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--workers", type=int, default=1)
    options = parser.parse_args()
    found = json.loads(FILE.read_text()) if FILE.exists() else {"rows": []}
    rows = found["rows"]
    done = {(row["init"], row["seed"]) for row in rows}
    jobs = [(init, seed) for seed in range(options.seeds) for init in INITS]
    with multiprocessing.get_context("spawn").Pool(options.workers) as pool:
        for some in pool.imap(measure, [job for job in jobs if job not in done]):
            rows += some
            facts = {"epochs": EPOCHS, "limit": LIMIT, "hardware": "2 shared CPU cores", "environment": environment()}
            FILE.write_text(json.dumps({**facts, "rows": rows}, indent=1) + "\n")
            print(", ".join(f"{row['arm']} {row['end']:.4f}" for row in some), flush=True)
    print(table(rows))


if __name__ == "__main__":
    main()
