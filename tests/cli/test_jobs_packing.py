"""What is sent with a job, what comes back, and what the head does with it; jobs run as processes of this machine, without Ray."""

import io
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from heads import Cable, Jobs, stub

from distprune.cli import aboard, fetching, following, head, jobs, main, packing
from distprune.environment import environment
from distprune.errors import UserError
from distprune.store.place import Objects, join

pytest.importorskip("aiohttp", reason="needs ray[default]: uv sync --group dev")
SEARCH: dict[str, Any] = {
    "name": "tiny",
    "recipe": {"data": "digits", "model": {"import": "my_models.small:net"}, "train": {"length": "2ep"}},
    "space": {"paradigm": ["dense"]},
}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's folder, with a module of his own."""
    folder = tmp_path / "here"
    (folder / "my_models").mkdir(parents=True)
    (folder / "my_models" / "__init__.py").touch()
    (folder / "my_models" / "small.py").write_text("def net(shape, classes): ...\n")
    (folder / "tiny.yaml").write_text(yaml.safe_dump(SEARCH))
    monkeypatch.chdir(folder)
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "")
    for room in (head, following):
        monkeypatch.setattr(room, "POLL_S", 0.05)
    return folder


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Jobs]:
    (home := tmp_path / "home").mkdir()
    yield Jobs(home)


def _fill(folder: Path, sizes: dict[str, int]) -> dict[str, bytes]:
    """A run folder of files of any bytes."""
    content = {name: os.urandom(size) for name, size in sizes.items()} | {"search.yaml": b"search: 1\n"}
    for name, data in content.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return content


def _read(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_run_folder_comes_in_parts_and_goes_on_where_it_broke_off(
    here: Path, server: Jobs, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(fetching, "PART_BYTES", 2500)
    run = server.home / "runs" / "tiny"
    sizes = {
        "study.journal": 1700,
        "reports.arrows": 2300,
        "checkpoints/3/a1/7/weights.safetensors": 4200,
        "masks/3.safetensors": 1,
        "empty": 0,
    }
    content = _fill(run, sizes)
    (run / ".lock").write_text("7")
    (run / "elsewhere").symlink_to("/etc/passwd")
    (run / "checkpoints" / "4").mkdir()
    server.add("j", "RUNNING", metadata={"run": "~/runs/tiny"})
    ask, asked = fetching._Packers.part, 0

    def break_off(self: Any, spans: Any) -> Any:
        nonlocal asked
        asked += 1
        if asked == 3:
            raise ConnectionError("cut")
        return ask(self, spans)

    monkeypatch.setattr(fetching._Packers, "part", break_off)
    with stub(server) as address:
        assert main(["fetch", "j", "--address", address, "--to", "runs"]) == 2
        assert not (here / "runs" / "tiny").exists()
        (run / "reports.arrows").open("ab").write(b"more")  # it runs on
        assert main(["fetch", "j", "--address", address, "--to", "runs"]) == 0
    assert _read(here / "runs" / "tiny") == content
    assert (here / "runs" / "tiny" / "checkpoints" / "4").is_dir()
    assert [path.name for path in (here / "runs").iterdir()] == ["tiny"]
    parts = -(-sum(map(len, content.values())) // 2500)
    assert asked == parts + 1 and len(server.sent) == parts, "no part is asked for twice"
    left = [log.stat().st_size for log in server.logs.iterdir() if "-fetch-" in log.name]
    assert sum(size > 0 for size in left) <= 2, "the head keeps no copy of it: each process of this machine left its last part"
    assert list(server.jobs) == ["j"]
    assert "fetched to runs/tiny" in capsys.readouterr().out


def test_the_journal_is_copied_no_newer_than_the_reports(here: Path, server: Jobs) -> None:
    _fill(server.home / "runs" / "tiny", {"a": 1, "reports.arrows": 1, "study.journal": 1, "z": 1})
    server.add("j", "RUNNING", metadata={"run": "~/runs/tiny"})
    with stub(server) as address, head.talking(address) as client:
        _, said = fetching._Packers(client, "j", "~/runs/tiny").part(None)
    assert [span[0] for span in said["plan"]["parts"][0]] == ["study.journal", "reports.arrows", "a", "search.yaml", "z"]


def test_what_goes_or_is_replaced_while_it_is_copied(here: Path, server: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetching, "PART_BYTES", 100)
    run = server.home / "runs" / "tiny"
    content = _fill(run, {"a": 95, "checkpoints/1/a/0/weights": 60, "trials.parquet": 30})
    server.add("j", "RUNNING", metadata={"run": str(run)})
    ask = fetching._Packers.part

    def change(self: Any, spans: Any) -> Any:
        if spans is not None and (run / "checkpoints" / "1").exists():
            (run / "checkpoints/1/a/0/weights").unlink()
            (run / "checkpoints/1/a/0").rmdir()
            (run / "checkpoints/1/a").rmdir()
            (run / "checkpoints/1").rmdir()
            (run / "new").write_bytes(b"another")
            (run / "new").rename(run / "trials.parquet")
        return ask(self, spans)

    monkeypatch.setattr(fetching._Packers, "part", change)
    with stub(server) as address:
        fetching.fetch("j", address=address, to=Path("runs"))
    found = _read(here / "runs" / "tiny")
    assert found == {"a": content["a"], "search.yaml": content["search.yaml"], "trials.parquet": b"another"}


def test_a_run_at_a_url_comes_from_there(here: Path, server: Jobs, s3: str, capsys: pytest.CaptureFixture[str]) -> None:
    content = {"search.yaml": b"search: 1\n", "masks/3.safetensors": b"3", "checkpoints/3/a1/7/weights.safetensors": b"weights"}
    for name, data in content.items():
        Objects.open(join(s3, "tiny")).put(name, data)
    server.add("j", "SUCCEEDED", metadata={"run": join(s3, "tiny")})
    with stub(server) as address:
        assert main(["fetch", "j", "--address", address, "--to", "runs"]) == 0
    found = _read(here / "runs" / "tiny")
    assert {name: data for name, data in found.items() if name in content} == content and not server.sent
    assert [path.name for path in (here / "runs").iterdir()] == ["tiny"]


@pytest.mark.parametrize("name", ["../outside", "/tmp/outside", "a/../../outside"])
def test_a_head_cannot_write_outside_of_the_folder(name: str, tmp_path: Path) -> None:
    (aside := tmp_path / "x" / "aside").mkdir(parents=True)
    header = json.dumps([1]).encode()
    (aside / "0.part").write_bytes(len(header).to_bytes(8, "big") + header + b"x")
    with pytest.raises(UserError, match="is not below the run folder: refused"):
        fetching._assemble({"folders": ["."], "parts": [[[name, 0, 1, 1, 1]]]}, aside)
    with pytest.raises(UserError, match="is not below the run folder: refused"):
        fetching._assemble({"folders": [name], "parts": []}, aside)
    assert not list(tmp_path.rglob("outside"))


def _refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(list(arguments)) == 2
    output, error = capsys.readouterr()
    assert output == "" and error.count("\n") == 1, output + error
    return error


def test_jobs_that_are_not_there_or_not_in_that_state(here: Path, server: Jobs, capsys: pytest.CaptureFixture[str]) -> None:
    server.add("tiny-1", "STOPPED", metadata={"run": "~/runs/tiny", "modules": ""}, start_time=1)
    server.add("big-1", "STOPPED", metadata={"run": "~/runs/big", "modules": ""}, start_time=2)
    server.add("big-2", "RUNNING", metadata={"run": "~/runs/big", "modules": ""}, start_time=3, log="x | 3/9 trials done | 1 running\n")
    server.add("theirs", "RUNNING", start_time=4)
    with stub(server) as address:
        at = ["--address", address]
        for command in ("status", "logs", "stop", "fetch", "resume"):
            assert "Unknown job 'tiny-2'. Did you mean 'tiny-1'? Known: big-1, big-2, tiny-1" in _refused(capsys, command, "tiny-2", *at)
        assert "tiny-1 is STOPPED already. Nothing is left to stop; go on with it: distprune resume tiny-1" in _refused(
            capsys, "stop", "tiny-1", *at
        )
        for job in ("big-1", "big-2", "~/runs/big"):
            error = _refused(capsys, "resume", job, *at)
            assert "big-2 is RUNNING and works on ~/runs/big. Wait for it, or stop it: distprune stop big-2" in error
        for command in ("fetch", "resume"):
            assert "theirs is no search that distprune submitted" in _refused(capsys, command, "theirs", *at)
        assert "there is no run folder" in _refused(capsys, "fetch", "tiny-1", *at)
        (here / "runs" / "tiny").mkdir()
        assert "runs/tiny exists already" in _refused(capsys, "fetch", "tiny-1", *at)
        assert "--tail must be at least 0" in _refused(capsys, "logs", "tiny-1", *at, "--tail", "-1")
        assert main(["status", *at]) == 0
        table = [line.split() for line in capsys.readouterr().out.splitlines()]
        assert [row[:3] for row in table[1:]] == [["tiny-1", "STOPPED", "-"], ["big-1", "STOPPED", "-"], ["big-2", "RUNNING", "3/9"]]
        assert [row[-1] for row in table[1:]] == ["~/runs/tiny", "~/runs/big", "~/runs/big"]
        assert main(["status", "big-2", *at]) == 0
        assert capsys.readouterr().out.startswith("big-2: RUNNING, 3/9 trials, started 1970-01-01 ")


@pytest.mark.parametrize(
    ("state", "code", "returned"), [("SUCCEEDED", 0, 0), ("FAILED", 3, 3), ("FAILED", None, 1), ("STOPPED", None, 143), ("FAILED", -9, 1)]
)
def test_logs_return_the_exit_code_of_the_job(
    state: str, code: int | None, returned: int, here: Path, server: Jobs, capsys: pytest.CaptureFixture[str]
) -> None:
    server.add("j", state, log="a\nb\nc\n", driver_exit_code=code)
    with stub(server) as address:
        for options, text in (([], "a\nb\nc\n"), (["--tail", "2"], "b\nc\n"), (["--tail", "0", "--no-follow"], "")):
            assert main(["logs", "j", "--address", address, *options]) == returned
            assert capsys.readouterr().out == f"{text}j: {state}" + (f", exit code {code}" if code else "") + "\n"


def test_a_lost_connection_is_taken_up_again(here: Path, server: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    server.add("j", "RUNNING", log="one\n")
    output, errors = io.StringIO(), io.StringIO()
    monkeypatch.setattr(sys, "stdout", output)
    monkeypatch.setattr(sys, "stderr", errors)

    def wait(on: io.StringIO, text: str) -> None:
        until = time.monotonic() + 60
        while text not in on.getvalue():
            assert time.monotonic() < until and thread.is_alive(), output.getvalue() + errors.getvalue()
            time.sleep(0.05)

    with stub(server) as address:
        cable, codes = Cable(int(address.rpartition(":")[2])), list[int]()
        thread = threading.Thread(target=lambda: codes.append(main(["logs", "j", "--address", cable.address])))
        try:
            thread.start()
            wait(output, "one\n")
            cable.cut()
            wait(errors, "connection lost; j goes on, and this tries again\n")
            server.add("j", "RUNNING", log="one\ntwo\n")
            cable.mend()
            wait(errors, "connected again\n")
            wait(output, "two\n")
            server.add("j", "FAILED", log="one\ntwo\nthree\n", driver_exit_code=5)
            thread.join(60)
        finally:
            cable.close()
    assert codes == [5] and output.getvalue() == "one\ntwo\nthree\nj: FAILED, exit code 5\n"


def test_ids_are_readable_and_new(here: Path, server: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "strftime", lambda *_: "20260102-030405")
    with stub(server) as address, head.talking(address) as client:
        for expected in ("my-run-20260102-030405", "my-run-20260102-030405-2", "my-run-20260102-030405-3"):
            assert jobs._new_id(client, "my run") == expected
            server.add(expected, "STOPPED")


@pytest.mark.parametrize(
    ("storage", "run", "shell"),
    [
        ("runs", "~/runs/x", '"${HOME:?}"/runs/x'),
        ("~/a b", "~/a b/x", "\"${HOME:?}\"/'a b/x'"),
        ("/shared/$(rm)", "/shared/$(rm)/x", "'/shared/$(rm)/x'"),
        ("s3://bucket/a?region=eu", "s3://bucket/a/x?region=eu", "'s3://bucket/a/x?region=eu'"),
    ],
)
def test_where_a_run_lies_on_the_head(storage: str, run: str, shell: str) -> None:
    assert jobs._on_head(storage, "x") == run and jobs._shell(run) == shell and head.name_of(run) == "x"
    assert (jobs._kept(run) is None) == ("://" in run)


def test_modules_and_relative_data_travel_and_large_data_does_not(here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "data" / "mine").mkdir(parents=True)
    (here / "data" / "mine" / "train.parquet").write_bytes(b"x" * 50)
    (here / "data" / ".hidden").touch()

    def pack(folder: str) -> Path:
        plain = {"recipe": {"data": {"name": "mnist", "folder": folder}, "model": {"import": "my_models.small:net"}}}
        (target := tmp_path / str(len(list(tmp_path.iterdir())))).mkdir()
        packing.pack(target, job="j", keep=None, plain=plain, modules=packing.modules_here(packing.module_names(plain)))
        return target

    sent = {name for name in _read(pack("data")) if name not in ("search.yaml", aboard.SCRIPT, aboard.FACTS)}
    assert sent == {"my_models/__init__.py", "my_models/small.py", "data/mine/train.parquet"}
    assert "data/mine/train.parquet" not in _read(pack("/shared/mnist"))
    with pytest.raises(UserError, match="recipe.data.folder 'data/yours' is not in"):
        pack("data/yours")
    (tmp_path / "else").mkdir()
    with pytest.raises(UserError, match="is outside of"):
        pack("../else")
    monkeypatch.setattr(packing, "MOST_BYTES", 49)
    with pytest.raises(UserError, match="are sent with a job. Put it on every node"):
        pack("data")
    with pytest.raises(UserError, match="'my_absent' of an import is neither in"):
        packing.modules_here(["my_absent"])


def test_requirements_are_pinned_and_archives_travel(here: Path) -> None:
    (here / "wheels").mkdir()
    (here / "wheels" / "mine-1-py3-none-any.whl").write_bytes(b"wheel")
    text = "--no-index  # none\n\n# all\na==1.2 ; python_version > '3'\nb[x]===2 \\\n    --hash=sha256:0\nc @ git+https://x/y@1\nwheels/mine-1-py3-none-any.whl\n"
    (here / "all.txt").write_text(text)
    (sent := here / "sent").mkdir()
    *lines, wheel = packing.requirements(here / "all.txt", sent)
    assert [line.split() for line in lines] == [
        ["--no-index"],
        ["a==1.2", ";", "python_version", ">", "'3'"],
        ["b[x]===2", "--hash=sha256:0"],
        ["c", "@", "git+https://x/y@1"],
    ]
    assert wheel.startswith("${RAY_RUNTIME_ENV_CREATE_WORKING_DIR}/wheels/")
    assert (sent / wheel.partition("/")[2]).read_bytes() == b"wheel"
    (here / "wheels" / "mine-1-py3-none-any.whl").write_bytes(b"another")
    assert packing.requirements(here / "all.txt", sent)[-1] != wheel, "Ray keeps an environment under its lines"
    for line in ("a", "a>=1", "a==1.*", "a==1,<2", "~/mine.whl"):
        (here / "all.txt").write_text(line)
        with pytest.raises(UserError, match="must pin every version"):
            packing.requirements(here / "all.txt", sent)
    for line in ("-r more.txt", "-e .", "--constraint=x"):
        (here / "all.txt").write_text(line)
        with pytest.raises(UserError, match="must be one file"):
            packing.requirements(here / "all.txt", sent)
    with pytest.raises(UserError, match="Cannot read absent.txt: No such file"):
        packing.requirements(Path("absent.txt"), sent)
    with pytest.raises(UserError, match="two ways to do one thing"):
        jobs.Environment(pip=Path("a"), uv=Path("b"))


def _aboard(folder: Path, *arguments: str, home: Path, **facts: Any) -> "subprocess.CompletedProcess[str]":
    known = {"job": "j", "keep": None, "versions": environment(), "sent": True}
    (folder / aboard.FACTS).write_text(json.dumps(known | facts))
    (folder / aboard.SCRIPT).write_text(Path(aboard.__file__).read_text())
    place = {**os.environ, "HOME": str(home), "PYTHONPATH": str(Path(__file__).parents[2])}
    return subprocess.run([sys.executable, aboard.SCRIPT, *arguments], cwd=folder, env=place, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("theirs", "code", "says"),
    [("{}.{}.99", 0, ""), ("{}.9.0", 2, "and the job is from 0.9.0. Install the same, on every node: pip install")],
)
def test_the_head_refuses_another_minor_version(theirs: str, code: int, says: str, tmp_path: Path) -> None:
    ours = environment()
    version = theirs.format(*ours["distprune"].split("."))
    done = _aboard(tmp_path, "--help", home=tmp_path, versions={**ours, "distprune": version})
    assert done.returncode == code and says in done.stderr and done.stderr.count("\n") == (1 if code else 0)
    assert f"head:      distprune {ours['distprune']}, torch " in done.stdout and f"submitted: distprune {version}, " in done.stdout
    assert ("Usage: distprune" in done.stdout) == (code == 0)


def test_what_was_sent_is_kept_for_later_jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("first", "second", "third"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine.py").write_text(name)
    kept, run = tmp_path / "runs" / ".sent" / "x", tmp_path / "runs" / "x"
    assert _aboard(tmp_path / "first", "search", home=tmp_path, keep="~/runs/.sent/x").returncode == 2  # it lacks its argument
    assert (kept / "mine.py").read_text() == "first"
    run.mkdir()
    (run / "search.yaml").touch()
    monkeypatch.chdir(tmp_path / "second")
    aboard._keep(str(kept), new=True, sent=True)
    assert (kept / "mine.py").read_text() == "first", "a search whose name is taken leaves the other's alone"
    aboard._keep(str(kept), new=False, sent=False)
    assert Path.cwd() == kept, "a search that goes on runs where its files are"
    monkeypatch.chdir(tmp_path / "third")
    aboard._keep(str(kept), new=False, sent=True)
    assert Path.cwd() == kept and (kept / "mine.py").read_text() == "third"
    monkeypatch.chdir(tmp_path / "first")
    aboard._keep(str(tmp_path / "runs" / ".sent" / "y"), new=False, sent=False)
    assert Path.cwd() == tmp_path / "first", "nothing was kept"


def test_no_distprune_on_the_head_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "distprune.py").write_text("raise ImportError('broken')")
    done = _aboard(tmp_path, "list", home=tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "has no distprune that can be imported (broken). On every node: pip install 'distprune[cluster]==" in done.stderr
