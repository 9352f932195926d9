"""What core does on a GPU: step times, images a second in fp32 and bf16, and two real runs on CIFAR-10.

    python benchmarks/gpu.py --data data/cifar10 --epochs 20
    python benchmarks/gpu.py --device cpu --quick --data data/cifar10    # a smoke test with tiny sizes: its numbers say nothing

Needs torch, numpy and safetensors. The runs on CIFAR-10 also need pyarrow and Pillow, to read train.parquet and test.parquet in the
folder `--data`; where they or the files are absent, that part is skipped and says so.
"""

import argparse
import importlib.util
import statistics
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, get_args

import torch
from step import CASES, OPTIMIZERS, Case, by_distprune, compare, dense_by_hand, machine, markdown, random_data, spread, table, take_turns

from distprune.core.executor import execute
from distprune.core.recipe import Precision, Recipe
from distprune.core.run import prepare

SPARSITY = 0.9


@dataclass(frozen=True)
class Sizes:
    """How much is run."""

    segments: int
    steps: dict[str, int]  # network -> steps in a segment
    batch: int  # of the images a second and of the runs
    model: dict[str, Any]  # options of resnet_cifar
    limit: int | None  # training images of the runs
    validation: float
    seeds: int
    share: float  # of lth


FULL = Sizes(11, {"mlp": 500, "lenet5": 500, "resnet20": 100}, 512, {"depth": 20}, None, 0.1, 3, 0.5)
QUICK = Sizes(2, {"mlp": 5, "lenet5": 1, "resnet20": 1}, 16, {"depth": 8, "width": 4}, 64, 0.02, 3, 0.8)


def steps_of_all(sizes: Sizes, device: torch.device, quick: bool) -> str:
    """The comparison of step.py on `device`, with a larger batch."""
    rows = []
    for name, case in CASES.items():
        case = replace(case, batch=sizes.batch, options=sizes.model if quick and case.model == "resnet_cifar" else case.options)
        for optimizer in OPTIMIZERS:
            rows.append(compare(name, case, optimizer, device=device, segments=sizes.segments, steps=sizes.steps[name]))
    return table(rows)


def images_a_second(sizes: Sizes, device: torch.device) -> str:
    """ResNet through the hand-written loop and distprune's, with and without masks and augmentation."""
    case, steps = Case("resnet_cifar", sizes.model, (3, 32, 32), sizes.batch, 0, 0), sizes.steps["resnet20"]
    plain, augmented = random_data(case.shape), random_data(case.shape, augment="crop_flip")
    rows = []
    for precision in get_args(Precision):
        ours = partial(by_distprune, case, "sgd", device=device, steps=steps, precision=precision)
        loops = {
            "by hand, dense": dense_by_hand(case, "sgd", plain, device, steps=steps, precision=precision),
            "distprune, dense": ours(plain, sparsity=0.0),
            "distprune, masked": ours(plain, sparsity=SPARSITY),
            "distprune, masked, crop_flip": ours(augmented, sparsity=SPARSITY),
        }
        found = take_turns(list(loops.values()), device, segments=sizes.segments, steps=steps)
        for name, times in zip(loops, found, strict=True):
            rows.append((name, precision, sizes.batch, spread([sizes.batch * 1000 / ms for ms in times], 0), len(times)))
    return markdown(("loop", "precision", "batch", "images/s, median [min-max]", "n"), rows)


def recipe(sizes: Sizes, folder: str, epochs: int, precision: str, seed: int, **what: Any) -> dict[str, Any]:
    """ResNet on CIFAR-10."""
    return {
        "model": {"name": "resnet_cifar", **sizes.model},
        "data": {"name": "cifar10", "folder": folder, "limit": sizes.limit, "validation": sizes.validation},
        "sparsity": SPARSITY,
        "train": {"length": f"{epochs}ep", "batch_size": sizes.batch, "optimizer": {"name": "sgd", "lr": 0.2}},
        "precision": precision,
        "seed": seed,
        **what,
    }


def run(value: Mapping[str, Any], device: torch.device) -> dict[str, float]:
    """A recipe from start to end. The time is that of the run without reading the data."""
    ready = prepare(Recipe.read(value), device=device)
    start = time.perf_counter()
    last = list(execute(ready.plan, ready.state, ready.env))[-1]
    wall = time.perf_counter() - start
    test = ready.env.task.metrics(ready.state.model, "test")
    return {
        "test": test["accuracy"],
        "validation": last.metrics["accuracy"],
        "sparsity": last.sparsity,
        "wall_s": wall,
        "images_s": last.cost / wall,
    }


def cifar_runs(sizes: Sizes, folder: str, epochs: int, precision: str, device: torch.device) -> str:
    """One lottery ticket, and SynFlow at initialization over seeds."""
    made = partial(recipe, sizes, folder, epochs, precision)
    groups = {
        f"lth (share {sizes.share})": [made(0, paradigm={"name": "lth", "share": sizes.share})],
        "at_init (synflow)": [made(seed, paradigm="at_init", criterion="synflow") for seed in range(sizes.seeds)],
    }
    rows = []
    for name, recipes in groups.items():
        runs = [run(value, device) for value in recipes]
        column = {key: [found[key] for found in runs] for key in runs[0]}
        rows.append(
            (
                name,
                f"{statistics.median(column['sparsity']):.4f}",
                spread(column["test"], 4),
                spread(column["validation"], 4),
                spread(column["wall_s"], 1),
                spread(column["images_s"], 0),
                len(runs),
            )
        )
    head = ("run", "sparsity", "test accuracy, median [min-max]", "validation accuracy", "wall s", "images/s with all", "n")
    return markdown(head, rows)


def missing(folder: Path) -> str:
    """Why CIFAR-10 cannot be read; empty if it can."""
    packages = [name for name, module in (("pyarrow", "pyarrow"), ("Pillow", "PIL")) if importlib.util.find_spec(module) is None]
    files = [name for name in ("train.parquet", "test.parquet") if not (folder / name).is_file()]
    return ", ".join(packages + [f"{folder / name}" for name in files])


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description="distprune's core on a GPU.")
    parser.add_argument("--device", default="cuda", help="where to run (default cuda)")
    parser.add_argument("--data", default="data/cifar10", help="folder of train.parquet and test.parquet (default data/cifar10)")
    parser.add_argument("--epochs", type=int, help="epochs of each training of the real runs, by default 20, or 1 with --quick")
    parser.add_argument("--precision", choices=get_args(Precision), default="fp32", help="of the real runs (default fp32)")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does it run?")
    options = parser.parse_args()
    device, sizes = torch.device(options.device), QUICK if options.quick else FULL
    epochs = options.epochs or (1 if options.quick else 20)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no GPU here. For a smoke test write --device cpu --quick.")

    if device.type == "cpu":
        torch.set_num_threads(1)  # on busy cores, threads that wait for each other are many times slower than one
    print(f"{machine(device)}.{' Tiny sizes: the numbers say nothing.' if options.quick else ''}\n", flush=True)
    print(f"## A step, masked at sparsity {SPARSITY}, against a dense loop written by hand, fp32\n", flush=True)
    print(steps_of_all(sizes, device, options.quick), flush=True)
    print(f"\n## Images a second, {'a tiny ResNet' if options.quick else 'ResNet-20'}, sgd\n", flush=True)
    print(images_a_second(sizes, device), flush=True)
    print(f"\n## CIFAR-10, {epochs} epoch{'s' if epochs > 1 else ''} a training, {options.precision}\n", flush=True)
    lacking = missing(Path(options.data))
    print(f"Skipped: needs {lacking}." if lacking else cifar_runs(sizes, options.data, epochs, options.precision, device), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
