"""Ray on this machine asks for a token, which is in no file nor used elsewhere; a search that is told to end does so in order."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from distprune.errors import UserError
from distprune.search import access

pytestmark = [pytest.mark.ray, pytest.mark.slow]

PROGRAM = """
import os, signal, subprocess, sys
from pathlib import Path
signal.signal(signal.SIGTERM, print)
from distprune.search import access
access.connect(None)
import ray
assert signal.getsignal(signal.SIGTERM) is print
assert os.environ["RAY_AUTH_MODE"] == "token" and len(os.environ["RAY_AUTH_TOKEN"]) == 64
print(ray.get(ray.remote(lambda: 6 * 7).remote()))
print(ray.get_runtime_context().gcs_address, flush=True)
input()

# Another cluster is joined from here, or by a child process: what was made for this one is gone, and so is this one.
child = [sys.executable, "-c", "from distprune.search import access; import os; access.use_token(); print([*filter(AUTH, os.environ)])"]
child[2] = child[2].replace("AUTH", "lambda name: 'AUTH' in name or 'TOKEN' in name")
print(subprocess.run(child, capture_output=True, text=True, check=True).stdout.strip())
(home := Path.home() / ".ray").mkdir()
(home / "auth_token").write_text("e" * 64)
(home / "auth_token").chmod(0o600)
print(subprocess.run(child, capture_output=True, text=True, check=True).stdout.strip())
assert os.environ["RAY_AUTH_TOKEN"] and ray.is_initialized()
access.connect(None)
assert os.environ["RAY_AUTH_TOKEN"] and ray.is_initialized()
from distprune.errors import UserError
try:
    access.connect("127.0.0.1:1")
except UserError as error:
    print(error)
from ray._raylet import AuthenticationTokenLoader
print(AuthenticationTokenLoader.instance().get_raw_token(), ray.is_initialized(), os.environ.get("RAY_AUTH_TOKEN"))
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
    mine = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_AUTH", "RAY_ADDRESS"))}
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
        assert not list(tmp_path.rglob("*token*"))
    finally:
        said = process.communicate("\n", timeout=120)[0].splitlines()
    assert process.returncode == 0
    assert said[:2] == ["[]", "['RAY_AUTH_MODE']"], "in a child process, without a token and with one in a file"
    assert said[2].startswith("No Ray cluster answers at 127.0.0.1:1") and said[3:] == [f"{'e' * 64} False None"]


def test_a_token_that_the_user_has_set_since_is_his(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(access, "_look_again", lambda: None)
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_MODE", access._MADE):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)

    def known() -> list[str]:
        return [name for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_MODE", access._MADE) if name in os.environ]

    access._make_token()
    assert len(known()) == 3 and os.environ["RAY_AUTH_TOKEN"] not in os.environ[access._MADE]
    access._drop_made()
    assert known() == []
    access._make_token()
    os.environ["RAY_AUTH_TOKEN"] = "his"
    access._drop_made()
    access._drop_made()
    assert os.environ["RAY_AUTH_TOKEN"] == "his" and os.environ["RAY_AUTH_MODE"] == "token"
    os.environ["RAY_AUTH_MODE"] = "token"
    del os.environ["RAY_AUTH_TOKEN"]
    access._make_token()
    access._drop_made()
    assert known() == ["RAY_AUTH_MODE"], "the mode that was there before"


@pytest.mark.parametrize(("failures", "works"), [(1, True), (2, False)])
def test_a_ray_that_begins_too_slowly_has_a_second_chance(failures: int, works: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    said: list[str] = []

    def begin(**options: object) -> None:
        said.append("init")
        if said.count("init") <= failures:
            raise Exception("The current node timed out during startup.")

    monkeypatch.setattr(access, "_own", "")
    monkeypatch.setattr(ray, "init", begin)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "shutdown", lambda: said.append("shutdown"))
    monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(gcs_address="here:1"))
    if works:
        access.connect(None)
        assert access._own == "here:1"
    else:
        with pytest.raises(UserError, match=r"did not start on this machine: The current node timed out .* Try again when it is less busy"):
            access.connect(None)
    assert said == ["init", "shutdown", "init"]
