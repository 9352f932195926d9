"""Deep inverse priors: when a wide generator fits its measurements, and what pruning does to one that fits the noise.

    python benchmarks/inverse.py               # all three tables; goes on from benchmarks/inverse.json if there is one

width    n numbers from m Gaussian measurements by the two-layer generator of k units: in how many of ten draws gradient descent with step
         1 / (largest eigenvalue of the tangent kernel at the start) comes to a relative squared residual below 1e-6 within 3,000 steps.
pruned   the same at n = 60, m = 10, k = 320 with weights of W removed at random before training, the others times 1 / sqrt(kept share).
denoise  scikit-learn's china, grey, with noise of standard deviation 0.1, and the generator of `configs/papers/inverse.yaml`: PSNR at its
         peak and at the end, dense, with Optimal Eye Surgeon's mask, and with masks drawn at random.
"""

import argparse
import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from distprune.core.executor import execute
from distprune.core.recipe import Recipe
from distprune.core.run import Run, prepare
from distprune.core.stages import Prune
from distprune.environment import environment

FILE = Path(__file__).with_suffix(".json")
CONFIG = Path(__file__).parents[1] / "configs/papers/inverse.yaml"
NARROW_SEEDS = 3  # at k = 40, where no draw is solved and each takes all the steps
WIDTHS = (40, 80, 160, 320, 640)
SIZES = ((40, 10), (80, 10), (160, 10), (60, 20), (60, 40))  # n, m
PRUNED = (0.0, 0.5, 0.9, 0.96, 0.98)
SOLVED_DB = 60.0  # a relative squared residual of 1e-6
STEPS, LOOK = 3000, 5  # a convergence run is looked at every LOOK steps
EVERY = 50  # steps between two points of a denoising curve


def problem(n: int, m: int, width: int, pruned: float, seed: int, rate: float = 1.0) -> Recipe:
    """One draw of signal, operator, readout and weights; one measurement more than `m` is held out."""
    pruning = (
        {"paradigm": "at_init", "criterion": "random", "allocator": "uniform", "sparsity": pruned} if pruned else {"paradigm": "dense"}
    )
    descent = {"name": "sgd", "lr": rate, "momentum": 0.0, "weight_decay": 0.0, "nesterov": False}
    return Recipe.read(
        {
            **pruning,
            "model": {"name": "two_layer", "width": width, "spread": (1 - pruned) ** -0.5},
            "data": {"name": "gaussian_signal", "n": n, "seed": seed},
            "task": {
                **{"name": "inverse", "operator": "gaussian", "measurements": m + 1, "held_out": 1 / (m + 1)},
                **{"latent": 50, "start": "sphere", "epoch": LOOK, "seed": seed},
            },
            "train": {"length": f"{STEPS}it", "batch_size": 1, "optimizer": descent, "decay": "constant"},
            "seed": seed,
        }
    )


def kernel(run: Run) -> torch.Tensor:
    """The tangent kernel J J^T [m, m] of the measurements in the kept weights, as the run's network is now."""
    task, weights = run.env.task, run.state.weights
    made = task.operator(task.image(task.outputs(run.state.model, task.input)))[:, task.seen].flatten()  # type: ignore[attr-defined]
    rows = []
    for value in made:
        slopes = torch.autograd.grad(value, list(weights.values()), retain_graph=True)
        rows.append(torch.cat([(slope * run.state.masks[name]).flatten() for name, slope in zip(weights, slopes, strict=True)]))
    jacobian = torch.stack(rows).double()
    return jacobian @ jacobian.T


def converge(n: int, m: int, width: int, pruned: float, seed: int) -> dict[str, Any]:
    """Whether one draw is solved, and after how many steps."""
    first = prepare(problem(n, m, width, pruned, seed))
    for stage in first.plan.stages:
        if isinstance(stage, Prune):
            list(stage.run(first.state, first.env))
    # The loss is the mean of m squares: its gradient is 2 / m times that of half their sum.
    rate = m / 2 / float(torch.linalg.eigvalsh(kernel(first))[-1])
    run = prepare(problem(n, m, width, pruned, seed, rate), report_every=f"{LOOK}it")
    solved = next((report.clock for report in execute(run.plan, run.state, run.env) if report.metrics["fit"] > SOLVED_DB), None)
    return {"n": n, "m": m, "width": width, "pruned": pruned, "seed": seed, "rate": rate, "solved_at": solved}


def denoise(name: str, changes: dict[str, Any], seed: int) -> dict[str, Any]:
    """One training: PSNR and the held-out residual at each report of the weights' training."""
    from distprune.core.config import read_yaml

    base = read_yaml(CONFIG)
    base = {**base, **changes, "seed": seed, "task": {**base["task"], "seed": seed}}
    run = prepare(Recipe.read(base), report_every=f"{EVERY}it")
    seen = []
    for report in execute(run.plan, run.state, run.env):
        seen.append((report.lap, {"step": report.clock, **run.env.task.metrics(run.state.model, "test")}))
    curve = [point for lap, point in seen if lap == run.state.lap]  # a mask is learned in the lap before
    peak, chosen = (max(curve, key=lambda point: point[metric]) for metric in ("psnr", "held_out"))
    found = {"peak": peak["psnr"], "last": curve[-1]["psnr"], "by_held_out": chosen["psnr"], "held_out_last": curve[-1]["held_out"]}
    steps = {"peak_at": peak["step"], "by_held_out_at": chosen["step"], "kept": run.state.masks.kept, "total": run.state.masks.total}
    return {"name": name, "seed": seed, **found, **steps, "held_out_peak": chosen["held_out"], "curve": curve}


def controls() -> dict[str, dict[str, Any]]:
    """Row of the table -> what it changes in the recipe of the config."""
    random = {"paradigm": "at_init", "criterion": "random", "allocator": "erk"}  # by a global ranking it loses a whole layer
    return {"dense": {"paradigm": "dense", "sparsity": 0.0}, "eye_surgeon": {}, "random mask": random}


def jobs(seeds: int, images: int) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """(table, arguments) of every run."""
    for seed in range(seeds):
        yield from (("width", (n, m, width, 0.0, seed)) for n, m in SIZES for width in WIDTHS if width >= 80 or seed < NARROW_SEEDS)
        yield from (("pruned", (60, 10, 320, pruned, seed)) for pruned in PRUNED)
    for seed in range(images):
        yield from (("denoise", (name, changes, seed)) for name, changes in controls().items())


def convergence_table(rows: list[dict[str, Any]], key: str) -> str:
    """Markdown: share of draws that are solved, and the median of their steps, a column a value of `key`."""
    columns = sorted({row[key] for row in rows})
    lines = ["| n, m | " + " | ".join(f"{value:g}" for value in columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for n, m in dict.fromkeys((row["n"], row["m"]) for row in rows):
        cells = []
        for value in columns:
            found = [row["solved_at"] for row in rows if (row["n"], row["m"], row[key]) == (n, m, value)]
            solved = [step for step in found if step is not None]
            cells.append(f"{len(solved)}/{len(found)}" + (f" ({statistics.median(solved):.0f} steps)" if solved else ""))
        lines.append(f"| {n}, {m} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def denoise_table(rows: list[dict[str, Any]]) -> str:
    """Markdown: mean and standard deviation over seeds, in dB."""
    lines = ["| | kept | peak | last | last - peak | stopped by held-out |", "|---" * 6 + "|"]
    for name in dict.fromkeys(row["name"] for row in rows):
        found = [row for row in rows if row["name"] == name]
        fall = [row["last"] - row["peak"] for row in found]
        cells = [_cell([row[key] for row in found]) for key in ("peak", "last")]
        cells += [_cell(fall), _cell([row["by_held_out"] for row in found])]
        lines.append(f"| {name} | {found[0]['kept'] / found[0]['total']:.1%} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(values: list[float]) -> str:
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{spread}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seeds", type=int, default=10, help="draws of each cell of the convergence tables")
    parser.add_argument("--images", type=int, default=3, help="seeds of the denoising table")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = json.loads(FILE.read_text()) if FILE.exists() else {"rows": []}
    rows = found["rows"]
    work = {"width": converge, "pruned": converge, "denoise": denoise}
    due = list(jobs(options.seeds, options.images))
    names = {(row["table"], json.dumps(row["job"])) for row in rows}
    for table, arguments in due:
        if (table, json.dumps(arguments)) in names:
            continue
        rows.append({"table": table, "job": arguments, **work[table](*arguments)})
        FILE.write_text(json.dumps({"environment": environment(), "hardware": "2 shared CPU cores, one thread", "rows": rows}) + "\n")
        print(f"{len(rows)}/{len(due)} {table} {arguments}", flush=True)
    of = {table: [row for row in rows if row["table"] == table] for table in work}
    print(
        convergence_table(of["width"], "width"), "", convergence_table(of["pruned"], "pruned"), "", denoise_table(of["denoise"]), sep="\n"
    )


if __name__ == "__main__":
    main()
