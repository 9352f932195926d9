"""A search on real nodes, each with an address, processes and files of its own: one is cut off, one is killed, and the head is lost.

Nodes are those of `cluster/local_two_nodes.sh`. Nothing here depends on how fast anything is: the network that is trained waits where the
test wants it to.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from laws import NONE, broken, masks
from searches import reports, search, start, trials

from distprune.search.trial import run_trial
from distprune.store.folder import RunFolder
from distprune.store.reports import read

SCRIPT = Path(__file__).parents[2] / "cluster" / "local_two_nodes.sh"
HAS_NAMESPACES = (
    sys.platform == "linux"
    and os.geteuid() == 0
    and all(map(shutil.which, ("ip", "nsenter", "unshare", "pgrep")))
    and subprocess.run(["unshare", "--net", "--pid", "--fork", "--mount-proc", "true"], capture_output=True, check=False).returncode == 0
)
pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(
        not HAS_NAMESPACES,
        reason="needs root, and ip and pgrep of the packages iproute2 and procps; without, tests/search/test_chaos.py kills nodes of "
        "ray.cluster_utils",
    ),
]
PATIENCE_S = 200.0  # for one thing to happen: then something hangs
TRIALS, EPOCHS, STEPS = 7, 6, 17  # steps of an epoch
# A node that is silent is known as dead in some ten seconds.
QUICK = {
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "8",
}


class Nodes:
    """The script's nodes, and what the networks that are trained on them leave behind."""

    def __init__(self, folder: Path, marks: Path, shared: Path) -> None:
        self.folder, self.marks, self.shared = folder, marks, shared
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_AUTH", "RAY_ADDRESS"))}
        self._environment = {**kept, **QUICK, "PATH": path, "NODES": str(folder), "HOME": str(shared), "OMP_NUM_THREADS": "1"}

    def begin(self, *arguments: str, **changes: str) -> "subprocess.Popen[str]":
        """Begin a command of the script."""
        return subprocess.Popen(
            [str(SCRIPT), *arguments],
            env=self._environment | changes,
            cwd=self.shared,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            text=True,
        )

    def end(self, process: "subprocess.Popen[str]") -> str:
        """Its output, once it has ended well."""
        try:
            output, _ = process.communicate(timeout=PATIENCE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            output, _ = process.communicate()
        token = (self.folder / "auth_token").read_text() if (self.folder / "auth_token").exists() else None
        assert token is None or token not in output
        assert process.returncode == 0, f"{output}\n{self.logs()}"
        return output

    def do(self, *arguments: str, **changes: str) -> str:
        """Run a command of the script."""
        return self.end(self.begin(*arguments, **changes))

    def logs(self) -> str:
        """The ends of the nodes' logs."""
        paths = [path for pattern in ("*/log", "*/ray/session_2*/logs/*.out") for path in sorted(self.folder.glob(pattern))]
        return "\n".join(f"{path}: {path.read_text(errors='replace')[-1500:]}" for path in paths) + self.said()[-3000:]

    def steps(self, name: str) -> int:
        """Steps of training that were done on a node."""
        path = self.marks / name / "steps"
        return path.stat().st_size if path.exists() else 0

    def hold(self, name: str) -> None:
        """The trial that runs there, or the next, waits in its last epoch."""
        (self.marks / name / "held").unlink(missing_ok=True)
        (self.marks / name / "hold").touch()

    def release(self, name: str) -> None:
        """Let it go on."""
        (self.marks / name / "hold").unlink()

    def is_held(self, name: str) -> bool:
        """Whether it waits just now: it says so twenty times a second."""
        path = self.marks / name / "held"
        return path.exists() and time.time() - path.stat().st_mtime < 2

    def runs(self, name: str) -> bool:
        """Whether a node has processes left."""
        try:
            process = int((self.folder / name / "pid").read_text())
            return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
        except (OSError, ValueError):
            return False

    def said(self) -> str:
        """What the drivers of jobs on the head have printed."""
        return "".join(path.read_text() for path in self.folder.glob("head/ray/session_2*/logs/job-driver-*.log"))


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[Nodes]:
    folder = Path(tempfile.mkdtemp(prefix="dp", dir="/tmp"))  # the path of a Unix socket has room for 107 characters
    for name in ("head", "worker", "second"):
        (tmp_path / "marks" / name).mkdir(parents=True)
    (tmp_path / "shared").mkdir()
    found = Nodes(folder, tmp_path / "marks", tmp_path / "shared")
    # Should this process be killed, nothing stays behind either.
    last_word = f"tail --pid={os.getpid()} -f /dev/null; NODES={folder} {SCRIPT} stop; rm -rf {folder}"
    watch = subprocess.Popen(["bash", "-c", last_word], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    before = _namespaces()
    try:
        yield found
    finally:
        found.do("stop")
        os.killpg(watch.pid, signal.SIGKILL)
        watch.wait()
        shutil.rmtree(folder)
    assert _namespaces() == before


def _namespaces() -> str:
    return subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout


def _until(true: Callable[[], Any], what: str, nodes: Nodes) -> Any:
    end = time.monotonic() + PATIENCE_S
    while not (found := true()):
        assert time.monotonic() < end, f"{what}: not in {PATIENCE_S:.0f} s\n{nodes.logs()}"
        time.sleep(0.1)
    return found


def _attempts(folder: RunFolder) -> dict[int, list[str]]:
    """The attempts that were heard of each trial, in the order of the stream, each as often as its turn came."""
    found: dict[int, list[str]] = {}
    for row in read(folder.reports).select(["trial", "attempt"]).to_pylist() if folder.reports.exists() else []:
        turns = found.setdefault(row["trial"], [])
        if turns[-1:] != [row["attempt"]]:
            turns.append(row["attempt"])
    return found


def test_partition_kill_and_a_lost_head(nodes: Nodes, tmp_path: Path) -> None:
    changes: dict[str, Any] = {
        "recipe": {
            "data": "digits",
            "model": {"import": "paced:net", "folder": str(nodes.marks), "last": (EPOCHS - 1) * STEPS + 5},
            "train": {"length": f"{EPOCHS}ep", "batch_size": 64, "optimizer": {"name": "sgd", "lr": 0.05}},
        },
        "space": {"paradigm": ["at_init", "gradual"], "criterion": ["magnitude", "snip"], "allocator": ["erk", "uniform"]}
        | {"regularizer": ["none", "l2"], "sparsity": [0.5, 0.9]},
        "scheduler": "none",  # and a random sampler: then all is to be as on one machine that nobody disturbs
        "cache": False,
        "trials": TRIALS,
    }
    value = search(nodes.shared / "runs", **changes)
    folder = RunFolder(value.folder)
    (nodes.shared / "search.yaml").write_text(yaml.safe_dump(value.plain()))
    shutil.copy(Path(__file__).with_name("paced.py"), nodes.shared)

    nodes.do("start")
    assert (nodes.folder / "auth_token").stat().st_mode & 0o777 == 0o600
    for name in ("head", "worker"):
        nodes.hold(name)
    dashboard = ("--address", "http://127.0.0.1:8265")
    submitted = nodes.do("on", "head", "distprune", "submit", "search.yaml", "--no-follow", "--storage", value.storage, *dashboard)
    assert re.search(r"^submitted s-", submitted, re.MULTILINE)
    _until(lambda: nodes.is_held("head") and nodes.is_held("worker"), "trials on both nodes", nodes)

    # A partition: the worker's trial has made all of its reports but the last, and is given up while it is at work on that one.
    nodes.do("cut", "worker")
    _until(lambda: "1 trials at once, 2 before" in nodes.said(), "a head that knows of the partition", nodes)
    nodes.release("head")
    taken_over = _until(lambda: [n for n, turns in _attempts(folder).items() if len(turns) > 1], "another attempt at the trial", nodes)
    (zombie,) = taken_over
    late, heir = _attempts(folder)[zombie]
    assert nodes.is_held("worker"), "the worker that is given up for dead lives on"
    for name in ("head", "second"):
        nodes.hold(name)
    joining = nodes.begin("add", "second")
    nodes.release("worker")
    _until(lambda: list(folder.checkpoints.glob(f"{zombie}/{late}/*/state.safetensors")), "what the zombie writes late", nodes)
    nodes.do("heal", "worker")
    _until(lambda: not nodes.runs("worker"), "the end of a node that was declared dead", nodes)
    assert _attempts(folder)[zombie] == [late, heir]

    # A node joins, and is killed in the middle of a trial; then the head with its driver.
    nodes.end(joining)
    _until(lambda: nodes.is_held("second") and nodes.is_held("head"), "a trial on the node that has joined", nodes)
    nodes.do("kill", "second")
    nodes.do("kill", "head")
    assert not any(map(nodes.runs, ("head", "worker", "second")))
    states = [trial.state.is_finished() for trial in trials(folder)]
    assert any(states) and not all(states), "there is something to go on with"
    ends = {trial.number: trial.user_attrs["end"] for trial in trials(folder) if trial.state.is_finished()}
    assert ends[zombie]["deaths"] == ["node died"] and ends[zombie]["attempts"] == 2

    # A new head, and the search goes on where it was.
    nodes.release("head")
    nodes.do("add", "head", CPUS="2")
    nodes.do("on", "head", "distprune", "resume", str(folder.path), *dashboard)

    undisturbed = start(search(tmp_path / "whole", **changes), using=run_trial)
    found = broken(folder, most=TRIALS, reference=reports(undisturbed), aside=tmp_path / "aside", undisturbed=undisturbed)
    assert found == NONE
    assert masks(folder) == masks(undisturbed)
    assert _attempts(folder)[zombie] == [late, heir]
