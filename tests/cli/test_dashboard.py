"""The dashboard shows the study of a run over HTTP, while it grows, and cannot change it."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from optuna.exceptions import StorageInternalError
from optuna.storages import BaseStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState
from toys import REPOSITORY

import distprune.store.files as files
from distprune.cli import main
from distprune.errors import UserError
from distprune.report.dashboard import Dashboard, _names
from distprune.store.folder import RunFolder
from distprune.store.readonly import Refused, open_study
from distprune.store.study import Truth

pytest.importorskip("optuna_dashboard")


def birth(truth: Truth, number: int) -> None:
    truth.born(number, {}, {}, {"recipe": {}, "identity": str(number)})


def end(truth: Truth, number: int, value: float) -> None:
    truth.tell(number, TrialState.COMPLETE, [value, 0.5], {"budget": -0.1}, {"ended": "finished", "rung": -1})


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """A run folder with three trials, one of which runs."""
    folder = RunFolder(tmp_path / "mine")
    folder.path.mkdir()
    folder.search_yaml.write_text(json.dumps({"search": {"minimize": ["params"]}, "rungs": [], "environment": {}}))
    truth = Truth.open(folder.journal, "mine", ("maximize", "minimize"))
    for number in range(3):
        birth(truth, number)
    end(truth, 0, 0.9)
    end(truth, 1, 0.8)
    return folder


@contextmanager
def serving(path: Path) -> Iterator[Dashboard]:
    server = Dashboard(str(path), port=0)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def ask(server: Dashboard, path: str, *, method: str = "GET", **body: Any) -> tuple[int, Any]:
    data = json.dumps(body).encode() if method != "GET" else None
    request = urllib.request.Request(server.url + path, data, {"Content-Type": "application/json"}, method=method)
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            content = answer.read()
            return answer.status, json.loads(content) if answer.headers.get_content_type() == "application/json" else content.decode()
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def test_the_study_is_shown_with_its_trials(run: RunFolder) -> None:
    with serving(run.path) as server:
        assert server.url.startswith("http://127.0.0.1:")
        status, page = ask(server, "dashboard")
        assert status == 200 and "<html" in page and ask(server, "static/bundle.js")[0] == 200
        status, found = ask(server, "api/studies")
        [study] = found["study_summaries"]
        assert status == 200 and study["study_name"] == "mine" and study["directions"] == ["maximize", "minimize"]
        detail = ask(server, f"api/studies/{study['study_id']}")[1]
    assert [trial["state"] for trial in detail["trials"]] == ["Complete", "Complete", "Running"]
    assert [trial["values"] for trial in detail["trials"][:2]] == [[0.9, 0.5], [0.8, 0.5]]
    assert detail["objective_names"] == ["objective", "share of params"]


def test_a_cost_whose_module_is_not_here_is_called_as_the_search_calls_it(run: RunFolder) -> None:
    run.search_yaml.write_text(json.dumps({"search": {"minimize": ["params", {"import": "gone:watts"}]}, "rungs": [], "environment": {}}))
    assert _names(run) == ["objective", "share of params", "share of gone:watts"]


WRITES = [
    ("POST", "api/studies", {"study_name": "other", "directions": ["minimize"]}),
    ("POST", "api/studies/0/rename", {"study_name": "other"}),
    ("DELETE", "api/studies/0", {}),
    ("PUT", "api/studies/0/note", {"version": 1, "body": "mine now"}),
    ("PUT", "api/studies/0/1/note", {"version": 1, "body": "mine now"}),
    ("POST", "api/trials/2/tell", {"state": "Fail"}),
    ("POST", "api/trials/2/user-attrs", {"user_attrs": {"a": 1}}),
    ("POST", "api/studies/0/2/skip", {}),
    ("PUT", "api/studies/0/preference_feedback_component", {"output_type": "note"}),
]


def test_what_would_change_the_study_is_refused(run: RunFolder) -> None:
    before = run.journal.read_bytes()
    with serving(run.path) as server:
        for method, path, body in WRITES:
            status, answer = ask(server, path, method=method, **body)
            assert status == 405 and "read-only" in answer["reason"], (method, path)
        assert [study["study_name"] for study in ask(server, "api/studies")[1]["study_summaries"]] == ["mine"]
    assert run.journal.read_bytes() == before and sorted(os.listdir(run.path)) == ["search.yaml", "study.journal"]


def test_the_storage_refuses_without_the_guard_before_it(run: RunFolder) -> None:
    before, study = run.journal.read_bytes(), open_study(run)
    now = datetime.now(UTC)
    trial = FrozenTrial(0, TrialState.RUNNING, None, now, None, {}, {}, {}, {}, {}, 0)
    calls: dict[str, tuple[Any, ...]] = {
        "create_new_study": ([StudyDirection.MINIMIZE], "other"),
        "delete_study": (0,),
        "set_study_user_attr": (0, "a", 1),
        "set_study_system_attr": (0, "a", 1),
        "create_new_trial": (0, trial),
        "set_trial_param": (2, "a", 1.0, None),
        "set_trial_state_values": (2, TrialState.FAIL),
        "set_trial_intermediate_value": (2, 0, 1.0),
        "set_trial_user_attr": (2, "a", 1),
        "set_trial_system_attr": (2, "a", 1),
    }
    changing = {name for name in BaseStorage.__abstractmethods__ if not name.startswith("get_")}
    assert changing == set(calls), "every call of Optuna's that changes something"
    for name, arguments in calls.items():
        with pytest.raises(Refused, match="read-only"):
            getattr(study, name)(*arguments)
    assert run.journal.read_bytes() == before


def test_it_follows_a_search_that_runs_and_one_that_lost_its_end(run: RunFolder) -> None:
    study, truth = open_study(run), Truth.open(run.journal, "mine", ())
    files.append(run.journal, b'{"op_code": 8, "study')  # a driver is writing, or has died while it was
    assert len(study.get_all_trials(0)) == 3
    files.cut(run.journal, run.journal.read_bytes().rfind(b"\n") + 1)
    end(truth, 2, 0.7)
    birth(truth, 3)
    assert [trial.state.name for trial in study.get_all_trials(0)] == ["COMPLETE", "COMPLETE", "COMPLETE", "RUNNING"]
    lines = run.journal.read_bytes().splitlines(keepends=True)
    files.publish(run.journal, b"".join(lines[:2]))  # study and first trial
    assert len(study.get_all_trials(0)) == 1


def test_a_study_in_a_database(run: RunFolder, tmp_path: Path) -> None:
    from distprune.store.database import Database

    url = f"sqlite:///{tmp_path / 'studies.db'}"
    facts = {"search": {"study": url, "minimize": ["params"]}, "study": {"name": "mine-1", "run": "1"}}
    run.search_yaml.write_text(json.dumps(facts))
    run.journal.unlink()
    with pytest.raises(UserError, match=r"studies\.db does not exist"):
        open_study(run)
    assert not (tmp_path / "studies.db").exists()
    for name in ("mine", "other"):
        database = Database.at(url, name=f"{name}-1", run="1", directions=("maximize", "minimize"))
        birth(database, 0)
        end(database, 0, 0.9)
        database.close()
    before = (tmp_path / "studies.db").read_bytes()
    with serving(run.path) as server:
        [study] = ask(server, "api/studies")[1]["study_summaries"]
        assert study["study_name"] == "mine-1", "the other runs of the database are not shown"
        detail = ask(server, f"api/studies/{study['study_id']}")[1]
        assert [trial["values"] for trial in detail["trials"]] == [[0.9, 0.5]]
        assert all(ask(server, path, method=method, **body)[0] == 405 for method, path, body in WRITES)
    inside = open_study(run)._current()
    with pytest.raises(StorageInternalError):
        inside.set_study_user_attr(study["study_id"], "a", 1)  # past the wrapper, the connection itself refuses
    assert (tmp_path / "studies.db").read_bytes() == before


def test_what_cannot_be_shown_is_said_in_a_line(run: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def said(*arguments: str) -> str:
        assert main(["dashboard", *arguments]) == 2
        text = capsys.readouterr().err
        assert text.count("\n") == 1
        return text

    assert "is not a run folder" in said(str(tmp_path))
    assert "port must be in [0, 65535], got 70000" in said(str(run.path), "--port", "70000")
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        text = said(str(run.path), "--port", str(port))
    assert f"cannot listen on 127.0.0.1, port {port}: address already in use" in text and f"--port {port + 1}" in text
    run.journal.unlink()
    assert "has no trials yet" in said(str(run.path)) and not run.journal.exists()


def test_without_the_package_the_extra_is_named(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "optuna_dashboard", None)
    assert main(["dashboard", str(run.path)]) == 2
    assert 'pip install "distprune[dashboard]"' in capsys.readouterr().err


def test_ctrl_c_ends_the_command_without_a_traceback(run: RunFolder) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "distprune", "dashboard", str(run.path), "--port", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
        cwd=REPOSITORY,
    )
    assert process.stdout is not None
    line = process.stdout.readline()
    url = line.split(" at ")[1].split()[0]
    assert str(run.path) in line and url.startswith("http://127.0.0.1:")
    with urllib.request.urlopen(f"{url}api/studies", timeout=30) as answer:
        assert len(json.loads(answer.read())["study_summaries"]) == 1
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=30)
    assert process.returncode == 0 and not error
