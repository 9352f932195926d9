"""Jobs on a real Ray head with token authentication, as a user runs them: each command is a process of its own."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]

START_S, COMMAND_S = 300, 600
TOKEN = "0123456789abcdef" * 4
SEARCH = """
name: tiny
recipe:
  data: digits
  model: {import: "my_models.small:net", hidden: [16]}
  train: {length: 2ep}
space:
  paradigm: [at_init, dense]
  criterion: [magnitude]
"""
MODEL = """
from distprune.core.models.mlp import mlp
from my_models.sizes import DEFAULT

def net(shape, classes, *, hidden: tuple[int, ...] = DEFAULT):
    return mlp(shape, classes, hidden=hidden)
"""


@dataclass(frozen=True)
class Head:
    """A head that runs, and what a client needs to talk to it."""

    address: str
    environment: dict[str, str]
    folder: Path  # where clients run

    def distprune(self, *arguments: str, **changes: str | None) -> subprocess.CompletedProcess[str]:
        """Run a command; a change to None takes a variable away."""
        environment = {key: value for key, value in (self.environment | changes).items() if value is not None}
        command = [sys.executable, "-m", "distprune", *arguments]
        done = subprocess.run(
            command, env=environment, cwd=self.folder, capture_output=True, text=True, timeout=COMMAND_S, stdin=subprocess.DEVNULL
        )
        assert TOKEN not in done.stdout + done.stderr
        return done


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    pytest.importorskip("aiohttp", reason="needs ray[default]")
    home = tmp_path_factory.mktemp("home")
    token = home / "token"
    token.touch(mode=0o600)
    token.write_text(TOKEN)
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")} | {
        "HOME": str(home),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
    }
    scratch = tempfile.mkdtemp(prefix="dp", dir="/tmp")  # the path of a Unix socket has room for 107 characters
    ports = dict(zip(("port", "dashboard-port", "dashboard-agent-listen-port", "ray-client-server-port"), _free_ports(4), strict=True))
    command = ["ray", "start", "--head", "--block", "--num-cpus=2", "--object-store-memory=100000000", "--disable-usage-stats"]
    command += [f"--temp-dir={scratch}", "--dashboard-host=127.0.0.1", *(f"--{name}={port}" for name, port in ports.items())]
    log = home / "head.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            command,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        address = f"http://127.0.0.1:{ports['dashboard-port']}"
        _wait_for(address, process, log)
        yield Head(address, environment, tmp_path_factory.mktemp("client"))
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            pass
        _kill_group(process.pid)
        process.wait()
        shutil.rmtree(scratch, ignore_errors=True)


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [int(each.getsockname()[1]) for each in sockets]
    for each in sockets:
        each.close()
    return ports


def _wait_for(address: str, process: subprocess.Popen[bytes], log: Path) -> None:
    """Until the job server asks for a token."""
    until = time.monotonic() + START_S
    while time.monotonic() < until:
        assert process.poll() is None, log.read_text()
        try:
            urllib.request.urlopen(f"{address}/api/jobs/", timeout=5).close()
        except urllib.error.HTTPError as error:
            with error:
                if error.code == 401:
                    return
        except OSError:
            pass
        time.sleep(0.5)
    raise AssertionError(f"no head after {START_S} s: {log.read_text()}")


def _kill_group(group: int) -> None:
    try:
        os.killpg(group, signal.SIGKILL)
    except ProcessLookupError:
        pass


def test_a_search_is_submitted_followed_and_fetched(head: Head) -> None:
    import distprune

    (head.folder / "tiny.yaml").write_text(SEARCH)
    package = head.folder / "my_models"  # not installed: it must travel with the job
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "sizes.py").write_text("DEFAULT = (8,)\n")
    (package / "small.py").write_text(MODEL)

    submitted = head.distprune("submit", "tiny.yaml", "--trials", "3", "--address", head.address, RAY_ADDRESS="127.0.0.1:1")
    assert submitted.returncode == 0, submitted.stdout + submitted.stderr
    assert "Pareto front of" in submitted.stdout and "SUCCEEDED" in submitted.stdout
    assert submitted.stderr == ""
    found = re.search(r"^submitted (tiny-\d{8}-\d{6});", submitted.stdout, re.MULTILINE)
    assert found is not None
    job = found[1]
    assert (Path(head.environment["HOME"]) / "runs" / "tiny" / "search.yaml").is_file()

    status = head.distprune("status", job, "--address", head.address)
    assert (status.returncode, status.stderr) == (0, "")
    assert status.stdout.startswith(f"{job}: SUCCEEDED, started 2") and "Pareto front of" in status.stdout

    fetched = head.distprune("fetch", job, "--address", head.address, "--to", "here")
    assert (fetched.returncode, fetched.stdout) == (0, "fetched to here/tiny\n"), fetched.stderr
    folder = head.folder / "here" / "tiny"
    assert distprune.Result(folder).trials.num_rows == 3
    exported = head.distprune("export", "here/tiny", "--to", "exported")
    assert exported.returncode == 0 and (head.folder / "exported" / "weights.safetensors").exists(), "the weights came along"
    assert [path.name for path in folder.parent.iterdir()] == ["tiny"]

    again = head.distprune("fetch", job, "--address", head.address, "--to", "here")
    assert again.returncode == 2 and "exists already" in again.stderr

    # The run folder is on the head already: the driver refuses, and its exit code comes through.
    refused = head.distprune("submit", "tiny.yaml", "--address", head.address)
    assert refused.returncode == 2, refused.stdout + refused.stderr
    assert "exists already. Go on with it" in refused.stdout and "FAILED, exit code 2" in refused.stdout


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"RAY_AUTH_MODE": None}, "export RAY_AUTH_MODE=token"),
        ({"RAY_AUTH_TOKEN_PATH": None}, "there is none. Ray looks for the token in RAY_AUTH_TOKEN"),
        ({"RAY_AUTH_TOKEN": "f" * 64}, "refuses this token (403)"),
    ],
    ids=["no mode", "no token", "wrong token"],
)
def test_errors_about_the_token(head: Head, changes: dict[str, str | None], says: str) -> None:
    _is_one_line(head.distprune("status", "any", "--address", head.address, **changes), says)


def test_errors_about_the_address_and_the_job(head: Head) -> None:
    (nothing,) = _free_ports(1)
    _is_one_line(head.distprune("fetch", "any", "--address", f"http://127.0.0.1:{nothing}"), "No Ray dashboard answers at")
    _is_one_line(head.distprune("status", "any", "--address", "127.0.0.1:8265"), "Write http://HEAD:8265")
    _is_one_line(head.distprune("status", "any", "--address", head.address), "Unknown job 'any'")


def test_a_wrong_search_is_refused_before_the_network(head: Head) -> None:
    (head.folder / "wrong.yaml").write_text("name: x\nrecipe: {data: digits, model: {name: mlp}, train: {length: 2ep}}\nspeed: 1\n")
    _is_one_line(head.distprune("submit", "wrong.yaml", "--address", "http://127.0.0.1:1"), "Unknown key in search: 'speed'")


def _is_one_line(done: subprocess.CompletedProcess[str], says: str) -> None:
    assert (done.returncode, done.stdout) == (2, ""), done.stdout + done.stderr
    assert done.stderr.startswith("Error: ") and done.stderr.count("\n") == 1
    assert says in done.stderr
