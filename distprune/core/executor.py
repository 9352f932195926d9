"""The one executor: runs any plan from any state and yields reports."""

import math
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from distprune.core.loop import Diverged
from distprune.core.metrics import Profile
from distprune.core.plan import Plan, Stage
from distprune.core.state import State
from distprune.core.task import Task


@dataclass(frozen=True, kw_only=True)
class Env:
    """What a run is given and does not change."""

    task: Task
    build: Callable[[], nn.Module]  # an untrained network, drawn from torch's global generator
    seed: int
    device: torch.device
    report_every: int  # steps between reports within a Train
    precision: str = "fp32"
    profile: Profile = field(default_factory=Profile)  # of the network as it was built

    @property
    def flops(self) -> Mapping[str, int]:
        """FLOPs of a forward pass of one sample in each prunable layer of the network as it was built, dense."""
        return self.profile.flops

    def autocast(self) -> AbstractContextManager[Any]:
        """The context of forward passes."""
        return torch.autocast(self.device.type, torch.bfloat16) if self.precision == "bf16" else nullcontext()

    def seed_global(self, seed: int) -> None:
        """Seed the generator that dropout draws from on the run's device."""
        torch.default_generator.manual_seed(seed)
        if self.device.type == "cuda":
            torch.cuda.manual_seed(seed)


@dataclass(frozen=True, kw_only=True)
class Report:
    """Where a run stands, with metrics of the validation split.

    `cost` is the bill in samples; `flops` and `sparse_flops` are what it takes in the prunable layers, dense and with zeros skipped.
    """

    index: int
    stage: int
    clock: int
    lap: int
    metrics: dict[str, float]
    sparsity: float
    kept: int
    cost: int
    flops: float
    sparse_flops: float
    final: bool


def execute(plan: Plan, state: State, env: Env) -> Generator[Report, None, None]:
    """Run what is left of `plan`. The state can be saved at every report and be gone on from with the same bits."""
    return (report for report in walk(plan, state, env) if report is not None)


def walk(plan: Plan, state: State, env: Env, *, arriving: bool = False) -> Iterator[Report | None]:
    """As `execute`, with a None wherever the state is one that other plans may come by: before a stage is left, and after it.

    `arriving` says that the state was put where it stands, and that the report which is due there has not been made.
    The global random generators belong to the run while it works and are put back before each report.
    """
    work = _work(plan, state, env, arriving)
    while True:
        devices = [env.device] if env.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            report = next(work, _END)
        if report is _END:
            return
        env.task.ranks.align(state)
        yield report  # type: ignore[misc]


_END = object()


def _work(plan: Plan, state: State, env: Env, arriving: bool) -> Iterator[Report | None]:
    last = len(plan.stages) - 1
    if arriving and not state.entered and state.stage and (plan.is_measured(state.stage - 1) or state.stage > last):
        yield _report(state, env, final=state.stage > last)
    while state.stage <= last:
        stage = plan.stages[state.stage]
        if not state.entered:
            joins = plan.joined(state.stage) is not None
            if not joins:
                stage.enter(state, env)
            state.entered, arriving = True, joins
        # Where two stages are one, so are their reports: the second makes what the whole would make where the first ends.
        if arriving and stage.reports_now(state, env):
            yield _viewed_report(stage, state, env)
        arriving = False
        for _ in stage.run(state, env):
            yield _viewed_report(stage, state, env)
        yield None
        measured = plan.is_measured(state.stage)
        if not plan.is_continued(state.stage):
            stage.leave(state, env)
        state.stage, state.entered = state.stage + 1, False
        yield None
        if measured or state.stage > last:
            yield _report(state, env, final=state.stage > last)


def _viewed_report(stage: Stage, state: State, env: Env) -> Report:
    with stage.viewing(state, env):
        return _report(state, env, final=False)


def _report(state: State, env: Env, *, final: bool) -> Report:
    with env.autocast():
        metrics = env.task.metrics(state.model, "validation")
    if wrong := [name for name, value in metrics.items() if not math.isfinite(value)]:  # the last step may have been one too many
        raise Diverged(f"The validation {wrong[0]} is not finite at step {state.clock} of lap {state.lap}. Lower the learning rate.")
    state.reports += 1
    return Report(
        index=state.reports - 1,
        stage=state.stage,
        clock=state.clock,
        lap=state.lap,
        metrics=metrics,
        sparsity=state.sparsity,
        kept=state.masks.kept,
        cost=state.ledger.cost,
        flops=state.ledger.flops,
        sparse_flops=state.ledger.sparse_flops,
        final=final,
    )
