"""The score of an unfinished run: what its network would be worth at its final budget, after a short recovery.

Plain accuracy ranks unfinished runs badly: one that has not pruned yet looks best, one that was just rewound looks dead. So a copy ends
the stage that it is in, is fused as the plan will do it and pruned to the recipe's budget, trained for a few steps under its masks, given
fresh batch-norm statistics, and measured. Where the recipe learns masks over frozen weights, the copy's weights stay as they are too.
"""

import copy
from typing import NamedTuple

import torch

from distprune.core.costs import counted, subject_of
from distprune.core.edits.fuse import Fuse
from distprune.core.executor import Env
from distprune.core.plan import Plan
from distprune.core.recipe import Recipe
from distprune.core.registry import Choice
from distprune.core.stages import Prune, Train, calibrate
from distprune.core.state import Ledger, State

_CALIBRATION_BATCHES = 5


class Projection(NamedTuple):
    """What a run would be worth."""

    score: float  # the objective on validation
    spent: int  # samples
    costs: dict[str, float | None]  # shares of the dense network, of all costs that are functions of the masks


def project(state: State, recipe: Recipe, plan: Plan, env: Env, *, recovery: int, costs: tuple[Choice, ...] = ()) -> Projection:
    """Score and costs of a copy projected onto the final budget; `costs` are counted besides the table's. The state is left as it was.

    `recovery` steps are trained at the rate of the middle of the schedule, where half of the learning rate is left, without hooks.
    """
    snapshots, state.snapshots = state.snapshots, {}
    scratch = copy.deepcopy(state)
    state.snapshots = snapshots
    scratch.ledger = Ledger()
    selects = all(stage.train == "scores" for stage in plan.stages if isinstance(stage, Train))
    devices = [env.device] if env.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        if state.entered:
            plan.stages[state.stage].leave(scratch, env)
        for stage in plan.stages[state.stage :]:
            if isinstance(stage, Fuse):
                for _ in stage.run(scratch, env):
                    pass
        if recipe.sparsity and recipe.sparsity > scratch.units(recipe.granularity, env.task.example).sparsity(scratch.masks) + 1e-9:
            ahead = [stage for stage in plan.stages if isinstance(stage, Prune) and stage.sparsity == recipe.sparsity]
            for _ in (ahead[-1] if ahead else recipe.prune(recipe.sparsity)).run(scratch, env):
                pass
        config = recipe.resolved(env.task.steps_per_epoch(recipe.train.batch_size)).train
        middle = config.length // 2
        if not selects:
            recover = Train(config=config, since=middle, until=middle + recovery)
            recover.enter(scratch, env)
            for _ in recover.run(scratch, env):
                pass  # where the run would report
        calibrated = calibrate(scratch, env, _CALIBRATION_BATCHES, config.batch_size)
        with env.autocast():
            metrics = env.task.metrics(scratch.model, "validation")
    spent = scratch.ledger.cost + calibrated
    return Projection(metrics[env.task.objective], spent, counted(subject_of(scratch, recipe, env), costs))
