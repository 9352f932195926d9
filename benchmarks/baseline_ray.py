"""The script that a user of Ray Tune would write: OptunaSearch (TPE, two objectives), ASHA on accuracy, torch.nn.utils.prune.

    python benchmarks/baseline_ray.py --trials 40                    # prints the front
    python benchmarks/baseline_ray.py --scheduler none --log x.json  # also writes every report: what search_efficiency.py reads

LeNet-5 on Fashion-MNIST, pruned at initialization, gradually, after training with fine-tuning, or with rewinding (lottery), one-shot
or in rounds; L1 or random, global or layer by layer; density, learning rate and an L1 penalty searched too. It knows nothing of distprune.
"""

import argparse
import gzip
import json
import math
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")  # workers use this interpreter
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
os.environ.setdefault("TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S", "0")

import numpy as np
import ray
import torch
import torch.nn.functional as F
from ray import tune
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler
from ray.tune.search.optuna import OptunaSearch
from torch import Tensor, nn
from torch.nn.utils import prune

RATES = (0.02, 0.05, 0.1)
SHARES = (0.6, 0.8, 1.0)  # of what is left, removed in a round; 1 is one-shot
REDUCTION = 3
DENSITIES = (0.02, 0.5)
Split = tuple[Tensor, Tensor]


# The data.


def read_idx(path: Path, dimensions: int) -> Tensor:
    raw = np.frombuffer(gzip.decompress(path.read_bytes()), np.uint8)
    sizes = raw[4 : 4 + 4 * dimensions].view(">u4")
    return torch.from_numpy(raw[4 + 4 * dimensions :].reshape(*sizes).copy())


def data(folder: Path, images: int, validation: float) -> tuple[Split, Split]:
    """(train, validation) of floats with mean 0 and variance 1."""
    inputs = read_idx(folder / "train-images-idx3-ubyte.gz", 3)
    labels = read_idx(folder / "train-labels-idx1-ubyte.gz", 1).long()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    held = round(len(labels) * validation)
    chosen = {"validation": order[:held], "train": order[held:][:images]}
    pixels = {name: inputs[index].unsqueeze(1) / 255 for name, index in chosen.items()}
    mean, std = pixels["train"].mean(), pixels["train"].std()
    splits = {name: ((value - mean) / std, labels[chosen[name]]) for name, value in pixels.items()}
    return splits["train"], splits["validation"]


# The network and its masks.


def lenet5(width: float) -> nn.Sequential:
    first, second, third = (round(units * width) for units in (20, 50, 500))
    model = nn.Sequential(
        nn.Conv2d(1, first, 5), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(first, second, 5), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(16 * second, third), nn.ReLU(), nn.Linear(third, 10),
    )  # fmt: skip
    for layer in layers(model):
        prune.identity(layer, "weight")  # from now on `weight_orig` is trained and `weight` is masked
    return model


def layers(model: nn.Module) -> list[nn.Module]:
    return [layer for layer in model.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]


def density(model: nn.Module) -> float:
    masks = [layer.weight_mask for layer in layers(model)]
    return float(sum(mask.sum() for mask in masks) / sum(mask.numel() for mask in masks))


def prune_to(model: nn.Module, target: float, criterion: str, scope: str) -> None:
    """Remove weights until `target` of all are left: torch.nn.utils.prune counts shares of those that are left."""
    amount = max(1 - target / density(model), 0.0)
    if scope == "global":
        method = prune.L1Unstructured if criterion == "magnitude" else prune.RandomUnstructured
        prune.global_unstructured([(layer, "weight") for layer in layers(model)], pruning_method=method, amount=amount)
    else:
        each = prune.l1_unstructured if criterion == "magnitude" else prune.random_unstructured
        for layer in layers(model):
            each(layer, "weight", amount=amount)


def rounds(target: float, share: float) -> list[float]:
    """Densities: each round removes `share` of what is left, the last one less."""
    left, found = 1.0, []
    while left * (1 - share) > target:
        left *= 1 - share
        found.append(left)
    return [*found, target]


@torch.no_grad()
def accuracy(model: nn.Module, split: Split) -> float:
    model.eval()
    correct = sum(int((model(x).argmax(1) == y).sum()) for x, y in zip(split[0].split(1000), split[1].split(1000), strict=True))
    model.train()
    return correct / len(split[1])


# One trial.


class Trial:
    """A network, its recipe, and how many samples it was trained on."""

    def __init__(self, config: dict[str, Any], splits: tuple[Split, Split], *, width: float, epochs: int, batch: int, seed: int) -> None:
        torch.manual_seed(seed)
        self.config, self.epochs, self.batch, self.samples = config, epochs, batch, 0
        self.train, self.validation = splits
        self.model = lenet5(width)
        self.steps = len(self.train[1]) // batch  # of an epoch

    def run(self) -> Iterator[dict[str, Any]]:
        """A report after every epoch."""
        method, config = self.config["method"], self.config
        if method == "at_init":
            self.prune(config["density"])
            yield from self.fit(0, self.epochs)
        elif method == "gradual":
            yield from self.fit(0, self.epochs, gradually=True)
        else:
            rewind_to = config.get("rewind_to", 0)
            yield from self.fit(0, rewind_to)
            early = [parameter.detach().clone() for parameter in self.model.parameters()]
            yield from self.fit(rewind_to, self.epochs)
            for target in rounds(config["density"], config["share"]):
                self.prune(target)
                if method == "lth":
                    with torch.no_grad():
                        for parameter, value in zip(self.model.parameters(), early, strict=True):
                            parameter.copy_(value)
                yield from self.fit(rewind_to if method == "lth" else self.epochs // 2, self.epochs)

    def prune(self, target: float) -> None:
        prune_to(self.model, target, self.config["criterion"], self.config["scope"])

    def fit(self, begin: int, end: int, *, gradually: bool = False) -> Iterator[dict[str, Any]]:
        """Train over the part of the cosine between two epochs."""
        whole = self.epochs * self.steps
        first, last = whole // 4, whole * 3 // 4  # of the cubic schedule (Zhu & Gupta 2017)
        every = max((last - first) // 10, 1)
        optimizer = torch.optim.SGD(self.model.parameters(), lr=self.config["lr"], momentum=0.9, nesterov=True, weight_decay=5e-4)
        for step in range(begin * self.steps, end * self.steps):
            if step % self.steps == 0:
                order = torch.randperm(len(self.train[1]))
            optimizer.param_groups[0]["lr"] = self.config["lr"] * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * step / whole)))
            index = order[step % self.steps * self.batch :][: self.batch]
            loss = F.cross_entropy(self.model(self.train[0][index]), self.train[1][index])
            if self.config["l1"]:
                loss = loss + self.config["l1"] * sum(layer.weight.abs().sum() for layer in layers(self.model))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            self.samples += self.batch
            if gradually and first <= step + 1 <= last and ((step + 1 - first) % every == 0 or step + 1 == last):
                progress = min((step + 1 - first + every) / (last - first + every), 1.0)
                self.prune(1 - (1 - self.config["density"]) * (1 - (1 - progress) ** 3))
            if (step + 1) % self.steps == 0:
                yield {"accuracy": accuracy(self.model, self.validation), "left": density(self.model), "samples": self.samples}


def space(trial: Any) -> None:
    """What OptunaSearch searches."""
    method = trial.suggest_categorical("method", ["at_init", "gradual", "finetune", "lth"])
    if method in ("finetune", "lth"):
        trial.suggest_categorical("share", list(SHARES))
    if method == "lth":
        trial.suggest_categorical("rewind_to", [0, 1])
    trial.suggest_categorical("criterion", ["magnitude", "random"])
    trial.suggest_categorical("scope", ["global", "uniform"])
    trial.suggest_categorical("l1", [0.0, 1e-4])
    trial.suggest_categorical("lr", list(RATES))
    trial.suggest_float("density", *DENSITIES, log=True)


def trainable(config: dict[str, Any], splits: tuple[Split, Split], fixed: dict[str, Any]) -> None:
    """Ray Tune's function: reports after every epoch."""
    torch.set_num_threads(1)
    waiting = None
    for report in Trial(config, splits, **fixed).run():
        if waiting:
            tune.report(waiting)
        waiting = {**report, "density": config["density"], "finished": False}
    tune.report({**waiting, "finished": True})


class Log(tune.Callback):
    """What was reported, in the order in which Ray Tune heard it: (samples of all trials, trial, accuracy, weights left, finished)."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, str, float, float, bool]] = []
        self.samples: dict[str, int] = {}
        self.configs: dict[str, Any] = {}

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any) -> None:
        name = trial.trial_id
        self.samples[name], self.configs[name] = result["samples"], trial.config
        self.rows.append((sum(self.samples.values()), name, result["accuracy"], result["left"], result["finished"]))


def search(splits: tuple[Split, Split], fixed: dict[str, Any], *, trials: int, workers: int, scheduler: str) -> Log:
    """One search. Its samples are those of all trials, stopped ones too."""
    epochs = fixed["epochs"]
    stop: Any = FIFOScheduler()
    if scheduler == "asha":
        longest = epochs + epochs * len(rounds(min(DENSITIES), min(SHARES)))
        stop = ASHAScheduler(metric="accuracy", mode="max", max_t=longest, grace_period=max(epochs // 2, 1), reduction_factor=REDUCTION)
    log = Log()
    if "RAY_ADDRESS" in os.environ:
        ray.init(log_to_driver=False)
    else:
        ray.init(num_cpus=workers, include_dashboard=False, log_to_driver=False, object_store_memory=200 * 2**20)
    with tempfile.TemporaryDirectory() as folder:
        tuner = tune.Tuner(
            tune.with_resources(tune.with_parameters(trainable, splits=splits, fixed=fixed), {"cpu": 1}),
            tune_config=tune.TuneConfig(
                search_alg=OptunaSearch(space, metric=["accuracy", "density"], mode=["max", "min"], seed=fixed["seed"]),
                scheduler=stop,
                num_samples=trials,
                max_concurrent_trials=workers,
                reuse_actors=True,
            ),
            run_config=tune.RunConfig(storage_path=folder, callbacks=[log], verbose=0),
        )
        tuner.fit()
    ray.shutdown()
    return log


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--trials", type=int, default=40)
    parser.add_argument("--images", type=int, default=2560)
    parser.add_argument("--width", type=float, default=0.25, help="units of the layers, as a share of 20-50-500")
    parser.add_argument("--epochs", type=int, default=4, help="an even number")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--validation", type=float, default=0.04, help="share of the 60,000 images")
    parser.add_argument("--folder", type=Path, default=Path("data/fashion-mnist"))
    parser.add_argument("--scheduler", choices=["asha", "none"], default="asha")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--log", type=Path)
    options = parser.parse_args()
    splits = data(options.folder, options.images, options.validation)
    fixed = {name: getattr(options, name) for name in ("width", "epochs", "batch", "seed")}
    log = search(splits, fixed, trials=options.trials, workers=options.workers, scheduler=options.scheduler)
    if options.log:
        options.log.write_text(json.dumps({"rows": log.rows, "configs": log.configs}))
    best = 0.0
    for _, name, value, left, _ in sorted((row for row in log.rows if row[4]), key=lambda row: row[3]):
        if value > best:
            best = value
            print(f"{left:8.4f} {value:.4f} {log.configs[name]}")
    print(f"{len(log.samples)} trials, {sum(row[4] for row in log.rows)} finished, {sum(log.samples.values())} samples")


if __name__ == "__main__":
    main()
