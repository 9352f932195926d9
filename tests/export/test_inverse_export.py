"""The export of a generator: a plain script makes the recorded image out of the recorded input."""

import json
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from toys import check_alone

import distprune as dp
from distprune.core.tasks.given import GivenBatches
from distprune.errors import UserError
from distprune.export.kinds import kind_of

RECIPE: dict[str, Any] = {
    "model": {"name": "hourglass", "widths": [6, 8]},
    "data": {"name": "image", "side": 16, "grey": False},
    "task": {"name": "inverse", "operator": "mask", "noise": 0.1, "latent": 4, "epoch": 10},
    "paradigm": {"name": "eye_surgeon", "learn": "10it"},
    "sparsity": 0.8,
    "train": {"length": "20it", "batch_size": 1, "optimizer": {"name": "adamw", "lr": 0.01}},
}
SIGNAL: dict[str, Any] = {
    **RECIPE,
    "model": {"name": "two_layer", "width": 20},
    "data": {"name": "gaussian_signal", "n": 12},
    "task": {"name": "inverse", "operator": "gaussian", "measurements": 8, "latent": 5, "start": "sphere", "epoch": 10},
}


@pytest.mark.parametrize("recipe", [RECIPE, SIGNAL], ids=["image", "signal"])
def test_a_plain_script_makes_the_recorded_image(recipe: dict[str, Any], tmp_path: Path) -> None:
    outcome = dp.run(recipe)
    folder = outcome.export(tmp_path / "out")
    done = check_alone(folder)
    assert done.returncode == 0 and ", 0 pixels differ, " in done.stdout, done.stderr
    manifest, test = json.loads((folder / "manifest.json").read_text()), load_file(folder / "test.safetensors")
    task: Any = outcome.run.env.task
    assert (
        manifest["metrics"]["test"] == task.metrics(outcome.model, "test") and next(iter(manifest["metrics"]["validation"])) == "held_out"
    )
    torch.testing.assert_close(test["image"], task.image(task.predict(outcome.model)), rtol=1e-5, atol=1e-6)
    error = (test["image"] - task.truth).square().mean().sqrt().item()
    assert f"root mean squared error {error:.4f} against the true image" in done.stdout
    names = runpy.run_path(str(folder / "model.py"))
    network = names["build"]().eval()
    network.load_state_dict(load_file(folder / "weights.safetensors"))
    with torch.no_grad():
        fresh = names["image"](network(test["inputs"]))
    torch.testing.assert_close(task.operator(fresh)[:, task.held], task.operator(test["image"])[:, test["held"]], rtol=1e-4, atol=1e-5)


def test_a_changed_weight_is_noticed(tmp_path: Path) -> None:
    folder = dp.run(RECIPE).export(tmp_path / "out")
    weights, masks = load_file(folder / "weights.safetensors"), load_file(folder / "masks.safetensors")
    first = next(iter(masks))
    save_file({**weights, first: weights[first] * masks[first] * 1.5 + 0.3 * masks[first]}, str(folder / "weights.safetensors"))
    done = check_alone(folder)
    assert done.returncode != 0 and "the export does not give the recorded results" in done.stderr


def test_a_task_that_exports_do_not_know_is_refused() -> None:
    with pytest.raises(UserError, match="An export needs task classification or inverse, got GivenBatches"):
        kind_of(GivenBatches([], torch.nn.functional.cross_entropy), torch.nn.Linear(1, 1))
