"""A Ray cluster on this machine, drivers on it, and the means to kill any part of them at a moment that the report stream gives."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

from distprune.store.folder import RunFolder
from distprune.store.reports import read

TESTS = Path(__file__).parents[1]
KINDS = ("worker", "node", "driver")
PATIENCE_S = 240.0  # for one row more: then something hangs
_POLL_S = 0.05
_QUICK = {"health_check_period_ms": 1000, "health_check_failure_threshold": 10}  # a dead node is known as dead in ten seconds


def environment() -> dict[str, str]:
    """Of drivers and nodes: the toys can be imported and take some seconds, and nothing is asked of or left in the user's home."""
    path = os.pathsep.join([str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": path, "RAY_AUTH_MODE": "disabled", "OMP_NUM_THREADS": "1", "TOYS_SLEEP_S": "0.02"}


class Nodes:
    """A cluster of a head, which runs no trials and to which drivers connect, and of nodes of one CPU each, which can be killed."""

    def __init__(self, count: int = 2) -> None:
        with self._unknown():
            try:
                self._begin(count)
            except Exception:  # Ray gives a node 30 seconds to begin, which a busy machine exceeds now and then
                self._begin(count)

    def _begin(self, count: int) -> None:
        from ray.cluster_utils import Cluster

        head = {"num_cpus": 0, "include_dashboard": False, "include_log_monitor": False, "_system_config": _QUICK}
        self._cluster = Cluster(initialize_head=True, head_node_args=head)
        self._nodes = [self._cluster.add_node(num_cpus=1) for _ in range(count)]

    @staticmethod
    @contextmanager
    def _unknown() -> Iterator[None]:
        """Ray notes its latest cluster for whoever asks for none in particular: others on this machine are not to come here."""
        with (
            mock.patch.dict(os.environ, environment()),
            mock.patch("ray._private.utils.write_ray_address"),
            mock.patch("ray._common.utils.reset_ray_address"),
        ):
            yield

    @property
    def address(self) -> str:
        """Where drivers connect."""
        return str(self._cluster.address)

    def kill_worker(self, chance: random.Random) -> bool:
        """SIGKILL one of the processes that run trials. False if there is none at the moment."""
        raylets = {node.all_processes["raylet"][0].process.pid for node in self._nodes}
        if not (workers := sorted(pid for pid in _children(raylets) if _runs(_command(pid)))):
            return False
        os.kill(chance.choice(workers), signal.SIGKILL)
        return True

    def kill_node(self, chance: random.Random) -> bool:
        """SIGKILL all processes of a node, and begin a new one in its place."""
        node = self._nodes.pop(chance.randrange(len(self._nodes)))
        self._cluster.remove_node(node, allow_graceful=False)
        with self._unknown():
            try:
                self._nodes.append(self._cluster.add_node(num_cpus=1))
            except Exception:  # as above
                self._nodes.append(self._cluster.add_node(num_cpus=1))
        return True

    def close(self) -> None:
        """End all of it."""
        with self._unknown():
            self._cluster.shutdown()


def _children(parents: set[int]) -> Iterator[int]:
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                after_name = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:  # it has just ended
                continue
            if int(after_name[1]) in parents:
                yield int(entry.name)


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""


def _runs(command: str) -> bool:
    """Whether that is an actor: Ray gives its processes titles."""
    title = command.partition("\0")[0]
    return title.startswith("ray::") and not title.startswith("ray::IDLE") and not title.endswith("Agent")


class Driver:
    """A driver in a process of its own."""

    def __init__(self, address: str, *arguments: str, log: Path) -> None:
        with log.open("a") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "distprune", *arguments, "--address", address],
                env=environment(),
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._log = log

    @property
    def ended(self) -> bool:
        """Whether it is gone."""
        return self._process.poll() is not None

    def kill(self) -> None:
        """SIGKILL it."""
        self._process.kill()
        self._process.wait()

    def check(self) -> None:
        """Raise unless it has ended well."""
        if self._process.wait(PATIENCE_S):
            raise RuntimeError(f"a driver ended with {self._process.returncode}: {self._log.read_text()[-3000:]}")


@dataclass
class Kill:
    """One kill: what, when the stream has how many rows, and how it went on."""

    kind: str  # one of KINDS
    at: int
    rows: int = 0  # of the stream, when it was done
    recovery_s: float | None = None  # until what it had interrupted has reported again
    _when: float = field(default=0.0, repr=False)
    _attempts: frozenset[tuple[int, str]] = field(default=frozenset(), repr=False)

    def did(self, attempts: frozenset[tuple[int, str]], rows: int) -> None:
        """It was done just now."""
        self.rows, self._when, self._attempts = rows, time.monotonic(), attempts

    def look(self, attempts: frozenset[tuple[int, str]], rows: int) -> None:
        """Note the first report of a trial's new attempt, or after a driver's death the first at all."""
        interrupted = {trial for trial, _ in self._attempts}
        again = rows > self.rows if self.kind == "driver" else any(trial in interrupted for trial, _ in attempts - self._attempts)
        if self.recovery_s is None and again:
            self.recovery_s = round(time.monotonic() - self._when, 2)

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        return {"kind": self.kind, "at": self.at, "rows": self.rows, "recovery_s": self.recovery_s}


def seeded(seed: str, kinds: Sequence[str], *, rows: int) -> list[Kill]:
    """Kills at random moments, one in each of as many equal parts of the first `rows` reports."""
    chance, part = random.Random(seed), rows // len(kinds)
    return [Kill(kind, place * part + chance.randrange(2, part)) for place, kind in enumerate(kinds)]


def torment(config: Path, folder: RunFolder, nodes: Nodes, kills: Sequence[Kill], *, seed: str) -> list[Kill]:
    """Drive a search to its end, killing as told and resuming where the driver was killed. Returns the kills that were done."""
    chance, log = random.Random(seed), config.with_suffix(".log")
    driver = Driver(nodes.address, "search", str(config), log=log)
    done: list[Kill] = []
    for kill in [*kills, None]:
        _wait(driver, folder, done, kill.at if kill else None)
        if kill is None or driver.ended:
            break
        attempts, rows = _seen(folder)
        if kill.kind == "driver":
            driver.kill()
            driver = Driver(nodes.address, "resume", str(folder.path), log=log)
        elif not (nodes.kill_worker if kill.kind == "worker" else nodes.kill_node)(chance):
            continue
        kill.did(attempts, rows)
        done.append(kill)
    driver.check()
    return done


def _wait(driver: Driver, folder: RunFolder, done: Sequence[Kill], moment: int | None) -> None:
    """Until the stream has `moment` rows, or the driver has ended."""
    latest, heard = 0, time.monotonic()
    while not driver.ended:
        attempts, rows = _seen(folder)
        for kill in done:
            kill.look(attempts, rows)
        if moment is not None and rows >= moment:
            return
        if rows > latest:
            latest, heard = rows, time.monotonic()
        if time.monotonic() - heard > PATIENCE_S:
            raise TimeoutError(f"no report in {PATIENCE_S:.0f} s after {rows} of them")
        time.sleep(_POLL_S)


def _seen(folder: RunFolder) -> tuple[frozenset[tuple[int, str]], int]:
    """((trial, attempt) of all reports, how many reports)."""
    table = read(folder.reports).select(["trial", "attempt"]).to_pylist()
    return frozenset((row["trial"], row["attempt"]) for row in table), len(table)
