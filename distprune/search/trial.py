"""One trial as its worker runs it: from a job, which is plain data, to reports, which are plain data."""

import gc
import json
import math
import os
import time
import uuid
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import nn

from distprune.core import registry
from distprune.core.allocation import OutOfMemory, Unsplittable, is_shortage
from distprune.core.costs import counted, is_measured, label, subject_of
from distprune.core.edits.shrink import shrink
from distprune.core.executor import Report, execute
from distprune.core.lengths import to_steps
from distprune.core.loop import Diverged
from distprune.core.metrics import collapsed, flops
from distprune.core.plan import Plan
from distprune.core.projection import project
from distprune.core.ranks import ALONE, Lost, Ranks
from distprune.core.recipe import Recipe
from distprune.core.registry import Choice
from distprune.core.run import Run, prepare
from distprune.core.stages import Prune
from distprune.core.state import State
from distprune.core.streams import global_stream
from distprune.errors import UserError
from distprune.search.cap import capped
from distprune.search.following import opened, restored
from distprune.search.sharing import Sharing
from distprune.store.cache import Cache
from distprune.store.checkpoints import Checkpoint, Checkpoints, checkpoints_at
from distprune.store.datasets import SharedData

CHECKPOINT_EVERY_S = 60.0  # besides those at rungs and at the end
KEPT_CHECKPOINTS = 2  # of an attempt
RECOVERY_STEPS, RECOVERY_SHARE = 40, 0.1  # before a score is taken, of the training at most; see benchmarks/ranks.py


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a worker is told: everything as plain data, so that any worker anywhere can run it."""

    number: int
    recipe: dict[str, Any]
    folder: str  # where its checkpoints are: the run folder or its URL
    rungs: list[int]  # costs
    report_every: str
    recovery: str | None  # see Search
    known: int  # reports that the driver has already; those after it are sent again
    threads: int
    device: str
    working_dir: str  # where the user's modules and data are looked for
    costs: list[Any] = field(default_factory=list)  # that the search asks for, as YAML writes them
    cache: str | None = None  # folder or URL of the stage cache
    cache_limit: int | None = None  # its bytes
    cache_room: int | None = None  # its bytes above which this trial adds nothing to it
    silence: float | None = None  # seconds without a report after which the worker is given up
    driver: str = ""  # who gives the job out; what only its workers can share is shared under this name
    memory: dict[str, Any] = field(default_factory=dict)  # where it is to go on as it did once it had run out of memory
    ask: dict[str, Any] = field(default_factory=dict)  # what it gets besides CPUs, see more.py
    ranks: int = 1  # processes that share its batches

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


Rows = Callable[[Job, dict[str, Any], "Memory"], Generator[dict[str, Any], None, None]]  # of one attempt


def run_trial(job: Job) -> Generator[dict[str, Any], None, None]:
    """Yield a row of `reports.arrows` at each report. Never raises: what goes wrong is the last row, and the worker lives on."""
    return attempts(job, _capped_rows)


def _capped_rows(job: Job, base: dict[str, Any], memory: "Memory") -> Generator[dict[str, Any], None, None]:
    with capped(job.ask.get("gpus", 0.0), job.device):  # a GPU that is broken is what went wrong with the attempt
        yield from rows_of(job, base, memory)


def attempts(job: Job, rows: Rows) -> Generator[dict[str, Any], None, None]:
    """The rows of a trial that is begun again, with half of the samples in a pass, when it runs out of memory. Raises Lost alone."""
    memory, count = Memory.of(job), job.known
    while True:
        base = {"trial": job.number, "attempt": uuid.uuid4().hex[:8]}
        try:
            for row in rows(job, base, memory):
                count = max(count, row["index"] + 1)  # rows from before memory ran out come again: the first of each counts
                yield row
            return
        except Lost:  # nothing that the trial did
            raise
        except Exception as error:  # whatever a user's model, data or loss may raise
            if not memory.halve(error, job.recipe["train"]["batch_size"]):
                yield {**base, **_failure(error, memory), "index": count, "final": True, "rung": -1}
                return
        free_memory()  # here nothing holds the failed pass any more


@dataclass
class Memory:
    """How many samples a trial may have in one pass, once it has run out of memory, and how often it was begun again for that."""

    micro_batch: int | None = None
    retries: int = 0
    asked: int = 0  # times that it was given more memory

    @classmethod
    def of(cls, job: Job) -> "Memory":
        """Of a trial that begins, or goes on."""
        return cls(**{"asked": job.ask.get("times", 0), **job.memory})

    def halve(self, error: Exception, batch_size: int) -> bool:
        """Whether to go on with half of the samples in a pass: memory ran out, and there was more than one."""
        if not is_shortage(error):
            return False
        samples = error.samples if isinstance(error, OutOfMemory) else batch_size
        samples = min(samples, self.micro_batch or samples)  # a part may be larger, where ranks have as many of them each
        if samples > 1:
            self.micro_batch, self.retries = samples // 2, self.retries + 1
        return samples > 1

    def facts(self) -> dict[str, Any]:
        """For `extra` of a report; empty where memory was enough."""
        halved = {"micro_batch": self.micro_batch, "retries": self.retries} if self.retries else {}
        return halved | ({"asked": self.asked} if self.asked else {})


def free_memory() -> None:
    """Give back what a trial has left behind."""
    gc.collect()  # a state and its optimizer are a cycle
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _failure(error: Exception, memory: Memory) -> dict[str, Any]:
    if isinstance(error, Diverged):
        ended = "nan"
    elif is_shortage(error) or (memory.retries and _is_too_little(error)):
        ended = "oom"
    else:
        ended = "error"
    text = str(error) if isinstance(error, UserError | Diverged | OutOfMemory) else f"{type(error).__name__}: {error}"
    if memory.retries:
        text = f"With a micro-batch of {memory.micro_batch} after running out of memory: {text}"
    return {"ended": ended, "extra": json.dumps({"reason": " ".join(text.split())[:500], "pid": os.getpid(), **memory.facts()})}


def _is_too_little(error: Exception) -> bool:
    """Whether a batch cannot be split, or batch normalisation was shown a single sample."""
    return isinstance(error, Unsplittable) or "more than 1 value per channel" in str(error)


def rows_of(job: Job, base: dict[str, Any], memory: Memory, ranks: Ranks = ALONE) -> Generator[dict[str, Any], None, None]:
    """The rows of one attempt at a trial, in this process or, in step with others, in one of `ranks`."""
    if os.path.isdir(job.working_dir):  # on another node, Ray has put the worker into its own copy of it
        os.chdir(job.working_dir)
    torch.set_num_threads(job.threads)
    started = time.monotonic()
    run = prepare(Recipe.read(job.recipe), device=job.device, report_every=job.report_every, share=SharedData(job.driver))
    store = checkpoints_at(job.folder, patient=True)
    run.env.task.ranks = run.state.ranks = ranks
    outbox = restored(ranks, run, memory, lambda: _restore(store, job, run, memory))
    run.env.task.micro_batch = memory.micro_batch
    yield from (row for row in outbox if row["index"] >= job.known)
    if outbox and outbox[-1]["final"]:
        return
    grace = grace_cost(run.plan)
    recovery = _recovery(job.recovery, run)
    rung = max((row["rung"] for row in outbox), default=-1)
    saved_at, kept_checkpoints = started, list[Checkpoint]()
    before = _run_so_far(run)  # in earlier attempts
    sharing = _sharing(job, run, memory)
    saved_before = json.loads(outbox[-1]["extra"]).get("saved", 0) if outbox else 0

    def due() -> float:
        """The bill from which the next report is scored."""
        return max(grace, job.rungs[rung + 1]) if rung + 1 < len(job.rungs) else math.inf

    with closing(sharing.reports(outbox, due) if sharing else execute(run.plan, run.state, run.env)) as reports:
        for report in reports:
            own = report if isinstance(report, Report) else None  # else a row from the cache
            row = {**base, "index": len(outbox), **(_row(report, run, job.costs, memory) if isinstance(report, Report) else report)}
            crossed = rung if row["cost"] < grace else sum(row["cost"] >= cost for cost in job.rungs) - 1
            if own and crossed > rung and not own.final:
                row |= _score(run, own, recovery, row, job.costs)
            elif row["final"]:
                row["score"] = row["objective"]
            spent = _run_so_far(run) - before - (sharing.served if sharing else 0)
            row |= {"rung": crossed, "spent": spent, "wall_s": time.monotonic() - started}
            if saved := saved_before + (sharing.served if sharing else 0):
                row["extra"] = json.dumps({**json.loads(row["extra"]), "saved": saved})
            outbox.append(row)
            # A state from the cache is ahead of the reports that come with it.
            if own and ranks.rank == 0 and (crossed > rung or row["final"] or time.monotonic() - saved_at > CHECKPOINT_EVERY_S):
                saved_at = time.monotonic()
                kept_checkpoints.append(_save(store, run, outbox, memory))
                for old in kept_checkpoints[:-KEPT_CHECKPOINTS]:
                    store.remove(job.number, old)
                del kept_checkpoints[:-KEPT_CHECKPOINTS]
            rung = crossed
            yield row


def _recovery(length: str | None, run: Run) -> int:
    """Steps of training before a score is taken."""
    steps_per_epoch = run.env.task.steps_per_epoch(run.recipe.train.batch_size)
    whole = int(run.recipe.resolved(steps_per_epoch).train.length)
    if length is not None:
        return to_steps(length, steps_per_epoch=steps_per_epoch, whole=whole)
    return min(RECOVERY_STEPS, math.ceil(RECOVERY_SHARE * whole))


def _run_so_far(run: Run) -> int:
    return run.state.ledger.cost + run.state.ledger.observing


def _sharing(job: Job, run: Run, memory: Memory) -> Sharing | None:
    """The stage cache; none for a trial in parts of batches, whose bits are its own, and none where it cannot be opened."""
    if job.cache is None or memory.micro_batch is not None:
        return None

    def open_cache() -> Cache | None:
        try:
            return Cache.open(str(job.cache), limit=job.cache_limit, room=job.cache_room)
        except UserError:
            return None

    return opened(run.env.task.ranks, run, job.rungs, open_cache, silence=job.silence)


def _score(run: Run, report: Report, recovery: int, row: dict[str, Any], costs: list[Any]) -> dict[str, Any]:
    """The score at a rung with the costs that go with it, those that are functions of the masks.

    The plain objective, and no costs, where the projected copy cannot be trained, which must not end the trial.
    """
    try:
        found = project(run.state, run.recipe, run.plan, run.env, recovery=recovery, costs=_read(costs))
    except UserError:
        return {"score": report.metrics[run.env.task.objective]}
    run.state.ledger.observing += found.spent
    return {"score": found.score, "extra": json.dumps({**json.loads(row["extra"]), "costs": found.costs})}


def _read(costs: list[Any]) -> tuple[Choice, ...]:
    return tuple(registry.cost.read(cost, "cost") for cost in costs)


def _row(report: Report, run: Run, costs: list[Any], memory: Memory) -> dict[str, Any]:
    extra = {"metrics": report.metrics, "stage": report.stage, "clock": report.clock, "lap": report.lap, **memory.facts()}
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
        extra["costs"] = _costs(run, _read(costs))
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


def _costs(run: Run, asked: tuple[Choice, ...]) -> dict[str, float | None]:
    """Shares of the dense network's costs by label: those that are functions of the masks, and those that the search wants measured."""
    state, env = run.state, run.env

    def networks() -> tuple[nn.Module, nn.Module, torch.Tensor]:
        units = state.units(run.recipe.granularity, env.task.example)
        with global_stream(env.seed, "latency"):
            dense = env.build().to(env.device)
        return dense, shrink(state.model, units.channels, units.alive(state.masks)), env.task.example()

    subject = replace(subject_of(state, run.recipe, env), networks=networks)
    return {**counted(subject, asked), **{label(cost): cost(subject) for cost in asked if is_measured(cost)}}


def grace_cost(plan: Plan) -> int:
    """The bill (samples) up to which a trial is not judged: the end of the first round of a plan that prunes in rounds, else 0."""
    prunes = [index for index, stage in enumerate(plan.stages) if isinstance(stage, Prune)]
    return sum(plan.costs()[: prunes[1]]) if len(prunes) > 1 else 0


def _save(store: Checkpoints, run: Run, outbox: list[dict[str, Any]], memory: Memory) -> Checkpoint:
    """Write a checkpoint with all reports of the trial so far, so that it is never ahead of what can be reported.

    Its size (bytes) is noted in the latest report as `checkpoint`, from which the driver knows what is kept.
    """
    last = outbox[-1]
    checkpoint = Checkpoint(last["index"], last["attempt"])
    size = store.write(last["trial"], checkpoint, lambda path: run.state.save(path, key=run.key, outbox=outbox, memory=asdict(memory)))
    last["extra"] = json.dumps({**json.loads(last["extra"]), "checkpoint": size})
    return checkpoint


def _restore(store: Checkpoints, job: Job, run: Run, memory: Memory) -> list[dict[str, Any]]:
    """Load the newest readable checkpoint of any attempt into the run's state and return its reports; others are passed over.

    A trial that has run out of memory before goes on as it did then.
    """
    for checkpoint in store.held(job.number).farthest_first():
        try:
            with store.reading(job.number, checkpoint) as file:
                if State.facts(file)["key"] == run.key:  # another torch or an edited model would go on from bits that are not its own
                    facts = run.state.load(file)
                    if not memory.retries:
                        before = facts.get("memory") or {}
                        memory.micro_batch, memory.retries = before.get("micro_batch"), before.get("retries", 0)
                    return list(facts["outbox"])
        except (UserError, FileNotFoundError):
            continue
    return []
