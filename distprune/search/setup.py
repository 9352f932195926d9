"""What a search is about to do, worked out before anything starts: its space, its rungs, its cost."""

import os
from dataclasses import dataclass

import optuna
import torch

from distprune.core.legality import fixed_sparsity
from distprune.core.recipe import Recipe
from distprune.core.registry import Choice
from distprune.core.run import prepare
from distprune.errors import UserError
from distprune.search.config import Search
from distprune.search.rungs import Rungs
from distprune.search.space import Space

_LOOKED_AT = 64  # random recipes whose plans say what trials cost


@dataclass(frozen=True)
class Setup:
    """A checked search."""

    search: Search
    space: Space
    total: int  # prunable weights
    dense_cost: int  # samples of one dense training
    mean_cost: int  # samples a random trial bills
    most_cost: int

    def rungs(self, costs: list[int] | None = None) -> Rungs:
        """Fresh rungs, as the scheduler of the search lays them, or at given costs (samples)."""
        rungs: Rungs = self.search.scheduler(self.dense_cost, self.most_cost)
        return rungs if costs is None else Rungs(costs, rungs.reduction)


def set_up(search: Search) -> Setup:
    """Load the data, build the network once and try the space out. Raises UserError for what cannot be done."""
    dense = prepare(Recipe.read({**search.recipe, "paradigm": "dense", "seed": search.seed}))
    if dense.env.task.direction != "maximize":
        raise UserError(f"A search maximizes the task's objective, {dense.env.task.objective!r} is to be minimized. Give its negative.")

    def layers(granularity: Choice) -> list[str]:
        return [layer.name for layer in dense.state.units(granularity, dense.env.task.example).layers()]

    space = Space(search.recipe, search.space, seed=search.seed, layers=layers)
    for granularity in space.granularities:
        if fixed_sparsity(granularity) is None:
            dense.state.units(granularity, dense.env.task.example).check(space.highest)
    per_epoch = dense.env.task.steps_per_epoch(dense.recipe.train.batch_size)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    costs = [space.build(study.ask()).plan(per_epoch).cost for _ in range(_LOOKED_AT)]
    return Setup(search, space, dense.state.masks.total, dense.plan.cost, sum(costs) // len(costs), max(costs))


def check_machine(search: Search) -> None:
    """Raise UserError if a trial asks for more than this machine has."""
    gpus = torch.cuda.device_count()
    if search.workers.gpus > gpus:
        raise UserError(
            f"workers.gpus must be at most the {gpus} GPUs of this machine, got {search.workers.gpus:g}. "
            "Write gpus: 0 to run on the CPU, or submit the search to a cluster that has them."
        )
    cpus = os.cpu_count() or 1
    if search.workers.cpus > cpus:
        raise UserError(f"workers.cpus must be at most the {cpus} CPUs of this machine, got {search.workers.cpus}. Write cpus: {cpus}.")


def slots_of(search: Search, resources: dict[str, float]) -> int:
    """Trials that run at once on `resources` (CPU, GPU). Raises UserError if not even one fits."""
    workers = search.workers
    fits = int(resources.get("CPU", 0) // workers.cpus)
    if workers.gpus:
        fits = min(fits, int(resources.get("GPU", 0) / workers.gpus + 1e-6))
    if fits < 1:
        has = f"{resources.get('CPU', 0):g} CPUs and {resources.get('GPU', 0):g} GPUs"
        raise UserError(f"workers asks for {workers.cpus} CPUs and {workers.gpus:g} GPUs a trial, and the cluster has {has}. Ask for less.")
    return min(fits, workers.most or fits)
