"""A trial run once more from nothing, and compared with what was recorded of it, bit by bit."""

import dataclasses
import itertools
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from distprune.core.executor import execute
from distprune.core.masks import Masks
from distprune.core.recipe import Recipe
from distprune.core.run import Run, prepare
from distprune.environment import environment
from distprune.errors import UserError
from distprune.search.config import Search
from distprune.search.driver import job_of, read_facts
from distprune.search.entry import Assignment
from distprune.search.trial import Job, Memory, run_trial
from distprune.store.checkpoints import checkpoints_at
from distprune.store.folder import RunFolder
from distprune.store.reports import read
from distprune.store.trials import FAILED, read_trials

COMPARED = ("step", "cost", "sparsity", "kept", "objective", "rung", "score", "final", "ended", "metrics")  # columns of a report

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Difference:
    """A report that came out otherwise; a column of one that is missing is None."""

    index: int
    columns: Mapping[str, tuple[Any, Any]]  # name -> (recorded, replayed)


@dataclass(frozen=True)
class Replay:
    """How a trial came out the second time."""

    trial: int
    compared: int  # reports
    differences: tuple[Difference, ...]
    masks: bool | None  # whether they are the same; None where the run folder keeps none
    surroundings: Mapping[str, tuple[str, str]]  # what is different about versions and machine: (recorded, here)

    @property
    def same(self) -> bool:
        """Whether every bit that was compared is the same."""
        return not self.differences and self.masks is not False

    def lines(self) -> list[str]:
        """For people."""
        masks = {None: "", True: " and in the masks", False: ""}[self.masks]
        lines = [f"trial {self.trial}: the same bits in {self.compared} reports{masks}"] if self.same else []
        if self.differences:
            first = self.differences[0]
            names = sorted({name for difference in self.differences for name in difference.columns}, key=COMPARED.index)
            lines.append(f"trial {self.trial}: {len(self.differences)} of {self.compared} reports differ, first report {first.index}:")
            lines += [f"  {name}: recorded {recorded!r}, now {now!r}" for name, (recorded, now) in first.columns.items()]
            lines.append(f"  columns that differ anywhere: {', '.join(names)}")
        if self.masks is False:
            lines.append(f"trial {self.trial}: other masks than those recorded")
        lines += [f"{name}: recorded with {recorded}, now {now}" for name, (recorded, now) in self.surroundings.items()]
        return lines


def replay(
    path: str | Path, trial: int, *, device: str | None = None, listen: Callable[[str, dict[str, Any]], None] = lambda event, facts: None
) -> Replay:
    """Run a trial again as its worker did, in a folder of its own, with its threads and on its device; `device` puts another in its place.

    A stopped trial, and one that runs still, is replayed up to its last report. Raises UserError for what cannot be replayed.
    """
    folder = RunFolder.existing(path)
    folder.check_real("replayed")
    return _again(folder, trial, device, listen, network=False)[0]


def rebuilt(
    path: str | Path, trial: int, *, device: str | None = None, listen: Callable[[str, dict[str, Any]], None] = lambda event, facts: None
) -> tuple[Run, Replay]:
    """The network of a trial that has kept no weights, as it was at its last report, and how that came out against the record.

    `device` is as for `replay`, and the processor where there is no GPU. Raises UserError for a trial that failed, and for what cannot be
    replayed.
    """
    folder = RunFolder.existing(path)
    folder.check_real("exported")
    for row in read_trials(folder.trials, columns=["number", "ended", "reason"]).to_pylist():
        if row["number"] == trial and row["ended"] in FAILED:
            raise UserError(
                f"Trial {trial} has no network to export: it ended with '{row['ended']}' ({row['reason']}). Choose another trial."
            )
    outcome, run = _again(folder, trial, device or (None if torch.cuda.is_available() else "cpu"), listen, network=True)
    if run is None:
        raise UserError(f"Trial {trial} could not be made again: {' '.join(outcome.lines())}. Choose another trial.")
    return run, outcome


def _again(
    folder: RunFolder, trial: int, device: str | None, listen: Callable[[str, dict[str, Any]], None], *, network: bool
) -> tuple[Replay, Run | None]:
    """A trial run again up to its last report: how it came out and, if that is asked for, its `network`; None where it ended before."""
    facts = read_facts(folder)
    recorded = _recorded(folder, trial)
    search = Search.of_run(facts["search"])
    plain, judged = _recipe(folder, trial)
    recipe = Recipe.read(plain)
    threads, here = torch.get_num_threads(), os.getcwd()
    with tempfile.TemporaryDirectory(prefix="distprune-replay-") as scratch:
        fresh = RunFolder(Path(scratch))
        job = job_of(search, fresh, facts["rungs"], Assignment(trial, recipe, 0, judged=judged))
        recorded_device = job.device
        job = dataclasses.replace(job, device=device or job.device, cache=None)  # nothing that was computed before
        # What cannot be done here is said before anything is compared.
        ready = prepare(recipe, device=job.device, report_every=job.report_every)
        found: list[Row] = []
        try:
            for row in _run(job, recorded):
                found.append(row)
                listen("replayed", {"row": row, "share": len(found) / len(recorded)})
            wanted = network or (recorded[-1]["final"] and folder.masks_file(trial).exists())
            reached = wanted and len(found) == len(recorded) and _reach(fresh, trial, ready, len(recorded))
        finally:
            torch.set_num_threads(threads)
            os.chdir(here)
        masks = _masks(folder, trial, ready if reached else None) if recorded[-1]["final"] else None
    surroundings = {name: (str(old), str(new)) for name, old, new in _changed(facts["environment"], environment())}
    if recorded_device != job.device:
        surroundings["device"] = (recorded_device, job.device)
    if job.ranks > 1:  # whose sums round otherwise, and draw their own noise
        surroundings["ranks"] = (str(job.ranks), "1")
    return Replay(trial, len(recorded), tuple(_differences(recorded, found)), masks, surroundings), ready if reached else None


def _run(job: Job, recorded: Sequence[Row]) -> Iterator[Row]:
    """The reports of a trial that is run again; where it ran out of memory it goes on from its checkpoint, as then in parts of batches."""
    index = 0
    for memory, rows in itertools.groupby(recorded, key=_memory):
        end = index + len(list(rows))
        with closing(run_trial(dataclasses.replace(job, known=index, memory=memory))) as work:
            for row in work:
                if row["index"] == index:
                    index += 1
                    yield row
                if row["final"] or index == end:
                    break
        if index < end:
            return  # it ended before


def _memory(row: Row) -> dict[str, Any]:
    extra = json.loads(row.get("extra") or "{}")
    return {field.name: extra[field.name] for field in dataclasses.fields(Memory) if field.name in extra}


def _recorded(folder: RunFolder, trial: int) -> list[Row]:
    rows = sorted((row for row in read(folder.reports).to_pylist() if row["trial"] == trial), key=lambda row: int(row["index"]))
    if rows and rows[-1]["ended"] in ("", "finished", "nan", "error"):
        return rows
    if rows[:-1]:  # out of memory or time: an end that is the machine's, not the trial's
        return rows[:-1]
    raise UserError(f"{folder} has no reports of trial {trial}. {_known(folder)}")


def _known(folder: RunFolder) -> str:
    heard = sorted(set(read(folder.reports)["trial"].to_pylist()))
    return f"Trials with reports: {', '.join(map(str, heard[:20])) or 'none'}{', ...' if len(heard) > 20 else ''}."


def _recipe(folder: RunFolder, trial: int) -> tuple[dict[str, Any], bool]:
    """What a trial ran, and whether it was scored at rungs."""
    rows = read_trials(folder.trials, columns=["number", "recipe", "round_of"]).to_pylist() if folder.trials.exists() else []
    found = [row for row in rows if row["number"] == trial]
    if not found:
        raise UserError(f"{folder.trials} does not have trial {trial} yet. Wait, or go on with the search.")
    return dict(json.loads(found[0]["recipe"])), found[0]["round_of"] is None


def _columns(row: Row | None) -> dict[str, Any]:
    if row is None:
        return dict.fromkeys(COMPARED)
    extra = json.loads(row.get("extra") or "{}")
    return {name: row.get(name) for name in COMPARED[:-1]} | {"metrics": extra.get("metrics")}


def _differences(recorded: Sequence[Row], found: Sequence[Row]) -> list[Difference]:
    differences = []
    for index, row in enumerate(recorded):
        old, new = _columns(row), _columns(found[index] if index < len(found) else None)
        if columns := {name: (old[name], new[name]) for name in COMPARED if not _equal(old[name], new[name])}:
            differences.append(Difference(index, columns))
    return differences


def _equal(a: Any, b: Any) -> bool:
    return bool(a == b) or (a != a and b != b)  # nan is nan


def _reach(fresh: RunFolder, trial: int, ready: Run, reports: int) -> bool:
    """Bring a prepared run to where the replayed trial was after that many reports: from its latest checkpoint on."""
    store = checkpoints_at(fresh.place)
    for checkpoint in store.held(trial).farthest_first():
        with store.reading(trial, checkpoint) as path:
            memory = ready.state.load(path).get("memory") or {}
        ready.env.task.micro_batch = memory.get("micro_batch")
        break
    if ready.state.reports < reports:
        with closing(execute(ready.plan, ready.state, ready.env)) as work:
            for _ in work:
                if ready.state.reports == reports:
                    break
    return ready.state.reports == reports


def _masks(folder: RunFolder, trial: int, ready: Run | None) -> bool | None:
    """Whether the replayed trial keeps the weights that the recorded one keeps."""
    if not folder.masks_file(trial).exists():
        return None
    return ready is not None and Masks.load(folder.masks_file(trial)).equal(ready.state.masks.to("cpu"))


def _changed(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    names = [*old, *(name for name in new if name not in old)]
    return [(name, old.get(name, "none"), new.get(name, "none")) for name in names if old.get(name) != new.get(name)]
