"""What a search is about to do, worked out before anything starts: its space, its rungs, its cost."""

import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import optuna
import torch

from distprune.core import registry
from distprune.core.allocation import Unsplittable
from distprune.core.allocators.constrained_rl import count
from distprune.core.costs import is_measured, price, subject_of
from distprune.core.hooks.functional_prior import check_priors
from distprune.core.legality import fixed_sparsity
from distprune.core.lengths import to_steps
from distprune.core.recipe import Recipe
from distprune.core.registry import Choice
from distprune.core.run import Run, check_fits, check_options, prepare
from distprune.errors import UserError
from distprune.search.budgeted import ALLOCATOR
from distprune.search.config import Search
from distprune.search.covering import covering
from distprune.search.enumeration import Grid
from distprune.search.episodes import Budgets
from distprune.search.learned import collect
from distprune.search.rungs import Rungs
from distprune.search.space import Space
from distprune.search.starts import settle
from distprune.store.datasets import SharedData
from distprune.store.place import Objects, local_path, why

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
    budgets: Budgets | None = None  # what a policy decides on, where the space has keep ratios
    first: tuple[Mapping[str, Any], ...] = ()  # parameters of the first trials, as search.start sets them
    learned: Mapping[str, list[dict[str, Any]]] = field(default_factory=dict)  # earlier run folder -> its trials that are of use here
    combinations: int | None = None  # of a space that the sampler goes through as a whole
    steps_per_epoch: int = 1

    def rungs(self, costs: list[int] | None = None) -> Rungs:
        """Fresh rungs, as the scheduler of the search lays them, or at given costs (samples)."""
        rungs: Rungs = self.search.scheduler(self.dense_cost, self.most_cost, 1 + len(self.search.minimize))
        if costs is not None:
            rungs.costs = list(costs)
        return rungs


def set_up(search: Search, *, learned: Path | None = None) -> Setup:
    """Load the data, build the network once and try the space out. Raises UserError for what cannot be done.

    `learned` is where a search that goes on keeps what it learned from earlier ones when it began.
    """
    search.scheduler(1, 2, 1 + len(search.minimize))  # options that make no sense are said before anything is written
    dense = prepare(Recipe.read({**search.recipe, "paradigm": "dense", "seed": search.seed}), share=SharedData())
    if dense.env.task.direction != "maximize":
        raise UserError(f"A search maximizes the task's objective, {dense.env.task.objective!r} is to be minimized. Give its negative.")

    def layers(granularity: Choice) -> list[str]:
        return [layer.name for layer in dense.state.units(granularity, dense.env.task.example).layers()]

    def sparsity_of(granularity: Choice, keep: Mapping[str, float]) -> float:
        units = dense.state.units(granularity, dense.env.task.example)
        share = units.share({layer.name: count(keep.get(layer.name, 1.0), layer) for layer in units.layers()})
        return max(1 - share, 1 / units.total)  # a recipe that prunes keeps less than all

    space = Space(search.recipe, search.space, seed=search.seed, layers=layers, sparsity_of=sparsity_of if search.budget else None)
    budgets = _budgets(search, space, dense)
    _check_goals(search, space, dense)
    for granularity in space.granularities:
        if fixed_sparsity(granularity) is None:
            dense.state.units(granularity, dense.env.task.example).check(space.highest)
    per_epoch = dense.env.task.steps_per_epoch(dense.recipe.train.batch_size)
    _check_lengths(search, dense, per_epoch)
    if search.workers.ranks > 1:
        _check_shared(dense)
    if search.workers.ranks > (most := dense.recipe.train.batch_size):
        raise UserError(
            f"workers.ranks must be at most train.batch_size, {most}, as each takes a slice of every batch, got {search.workers.ranks}. "
            "Write ranks: 1, or raise train.batch_size."
        )
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    _leave_out(space, dense, per_epoch, priors="regularizer" in search.space)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    costs = [space.build(study.ask()).plan(per_epoch).cost for _ in range(_LOOKED_AT)]
    first = tuple(settle(space, search.start, seed=search.seed))
    combinations = Grid(space, seed=search.seed).size if search.sampler.entry.facts["enumerates"] else None
    mean, known = sum(costs) // len(costs), _learned(search, space, learned)
    total, cost = dense.state.masks.total, dense.plan.cost
    return Setup(search, space, total, cost, mean, max(costs), budgets, first, known, combinations, per_epoch)


def _learned(search: Search, space: Space, known: Path | None) -> dict[str, list[dict[str, Any]]]:
    if known is not None and known.exists():
        return dict(json.loads(known.read_bytes()))
    return collect(search, space)


def _leave_out(space: Space, dense: Run, per_epoch: int, *, priors: bool) -> None:
    """Try the first recipe of each paradigm on the network: some need parts that it may not have.

    Options are tried with every candidate, and priors too where they are asked for by name: wrong ones are raised.
    """
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    first: dict[str, Recipe] = {}
    for parameters in covering(space):
        study.enqueue_trial(parameters)
        recipe = space.build(study.ask())
        plan = recipe.plan(per_epoch)
        check_options(plan, dense.state, dense.env)
        if priors:
            check_priors(plan, dense.state, dense.env)
        first.setdefault(recipe.paradigm.name, recipe)
    for recipe in first.values():
        plan = recipe.plan(per_epoch)
        try:
            check_fits(plan, dense.state, dense.env)
        except UserError as error:
            space.leave_out(recipe.paradigm, str(error))


def _budgets(search: Search, space: Space, dense: Run) -> Budgets | None:
    """The layers of the network and what keeping their units costs. Raises UserError where sampler, space and budget do not fit."""
    learns, name = search.sampler.entry.facts["learns"], search.sampler.name
    search.sampler(0)  # options that make no sense are said before anything is written
    if not search.budget:
        if learns:
            raise UserError(f"sampler '{name}' keeps to a budget, and the search has none. Write budget: {{cost: params, most: 0.1}}.")
        return None
    cost, most = search.budget[0].cost, search.budget[0].most
    measured = is_measured(cost)
    if (granularity := space.budgeted) is None:
        if learns:
            raise UserError(
                f"sampler '{name}' proposes the ratios of allocator '{ALLOCATOR}', which the space never searches. "
                f"Add {ALLOCATOR} without keep to space.allocator, or write sampler: tpe."
            )
        return None
    if measured and search.sampler.options.get("wall"):
        raise UserError(f"sampler.wall needs a cost that is known beforehand, got '{cost.name}'. Write wall: false.")
    units = dense.state.units(granularity, dense.env.task.example)
    # What is measured later is in proportion to FLOPs until then.
    known = price(registry.cost.choose("flops") if measured else cost, dense.env.profile)

    def share(counts: Mapping[str, int]) -> float:
        return known.share(units.kept_weights(counts), units.left(counts))

    return Budgets(units.layers(), share, most, measured=measured)


def _check_goals(search: Search, space: Space, dense: Run) -> None:
    """Raise UserError for a cost that cannot be had in this space or network, and for a floor that no network is above."""
    named = [("minimize", cost) for cost in search.minimize] + [("budget.cost", budget.cost) for budget in search.budget]
    everything = subject_of(dense.state, dense.recipe, dense.env)
    for where, cost in named:
        if is_measured(cost):
            if not any(granularity.entry.facts["channels"] for granularity in space.granularities):
                names = ", ".join(granularity.name for granularity in space.granularities) or "none"
                raise UserError(
                    f"{where} '{cost.name}' is measured on a network that is really smaller, which needs granularity filter or channel, "
                    f"got {names}. Write granularity: filter, or take flops."
                )
            cost = registry.cost.choose("flops")  # what it is taken to be in proportion to at rungs
        if cost(everything) is None:
            raise UserError(f"{where} '{cost.name}' cannot be counted on this network. Write params.")
    fixed = [sparsity for granularity in space.granularities if (sparsity := fixed_sparsity(granularity)) is not None]
    least = 1 - max(space.highest, *fixed, 0.0)
    for budget in search.budget:
        if budget.cost == dense.recipe.sparsity_of and space.budgeted is None and least > budget.most + 1e-9:
            raise UserError(
                f"budget.most of '{budget.cost.name}' is {budget.most:g}, and no trial keeps less than {least:.4g}: space.sparsity ends at "
                f"{space.highest:g}. Raise that, or the budget."
            )
    low, high = dense.env.task.bounds
    if search.floor is not None and not low < search.floor <= high:
        raise UserError(
            f"floor must be above {low:g} and at most {high:g}, as {dense.env.task.objective} is, got {search.floor:g}. "
            "Write it as a share: 0.85."
        )


def _check_shared(dense: Run) -> None:
    """Raise UserError for a task whose batches are one whole."""
    task = dense.env.task
    try:
        task.split(task.batch(dense.env.seed, 0, 0, dense.recipe.train.batch_size), 2)
    except Unsplittable as error:
        raise UserError(f"The batches of {type(task).__name__} cannot be shared by ranks. Write workers.ranks: 1.") from error


def _check_lengths(search: Search, dense: Run, per_epoch: int) -> None:
    """Raise UserError for lengths that come to no step, or to more than the training has."""
    if to_steps(search.report_every, steps_per_epoch=per_epoch) < 1:
        raise UserError(f"report_every must be at least one step of {per_epoch} an epoch, got {search.report_every!r}. Write '1it'.")
    whole = int(dense.recipe.resolved(per_epoch).train.length)
    if search.recovery is not None and (steps := to_steps(search.recovery, steps_per_epoch=per_epoch, whole=whole)) > whole:
        raise UserError(f"recovery must be at most a training, {whole} steps, got {search.recovery!r}, {steps} steps. Write '10%'.")


def check_storage(search: Search) -> None:
    """Raise UserError if the run folder cannot be written, or its URL. Nothing is left behind."""
    try:
        _try_out(search.folder)
    except (OSError, ValueError) as error:
        where = f"storage '{search.storage}' cannot hold the run folder {search.name!r}: "
        if search.url:
            raise UserError(
                f"{where}its driver writes {search.folder} first, {_why(error)}. Set XDG_CACHE_HOME to a folder that you may write to."
            ) from error
        raise UserError(f"{where}{_why(error)}. Write storage: FOLDER, with one that you may write to.") from error
    if search.url:
        try:
            Objects.open(search.url).try_out()
        except (OSError, ValueError, NotImplementedError) as error:
            raise UserError(
                f"storage '{search.storage}' cannot hold the run {search.name!r}: {why(error)}. Check the URL, and that the environment of "
                "every node holds credentials that may read, write and list there, such as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY."
            ) from error


def check_cache(search: Search) -> None:
    """Raise UserError if the cache cannot be used where the search says that it is. In a folder, nothing is left behind."""
    if search.cache_at is None:
        return
    folder = local_path(search.cache_at)
    try:
        _try_out(folder) if folder else Objects.open(search.cache_at).try_out()
    except (OSError, ValueError, NotImplementedError) as error:
        says = _why(error) if folder else why(error)
        raise UserError(f"cache.path '{search.cache_at}' cannot be used: {says}. Give a folder, or write cache: false.") from error


def _try_out(folder: Path) -> None:
    """Make a folder of the same path below the nearest that is there, and remove it. Raises OSError or ValueError where that cannot be."""
    folder = folder.absolute()
    there = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    with tempfile.TemporaryDirectory(prefix=".try-", dir=there) as aside:
        (Path(aside) / folder.relative_to(there) / ".try").mkdir(parents=True)


def _why(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) and error.strerror else str(error)).lower()


def check_machine(search: Search) -> None:
    """Raise UserError if a trial asks for more than this machine has."""
    workers, ranks = search.workers, f" for each of {search.workers.ranks} ranks" if search.workers.ranks > 1 else ""
    gpus = torch.cuda.device_count()
    if workers.gpus * workers.ranks > gpus:
        fewer = f"ranks: {gpus}" if workers.ranks > 1 else f"gpus: {gpus}"
        raise UserError(
            f"workers.gpus must be at most the {gpus} GPUs of this machine, got {workers.gpus:g}{ranks}. "
            f"Write {fewer if gpus else 'gpus: 0 to run on the CPU'}, or submit the search to a cluster that has them."
        )
    cpus = os.cpu_count() or 1
    if workers.cpus * workers.ranks > cpus:
        if cpus >= workers.ranks:
            fewer = f"cpus: {cpus // workers.ranks}"
        else:
            fewer = f"ranks: {cpus // workers.cpus}" if cpus >= workers.cpus else f"cpus: {cpus} and ranks: 1"
        raise UserError(f"workers.cpus must be at most the {cpus} CPUs of this machine, got {workers.cpus}{ranks}. Write {fewer}.")
