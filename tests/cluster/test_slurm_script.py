"""The job script of Slurm, run with stand-ins for `srun`, `ray` and `distprune`: what it starts, how it goes on, and its exit code."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "cluster" / "slurm" / "search.sbatch"
NODES = 3
STUBS = {
    # As Slurm does: the command on each node, with the number of the node.
    "srun": f"""
        while [[ $1 == --* ]]; do shift; done
        set -m # a group of processes a node, ended as a whole
        trap 'for group in $(jobs -p); do kill -- -$group; done' TERM
        for node in $(seq 0 {NODES - 1}); do SLURM_NODEID=$node "$@" & done
        wait""",
    "ray": """
        echo "$SLURM_NODEID $RAY_AUTH_MODE $(stat -c %a "$RAY_AUTH_TOKEN_PATH") $(wc -c <"$RAY_AUTH_TOKEN_PATH") $*" >>"$HOME/ray"
        echo $$ >>"$HOME/pids"
        exec sleep 600""",
    "distprune": """
        trap 'echo interrupted >>"$HOME/distprune"; exit 130' INT
        echo "$RAY_AUTH_MODE $*" >>"$HOME/distprune"
        [ ! -e "$HOME/waits" ] || for second in $(seq 600); do sleep 0.1; done
        exit "$(cat "$HOME/code")" """,
    # Nodes are counted by a program that asks Ray; all others are really run.
    "python": f"""
        case "$2" in *ray.init*) [ "$(grep -c . "$HOME/ray")" = {NODES} ] ;; *) exec {sys.executable} "$@" ;; esac""",
    "sleep": """
        exec /bin/sleep "$([ "$1" = 5 ] && echo 0.05 || echo "$1")" """,
}


@pytest.fixture
def home(tmp_path: Path) -> Path:
    (tmp_path / "bin").mkdir()
    for name, text in STUBS.items():
        stub = tmp_path / "bin" / name
        stub.write_text(f"#!/bin/bash\n{text}\n")
        stub.chmod(0o755)
    (tmp_path / "digits.yaml").write_text("name: digits\n")
    (tmp_path / "code").write_text("0")
    return tmp_path


def _begin(home: Path) -> "subprocess.Popen[str]":
    slurm = {"SLURM_JOB_ID": "12345", "SLURM_NNODES": str(NODES), "SLURM_CPUS_PER_TASK": "8"}
    return subprocess.Popen(
        ["bash", str(SCRIPT), "digits.yaml", f"{home}/runs"],
        env={"PATH": f"{home}/bin:{os.environ['PATH']}", "HOME": str(home), "RAY_AUTH_TOKEN": "of somebody else", **slurm},
        cwd=home,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def _submit(home: Path) -> tuple[int, str]:
    process = _begin(home)
    output, _ = process.communicate(timeout=60)
    return process.returncode, output


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def _have_ended(pids: list[str]) -> bool:
    """Whether processes that were told to end do so."""
    until = time.monotonic() + 60
    while any(map(_is_alive, pids)) and time.monotonic() < until:
        time.sleep(0.05)
    return not any(map(_is_alive, pids))


def _is_alive(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="Slurm's script is for Linux")
def test_nodes_are_started_and_the_exit_code_comes_through(home: Path) -> None:
    (home / "code").write_text("7")
    code, output = _submit(home)
    assert (code, output) == (7, "")
    started = sorted(_lines(home / "ray"))
    assert len(started) == NODES and all(line.split()[1:4] == ["token", "600", "64"] for line in started)
    head, *workers = started
    assert "start --block" in head and "--head --include-dashboard=false" in head and "--num-cpus=7" in head
    assert all("--address=" in line and "--num-cpus=8" in line and "--head" not in line for line in workers)
    (asked,) = _lines(home / "distprune")
    address = asked.split()[-1]
    assert asked.startswith(f"token search digits.yaml --storage {home}/runs --address ") and f"--address={address} " in workers[0]
    assert _have_ended(_lines(home / "pids")), "all nodes are ended with the search"
    assert not list((home / ".distprune").rglob("auth_token")), "and the token is gone"


@pytest.mark.skipif(sys.platform != "linux", reason="Slurm's script is for Linux")
def test_submitted_again_it_goes_on(home: Path) -> None:
    (home / "runs" / "digits").mkdir(parents=True)
    (home / "runs" / "digits" / "search.yaml").touch()
    code, _ = _submit(home)
    (asked,) = _lines(home / "distprune")
    assert code == 0 and asked.startswith(f"token resume {home}/runs/digits --address ")


@pytest.mark.skipif(sys.platform != "linux", reason="Slurm's script is for Linux")
def test_the_end_of_the_time_interrupts_the_search(home: Path) -> None:
    (home / "waits").touch()
    process = _begin(home)
    end = time.monotonic() + 60
    while not _lines(home / "distprune"):
        assert time.monotonic() < end and process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)  # as Slurm sends it to the script alone
    process.communicate(timeout=60)
    assert process.returncode == 130 and _lines(home / "distprune")[-1] == "interrupted"
    assert _have_ended(_lines(home / "pids"))


def test_without_arguments_it_says_how(tmp_path: Path) -> None:
    done = subprocess.run(["bash", str(SCRIPT)], env={"PATH": os.environ["PATH"]}, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stderr.startswith("Usage: sbatch ")
