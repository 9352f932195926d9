"""A training step of distprune's loop, under masks and without, against a dense training loop written by hand in plain torch.

    python benchmarks/step.py                  # about four minutes on two CPU cores
    python benchmarks/step.py --quick          # under a minute, for a look
    python benchmarks/step.py --at-most 1.1    # exit code 1 where a median masked/dense ratio is above 1.1

The three run in one process and take turns, a segment of the same number of steps each; a ratio is taken within a turn, so what else
the machine does hits both sides of it. Data are random and in memory; no file is read.
"""

import argparse
import platform
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from distprune.core import registry
from distprune.core.data.dataset import Dataset, Split
from distprune.core.executor import Env
from distprune.core.loop import train
from distprune.core.recipe import Precision, TrainConfig
from distprune.core.run import build_model
from distprune.core.stages import Prune, Train
from distprune.core.state import State

SPARSITY = 0.9
IMAGES = 10_000
ENDLESS = 10**9  # steps: the cosine stays at its start, and no segment meets the end of the schedule


@dataclass(frozen=True)
class Case:
    """A network and how it is fed."""

    model: str
    options: dict[str, Any]
    shape: tuple[int, int, int]
    batch: int
    steps: int  # in a segment
    quick_steps: int


CASES = {
    "mlp": Case("mlp", {}, (1, 28, 28), 128, 60, 50),
    "lenet5": Case("lenet5", {}, (1, 28, 28), 128, 6, 5),
    "resnet20": Case("resnet_cifar", {"depth": 20}, (3, 32, 32), 64, 2, 1),
}
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "sgd": {"lr": 0.01, "momentum": 0.9, "weight_decay": 5e-4, "nesterov": True},
    "adamw": {"lr": 1e-3, "weight_decay": 1e-2},
}


@dataclass(frozen=True)
class Row:
    """Milliseconds a step of each loop, one number a segment; segments of one index ran one after another."""

    network: str
    optimizer: str
    batch: int
    dense: list[float]
    masked: list[float]
    unmasked: list[float]

    @property
    def masked_ratios(self) -> list[float]:
        """Masked step over dense step, by segment."""
        return [a / b for a, b in zip(self.masked, self.dense, strict=True)]

    @property
    def unmasked_ratios(self) -> list[float]:
        """Unmasked step over dense step, by segment."""
        return [a / b for a, b in zip(self.unmasked, self.dense, strict=True)]


def random_data(shape: tuple[int, int, int], images: int = IMAGES, augment: str = "none") -> Dataset:
    """Random bytes and labels of 10 classes."""
    generator = torch.Generator().manual_seed(0)

    def split(n: int) -> Split:
        return Split(torch.randint(256, (n, *shape), generator=generator, dtype=torch.uint8), torch.randint(10, (n,), generator=generator))

    channels = shape[0]
    return Dataset("random", split(images), split(100), split(100), 10, (0.5,) * channels, (0.25,) * channels, augment)


def by_hand(
    model: nn.Module, optimizer: torch.optim.Optimizer, data: Dataset, device: torch.device, *, batch: int, steps: int, precision: Precision
) -> Iterator[None]:
    """The loop that one writes by hand; a yield after every `steps` steps."""
    inputs, labels = data.train.inputs.to(device), data.train.labels.to(device)
    mean = torch.tensor([255 * value for value in data.mean], device=device).view(1, -1, 1, 1)
    std = torch.tensor([255 * value for value in data.std], device=device).view(1, -1, 1, 1)
    order, position = torch.randperm(len(labels), device=device), 0
    model.train()
    while True:
        for _ in range(steps):
            if position + batch > len(labels):
                order, position = torch.randperm(len(labels), device=device), 0
            index = order[position : position + batch]
            position += batch
            x = inputs.index_select(0, index).float().sub_(mean).div_(std)
            y = labels.index_select(0, index)
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else nullcontext():
                outputs = model(x)
            F.cross_entropy(outputs.float(), y).backward()
            optimizer.step()
        yield


def by_distprune(
    case: Case, optimizer: str, data: Dataset, device: torch.device, *, steps: int, precision: Precision, sparsity: float
) -> Iterator[None]:
    """distprune's loop through a Train stage, with every layer pruned to `sparsity`; a yield after every `steps` steps."""
    build = partial(build_model, registry.model.choose(case.model, **case.options), data.shape, data.classes)
    task = registry.task.choose("classification")(data).to(device)
    env = Env(task=task, build=build, seed=0, device=device, report_every=steps, precision=precision)
    state = State.new(build, seed=0, device=device)
    if sparsity:
        choices = {"criterion": registry.criterion.choose("random"), "allocator": registry.allocator.choose("uniform")}
        for _ in Prune(sparsity=sparsity, **choices).run(state, env):
            pass
    chosen = registry.optimizer.choose(optimizer, **OPTIMIZERS[optimizer])
    config = TrainConfig(length=ENDLESS, batch_size=case.batch, optimizer=chosen)
    stage = Train(config=config, until=ENDLESS)
    stage.enter(state, env)
    return train(stage, state, env)


def dense_by_hand(case: Case, optimizer: str, data: Dataset, device: torch.device, *, steps: int, precision: Precision) -> Iterator[None]:
    """The same network, with torch's own fused optimizer."""
    torch.manual_seed(0)
    model = build_model(registry.model.choose(case.model, **case.options), data.shape, data.classes).to(device)
    kind = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[optimizer]
    fused = kind(model.parameters(), fused=True, **OPTIMIZERS[optimizer])
    return by_hand(model, fused, data, device, batch=case.batch, steps=steps, precision=precision)


def wait_for(device: torch.device) -> None:
    """Return when the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def take_turns(loops: Sequence[Iterator[None]], device: torch.device, *, segments: int, steps: int) -> list[list[float]]:
    """Milliseconds a step of each loop, one number a segment. The first turn warms up and is discarded; the order turns round each time."""
    found: list[list[float]] = [[] for _ in loops]
    for turn in range(segments + 1):
        for index in range(len(loops)) if turn % 2 else reversed(range(len(loops))):
            wait_for(device)
            start = time.perf_counter()
            next(loops[index])
            wait_for(device)
            if turn:
                found[index].append((time.perf_counter() - start) * 1000 / steps)
    return found


def compare(
    network: str, case: Case, optimizer: str, *, device: torch.device, segments: int, steps: int, precision: Precision = "fp32"
) -> Row:
    """The three loops on one network."""
    data = random_data(case.shape)
    ours = partial(by_distprune, case, optimizer, data, device, steps=steps, precision=precision)
    loops = [dense_by_hand(case, optimizer, data, device, steps=steps, precision=precision), ours(sparsity=SPARSITY), ours(sparsity=0.0)]
    return Row(network, optimizer, case.batch, *take_turns(loops, device, segments=segments, steps=steps))


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Median [smallest-largest]."""
    return f"{statistics.median(values):.{digits}f} [{min(values):.{digits}f}-{max(values):.{digits}f}]"


def markdown(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table."""
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in [head, ["---"] * len(head), *rows])


def table(rows: Sequence[Row]) -> str:
    """The rows as printed."""
    head = ("network", "optimizer", "batch", "dense loop ms/step (median)", "masked/dense [min-max]", "unmasked/dense", "n")
    return markdown(
        head,
        [
            (
                row.network,
                row.optimizer,
                row.batch,
                f"{statistics.median(row.dense):.2f}",
                spread(row.masked_ratios),
                f"{statistics.median(row.unmasked_ratios):.2f}",
                len(row.dense),
            )
            for row in rows
        ],
    )


def machine(device: torch.device) -> str:
    """What the numbers were measured on, in one line."""
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    return f"torch {torch.__version__}, Python {platform.python_version()}, {platform.machine()}, {where}"


def names(text: str) -> list[str]:
    """Comma-separated names of networks."""
    chosen = text.split(",")
    if unknown := [name for name in chosen if name not in CASES]:
        raise argparse.ArgumentTypeError(f"--networks must be among {', '.join(CASES)}, got {unknown[0]!r}.")
    return chosen


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description="distprune's training step against a dense loop written by hand.")
    parser.add_argument("--segments", type=int, help="segments that count, by default 25, or 3 with --quick")
    parser.add_argument("--steps", type=int, help="steps in a segment, by default each network's own")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of torch (default 1, what a search gives a trial)")
    parser.add_argument("--networks", type=names, default=list(CASES), help=f"comma-separated, of {','.join(CASES)}")
    parser.add_argument("--quick", action="store_true", help="fewer and shorter segments")
    parser.add_argument("--at-most", type=float, help="exit with 1 where a median masked/dense ratio is above this")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    segments = options.segments or (3 if options.quick else 25)

    device = torch.device("cpu")
    rows = []
    for name in options.networks:
        case = CASES[name]
        steps = options.steps or (case.quick_steps if options.quick else case.steps)
        rows += [compare(name, case, optimizer, device=device, segments=segments, steps=steps) for optimizer in OPTIMIZERS]
    print(f"Masked: {SPARSITY:.0%} of every layer removed. {machine(device)}.\n")
    print(table(rows))
    above = [row for row in rows if options.at_most and statistics.median(row.masked_ratios) > options.at_most]
    for row in above:
        print(f"\n{row.network} with {row.optimizer}: masked/dense is {statistics.median(row.masked_ratios):.3f}, above {options.at_most}.")
    return 1 if above else 0


if __name__ == "__main__":
    sys.exit(main())
