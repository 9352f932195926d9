"""Clients that a head refuses, or that find none: one line each, exit code 2, and no token in it."""

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from heads import TOKEN, Jobs, free_ports, silent, stub

from distprune.cli import head, main
from distprune.errors import UserError
from distprune.search import access

pytest.importorskip("aiohttp", reason="needs ray[default]: uv sync --group dev")
COMMANDS = [["status"], ["logs", "j"], ["stop", "j"], ["fetch", "j"], ["resume", "j"]]


@pytest.fixture
def nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """A user without a token, in a folder of his own; Ray looks again at what the environment says, then and afterwards."""
    from ray._raylet import AuthenticationTokenLoader, Config

    def look() -> None:
        Config.initialize("")
        AuthenticationTokenLoader.instance().reset_cache()

    with monkeypatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("RAY_AUTH") or name == "RAY_ADDRESS"]:
            patch.delenv(name)
        patch.setenv("HOME", str(tmp_path))
        patch.setenv("RAY_API_SERVER_ADDRESS", "")  # put back in the end: commands set it
        patch.setenv("RAY_AUTH_MODE", "")
        patch.delenv("RAY_AUTH_MODE")
        patch.chdir(tmp_path)
        look()
        yield patch
        os.environ.pop("RAY_AUTH_TOKEN", None)
    look()


def _refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(list(arguments)) == 2
    output, error = capsys.readouterr()
    assert output == "" and error.startswith("Error: ") and error.count("\n") == 1, output + error
    assert TOKEN not in error
    return error


def _guarded(token: str) -> "Jobs":
    """A head that asks for a token, as Ray's does."""

    class Guarded(Jobs):
        def __call__(self, method: str, path: str, headers: dict[str, str]) -> tuple[int, object]:
            if not (given := headers.get("authorization")):
                return 401, "Unauthorized: Missing authentication token"
            return (
                super().__call__(method, path, headers) if given == f"Bearer {token}" else (403, "Forbidden: Invalid authentication token")
            )

    (folder := Path("head")).mkdir()
    return Guarded(folder.absolute())


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
def test_a_client_without_a_token(command: list[str], nobody: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with stub(_guarded(TOKEN)) as address:
        error = _refused(capsys, *command, "--address", address)
    assert f"{address} wants a token, and there is none here. Ray looks for the token in RAY_AUTH_TOKEN" in error


def test_a_client_with_a_wrong_token_or_the_wrong_mode(nobody: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with stub(_guarded("f" * 64)) as address:
        nobody.setenv("RAY_AUTH_MODE", "disabled")
        assert "RAY_AUTH_MODE is disabled. First: export RAY_AUTH_MODE=token" in _refused(capsys, "status", "--address", address)
        nobody.delenv("RAY_AUTH_MODE")
        nobody.setenv("RAY_AUTH_TOKEN", TOKEN)
        assert f"{address} refuses this token. Take the one" in _refused(capsys, "status", "--address", address)


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o644])
def test_a_token_is_used_without_being_asked_for_and_kept_from_others(
    mode: int, nobody: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = Path.home() / ".ray" / "auth_token"
    file.parent.mkdir()
    file.write_text(TOKEN)
    file.chmod(mode)
    with stub(_guarded(TOKEN)) as address:
        assert main(["status", "--address", address]) == 0
    output, error = capsys.readouterr()
    assert output.split() == ["job", "state", "trials", "started", "ended", "run", "folder"]
    warning = f"Warning: others may read the token in {file}, mode {mode:04o}. First: chmod 600 {file}\n"
    assert error == ("" if mode == 0o600 else warning)


@pytest.mark.parametrize(("version", "fits"), [("1.13.0", False), ("2.59.1", False), ("2.60.0", True), ("2.75.1", True), ("3.0.0", False)])
def test_another_version_of_ray(
    version: str, fits: bool, nobody: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with stub(Jobs(tmp_path, version=version)) as address:
        if fits:
            assert main(["status", "--address", address]) == 0
            return
        error = _refused(capsys, "status", "--address", address)
    assert f"{address} runs Ray {version}; distprune needs 2.60 or newer, below 3. Install that on its nodes." in error


@pytest.mark.parametrize("answer", [(200, "<html>"), (404, "not here"), (200, []), (200, {"version": 3}), (302, ""), (500, "oh")], ids=str)
def test_another_program_at_the_address(answer: tuple[int, object], nobody: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with stub(lambda *_: answer) as address:
        assert f"What answers at {address} is no Ray dashboard" in _refused(capsys, "status", "--address", address)


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
def test_nobody_at_the_address(command: list[str], nobody: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    (port,) = free_ports(1)
    error = _refused(capsys, *command, "--address", f"http://127.0.0.1:{port}")
    assert f"No Ray dashboard answers at http://127.0.0.1:{port}: no connection." in error
    nobody.setattr(head, "_CONNECT_S", 0.3)
    with silent() as port:
        began = time.monotonic()
        assert f"127.0.0.1:{port}: no answer in time." in _refused(capsys, *command, "--address", f"http://127.0.0.1:{port}")
        assert time.monotonic() - began < 5
    for address in ("127.0.0.1:8265", "http://", "ftp://head"):
        if command[0] != "resume":
            assert "Write http://HEAD:8265" in _refused(capsys, *command, "--address", address)


def test_waiting_for_a_head_is_bounded() -> None:
    assert head._CONNECT_S + access._CONNECT_S <= 15 and access._CONNECT_S + access._ANSWER_S <= 15


@pytest.mark.ray
def test_a_driver_finds_no_cluster(nobody: pytest.MonkeyPatch) -> None:
    nobody.setattr("ray._private.services.resolve_ip_for_localhost", lambda host: host)  # else to another of this machine's addresses
    (port,) = free_ports(1)
    with pytest.raises(UserError, match=f"No Ray cluster answers at 127.0.0.1:{port}"):
        access.connect(f"127.0.0.1:{port}")
    nobody.setattr("ray._private.services.find_gcs_addresses", set)  # of this machine, on which another Ray may run
    for address in ("auto", "nonsense"):
        with pytest.raises(UserError, match=f"No Ray cluster answers at {address}"):
            access.connect(address)
    with pytest.raises(UserError, match="--address must be ip:port or auto here"):
        access.connect("http://127.0.0.1:8265")
    nobody.setattr(access, "_ANSWER_S", 0.5)
    with silent() as port, pytest.raises(UserError, match="is no Ray head") as error:
        access.connect(f"127.0.0.1:{port}")
    with stub(lambda *_: (200, "hello")) as address, pytest.raises(UserError, match="is no Ray head"):
        access.connect(address.removeprefix("http://"))
    assert "\n" not in str(error.value)
