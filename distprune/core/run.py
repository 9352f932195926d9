"""One recipe from text to a trained network: what a trial, `distprune run` and `distprune plan` have in common."""

import functools
import json
import math
import platform
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from distprune.core.data.dataset import Dataset
from distprune.core.edits.fuse import check_fusions
from distprune.core.executor import Env
from distprune.core.hooks.functional_prior import check_priors
from distprune.core.keys import digest, keys
from distprune.core.lengths import to_steps
from distprune.core.plan import Plan
from distprune.core.recipe import Recipe
from distprune.core.registry import PARAMS, WEIGHT, Choice
from distprune.core.scoring import Probe, unit_scores
from distprune.core.stages import Prune, Train
from distprune.core.state import State
from distprune.core.task import Task
from distprune.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Run:
    """A recipe made ready: `execute(run.plan, run.state, run.env)` runs it."""

    recipe: Recipe
    plan: Plan
    state: State
    env: Env

    @property
    def key(self) -> str:
        """The content key of the finished recipe."""
        return keys(root_key(self.recipe, self.env.device, ranks=self.env.task.ranks.size), self.plan)[-1]


Share = Callable[[Choice, Callable[[], Dataset]], Dataset]  # how processes come by a data set together: (which, what reads it)


def prepare(recipe: Recipe, *, device: torch.device | str = "cpu", report_every: str | None = None, share: Share | None = None) -> Run:
    """Load the data, build the network and the plan. Raises UserError for whatever in the recipe cannot be done.

    Reports come every `report_every`, a length; by default every epoch, or every few where a training has more than a hundred of them.
    `share` is how the data is read once for several processes.
    """
    device = _device(device)
    dataset = load_data(recipe.data, share)
    task: Task = recipe.task(dataset).to(device)
    per_epoch = task.steps_per_epoch(recipe.train.batch_size)
    build = functools.partial(build_model, recipe.model, task.shape, task.classes)
    untrained = {name: value for name, value in recipe.model.options.items() if name not in recipe.model.entry.facts["values_only"]}
    state = State.new(
        build, seed=recipe.seed, device=device, include=recipe.include, exclude=recipe.exclude, sparsity_of=recipe.sparsity_of
    )
    env = Env(
        task=task,
        build=functools.partial(build_model, replace(recipe.model, options=untrained), task.shape, task.classes),
        seed=recipe.seed,
        device=device,
        report_every=max(to_steps(report_every or _some_epochs(recipe, per_epoch), steps_per_epoch=per_epoch), 1),
        precision=recipe.precision,
        profile=state.profile(task.example),
    )
    plan = recipe.plan(per_epoch)
    check_options(plan, state, env)
    check_priors(plan, state, env)
    check_fits(plan, state, env)
    return Run(recipe=recipe, plan=plan, state=state, env=env)


def _some_epochs(recipe: Recipe, per_epoch: int) -> str:
    epochs = to_steps(recipe.train.length, steps_per_epoch=per_epoch) / per_epoch
    return f"{max(math.ceil(epochs / 100), 1)}ep"


def check_fits(plan: Plan, state: State, env: Env) -> None:
    """Raise UserError for units and pairs that the network does not have and budgets that cannot be met, before anything is trained."""
    chosen = [stage for stage in plan.stages if isinstance(stage, Prune)]
    hooks = [hook for stage in plan.stages if isinstance(stage, Train) for hook in stage.hooks]
    steps: list[Any] = [*chosen, *(hook for hook in hooks if hasattr(hook, "sparsity"))]
    for step in steps:
        units = state.units(getattr(step, "granularity", WEIGHT), env.task.example)
        units.check(step.sparsity)
        criterion = getattr(step, "criterion", None)
        if criterion is not None and criterion.entry.facts["of_units"] and not criterion.entry.facts["passes"]:
            unit_scores(Probe(state.model, env.task, state.masks, seed=0, draw=(), batch_size=1, units=units), criterion)
    check_fusions(plan, state, env)


def check_options(plan: Plan, state: State, env: Env) -> None:
    """Raise UserError for names of layers that the network does not have and values that optimizers refuse, before anything is trained."""
    for stage in plan.stages:
        if isinstance(stage, Train):
            _check_optimizer(stage.config.optimizer)
        for step in (stage, *(stage.hooks if isinstance(stage, Train) else ())):
            allocator = getattr(step, "allocator", None)
            if allocator is not None and not allocator.entry.facts["needs_scores"]:
                layers = state.units(getattr(step, "granularity", WEIGHT), env.task.example).layers()
                allocator(layers, len(layers), None, None)  # one unit each always fits: it is the options that are tried


def _check_optimizer(optimizer: Choice) -> None:
    try:
        optimizer([torch.nn.Parameter(torch.zeros(1))])
    except UserError:
        raise
    except ValueError as error:  # torch's own optimizers say so
        raise UserError(f"train.optimizer '{optimizer.name}' refuses its options: {error}. Correct or leave them out.") from error


def _device(name: torch.device | str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device must be one that torch can use here, got '{name}': {str(error).splitlines()[0]} Write cpu.") from error
    return device


def build_model(choice: Choice, shape: tuple[int, int, int], classes: int) -> torch.nn.Module:
    """A fresh network. Raises UserError where the entry refuses the shape or returns something else."""
    try:
        network = choice(shape, classes)
    except UserError:
        raise
    except Exception as error:  # a user's function may raise anything
        raise UserError(f"model '{choice.name}' cannot be built for inputs {shape} and {classes} classes: {error}") from error
    if not isinstance(network, torch.nn.Module):
        raise UserError(f"model '{choice.name}' must return a torch.nn.Module, got {type(network).__name__}.")
    return network


_LOADED: dict[str, Dataset] = {}  # the latest data set: a worker runs many trials on the same one


def load_data(choice: Choice, share: Share | None = None) -> Dataset:
    """The data set of a choice, loaded once for all trials of a process."""
    text = json.dumps(choice.plain(), sort_keys=True)
    if text not in _LOADED:
        dataset = share(choice, lambda: _read_data(choice)) if share else _read_data(choice)
        _LOADED.clear()
        _LOADED[text] = dataset
    return _LOADED[text]


def _read_data(choice: Choice) -> Dataset:
    try:
        dataset = choice()
    except UserError:
        raise
    except Exception as error:  # a user's function may raise anything
        raise UserError(f"data '{choice.name}' cannot be loaded: {type(error).__name__}: {error}") from error
    if not isinstance(dataset, Dataset):
        raise UserError(f"data '{choice.name}' must return a distprune.Dataset, got {type(dataset).__name__}.")
    return dataset


@functools.cache
def _processor() -> str:
    """The model of this machine's processor, in the words of the system."""
    names = ("vendor_id", "cpu family", "model", "model name", "CPU implementer", "CPU part")
    try:
        lines = [line.partition(":") for line in Path("/proc/cpuinfo").read_text().splitlines()]
    except OSError:  # not Linux
        lines = []
    found = {f"{name.strip()} {value.strip()}" for name, _, value in lines if name.strip() in names}
    return ", ".join(sorted(found)) or platform.processor() or platform.machine()


def hardware(device: torch.device) -> str:
    """The model of a device: others round otherwise. Empty for a GPU that this process has not used, which computes nothing on it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device) if torch.cuda.is_initialized() else ""  # type: ignore[no-untyped-call]
    return _processor()


def root_key(recipe: Recipe, device: torch.device, threads: int | None = None, ranks: int = 1) -> str:
    """The key of a recipe's network before the first stage: all that the bits depend on besides the stages.

    `threads` are those of the process that runs it, by default of this one; `ranks` processes that share its batches round otherwise.
    """
    counted: dict[str, Any] = {"sparsity_of": recipe.sparsity_of} if recipe.sparsity_of != PARAMS else {}
    counted |= {"ranks": ranks} if ranks > 1 else {}
    content = recipe.data.entry.facts["content"]
    counted |= {"content": content(recipe.data)} if content else {}
    return digest(
        {
            **counted,
            "model": recipe.model,
            "data": recipe.data,
            "task": recipe.task,
            "prunable": [recipe.include, recipe.exclude],
            "seed": recipe.seed,
            "precision": recipe.precision,
            "threads": (threads or torch.get_num_threads()) if device.type == "cpu" else 0,
            "device": [device.type, hardware(device)],
            "torch": torch.__version__.split("+")[0],
        }
    )
