"""Searches of real trials whose storage is a URL of an S3 server: the same as in a folder, read from anywhere, gone on with anywhere."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from books import book_of
from disks import checkpoint_of, on_disk
from laws import front, masks, told
from searches import outcome, resume, search, start
from toys import BASE

import distprune as dp
from distprune.cli import main
from distprune.errors import UserError
from distprune.search.config import Search
from distprune.search.retention import Retention
from distprune.search.trial import run_trial
from distprune.store import parts
from distprune.store.folder import RunFolder
from distprune.store.place import Objects, join

TESTS = Path(__file__).parents[1]
TRIALS = 4


def _names(url: str) -> list[str]:
    return [name for name, _, _ in Objects.open(url).list()]


def row_of(trial: Any) -> dict[str, Any]:
    return {name: value for name, value in trial.row.items() if name != "wall_s"}


def _states(url: str) -> set[int]:
    """The trials that have checkpoints there."""
    return {int(name.split("/")[1]) for name in _names(url) if name.startswith("checkpoints/")}


def test_a_search_at_a_url_is_the_one_in_a_folder(
    s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    here, there = search(tmp_path / "runs", trials=TRIALS), search(s3, trials=TRIALS)
    url = join(s3, "s")
    assert there.url == url and there.cache_at == join(s3, ".cache") and Search.load(there.plain()) == there
    local, folder = start(here, using=run_trial), start(there, using=run_trial)
    assert outcome(folder) == outcome(local) and front(folder) == front(local) and masks(folder) == masks(local)
    assert not list(folder.checkpoints.iterdir()), "they went straight there"
    assert _states(url) == {row[0] for row in front(local)}
    assert any(name.endswith(".safetensors") for name in _names(join(s3, ".cache")))

    with pytest.raises(UserError, match="exists already. Go on with it: distprune resume 's3://"):
        start(there, using=run_trial)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "laptop"))
    result = dp.Result(url)
    best = dp.Result(local.path).best()
    assert [row_of(trial) for trial in result.pareto()] == [row_of(trial) for trial in dp.Result(local.path).pareto()]
    assert result.best().masks.equal(best.masks) and result.best().replay().same
    assert main(["report", url]) == 0
    shown = capsys.readouterr().out
    assert f"The run is at {url}" in shown and f"resume '{url}' --trials" in shown
    assert main(["export", url, "--to", str(tmp_path / "best")]) == 0
    assert dp.Masks.load(tmp_path / "best" / "masks.safetensors").equal(best.masks)

    extended = resume(url, using=run_trial, trials=TRIALS + 2)
    resume(local.path, using=run_trial, trials=TRIALS + 2)
    assert told(extended) == told(local) and front(extended) == front(local) and masks(extended) == masks(local)
    assert {name for name in _names(url) if name.startswith("masks/")} == {f"masks/{row[0]}.safetensors" for row in front(local)}
    assert _states(url) == {row[0] for row in front(local)}


def test_limits_of_the_disk_hold_at_a_url(s3: str, tmp_path: Path) -> None:
    """Weights of the front go where the limit says so; their masks are kept, and an export runs the trial again."""
    folder = start(search(s3, trials=TRIALS, limits={"trials": TRIALS, "disk": "1KB"}), using=run_trial)
    url = join(s3, "s")
    kept = {row[0] for row in front(folder)}
    assert kept and not [name for name in _names(url) if name.endswith("state.safetensors")]
    assert {name for name in _names(url) if name.endswith("/dropped")} == {f"checkpoints/{number}/dropped" for number in kept}
    assert {path.stem for path in dp.Result(url).folder.masks.iterdir()} == set(map(str, kept))
    best = dp.Result(url).best()
    export = dp.open_export(best.export(tmp_path / "out"))
    assert export.masks.equal(best.masks) and "the same bits in" in export.manifest["replayed"][0]


def test_what_is_deleted_waits_until_it_is_known_why(tmp_path: Path) -> None:
    folder, book, works = RunFolder(tmp_path / "x").create(), book_of(tmp_path, entries=3), list[Callable[[], None]]()
    retention = Retention(folder, book, later=works.append)
    for number in range(3):
        for index in (1, 2):
            retention.heard(checkpoint_of(folder, number, "a", index, size=10))
    everything = on_disk(folder)
    book.entries[0].told = book.entries[1].told = True
    book.front[1] = (0.9, -9.0)
    retention.sweep(0)
    retention.sweep(1)
    retention.sweep()
    assert on_disk(folder) == everything and len(everything) == 6 and retention.total == 30, "it is counted as if it were gone"
    for work in works:
        work()
    assert on_disk(folder) == {"1/a/2", "2/a/1", "2/a/2"}


def _environment(machine: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(TESTS), "RAY_AUTH_MODE": "disabled", "XDG_CACHE_HOME": str(machine)}


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_lost_head_is_gone_on_with_from_the_url(s3: str, tmp_path: Path) -> None:
    """Real Ray: workers take their credentials from the environment. The head dies with its disk, another machine goes on."""
    recipe = {**BASE, "train": {**BASE["train"], "length": "40ep"}}
    path, url = tmp_path / "search.yaml", join(s3, "s")
    path.write_text(yaml.safe_dump({**search(s3, trials=4, workers={"most": 2}).plain(), "recipe": recipe}))
    log = (tmp_path / "log").open("w+")
    process = subprocess.Popen(
        [sys.executable, "-m", "distprune", "search", str(path)],
        env={**_environment(tmp_path / "head"), "TOYS_SLEEP_S": "0.05"},
        cwd=tmp_path,
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        until = time.monotonic() + 300
        while not (up := parts.read(Objects.open(url)).streams["study.journal"]).count(b'"values":['):
            assert process.poll() is None and time.monotonic() < until, (tmp_path / "log").read_text()
            time.sleep(0.3)
    finally:
        os.killpg(process.pid, signal.SIGKILL)  # Ray of this head too
        process.wait()
        log.close()
    command = [sys.executable, "-m", "distprune", "resume", url]
    done = subprocess.run(
        command, env=_environment(tmp_path / "other"), cwd=tmp_path, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"results go to {url}" in done.stdout and f"The run is at {url}" in done.stdout
    final: Any = parts.read(Objects.open(url))
    assert final.driver[0] == 2 and final.streams["study.journal"].startswith(up[: up.rfind(b"\n") + 1])
    rows = dp.Result(url).trials.to_pylist()
    assert [row["number"] for row in rows] == list(range(4)) and all(row["ended"] in ("finished", "stopped") for row in rows)
    assert _states(url) == {row["number"] for row in rows if row["pareto"]}
    assert "test" not in (tmp_path / "head").name and "AWS" not in done.stdout
