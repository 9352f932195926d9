"""Small parts for tests: a data set and networks, reached from recipes as `import: "toys:name"`."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from torch import nn

from distprune.core import registry
from distprune.core.data.dataset import Dataset, Split
from distprune.core.executor import Report, execute
from distprune.core.options import Choices
from distprune.core.recipe import Recipe
from distprune.core.run import Run, prepare

REPOSITORY = Path(__file__).parents[1]


def blobs(*, train: int = 320) -> Dataset:
    """Noisy templates of 10 classes, 8x8."""
    generator = torch.Generator().manual_seed(0)
    templates = torch.randint(40, 216, (10, 1, 8, 8), generator=generator).float()

    def split(n: int) -> Split:
        labels = torch.randint(10, (n,), generator=generator)
        noise = 40 * torch.randn(n, 1, 8, 8, generator=generator)
        return Split((templates[labels] + noise).clamp(0, 255).byte(), labels)

    return Dataset("blobs", split(train), split(100), split(100), classes=10, mean=(0.5,), std=(0.25,))


def photos() -> Dataset:
    """Noise in three channels, 32x32, two classes."""
    generator = torch.Generator().manual_seed(0)

    def split(n: int) -> Split:
        return Split(
            torch.randint(256, (n, 3, 32, 32), generator=generator, dtype=torch.uint8), torch.randint(2, (n,), generator=generator)
        )

    return Dataset("photos", split(32), split(16), split(16), classes=2, mean=(0.5,) * 3, std=(0.25,) * 3)


def network(shape: tuple[int, int, int], classes: int, *, hidden: int = 32) -> nn.Module:
    """Convolution, batch normalisation, dropout and two linear layers: everything that makes resuming hard.

    With TOYS_SLEEP_S in the environment each pass takes that many seconds longer, so that a trial can be killed on a machine of any speed.
    """
    found = nn.Sequential(
        nn.Conv2d(shape[0], 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Dropout(0.2),
        nn.Linear(6 * (shape[1] // 2) * (shape[2] // 2), hidden),
        nn.ReLU(),
        nn.Linear(hidden, classes),
    )
    if seconds := float(os.environ.get("TOYS_SLEEP_S", 0)):
        found.register_forward_pre_hook(lambda module, inputs: time.sleep(seconds))
    return found


def raises(shape: tuple[int, int, int], classes: int) -> nn.Module:
    """A network whose forward pass fails."""

    class Broken(nn.Linear):
        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            if self.training:
                raise RuntimeError("this network is broken")
            return super().forward(inputs.flatten(1))

    return Broken(shape[1] * shape[2] * shape[0], classes)


def sometimes_explodes(parameters: Any, *, lr: Annotated[float, Choices(0.05, 1e12)] = 0.05) -> torch.optim.Optimizer:
    """SGD at a rate that is sometimes absurd."""
    return torch.optim.SGD(parameters, lr=lr)


def fate(parameters: Any, *, kind: Literal["lives", "dies", "dies once", "hangs"] = "lives", folder: str = "") -> torch.optim.Optimizer:
    """SGD whose 25th step may be the end of its worker; `folder` remembers that one has died."""

    class Fate(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            super().step(closure)
            Fate.steps += 1
            mark = Path(folder) / kind
            if Fate.steps != 25 or kind == "lives" or (kind == "dies once" and mark.exists()):
                return
            mark.touch()
            if kind == "hangs":
                time.sleep(1000)
            os.kill(os.getpid(), signal.SIGKILL)

        steps = 0

    return Fate(parameters, lr=0.05)


def nothing(shape: tuple[int, int, int], classes: int) -> nn.Module:
    """A network without prunable weights."""
    return nn.Sequential(nn.Flatten(), nn.BatchNorm1d(shape[0] * shape[1] * shape[2]))


BASE: dict[str, Any] = {
    "model": {"import": "toys:network"},
    "data": {"import": "toys:blobs"},
    "train": {"length": "4ep", "batch_size": 32, "optimizer": {"name": "sgd", "lr": 0.05}},
}


# What a paradigm needs besides the defaults to be legal, and quick, on the toys.
SETTINGS: dict[str, dict[str, Any]] = {
    "dense": {"sparsity": 0.0},
    "lth": {"paradigm": {"name": "lth", "share": 0.7, "rewind_to": "10%"}},
    "force": {"paradigm": {"name": "force", "steps": 10}},
    "slimming": {"granularity": "filter", "sparsity": 0.3, "model": {"name": "resnet_cifar", "depth": 8, "width": 4}},
    "ssl": {"granularity": "filter", "sparsity": 0.3},
    "soft_filters": {"granularity": "filter", "sparsity": 0.3},
    "fusion": {"paradigm": {"name": "fusion", "batches": 4}, "sparsity": 0.0},
    "greg": {"granularity": "filter", "sparsity": 0.3},
    "sbp_sr": {"model": {"name": "resnet_cifar", "depth": 8, "width": 4}},  # it has branches to scale
}
PARADIGMS = registry.paradigm.names()


def recipe(paradigm: Any = "at_init", sparsity: float | None = None, **changes: Any) -> Recipe:
    """A recipe on the toys, at 0.9 unless the paradigm's SETTINGS say otherwise; `train` is merged."""
    settings = SETTINGS.get(paradigm, {}) if isinstance(paradigm, str) else {}
    train = {**BASE["train"], **changes.pop("train", {})}
    facts = registry.paradigm.read(paradigm, "paradigm").entry.facts
    if not facts["trains"] or (facts["grows"] and changes.get("regularizer") == "growing_l2"):
        changes.pop("regularizer", None)  # not legal
    wanted = {} if sparsity is None else {"sparsity": sparsity}
    return Recipe.read({**BASE, "paradigm": paradigm, "sparsity": 0.9, "allocator": "erk", **settings, **wanted, **changes, "train": train})


def ready(paradigm: Any = "at_init", sparsity: float | None = None, *, report_every: str = "1ep", **changes: Any) -> Run:
    """That recipe, prepared."""
    return prepare(recipe(paradigm, sparsity, **changes), report_every=report_every)


def finish(run: Run) -> list[Report]:
    """Run to the end."""
    return list(execute(run.plan, run.state, run.env))


def tensors(run: Run) -> dict[str, torch.Tensor]:
    """All tensors of a state that a later step depends on."""
    state = run.state
    found = {f"model/{name}": value for name, value in state.values().items()} | {
        f"masks/{name}": mask for name, mask in state.masks.items()
    }
    for room, rows in (("memory", state.memory), ("slots", state.slots)):
        found |= {f"{room}/{owner}/{key}": v for owner, row in rows.items() for key, v in row.items() if isinstance(v, torch.Tensor)}
    return found


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Whether both hold the same bits."""
    return a.keys() == b.keys() and all(torch.equal(value, b[name]) for name, value in a.items())


# Runs a script as its own process in which distprune cannot be imported, nor anything that torch and safetensors do not need.
ALONE = """
import runpy, sys
sys.modules |= dict.fromkeys(("distprune", "optuna", "ray", "pyarrow", "sklearn", "yaml"))  # None: not there
sys.path.insert(0, sys.argv[1])
runpy.run_path(sys.argv[1] + "/check.py", run_name="__main__")
"""


def check_alone(folder: Path, **environment: str) -> "subprocess.CompletedProcess[str]":
    """Run an export's check.py where distprune cannot be imported."""
    return subprocess.run(
        [sys.executable, "-c", ALONE, str(folder)], capture_output=True, text=True, check=False, env={"OMP_NUM_THREADS": "1", **environment}
    )
