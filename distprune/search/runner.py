"""A search on Ray Tune: the only file that imports it. Ray places trials and carries reports; the book decides.

Each trial asks for its own resources, and Tune runs it in a worker that asked for the same. How many there may be at once is looked up in
the cluster whenever Tune asks for one more, so that nodes which join are used and those which leave are not waited for.
"""

import functools
import gc
import json
import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

# Before ray is imported. Workers use the driver's interpreter and files; nothing is printed, logged or snapshotted by Ray:
# the journal and the report stream are the truth, and a resumed search starts a new Tuner.
os.environ.update(
    RAY_ENABLE_UV_RUN_RUNTIME_ENV="0",
    RAY_AIR_NEW_OUTPUT="0",
    RAY_CHDIR_TO_TRIAL_DIR="0",
    RAY_TRAIN_ENABLE_V2_MIGRATION_WARNINGS="0",
    RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO="0",
    TUNE_DISABLE_AUTO_CALLBACK_LOGGERS="1",
    TUNE_DISABLE_STRICT_METRIC_CHECKING="1",
    TUNE_DISABLE_SIGINT_HANDLER="1",
    TUNE_GLOBAL_CHECKPOINT_S="1000000000",
    TUNE_PRINT_ALL_TRIAL_ERRORS="0",
)

import ray
import torch
from ray import tune
from ray.tune.experiment import Trial as RayTrial
from ray.tune.schedulers import FIFOScheduler
from ray.tune.search import Searcher

from distprune.search.book import Book
from distprune.search.cluster import Cluster
from distprune.search.config import MOST_WORKERS, Search, Workers
from distprune.search.entry import Assignment
from distprune.search.failures import NOBODYS_FAULT, Silence, cause_of_death
from distprune.search.more import Ask
from distprune.search.parcels import Parcels
from distprune.search.resources import bundles, weight
from distprune.search.setup import check_machine
from distprune.search.together import run_together
from distprune.search.trial import Job, run_trial

_LATEST = 8000  # characters of an error's text that may say why
_AN_ERROR = "Failure # "  # begins each
WAITS_S = 30.0  # that a trial which waits for room is waited for beyond the limits of the search: longer than a worker takes to start


class Worker(tune.Trainable):  # type: ignore[misc]
    """Runs one trial after another in the same process, or leads the ranks that do."""

    _crew: Any = None  # of trials on several ranks

    def setup(self, config: dict[str, Any]) -> None:
        job = Job(**json.loads(config["job"]))
        if job.ranks > 1 and self._crew is None:
            from distprune.search.crew import RayCrew

            self._crew = RayCrew(job.ranks, dict(config["bundle"]), job.device)
        self._rows = run_trial(job) if self._crew is None else run_together(job, self._crew)
        self._parcels = Parcels(self._rows)

    def step(self) -> dict[str, Any]:
        rows = self._parcels.next()
        return {"r": json.dumps(rows), "done": rows[-1]["final"]}

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self.cleanup()
        self.setup(new_config)
        return True

    def cleanup(self) -> None:
        self._rows.close()
        gc.collect()  # a state and its optimizer are a cycle
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


class _Face:
    """What Ray pickles with a Tuner leaves the search's state at home."""

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return self


class Face(_Face, Searcher):  # type: ignore[misc]
    """The book as Ray's searcher. `room` says for how many trials there is room just now, `bounded` what can be had of what one was given.

    One trial is let wait where there is none: Ray then goes round, and an autoscaler sees what is needed.
    """

    def __init__(
        self,
        book: Book,
        job: Callable[[Assignment], Job],
        numbers: dict[str, int],
        ended: Callable[[int], None],
        *,
        room: Callable[[], int] = lambda: MOST_WORKERS,
        workers: Workers | None = None,
        bounded: Callable[[Ask | None], Ask | None] = lambda ask: ask,
    ) -> None:
        super().__init__(metric="r", mode="max")
        self._book, self._job, self._numbers, self._ended = book, job, numbers, ended
        self._room, self._workers, self._taken = room, workers or Workers(), dict[str, int]()
        self._bounded = bounded

    def suggest(self, trial_id: str) -> Any:
        if sum(self._taken.values()) >= max(self._room(), 1) or self._book.holds():
            return None  # Ray asks again
        assignment = self._book.next()
        if assignment is None:
            return None if self._book.is_busy else Searcher.FINISHED  # a worker may yet die, or let another go on
        assignment = replace(assignment, ask=self._bounded(assignment.ask))
        self._numbers[trial_id], self._taken[trial_id] = assignment.number, weight(assignment.ask, self._workers)
        bundle = bundles(self._workers, assignment.ask)[0]
        return {"job": json.dumps(self._job(assignment).plain()), "bundle": bundle}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        self._taken.pop(trial_id, None)
        number = self._numbers[trial_id]
        if error:
            self._book.gone(number)
        else:
            self._book.finish(number)
        self._ended(number)

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the journal is the truth."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing: a resumed search starts a new Tuner."""


class Gate(_Face, FIFOScheduler):  # type: ignore[misc]
    """The book as Ray's scheduler."""

    def __init__(self, book: Book, numbers: dict[str, int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._book, self._numbers = book, numbers

    def on_trial_result(self, tune_controller: Any, trial: RayTrial, result: dict[str, Any]) -> str:
        goes_on = all(map(self._book.hear, json.loads(result["r"])))  # none after that at which it is stopped
        return str(self.CONTINUE if goes_on else self.STOP)

    def on_trial_error(self, tune_controller: Any, trial: RayTrial) -> None:
        cause, free = _cause(trial)
        self._book.died(self._numbers[trial.trial_id], cause, free=free)

    def on_trial_complete(self, tune_controller: Any, trial: RayTrial, result: dict[str, Any]) -> None:
        if "r" in result:  # the last reports of a trial come here alone
            all(map(self._book.hear, json.loads(result["r"])))


def _cause(trial: RayTrial) -> tuple[str, bool]:
    """(why a trial's worker died, whether that counts as nobody's fault), from the latest error in Ray's own text of them."""
    try:
        text = Path(trial.error_file).read_text()[-_LATEST:].rpartition(_AN_ERROR)[2]
    except Exception:  # none there, or one that cannot be read
        text = ""
    cause = cause_of_death(text)
    return cause, cause in NOBODYS_FAULT


class Draw(_Face, tune.Callback):  # type: ignore[misc]
    """What is looked at a few times a second: the progress display, and whether a worker has been silent, or at work, for too long."""

    def __init__(self, draw: Callable[[], None], book: Book, numbers: dict[str, int], silence: float | None) -> None:
        self._draw, self._latest = draw, 0.0
        self._book, self._numbers, self._seconds = book, numbers, silence or 0.0
        self._silence, self._running = Silence(silence, time.monotonic), dict[str, RayTrial]()

    def on_step_end(self, iteration: int, trials: list[RayTrial], **info: Any) -> None:
        if time.monotonic() - self._latest > 0.3:
            self._latest = time.monotonic()
            self._draw()
            if self._book.holds() == "full":
                self._silence.excuse()  # they wait for space, too
            for trial_id in self._silence.too_long():
                self._book.silent(self._numbers[str(trial_id)], self._seconds)
                self._kill(str(trial_id))
            for trial_id, seconds in self._silence.lengths():
                if self._book.overdue(self._numbers[str(trial_id)], seconds):
                    self._kill(str(trial_id))

    @property
    def is_idle(self) -> bool:
        """Whether no worker is at work."""
        return not self._running

    def _kill(self, trial_id: str) -> None:
        self._silence.gone(trial_id)
        if (actor := self._running[trial_id].temporary_state.ray_actor) is not None:
            ray.kill(actor)

    def on_trial_start(self, iteration: int, trials: list[RayTrial], trial: RayTrial, **info: Any) -> None:
        self._running[trial.trial_id] = trial
        self._silence.heard(trial.trial_id)

    def on_trial_result(self, iteration: int, trials: list[RayTrial], trial: RayTrial, result: dict[str, Any], **info: Any) -> None:
        self._silence.heard(trial.trial_id)

    def on_trial_recover(self, iteration: int, trials: list[RayTrial], trial: RayTrial, **info: Any) -> None:
        self._gone(trial)

    def on_trial_error(self, iteration: int, trials: list[RayTrial], trial: RayTrial, **info: Any) -> None:
        self._gone(trial)

    def _gone(self, trial: RayTrial) -> None:
        self._running.pop(trial.trial_id, None)
        self._silence.gone(trial.trial_id)

    def on_trial_complete(self, iteration: int, trials: list[RayTrial], trial: RayTrial, **info: Any) -> None:
        self._gone(trial)
        trial.run_metadata.last_result = {}  # 84 KB a finished trial otherwise
        trial.run_metadata.metric_analysis = {}


class Over(_Face, tune.Stopper):  # type: ignore[misc]
    """Ends a search beyond its limits whose last trials wait for room: they report nothing at which they would be stopped, and wait on."""

    def __init__(self, book: Book, is_idle: Callable[[], bool]) -> None:
        self._book, self._is_idle, self._since = book, is_idle, math.inf

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        if not (self._book.limit_reached and self._is_idle()):
            self._since = math.inf
            return False
        self._since = min(self._since, time.monotonic())
        return time.monotonic() - self._since >= WAITS_S


def _request(workers: Workers) -> Callable[[dict[str, Any]], tune.PlacementGroupFactory]:
    """What a trial's job asks for. Of several ranks each has a bundle, and who starts them needs nothing himself."""

    def request(config: dict[str, Any]) -> tune.PlacementGroupFactory:
        parts = bundles(workers, Ask(**json.loads(config["job"])["ask"]))
        return tune.PlacementGroupFactory(parts if len(parts) == 1 else [{}, *parts])

    return request


class Ray:
    """The engine of real searches: Ray on this machine, or the cluster at `address`, or the one that this process runs in."""

    def __init__(self, address: str | None, listen: Callable[[str, dict[str, Any]], None]) -> None:
        self._address, self._listen = address or os.environ.get("RAY_ADDRESS"), listen
        self._cluster = Cluster(self._address, listen)

    def open(self, search: Search) -> None:
        """Connect. Raises UserError if not even one trial fits."""
        if self._address is None:
            check_machine(search)
        self._listen("starting", {"address": self._address})
        self._cluster.join(search)

    def largest(self) -> float | None:
        """Memory (bytes) that a trial can set aside on the largest node."""
        return self._cluster.largest()

    def run(
        self, search: Search, book: Book, job: Callable[[Assignment], Job], ended: Callable[[int], None], draw: Callable[[], None]
    ) -> None:
        """Run until the book has no trial left. Raises KeyboardInterrupt on Ctrl-C; what runs then can be resumed."""
        scratch, numbers = Path(tempfile.mkdtemp(prefix="distprune-ray-")), dict[str, int]()
        room = functools.partial(self._cluster.slots, search)
        face = Face(book, job, numbers, ended, room=room, workers=search.workers, bounded=self._cluster.bounded)
        watch = Draw(draw, book, numbers, search.limits.silence)
        try:
            tuner = tune.Tuner(
                tune.with_resources(Worker, _request(search.workers)),
                tune_config=tune.TuneConfig(
                    search_alg=face,
                    scheduler=Gate(book, numbers),
                    num_samples=-1,
                    max_concurrent_trials=search.workers.most or MOST_WORKERS,  # that Tune starts at once: Face knows how many there may be
                    reuse_actors=True,
                    trial_dirname_creator=lambda trial: str(trial.trial_id),
                ),
                run_config=tune.RunConfig(
                    name="search",
                    storage_path=str(scratch),
                    callbacks=[watch],
                    stop=Over(book, lambda: watch.is_idle),
                    checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),  # the worker writes its own
                    failure_config=tune.FailureConfig(max_failures=0),  # the book begins trials again, as a resumed search does
                    verbose=0,
                ),
            )
            tuner.fit()
        finally:
            self._cluster.release()
            shutil.rmtree(scratch, ignore_errors=True)
