"""Jobs on a real Ray head with token authentication, as a user runs them: each command is a process of its own."""

import os
import re
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from heads import Cable, Head, is_one_line, real_head

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]

COMMAND_S = 600
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
LONG = SEARCH.replace("tiny", "long").replace("2ep", "40ep") + "limits: {trials: 400}\n"
MODEL = """
from distprune.core.models.mlp import mlp
from my_models.sizes import DEFAULT

def net(shape, classes, *, hidden: tuple[int, ...] = DEFAULT):
    return mlp(shape, classes, hidden=hidden)
"""
NEEDY = """
from distprune.core.models.mlp import mlp
from dp_test_package import SIZE

def net(shape, classes):
    return mlp(shape, classes, hidden=(SIZE,))
"""


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    pytest.importorskip("aiohttp", reason="needs ray[default]: uv sync --group dev")
    with real_head(tmp_path_factory.mktemp("home"), tmp_path_factory.mktemp("client")) as head:
        yield head


def _write_models(folder: Path) -> None:
    (package := folder / "my_models").mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "sizes.py").write_text("DEFAULT = (8,)\n")
    (package / "small.py").write_text(MODEL)


def _job(output: str, name: str) -> str:
    found = re.search(rf"^submitted ({name}-\d{{8}}-\d{{6}});", output, re.MULTILINE)
    assert found is not None, output
    return found[1]


def _write_wheel(folder: Path) -> Path:
    """A package of one line that no index has."""
    wheel, facts = folder / "dp_test_package-1.0-py3-none-any.whl", "dp_test_package-1.0.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("dp_test_package.py", "SIZE = 12\n")
        archive.writestr(f"{facts}/METADATA", "Metadata-Version: 2.1\nName: dp-test-package\nVersion: 1.0\n")
        archive.writestr(f"{facts}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(
            f"{facts}/RECORD", "".join(f"{name},,\n" for name in ("dp_test_package.py", f"{facts}/METADATA", f"{facts}/WHEEL"))
        )
    return wheel


def test_a_search_is_submitted_followed_and_fetched(head: Head) -> None:
    import distprune

    (head.folder / "tiny.yaml").write_text(SEARCH)
    _write_models(head.folder)  # not installed: they must travel with the job

    submitted = head.distprune("submit", "tiny.yaml", "--trials", "3", "--address", head.address, RAY_ADDRESS="127.0.0.1:1")
    assert submitted.returncode == 0, submitted.stdout + submitted.stderr
    assert "Pareto front of" in submitted.stdout and "SUCCEEDED" in submitted.stdout
    assert submitted.stderr == ""
    job = _job(submitted.stdout, "tiny")
    assert (Path(head.environment["HOME"]) / "runs" / "tiny" / "search.yaml").is_file()

    status = head.distprune("status", job, "--address", head.address)
    assert (status.returncode, status.stderr) == (0, "")
    assert status.stdout.startswith(f"{job}: SUCCEEDED, started 2") and status.stdout.endswith(", ~/runs/tiny\n")

    fetched = head.distprune("fetch", job, "--address", head.address, "--to", "here")
    assert (fetched.returncode, fetched.stdout) == (0, "fetched to here/tiny\n"), fetched.stderr
    folder = head.folder / "here" / "tiny"
    assert distprune.Result(folder).trials.num_rows == 3
    exported = head.distprune("export", "here/tiny", "--to", "exported")
    assert exported.returncode == 0 and (head.folder / "exported" / "weights.safetensors").exists(), "the weights came along"
    assert [path.name for path in folder.parent.iterdir()] == ["tiny"]

    # The run folder is on the head already: the driver refuses, and its exit code comes through.
    refused = head.distprune("submit", "tiny.yaml", "--address", head.address)
    assert refused.returncode == 2, refused.stdout + refused.stderr
    assert "exists already. Go on with it" in refused.stdout and "FAILED, exit code 2" in refused.stdout


def test_a_job_is_followed_over_a_bad_line_stopped_by_another_and_resumed_from_elsewhere(head: Head) -> None:
    import distprune

    (head.folder / "long.yaml").write_text(LONG)
    if not (head.folder / "my_models").exists():
        _write_models(head.folder)
    submitted = head.distprune("submit", "long.yaml", "--no-follow", "--address", head.address)
    assert submitted.returncode == 0, submitted.stdout + submitted.stderr
    job = _job(submitted.stdout, "long")
    cable = Cable(int(head.address.rpartition(":")[2]))
    try:
        following = head.begin("logs", job, "--address", cable.address)
        output = _read_until(following, "trials done")
        cable.cut()
        output += _read_until(following, "connection lost")
        cable.mend()
        output += _read_until(following, "trials done")
        running = head.distprune("status", job, "--address", head.address)
        assert re.search(r": RUNNING, \d+/400 trials, started ", running.stdout)
        refused = head.distprune("resume", job, "--address", head.address)
        is_one_line(refused, f"{job} is RUNNING and works on ~/runs/long.")
        stopped = head.distprune("stop", job, "--address", head.address)
        assert (stopped.returncode, stopped.stderr) == (0, "")
        assert stopped.stdout == f"{job}: STOPPED\nNothing is lost. Go on with it: distprune resume {job} --address {head.address}\n"
        output += following.communicate(timeout=60)[0]
        assert following.returncode == 143, output
    finally:
        cable.close()
    assert "Interrupted; nothing is lost. Go on with: distprune resume" in output, "the driver had time to close its tables"
    whole = head.distprune("logs", job, "--no-follow", "--address", head.address)
    said = [line for line in output.splitlines() if not line.startswith(("connection lost; ", "connected again"))]
    assert whole.returncode == 143 and said == whole.stdout.splitlines(), "each line is shown once"

    (head.folder / "elsewhere").mkdir()  # without the modules
    elsewhere = Head(head.address, head.gcs, head.environment, head.folder / "elsewhere")
    resumed = elsewhere.distprune("resume", job, "--trials", "3", "--address", head.address)
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert "Pareto front of" in resumed.stdout and "found: " in resumed.stdout
    fetched = elsewhere.distprune("fetch", _job(resumed.stdout, "long"), "--address", head.address)
    assert fetched.returncode == 0, fetched.stderr
    result = distprune.Result(elsewhere.folder / "runs" / "long")
    assert result.trials.num_rows >= 3 and result.pareto()


def _read_until(process: "subprocess.Popen[str]", text: str) -> str:
    """Its lines up to the first that holds the text."""
    assert process.stdout is not None
    lines, until = [], time.monotonic() + COMMAND_S
    for line in process.stdout:
        lines.append(line)
        if text in line:
            return "".join(lines)
        assert time.monotonic() < until, lines
    raise AssertionError(f"it has ended without {text!r}: {''.join(lines)}")


@pytest.mark.parametrize("installer", ["pip", "uv"])
def test_a_pinned_environment_travels(installer: str, head: Head) -> None:
    (folder := head.folder / installer).mkdir()
    (folder / "needy.py").write_text(NEEDY)
    recipe = SEARCH.replace("tiny", f"needy-{installer}").replace('{import: "my_models.small:net", hidden: [16]}', '{import: "needy:net"}')
    (folder / "needy.yaml").write_text(recipe)
    wheel = _write_wheel(folder)
    (folder / "pinned.txt").write_text(f"--no-index\n{wheel.name}\n")
    here = {"PYTHONPATH": f"{head.environment['PYTHONPATH']}{os.pathsep}{wheel}"}  # the user has the package, the nodes have not
    client = Head(head.address, head.gcs, head.environment | here, folder)
    done = client.distprune("submit", "needy.yaml", "--trials", "1", f"--{installer}", "pinned.txt", "--address", head.address)
    assert done.returncode == 0 and "Pareto front of" in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"RAY_AUTH_TOKEN_PATH": None}, "wants a token, and there is none here. Ray looks for the token in RAY_AUTH_TOKEN"),
        ({"RAY_AUTH_TOKEN": "f" * 64}, "refuses this token"),
    ],
    ids=["no token", "wrong token"],
)
def test_errors_about_the_token(head: Head, changes: dict[str, str | None], says: str) -> None:
    is_one_line(head.distprune("status", "any", "--address", head.address, **changes), says)


def test_a_driver_without_a_token_is_refused_too(head: Head) -> None:
    config = str(Path(__file__).parents[2] / "configs" / "digits.yaml")
    done = head.distprune("search", config, "--address", head.gcs, RAY_AUTH_TOKEN_PATH=None)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stdout + done.stderr
    assert "wants a token, and there is none here" in done.stderr and not (head.folder / "runs" / "digits").exists()


def test_a_token_is_used_where_there_is_one(head: Head) -> None:
    done = head.distprune("status", "any", "--address", head.address, RAY_AUTH_MODE=None)
    is_one_line(done, "Unknown job 'any'")
    environment = {key: value for key, value in head.environment.items() if key != "RAY_AUTH_MODE"} | {"RAY_ADDRESS": head.gcs}
    program = "from distprune.search import access; access.connect('auto'); import ray; print(len(ray.nodes()))"
    joined = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=COMMAND_S)
    assert joined.stdout == "1\n", joined.stderr


def test_a_wrong_search_is_refused_before_the_network(head: Head) -> None:
    (head.folder / "wrong.yaml").write_text("name: x\nrecipe: {data: digits, model: {name: mlp}, train: {length: 2ep}}\nspeed: 1\n")
    is_one_line(head.distprune("submit", "wrong.yaml", "--address", "http://127.0.0.1:1"), "Unknown key in search: 'speed'")
