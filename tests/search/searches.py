"""Small searches for tests, on recorded curves or on the toys."""

import json
import math
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from toys import BASE

from distprune.search import driver
from distprune.search.config import Search
from distprune.search.simulate import Curve, Simulator
from distprune.search.trial import Job
from distprune.store import files
from distprune.store.checkpoints import checkpoints_at
from distprune.store.folder import RunFolder
from distprune.store.reports import read
from distprune.store.study import Truth

STEPS = 6
TOTAL = 3882  # prunable weights of toys.network


def search(storage: Path | str, *, trials: int = 8, name: str = "s", **changes: Any) -> Search:
    """A search on the toys."""
    value: dict[str, Any] = {
        "name": name,
        "recipe": BASE,
        "space": {"paradigm": ["dense", "at_init", "gradual"], "criterion": ["magnitude", "snip"], "allocator": ["erk", "uniform"]},
        "sampler": "random",
        "limits": {"trials": trials},
        "rounds": False,  # made-up trials leave nothing in a cache
        "storage": str(storage),
    }
    return Search.read({**value, **changes})


def curve(job: Job) -> Iterator[dict[str, Any]]:
    """A made-up trial that behaves as a worker does: checkpoints that carry their reports, reports sent again from `known` on."""
    folder = RunFolder(Path(job.folder)).checkpoints / str(job.number)
    folder.mkdir(parents=True, exist_ok=True)
    sparsity = job.recipe["sparsity"]
    quality = zlib.crc32(json.dumps(job.recipe, sort_keys=True).encode()) / 2**32
    saved = sorted(folder.glob("*.json"), key=lambda path: int(path.stem))
    outbox = json.loads(saved[-1].read_text()) if saved else []
    yield from outbox[job.known :]
    for index in range(len(outbox), STEPS):
        final, cost = index == STEPS - 1, 320.0 * (index + 1)
        value = 0.5 + 0.4 * quality * (1 - math.exp(-index)) - 0.2 * sparsity**8
        rung = sum(cost >= rung for rung in job.rungs) - 1
        crossed = rung > (outbox[-1]["rung"] if outbox else -1)
        outbox.append(
            {
                "trial": job.number,
                "attempt": f"a{job.known}",
                "index": index,
                "rung": rung,
                "final": final,
                "ended": "finished" if final else "",
                "step": index,
                "cost": cost,
                "spent": cost,
                "sparsity": sparsity,
                "kept": round(TOTAL * (1 - sparsity)),
                "objective": value,
                "score": value if crossed or final else None,
                "extra": "{}",
            }
        )
        if crossed or final:
            files.publish(folder / f"{index}.json", json.dumps(outbox).encode())
        yield outbox[-1]


def start(value: Search, *, workers: int = 2, using: Curve = curve) -> RunFolder:
    """Run a search on the simulator."""
    return driver.start(value, engine=Simulator(using, workers=workers), listen=lambda event, facts: None)


def resume(path: Path | str, *, workers: int = 2, using: Curve = curve, **limits: Any) -> RunFolder:
    """Go on with it."""
    return driver.resume(path, limits=limits, engine=Simulator(using, workers=workers), listen=lambda event, facts: None)


def trials(folder: RunFolder, *, name: str = "s", objectives: int = 2) -> list[Any]:
    """The journal's trials."""
    return Truth.open(folder.journal, name, ("maximize", "minimize", "minimize")[:objectives]).trials()


def reports(folder: RunFolder) -> dict[int, list[dict[str, Any]]]:
    """The stream's reports of each trial, in order."""
    found: dict[int, list[dict[str, Any]]] = {}
    for row in read(folder.reports).to_pylist():
        found.setdefault(row["trial"], []).append(row)
    return {number: sorted(rows, key=lambda row: row["index"]) for number, rows in found.items()}


def outcome(folder: RunFolder) -> list[tuple[Any, ...]]:
    """What a search decided: state, end, parameters and values of every trial."""
    return [(t.number, t.state.name, t.user_attrs["end"]["ended"], sorted(t.params.items(), key=str), t.values) for t in trials(folder)]


def checkpoints(folder: Path, number: int) -> list[Path]:
    """The folders of a trial's checkpoints, the farthest first."""
    found = checkpoints_at(str(folder)).held(number).farthest_first()
    return [RunFolder(folder).checkpoint(number, at.attempt, at.report) for at in found]


def job_in(folder: Path, **changes: Any) -> Job:
    """What a worker is told of a trial on the toys: two rungs, nothing shared."""
    fixed: dict[str, Any] = {"number": 3, "rungs": [640, 1920], "report_every": "1ep", "recovery": "3it", "known": 0, "threads": 1}
    return Job(**{**fixed, "folder": str(folder), "device": "cpu", "working_dir": os.getcwd(), **changes})
