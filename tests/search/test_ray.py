"""Searches on a real Ray: the same decisions as the simulator, failures that stay in their trial, Ctrl-C. Kills: test_chaos.py."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

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
PATIENCE_S = 200.0  # for one thing to happen: then something hangs


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


def test_ctrl_c_ends_a_search_and_says_how_to_go_on(tmp_path: Path) -> None:
    """Its trials wait at each pass: it does not wait for them."""
    value = search(tmp_path / "runs", trials=6, recipe={**BASE, "train": {**BASE["train"], "length": "40ep"}})
    (tmp_path / "search.yaml").write_text(yaml.safe_dump(value.plain()))
    folder = RunFolder(value.folder)
    process = subprocess.Popen(
        [sys.executable, "-m", "distprune", "search", "search.yaml"],
        env={**os.environ, "PYTHONPATH": str(TESTS), "RAY_AUTH_MODE": "disabled", "TOYS_SLEEP_S": "0.3"},
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    until = time.monotonic() + PATIENCE_S
    while not reports(folder):
        assert process.poll() is None and time.monotonic() < until, process.communicate()[0]
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 130
    assert f"Go on with: distprune resume {folder.path.relative_to(tmp_path)}" in output or f"distprune resume {folder.path}" in output
    assert not any(trial.state.is_finished() for trial in trials(folder))
