"""Searches on a real Ray: the same decisions as the simulator, failures that stay in their trial, and a driver that is killed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from searches import outcome, reports, search, start, trials
from toys import BASE, check_alone

import distprune as dp
from distprune.cli import main
from distprune.search.trial import run_trial
from distprune.store.folder import RunFolder

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]
TESTS = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def toys_are_importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(TESTS))


def test_ray_with_one_worker_decides_as_the_simulator(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = {**BASE, "model": {"name": "lenet5", "width": 0.2}}
    on_ray = dp.search(search(tmp_path / "ray", trials=6, recipe=recipe, workers={"most": 1}))
    simulated = start(search(tmp_path / "simulated", trials=6, recipe=recipe), workers=1, using=run_trial)
    assert outcome(on_ray.folder) == outcome(simulated)
    columns = ("index", "cost", "objective", "score", "rung", "kept")
    for number, rows in reports(simulated).items():
        assert [[row[name] for name in columns] for row in rows] == [
            [row[name] for name in columns] for row in reports(on_ray.folder)[number]
        ]
    front = on_ray.pareto()
    assert front and all(trial.row["test"] is not None and trial.masks.kept == trial.row["kept"] for trial in front)
    kept = {int(path.name) for path in on_ray.folder.checkpoints.iterdir()}
    assert kept == {trial.number for trial in front}, "only trials on the front keep their weights"

    assert main(["report", str(on_ray.folder.path)]) == 0
    shown = capsys.readouterr().out
    assert "Pareto front of" in shown and f"export {on_ray.folder.path} --to" in shown
    best = on_ray.best()
    assert main(["export", str(on_ray.folder.path), "--max-density", "1", "--to", str(tmp_path / "best")]) == 0
    assert f"trial {best.number} exported" in capsys.readouterr().out
    done = check_alone(tmp_path / "best")
    assert done.returncode == 0 and f"test accuracy {best.row['test']:.4f} on 100 images, 0 predictions differ" in done.stdout, done.stderr


def test_failures_stay_in_their_trial_and_the_worker_lives_on(tmp_path: Path) -> None:
    result = dp.search(
        search(
            tmp_path,
            trials=5,
            recipe={**BASE, "train": {"length": "1ep", "batch_size": 32}},
            space={"paradigm": ["dense"], "optimizer": [{"import": "toys:sometimes_explodes"}], "regularizer": ["none", "l1", "l2"]},
            workers={"most": 1},
        )
    )
    rows = result.trials.to_pylist()
    assert {row["ended"] for row in rows} == {"finished", "nan"}
    assert "loss is not finite" in next(row["reason"] for row in rows if row["ended"] == "nan")
    recipe = {**BASE, "model": {"import": "toys:raises"}}
    broken = dp.search(search(tmp_path, name="broken", trials=3, recipe=recipe, space={"paradigm": ["dense"]}, workers={"most": 1}))
    assert [row["ended"] for row in broken.trials.to_pylist()] == ["error"] * 3
    assert "RuntimeError: this network is broken" in broken.trials.to_pylist()[0]["reason"]
    workers = {json.loads(rows[-1]["extra"])["pid"] for rows in reports(broken.folder).values()}
    assert len(workers) == 1, "the worker caught each and took the next trial"
    assert broken.pareto() == []


def _facts(folder: RunFolder) -> list[list[Any]]:
    columns = ("trial", "index", "cost", "objective", "score", "rung", "kept")
    return [[row[name] for name in columns] for rows in reports(folder).values() for row in rows]


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(TESTS), "RAY_AUTH_MODE": "disabled"}


def _search_file(tmp_path: Path, **changes: Any) -> Path:
    value = search(tmp_path / "runs", trials=6, **changes)
    path = tmp_path / "search.yaml"
    path.write_text(yaml.safe_dump({**value.plain(), "recipe": {**BASE, "train": {**BASE["train"], "length": "40ep"}}}))
    return path


def _begin(path: Path) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "distprune", "search", str(path)],
        env=_environment(),
        cwd=path.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def _wait_for_reports(folder: RunFolder, process: "subprocess.Popen[str]", count: int) -> None:
    end = time.monotonic() + 200
    while sum(map(len, reports(folder).values())) < count:
        assert process.poll() is None and time.monotonic() < end, process.communicate()[0]
        time.sleep(0.05)


def test_a_driver_killed_with_its_ray_is_resumed_without_loss(tmp_path: Path) -> None:
    """Soon after its beginning; tests/search/test_chaos.py kills one later, on nodes that live on."""
    process = _begin(_search_file(tmp_path))
    folder = RunFolder(tmp_path / "runs" / "s")
    _wait_for_reports(folder, process, 2)
    process.kill()
    process.wait()
    done = subprocess.run([sys.executable, "-m", "distprune", "resume", str(folder.path)], env=_environment(), cwd=tmp_path, check=False)
    assert done.returncode == 0
    ended = trials(folder)
    assert [trial.number for trial in ended] == list(range(6)) and all(trial.state.is_finished() for trial in ended)
    for number, rows in reports(folder).items():
        assert [row["index"] for row in rows] == list(range(len(rows)))
        if ended[number].user_attrs["end"]["ended"] == "finished":
            assert rows[-1]["final"] and ended[number].values == pytest.approx([rows[-1]["objective"], 1 - rows[-1]["sparsity"]], rel=1e-12)


def test_ctrl_c_stops_within_seconds_and_says_how_to_go_on(tmp_path: Path) -> None:
    process = _begin(_search_file(tmp_path))
    folder = RunFolder(tmp_path / "runs" / "s")
    _wait_for_reports(folder, process, 2)
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130 and time.monotonic() - began < 30
    assert f"Go on with: distprune resume {folder.path.relative_to(tmp_path)}" in output or f"distprune resume {folder.path}" in output
