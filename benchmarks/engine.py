"""What the engine costs: driver CPU a trial, a report and a suggestion, driver memory, and the share of time that workers are busy.

    python benchmarks/engine.py own                      # the driver's own part up to 10,000 trials on 1,000 simulated workers
    python benchmarks/engine.py ray                      # real Ray beside plain Ray Tune (OptunaSearch, ASHA), same sleeping trainable
    python benchmarks/engine.py ray --slots 64 --trials 256 --seconds 30

Rows are added to benchmarks/engine.json. Each measurement is a process of its own; the two sides take turns. Trials sleep, so workers need
no CPU: many fit on few cores. Costs are CPU seconds of the driver and are counted from its first report on, so that imports and the start
of actors are left out; memory is the driver's, beyond what it held then.
"""

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_suffix(".json")
CONFIG = Path(__file__).parents[1] / "configs" / "digits.yaml"
SAMPLES = 1000.0  # billed between two reports


def resident() -> float:
    """Megabytes of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def reports(job: dict[str, Any], count: int) -> Iterator[dict[str, Any]]:
    """Made-up reports of a trial, as a worker writes them."""
    sparsity, rung = job["recipe"]["sparsity"], -1
    quality = zlib.crc32(json.dumps(job["recipe"], sort_keys=True).encode()) / 2**32
    for index in range(count):
        cost, final = SAMPLES * 20 / count * (index + 1), index == count - 1
        value = 0.5 + 0.4 * quality * (1 - math.exp(-index)) - 0.2 * sparsity**8
        crossed = sum(cost >= at for at in job["rungs"]) - 1
        yield {
            "trial": job["number"],
            "attempt": "a",
            "index": index,
            "rung": crossed,
            "final": final,
            "ended": "finished" if final else "",
            "step": index,
            "cost": cost,
            "spent": cost,
            "sparsity": sparsity,
            "kept": round(30_000 * (1 - sparsity)),
            "objective": value,
            "score": value if crossed > rung or final else None,
            "wall_s": cost / 1000,
            "extra": json.dumps({"metrics": {"accuracy": value, "loss": value}, "stage": 1, "clock": index, "lap": 0}),
        }
        rung = crossed


class Meter:
    """CPU and memory of this process from its first report on, and CPU within suggestions."""

    def __init__(self) -> None:
        self._cpu = self._memory = self.suggesting = 0.0
        self.suggestions = 0
        self._begun = False

    def report(self) -> None:
        """Called at every report."""
        if not self._begun:
            self._begun, self._cpu, self._memory = True, time.process_time(), resident()
            self.suggesting, self.suggestions = 0.0, 0

    def timed(self, function: Any) -> Any:
        """The function, its CPU counted."""

        def inner(*args: Any, **options: Any) -> Any:
            begun = time.process_time()
            try:
                return function(*args, **options)
            finally:
                self.suggesting += time.process_time() - begun
                self.suggestions += 1

        return inner

    def row(self) -> dict[str, Any]:
        """What was used."""
        return {
            "cpu_s": time.process_time() - self._cpu,
            "grown_mb": resident() - self._memory,
            "resident_mb": resident(),
            "suggestion_ms": 1000 * self.suggesting / max(self.suggestions, 1),
        }


def _search(folder: str, trials: int, sampler: str, slots: int) -> Any:
    from distprune.search.config import Search

    changes = {"sampler": sampler, "scheduler": "pareto_halving", "workers": {"cpus": 1, "most": slots}}
    return Search.load(CONFIG, storage=folder, name="s", limits={"trials": trials}, **changes)


def own(folder: str, *, trials: int, slots: int, count: int, sampler: str) -> dict[str, Any]:
    """The simulator in place of Ray: what is left is the driver's own part."""
    from distprune.search import driver
    from distprune.search.finale import close_tables
    from distprune.search.proposer import Proposer
    from distprune.search.simulate import Simulator

    meter, heard = Meter(), 0
    Proposer.ask = meter.timed(Proposer.ask)  # type: ignore[method-assign]
    driver.finalize = close_tables

    def curve(job: Any) -> Iterator[dict[str, Any]]:
        nonlocal heard
        for row in reports(job.plain(), count):
            heard += 1
            yield row

    def listen(event: str, facts: dict[str, Any]) -> None:
        meter.report() if event == "progress" else None

    begun = time.monotonic()
    run = driver.start(_search(folder, trials, sampler, slots), engine=Simulator(curve, workers=slots), listen=listen)
    row = {**meter.row(), "wall_s": time.monotonic() - begun, "reports": heard}
    again, cpu = time.monotonic(), time.process_time()
    driver.resume(run.path, limits={}, engine=Simulator(curve, workers=slots), listen=listen)
    return {**row, "reopen_s": time.monotonic() - again, "reopen_cpu_s": time.process_time() - cpu}


def sleeper(count: int, seconds: float, log: str, ours: bool) -> Any:
    """A trainable that sleeps between reports and notes when; pickled by value, so that its actors import nothing but Ray Tune."""
    from ray import tune

    made = reports

    class Sleeper(tune.Trainable):  # type: ignore[misc]
        def setup(self, config: dict[str, Any]) -> None:
            job = json.loads(config["job"]) if ours else {"number": 0, "recipe": {"sparsity": config["sparsity"]}, "rungs": []}
            self._rows = self._slept(made(job, count))
            if ours:
                from distprune.search.parcels import Parcels

                self._parcels = Parcels(self._rows)

        def _slept(self, rows: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
            for row in rows:
                begun = time.time()
                time.sleep(seconds / count)
                with open(f"{log}/{os.getpid()}", "a") as file:
                    file.write(f"{begun} {time.time()} {row['index']}\n")
                yield row

        def step(self) -> dict[str, Any]:
            if ours:
                rows = self._parcels.next()
                return {"r": json.dumps(rows), "done": rows[-1]["final"]}
            row = next(self._rows)
            return {"objective": row["objective"], "cost": row["cost"], "metrics": row["extra"], "done": row["final"]}

        def reset_config(self, new_config: dict[str, Any]) -> bool:
            self.setup(new_config)
            return True

    return Sleeper


def busy(log: str, slots: int) -> tuple[float, int]:
    """(share of the slots that slept, reports), from when all slots were taken to when the last trial began."""
    spans = [tuple(map(float, line.split())) for path in Path(log).iterdir() for line in path.read_text().splitlines()]
    firsts = sorted(begun for begun, _, index in spans if index == 0)
    low, high = firsts[min(slots, len(firsts)) - 1], firsts[-1]
    slept = sum(max(min(end, high) - max(begun, low), 0.0) for begun, end, _ in spans)
    return slept / (slots * (high - low)) if high > low else math.nan, len(spans)


def distprune(folder: str, *, trials: int, slots: int, count: int, seconds: float) -> dict[str, Any]:
    """A search on real Ray whose trials sleep."""
    import ray

    from distprune.search import driver, runner
    from distprune.search.finale import close_tables

    meter, log = Meter(), f"{folder}/log"
    os.mkdir(log)
    driver.finalize = close_tables
    ray.init(num_cpus=slots, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    runner.check_machine = lambda search: None
    runner.Worker = sleeper(count, seconds, log, ours=True)  # type: ignore[misc]
    runner.Face.suggest = meter.timed(runner.Face.suggest)  # type: ignore[method-assign]
    heard = runner.Gate.on_trial_result

    def hear(*args: Any) -> Any:
        meter.report()
        return heard(*args)

    runner.Gate.on_trial_result = hear  # type: ignore[method-assign]
    engine = runner.Ray(None, lambda event, facts: None)
    driver.start(_search(folder, trials, "tpe", slots), engine=engine, listen=lambda event, facts: None)
    share, number = busy(log, slots)
    return {**meter.row(), "busy": share, "reports": number}


SPACES: list[Any] = []  # what `propose` draws from: OptunaSearch pickles it by its name


def propose(trial: Any) -> dict[str, Any]:
    """A recipe's sparsity; its other parameters are drawn as well."""
    return {"sparsity": SPACES[0].build(trial).sparsity}


def plain(folder: str, *, trials: int, slots: int, count: int, seconds: float) -> dict[str, Any]:
    """The script that one writes without distprune: OptunaSearch over the same space, ASHA, Ray's default loggers off."""
    os.environ.update(TUNE_DISABLE_AUTO_CALLBACK_LOGGERS="1", RAY_AIR_NEW_OUTPUT="0", RAY_ENABLE_UV_RUN_RUNTIME_ENV="0")
    import optuna
    import ray
    from ray import tune
    from ray.tune.schedulers import ASHAScheduler
    from ray.tune.search.optuna import OptunaSearch

    from distprune.search.setup import set_up

    meter, log = Meter(), f"{folder}/log"
    os.mkdir(log)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    ray.init(num_cpus=slots, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    SPACES.append(set_up(_search(folder, trials, "tpe", slots)).space)

    class Hear(tune.Callback):  # type: ignore[misc]
        def on_trial_result(self, *args: Any, **options: Any) -> None:
            meter.report()

    sampler = optuna.samplers.TPESampler(multivariate=True, group=True, seed=0)
    OptunaSearch.suggest = meter.timed(OptunaSearch.suggest)
    tune.Tuner(
        tune.with_resources(sleeper(count, seconds, log, ours=False), {"cpu": 1}),
        tune_config=tune.TuneConfig(
            search_alg=OptunaSearch(propose, metric="objective", mode="max", sampler=sampler),
            scheduler=ASHAScheduler(time_attr="cost", metric="objective", mode="max", max_t=int(20 * SAMPLES), grace_period=int(SAMPLES)),
            num_samples=trials,
            max_concurrent_trials=slots,
            reuse_actors=True,
        ),
        run_config=tune.RunConfig(
            name="plain",
            storage_path=folder,
            callbacks=[Hear()],
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
            verbose=0,
        ),
    ).fit()
    share, number = busy(log, slots)
    return {**meter.row(), "busy": share, "reports": number}


SIDES = {"own": own, "distprune": distprune, "plain": plain}


def measure(side: str, **options: Any) -> dict[str, Any]:
    """A measurement in a process of its own."""
    text = json.dumps({"side": side, **options})
    done = subprocess.run([sys.executable, __file__, "one", "--case", text], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{side} failed:\n{done.stderr[-3000:]}")
    return {"side": side, **options, **json.loads(done.stdout.splitlines()[-1])}


def one(case: dict[str, Any]) -> None:
    """Run a case here and print its row."""
    import torch

    torch.set_num_threads(1)
    folder = tempfile.mkdtemp(prefix="distprune-engine-")
    try:
        print(json.dumps(SIDES[case.pop("side")](folder, **case)))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def add(row: dict[str, Any]) -> None:
    """Add a row to the file."""
    from distprune.environment import environment

    rows = json.loads(FILE.read_text()) if FILE.exists() else []
    rows.append({**row, "load": os.getloadavg()[0], "environment": environment()})
    FILE.write_text(json.dumps(rows, indent=1) + "\n")


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: a line a measurement; CPU a trial includes its reports."""
    head = ("side", "sampler", "trials", "slots", "trial s", "reports", "CPU ms/trial", "/report", "/suggestion", "KB/trial", "MB", "busy")
    lines = []
    for row in rows:
        shared = (row["trials"], row["slots"], row.get("seconds", ""), row["reports"])
        costs = (f"{1000 * row['cpu_s'] / row['trials']:.2f}", f"{1000 * row['cpu_s'] / row['reports']:.2f}", f"{row['suggestion_ms']:.2f}")
        memory = (f"{1024 * row['grown_mb'] / row['trials']:.0f}", f"{row['resident_mb']:.0f}")
        lines.append((row["side"], row.get("sampler", "tpe"), *shared, *costs, *memory, f"{row['busy']:.3f}" if "busy" in row else ""))
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in [head, ["---"] * len(head), *lines])


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["own", "ray", "one", "table"])
    parser.add_argument("--sizes", type=int, nargs="+", default=[100, 1000, 10_000], help="trials of the own part")
    parser.add_argument("--slots", type=int, default=64, help="trials at once on real Ray")
    parser.add_argument("--trials", type=int, default=256)
    parser.add_argument("--seconds", type=float, default=30.0, help="of a trial on real Ray")
    parser.add_argument("--reports", type=int, nargs="+", default=[20, 2], help="of a trial on real Ray")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part == "one":
        return one(json.loads(options.case))
    cases: list[dict[str, Any]] = []
    if options.part == "own":
        for trials in options.sizes:
            cases += [
                {"side": "own", "trials": trials, "slots": max(trials // 10, 1), "count": count, "sampler": "random"} for count in (20, 2)
            ]
    if options.part == "ray":
        shared = {"trials": options.trials, "slots": options.slots, "seconds": options.seconds}
        cases = [{"side": side, **shared, "count": count} for count in options.reports for side in ("distprune", "plain")]
    for case in cases * options.repeats:
        add(measure(**case))
    print(table(json.loads(FILE.read_text())))


if __name__ == "__main__":
    main()
