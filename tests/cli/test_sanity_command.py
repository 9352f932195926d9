"""`distprune sanity` on an export and on a run folder, and its mistakes: one line, exit code 2, nothing trained."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from toys import BASE

import distprune as dp
from distprune import api
from distprune.cli import main
from distprune.core.masks import Masks
from distprune.export.reading import digest, facts_of
from distprune.result import Result
from distprune.search import driver
from distprune.search.config import Search
from distprune.search.simulate import Simulator
from distprune.search.trial import run_trial

VARIANTS = ["as found", "shuffled", "reinitialised", "random", "inverted"]
SHORT = {"length": "2ep", "batch_size": 32, "optimizer": {"name": "sgd", "lr": 0.05}}


def _recipe(**changes: Any) -> dict[str, Any]:
    return {**BASE, "model": "mlp", "paradigm": "finetune", "sparsity": 0.9, "allocator": "erk", "train": SHORT, **changes}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return dp.run(_recipe()).export(tmp_path_factory.mktemp("export") / "out")


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A search whose front holds a dense trial and pruned ones; trials leave the directory and set the threads."""
    where = os.getcwd()
    value = {
        "name": "s",
        "recipe": {**BASE, "model": {"name": "lenet5", "width": 0.2}, "train": SHORT},
        "space": {"paradigm": ["dense", "at_init", "gradual"], "sparsity": [0.5, 0.9]},
        "sampler": "random",
        "scheduler": "none",
        "limits": {"trials": 5},
        "storage": str(tmp_path_factory.mktemp("runs")),
    }
    try:
        return driver.start(Search.read(value), engine=Simulator(run_trial, workers=1), listen=lambda event, facts: None).path
    finally:
        os.chdir(where)


def _error(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["sanity", *arguments]) == 2
    output = capsys.readouterr()
    assert output.err.startswith("Error: ") and output.err.count("\n") == 1 and "seed" not in output.out, output
    return output.err


def test_an_export_is_checked(exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sanity", str(exported), "--seeds", "2", "--to", str(tmp_path / "numbers.json")]) == 0
    output = capsys.readouterr().out
    manifest = json.loads((exported / "manifest.json").read_text())
    accuracy = manifest["metrics"]["validation"]["accuracy"]
    assert f"{accuracy:.4f} on validation as recorded" in output and "10 steps, where a training from the start has 20" in output
    assert output.count("%  seed 0  ") == output.count("%  seed 1  ") == 5 and "100%  seed 1  inverted" in output
    assert "differs on" not in output and "12.71 standard errors" in output and output.splitlines()[-1].count("it beats") <= 3
    numbers = json.loads((tmp_path / "numbers.json").read_text())
    assert [row["variant"] for row in numbers["rows"]] == VARIANTS and numbers["seeds"] == [0, 1]
    assert numbers["rows"][0]["values"][0] == accuracy, "as found with its own seed is the trial itself"
    assert numbers["recipe"] == manifest["recipe"] and numbers["versions"]["torch"] and numbers["verdict"]["text"] in output


def test_a_trial_is_checked(searched: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = Result(searched)
    pruned = [trial for trial in result.pareto() if trial.row["sparsity"]]
    assert main(["sanity", str(searched), "--seeds", "1"]) == 0
    output = capsys.readouterr().out
    assert f"trial {pruned[0].number} of {searched}: running the recipe up to its masks" in output
    assert "One seed is not enough for a verdict" in output
    for paradigm in {trial.row["paradigm"] for trial in pruned}:
        trial = next(trial for trial in pruned if trial.row["paradigm"] == paradigm)
        found = trial.sanity(seeds=1)
        assert [row.variant for row in found.rows] == VARIANTS[: 4 if paradigm == "gradual" else 5]
        if paradigm == "at_init":
            assert found.rows[0].mean == trial.row["objective"] and len(found.notes) == 1
        else:
            assert "checked as a ticket" in found.protocol


def test_one_seed_writes_numbers_without_errors(exported: Path, tmp_path: Path) -> None:
    found = api.sanity(exported, seeds=1, to=tmp_path / "numbers.json")
    assert found.verdict.weights is None and json.loads((tmp_path / "numbers.json").read_text())["rows"][1]["error"] is None


def test_mistakes_in_the_arguments(exported: Path, searched: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "taken.json").write_text("mine")
    assert "seeds must be at least 1, got 0" in _error(capsys, str(exported), "--seeds", "0")
    assert "taken.json exists already" in _error(capsys, str(exported), "--to", str(tmp_path / "taken.json"))
    assert "a folder that does not exist" in _error(capsys, str(exported), "--to", str(tmp_path / "nowhere" / "n.json"))
    assert "neither a run folder" in _error(capsys, str(tmp_path))
    assert "neither a run folder" in _error(capsys, str(tmp_path / "nowhere"))
    assert "is the export of one trial" in _error(capsys, str(exported), "--trial", "3")
    assert "device must be one that torch can use here, got 'tpu9'" in _error(capsys, str(exported), "--device", "tpu9")
    assert "has no trial 99" in _error(capsys, str(searched), "--trial", "99")
    assert (tmp_path / "taken.json").read_text() == "mine"


def test_trials_without_masks(searched: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = Result(searched).rows()
    dense = next(trial for trial in rows if not trial.row["sparsity"])
    assert f"Trial {dense.number} is dense" in _error(capsys, str(searched), "--trial", str(dense.number))
    copy = shutil.copytree(searched, tmp_path / "copy")
    pruned = next(trial for trial in Result(copy).pareto() if trial.row["sparsity"])
    Result(copy).folder.masks_file(pruned.number).unlink()
    assert f"Trial {pruned.number} has no masks" in _error(capsys, str(copy), "--trial", str(pruned.number))


def _seal(folder: Path) -> None:
    """The manifest as it is for the masks that are there now."""
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["masks.safetensors"] = facts_of(folder / "masks.safetensors")
    manifest["sha256"] = digest(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_masks_of_another_network(exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = shutil.copytree(exported, tmp_path / "copy")
    masks = Masks.load(copy / "masks.safetensors")
    Masks({f"other.{name}": mask for name, mask in masks.items()}).save(copy / "masks.safetensors")
    assert "is not the file that was exported" in _error(capsys, str(copy))
    _seal(copy)
    assert "The masks are of another network: 'fc1.weight'" in _error(capsys, str(copy))
    Masks.ones(masks).save(copy / "masks.safetensors")
    _seal(copy)
    assert "it keeps every weight" in _error(capsys, str(copy))
    (copy / "masks.safetensors").write_text("damaged")
    _seal(copy)
    assert "is not a readable safetensors file of masks" in _error(capsys, str(copy))
    (copy / "masks.safetensors").unlink()
    assert "masks.safetensors is missing, and the manifest" in _error(capsys, str(copy))


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"recipe": {}, "metrics": {"validation": {}}}'])
def test_manifests_that_are_none(text: str, exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = shutil.copytree(exported, tmp_path / "copy")
    (copy / "manifest.json").write_text(text)
    assert "is not the manifest of an export" in _error(capsys, str(copy))
