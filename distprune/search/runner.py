"""A search on Ray Tune: the only file that imports it. Ray places trials and carries reports; the book decides."""

import gc
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable
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
from ray import cloudpickle as pickle
from ray import tune
from ray.tune.experiment import Trial as RayTrial
from ray.tune.schedulers import FIFOScheduler
from ray.tune.search import Searcher

from distprune.errors import UserError
from distprune.search.book import Book
from distprune.search.config import Search
from distprune.search.entry import Assignment
from distprune.search.failures import Silence, cause_of_death
from distprune.search.setup import check_machine, slots_of
from distprune.search.trial import Job, run_trial

_LATEST = 4000  # characters of an error's text that may say why


class Worker(tune.Trainable):  # type: ignore[misc]
    """Runs one trial after another in the same process."""

    def setup(self, config: dict[str, Any]) -> None:
        self._rows = run_trial(Job(**json.loads(config["job"])))

    def step(self) -> dict[str, Any]:
        row = next(self._rows)
        return {"r": json.dumps(row), "done": row["final"]}

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
    """The book as Ray's searcher."""

    def __init__(self, book: Book, job: Callable[[Assignment], Job], numbers: dict[str, int], ended: Callable[[int], None]) -> None:
        super().__init__(metric="r", mode="max")
        self._book, self._job, self._numbers, self._ended = book, job, numbers, ended

    def suggest(self, trial_id: str) -> Any:
        if self._book.holds():
            return None  # Ray asks again
        assignment = self._book.next()
        if assignment is None:
            return None if self._book.is_busy else Searcher.FINISHED  # a worker may yet die, or let another go on
        self._numbers[trial_id] = assignment.number
        return {"job": json.dumps(self._job(assignment).plain())}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
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
        goes_on = self._book.hear(json.loads(result["r"]))
        return str(self.CONTINUE if goes_on else self.STOP)

    def on_trial_error(self, tune_controller: Any, trial: RayTrial) -> None:
        cause, free = _cause(trial)
        self._book.died(self._numbers[trial.trial_id], cause, free=free)

    def on_trial_complete(self, tune_controller: Any, trial: RayTrial, result: dict[str, Any]) -> None:
        if "r" in result:  # the last report of a trial comes here alone
            self._book.hear(json.loads(result["r"]))


def _cause(trial: RayTrial) -> tuple[str, bool]:
    """(why a trial's worker died, whether that counts as nobody's fault)."""
    try:
        error = pickle.loads(Path(trial.pickled_error_file).read_bytes())
        text, preempted = str(error), bool(getattr(error, "preempted", False))
    except Exception:  # none there, or one that cannot be read
        text, preempted = _text(trial), False
    cause = cause_of_death(text, preempted=preempted)
    return cause, cause in ("preempted", "node died")


def _text(trial: RayTrial) -> str:
    try:
        return Path(trial.error_file).read_text()[-_LATEST:]
    except Exception:
        return ""


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


class Ray:
    """The engine of real searches: Ray on this machine, or the cluster at `address`, or the one that this process runs in."""

    def __init__(self, address: str | None, listen: Callable[[str, dict[str, Any]], None]) -> None:
        self._address, self._listen = address or os.environ.get("RAY_ADDRESS"), listen
        self._slots = 0

    def open(self, search: Search) -> None:
        """Connect. Raises UserError if not even one trial fits."""
        if self._address is None:
            check_machine(search)
        self._listen("starting", {"address": self._address})
        if not ray.is_initialized():
            options: dict[str, Any] = (
                {"address": self._address} if self._address else {"include_dashboard": False, "num_cpus": os.cpu_count()}
            )
            try:
                ray.init(**options, log_to_driver=False, logging_level=logging.ERROR)
            except Exception as error:  # Ray raises bare Exceptions too
                where = f"No Ray cluster answers at {self._address}" if self._address else "Ray did not start on this machine"
                way_out = "Check the address and RAY_AUTH_MODE=token." if self._address else "Try again when it is less busy."
                raise UserError(f"{where}: {str(error).rstrip('.')}. {way_out}") from error
        resources = {str(name): float(amount) for name, amount in ray.cluster_resources().items()}  # type: ignore[no-untyped-call]
        self._slots = slots_of(search, resources)
        self._listen("slots", {"slots": self._slots, "resources": resources})

    def run(
        self, search: Search, book: Book, job: Callable[[Assignment], Job], ended: Callable[[int], None], draw: Callable[[], None]
    ) -> None:
        """Run until the book has no trial left. Raises KeyboardInterrupt on Ctrl-C; what runs then can be resumed."""
        cpus, gpus = search.workers.cpus, search.workers.gpus
        scratch, numbers = Path(tempfile.mkdtemp(prefix="distprune-ray-")), dict[str, int]()
        try:
            tuner = tune.Tuner(
                tune.with_resources(Worker, {"cpu": cpus, "gpu": gpus} if gpus else {"cpu": cpus}),
                tune_config=tune.TuneConfig(
                    search_alg=Face(book, job, numbers, ended),
                    scheduler=Gate(book, numbers),
                    num_samples=-1,
                    max_concurrent_trials=self._slots,
                    reuse_actors=True,
                    trial_dirname_creator=lambda trial: str(trial.trial_id),
                ),
                run_config=tune.RunConfig(
                    name="search",
                    storage_path=str(scratch),
                    callbacks=[Draw(draw, book, numbers, search.limits.silence)],
                    checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),  # the worker writes its own
                    failure_config=tune.FailureConfig(max_failures=0),  # the book begins trials again, as a resumed search does
                    verbose=0,
                ),
            )
            tuner.fit()
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
