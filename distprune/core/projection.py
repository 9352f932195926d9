"""The score of an unfinished run: what its network would be worth at its final budget, after a short recovery.

Plain accuracy ranks unfinished runs badly: one that has not pruned yet looks best, one that was just rewound looks dead. So a copy is
pruned to the recipe's budget, trained for a few steps under its masks, given fresh batch-norm statistics, and measured.
"""

import copy

import torch

from distprune.core.executor import Env
from distprune.core.recipe import Recipe
from distprune.core.stages import Train, calibrate
from distprune.core.state import Ledger, State

_CALIBRATION_BATCHES = 5


def project(state: State, recipe: Recipe, env: Env, *, recovery: int) -> tuple[float, int]:
    """(score, samples spent): the objective on validation of a copy projected onto the final budget. The state is left as it was.

    `recovery` steps are trained at the rate of the middle of the schedule, where half of the learning rate is left, without hooks.
    """
    snapshots, state.snapshots = state.snapshots, {}
    scratch = copy.deepcopy(state)
    state.snapshots = snapshots
    scratch.ledger, scratch.slots = Ledger(), {}
    devices = [env.device] if env.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        if recipe.sparsity > scratch.masks.sparsity + 1e-9:
            for _ in recipe.prune(recipe.sparsity).run(scratch, env):
                pass
        config = recipe.resolved(env.task.steps_per_epoch(recipe.train.batch_size)).train
        middle = config.length // 2
        stage = Train(config=config, since=middle, until=middle + recovery)
        stage.enter(scratch, env)
        for _ in stage.run(scratch, env):
            pass  # where the run would report
        calibrate(scratch, env, _CALIBRATION_BATCHES, config.batch_size)
        with env.autocast():
            metrics = env.task.metrics(scratch.model, "validation")
    return metrics[env.task.objective], scratch.ledger.cost + _CALIBRATION_BATCHES * recipe.train.batch_size
