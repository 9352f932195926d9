"""One trial as its worker runs it: from a job, which is plain data, to reports, which are plain data."""

import json
import os
import shutil
import time
import uuid
from collections.abc import Generator, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from distprune.core import registry
from distprune.core.costs import Subject
from distprune.core.edits.shrink import shrink
from distprune.core.executor import Report, execute
from distprune.core.lengths import to_steps
from distprune.core.loop import Diverged
from distprune.core.metrics import collapsed, flops
from distprune.core.plan import Plan
from distprune.core.projection import project
from distprune.core.recipe import Recipe
from distprune.core.run import Run, prepare
from distprune.core.stages import Prune
from distprune.core.state import State
from distprune.core.streams import global_stream
from distprune.errors import UserError
from distprune.store.folder import RunFolder

CHECKPOINT_EVERY_S = 60.0  # besides those at rungs and at the end
_KEPT_CHECKPOINTS = 2


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a worker is told: everything as plain data, so that any worker anywhere can run it."""

    number: int
    recipe: dict[str, Any]
    folder: str  # the run folder
    rungs: list[int]  # costs
    report_every: str
    recovery: str
    known: int  # reports that the driver has already; those after it are sent again
    threads: int
    device: str
    working_dir: str  # where the user's modules and data are looked for
    cost: Any = None  # what is measured at the end of the trial besides, as YAML writes it

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def run_trial(job: Job) -> Generator[dict[str, Any], None, None]:
    """Yield a row of `reports.arrows` at each report. Never raises: what goes wrong is the last row, and the worker lives on."""
    attempt = uuid.uuid4().hex[:8]
    base = {"trial": job.number, "attempt": attempt}
    count = 0
    try:
        for row in _rows(job, base):
            count = row["index"] + 1
            yield row
    except Exception as error:  # whatever a user's model, data or loss may raise
        yield {**base, **_failure(error), "index": max(count, job.known), "final": True, "rung": -1}


def _failure(error: Exception) -> dict[str, Any]:
    if isinstance(error, Diverged):
        ended = "nan"
    elif isinstance(error, torch.OutOfMemoryError):
        ended = "oom"
    else:
        ended = "error"
    text = str(error) if isinstance(error, UserError | Diverged) else f"{type(error).__name__}: {error}"
    return {"ended": ended, "extra": json.dumps({"reason": " ".join(text.split())[:500], "pid": os.getpid()})}


def _rows(job: Job, base: dict[str, Any]) -> Iterator[dict[str, Any]]:
    if os.path.isdir(job.working_dir):  # on another node, Ray has put the worker into its own copy of it
        os.chdir(job.working_dir)
    torch.set_num_threads(job.threads)
    started = time.monotonic()
    run = prepare(Recipe.read(job.recipe), device=job.device, report_every=job.report_every)
    folder = RunFolder(Path(job.folder))
    outbox = _restore(folder, job, run)
    yield from (row for row in outbox if row["index"] >= job.known)
    if outbox and outbox[-1]["final"]:
        return
    grace = grace_cost(run.plan)
    recovery = to_steps(job.recovery, steps_per_epoch=run.env.task.steps_per_epoch(run.recipe.train.batch_size))
    rung = max((row["rung"] for row in outbox), default=-1)
    ledger, saved_at = run.state.ledger, started
    before = ledger.cost + ledger.observing  # run in earlier attempts
    kept_checkpoints: list[Path] = []
    for report in execute(run.plan, run.state, run.env):
        row = {**base, **_row(report, run, job.cost)}
        crossed = rung if report.cost < grace else sum(report.cost >= cost for cost in job.rungs) - 1
        if crossed > rung and not report.final:
            row["score"] = _score(run, report, recovery)
        elif report.final:
            row["score"] = row["objective"]
        row |= {"rung": crossed, "spent": ledger.cost + ledger.observing - before, "wall_s": time.monotonic() - started}
        outbox.append(row)
        if crossed > rung or report.final or time.monotonic() - saved_at > CHECKPOINT_EVERY_S:
            saved_at = time.monotonic()
            kept_checkpoints.append(_save(folder, run, outbox))
            for old in kept_checkpoints[:-_KEPT_CHECKPOINTS]:
                shutil.rmtree(old, ignore_errors=True)
        rung = crossed
        yield row


def _score(run: Run, report: Report, recovery: int) -> float:
    """The score at a rung; the plain objective where the projected copy cannot be trained, which must not end the trial."""
    try:
        score, spent = project(run.state, run.recipe, run.plan, run.env, recovery=recovery)
    except UserError:
        return report.metrics[run.env.task.objective]
    run.state.ledger.observing += spent
    return score


def _row(report: Report, run: Run, cost: Any) -> dict[str, Any]:
    extra = {"metrics": report.metrics, "stage": report.stage, "clock": report.clock, "lap": report.lap}
    if report.final:
        masks, state = run.state.masks, run.state
        extra |= {
            "key": run.key,
            "pid": os.getpid(),
            "layers": masks.counts,
            "params": sum(p.numel() for p in state.model.parameters()) - masks.total + masks.kept,
            **({"edits": list(state.edits)} if state.edits else {}),
            "ledger": asdict(state.ledger),
            **_diagnosis(run),
        }
        extra["costs"] = _costs(run, extra, cost)
    return {
        "index": report.index,
        "final": report.final,
        "ended": "finished" if report.final else "",
        "step": report.clock,
        "cost": float(report.cost),
        "sparsity": report.sparsity,
        "kept": report.kept,
        "objective": report.metrics[run.env.task.objective],
        "score": None,
        "extra": json.dumps(extra),
    }


def _diagnosis(run: Run) -> dict[str, Any]:
    """FLOPs and collapsed layers; empty for a network that does not run in float64 or under the counter, which fails no trial."""
    dense, masks = run.state.layer_flops(run.env.task.example), run.state.masks
    try:
        dead = collapsed(run.state.model, masks, run.env.task.example())
    except Exception:  # the forward pass is the user's
        return {}
    counts = masks.counts  # a layer that was removed as a whole is no accident
    measured = {"flops": flops(dense, masks), "dense_flops": sum(run.env.flops.values())} if dense else {}
    return {**measured, "collapsed": [name for name in dead if counts[name]]}


def _costs(run: Run, extra: dict[str, Any], measured: Any) -> dict[str, float | None]:
    """Shares of the dense network's costs by name: those that are functions of the masks, and the one that is to be measured."""
    state, env = run.state, run.env

    def networks() -> tuple[nn.Module, nn.Module, torch.Tensor]:
        units = state.units(run.recipe.granularity, env.task.example)
        with global_stream(env.seed, "latency"):
            dense = env.build().to(env.device)
        return dense, shrink(state.model, units.channels, units.alive(state.masks)), env.task.example()

    subject = Subject(state.masks.kept, state.total, extra.get("flops", 0.0), extra.get("dense_flops", 0.0), networks)
    choices = [registry.cost.choose(entry.name) for entry in registry.cost if not entry.facts["measured"]]
    choices += [registry.cost.read(measured, "cost")] if measured is not None else []
    return {choice.name: choice(subject) for choice in choices}


def grace_cost(plan: Plan) -> int:
    """The bill (samples) up to which a trial is not judged: the end of the first round of a plan that prunes in rounds, else 0."""
    prunes = [index for index, stage in enumerate(plan.stages) if isinstance(stage, Prune)]
    return sum(plan.costs()[: prunes[1]]) if len(prunes) > 1 else 0


def _save(folder: RunFolder, run: Run, outbox: list[dict[str, Any]]) -> Path:
    """Write a checkpoint with all reports of the trial so far, so that it is never ahead of what can be reported."""
    last = outbox[-1]
    target = folder.checkpoint(last["trial"], last["attempt"], last["index"])
    aside = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}")
    aside.mkdir(parents=True)
    run.state.save(aside / "state.safetensors", key=run.key, outbox=outbox)
    aside.rename(target)
    return target


def _restore(folder: RunFolder, job: Job, run: Run) -> list[dict[str, Any]]:
    """Load the newest readable checkpoint of any attempt into the run's state and return its reports; others are passed over."""
    for checkpoint in checkpoints(folder, job.number):
        file = checkpoint / "state.safetensors"
        try:
            if State.facts(file)["key"] == run.key:  # another torch or an edited model would go on from bits that are not its own
                return list(run.state.load(file)["outbox"])
        except UserError:
            continue
    return []


def checkpoints(folder: RunFolder, number: int) -> list[Path]:
    """The checkpoints of a trial, the farthest first."""
    found = [path for path in folder.checkpoints.glob(f"{number}/*/*") if path.name.isdigit()]
    return sorted(found, key=lambda path: (-int(path.name), str(path)))
