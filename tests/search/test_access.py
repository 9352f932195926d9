"""Ray on this machine asks for a token, which is in no file; a search that is told to end does so in order."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.ray, pytest.mark.slow]

PROGRAM = """
import os, signal
signal.signal(signal.SIGTERM, print)
from distprune.search import access
access.connect(None)
import ray
assert signal.getsignal(signal.SIGTERM) is print
assert os.environ["RAY_AUTH_MODE"] == "token" and len(os.environ["RAY_AUTH_TOKEN"]) == 64
print(ray.get(ray.remote(lambda: 6 * 7).remote()))
print(ray.get_runtime_context().gcs_address, flush=True)
input()
"""
STRANGER = """
import sys
from distprune.errors import UserError
from distprune.search import access
try:
    access.connect(sys.argv[1])
except UserError as error:
    print(error)
"""


def _environment(home: Path, **more: str) -> dict[str, str]:
    mine = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    return mine | {"HOME": str(home), "PYTHONPATH": str(Path(__file__).parents[2])} | more


def test_ray_on_this_machine_has_a_token_that_is_in_no_file(tmp_path: Path) -> None:
    pytest.importorskip("grpc", reason="needs ray[default]: uv sync --group dev")
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM], env=_environment(tmp_path), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "42\n"
        place = process.stdout.readline().strip()
        for more, says in (({}, "wants a token, and there is none here"), ({"RAY_AUTH_TOKEN": "f" * 64}, "refuses this token")):
            done = subprocess.run(
                [sys.executable, "-c", STRANGER, place], env=_environment(tmp_path, **more), capture_output=True, text=True, check=True
            )
            assert says in done.stdout and done.stdout.count("\n") == 1
    finally:
        process.communicate("\n", timeout=60)
    assert process.returncode == 0
    assert not list(tmp_path.rglob("*token*"))
