"""Any trial of a search is exported: those that have kept no weights are run again first, and it says so."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from toys import BASE

import distprune as dp
from distprune.cli import main
from distprune.errors import UserError
from distprune.result import Result, TrialResult
from distprune.search import driver
from distprune.search.config import Search
from distprune.search.simulate import Simulator
from distprune.search.trial import Job, run_trial
from distprune.store.folder import RunFolder

SPACE = {
    "paradigm": ["at_init", "gradual"],
    "criterion": "magnitude",
    "allocator": ["erk", "uniform"],
    "regularizer": "none",
    "sparsity": [0.5, 0.9],
}


def _failing(job: Job) -> Iterator[dict[str, Any]]:
    """A worker whose fifth trial diverges after its first report."""
    for index, row in enumerate(run_trial(job)):
        if job.number == 4 and index == 1:
            yield {**row, "ended": "nan", "final": True, "extra": json.dumps({"reason": "The loss is not finite."})}
            return
        yield row


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    where = os.getcwd()
    value = {"name": "s", "recipe": BASE, "space": SPACE, "sampler": "random", "limits": {"trials": 8}, "rounds": False, "recovery": "2it"}
    search = Search.read({**value, "storage": str(tmp_path_factory.mktemp("runs"))})
    try:
        return driver.start(search, engine=Simulator(_failing, workers=2), listen=lambda event, facts: None).path
    finally:
        os.chdir(where)


def _trial(folder: Path, ended: str, *, front: bool = False) -> TrialResult:
    return next(trial for trial in Result(folder).rows() if trial.row["ended"] == ended and bool(trial.row["pareto"]) == front)


def test_a_trial_of_the_front_is_not_run_again(searched: Path, tmp_path: Path) -> None:
    heard: list[str] = []
    trial = _trial(searched, "finished", front=True)
    export = dp.open_export(trial.export(tmp_path / "out", listen=lambda event, facts: heard.append(event)))
    assert not heard and "replayed" not in export.manifest and export.manifest["ended"] == "finished"
    assert export.masks.equal(trial.masks) and export.manifest["metrics"]["validation"]["accuracy"] == trial.row["objective"]


def test_the_same_trial_without_its_weights_gives_the_same_files(searched: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(searched, tmp_path / "s"))
    kept = _trial(searched, "finished", front=True)
    shutil.rmtree(RunFolder(copy).checkpoints / str(kept.number))
    first, second = kept.export(tmp_path / "kept"), Result(copy).trial(kept.number).export(tmp_path / "again")
    for name in ("masks.safetensors", "weights.safetensors", "test.safetensors", "torch.safetensors"):
        due, found = load_file(first / name), load_file(second / name)
        assert found.keys() == due.keys() and all(torch.equal(found[key], value) for key, value in due.items()), name
    assert dp.open_export(second).manifest["replayed"][0].startswith(f"trial {kept.number}: the same bits in")


def test_a_stopped_trial_is_exported_as_it_was_stopped(searched: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trial, out = _trial(searched, "stopped"), tmp_path / "out"
    before = {path: path.read_bytes() for path in searched.rglob("*") if path.is_file()}
    assert main(["export", str(searched), "--trial", str(trial.number), "--to", str(out), "--formats", "masks, recipe"]) == 0
    said = capsys.readouterr().out
    assert f"trial {trial.number} was stopped and has kept no weights: running it again, {trial.row['cost']:,.0f} samples" in said
    assert f"trial {trial.number}: the same bits in" in said and "100%  report" in said and f"exported to {out}" in said
    manifest = dp.open_export(out).manifest
    assert manifest["metrics"]["validation"]["accuracy"] == trial.row["objective"] and manifest["sparsity"] == trial.row["sparsity"]
    assert manifest["ended"] == "stopped" and set(manifest["formats"]) == {"masks", "weights", "recipe"}
    assert {path: path.read_bytes() for path in searched.rglob("*") if path.is_file()} == before, "the run folder is only read"


def test_a_trial_that_failed_has_nothing_to_hand_out(searched: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(searched), "--trial", "4", "--to", str(tmp_path / "out")]) == 2
    assert "Trial 4 has no network to export: it ended with 'nan' (The loss is not finite.). Choose another" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_mistakes_are_said_before_anything_is_run_again(
    searched: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from distprune.search import replay

    def runs(job: Job) -> Any:
        raise AssertionError("it was run again")

    monkeypatch.setattr(replay, "run_trial", runs)
    trial = _trial(searched, "stopped")
    assert main(["export", str(searched), "--trial", str(trial.number), "--to", str(tmp_path / "out"), "--formats", "slim,onx"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("Error: Unknown export format 'onx'. Did you mean 'onnx'?") and error.count("\n") == 1
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(UserError, match="export folder must be empty"):
        trial.export(tmp_path / "full")
    with pytest.raises(UserError, match="The export folder must be a new one, .*file cannot be one: Not a directory"):
        trial.export(tmp_path / "full" / "file")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full"]
