"""An export is read without distprune, and gives the recorded test accuracy image for image."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from toys import BASE, check_alone

import distprune as dp
from distprune.core import registry
from distprune.errors import UserError


def _run(**changes: Any) -> Any:
    value = {**BASE, "paradigm": "at_init", "sparsity": 0.8, "allocator": "erk", "train": {"length": "3ep", "batch_size": 32}, **changes}
    return dp.run(value)


@pytest.mark.parametrize("model", ["mlp", "lenet5", {"name": "resnet_cifar", "depth": 8, "width": 4}])
def test_a_plain_script_gets_the_recorded_predictions(model: Any, tmp_path: Path) -> None:
    outcome = _run(model=model)
    folder = outcome.export(tmp_path / "out")
    done = check_alone(folder)
    assert done.returncode == 0, done.stderr
    manifest = json.loads((folder / "manifest.json").read_text())
    accuracy = outcome.run.env.task.metrics(outcome.model, "test")["accuracy"]
    assert manifest["metrics"]["test"]["accuracy"] == accuracy
    assert f"test accuracy {accuracy:.4f} on 100 images, 0 predictions differ" in done.stdout
    assert manifest["kept"] == outcome.masks.kept and set(manifest["layers"]) == set(outcome.masks)


def test_a_fused_network_is_read_without_what_fused_it(tmp_path: Path) -> None:
    options = {"layers": 2, "batches": 4, "pick": "last"}
    outcome = _run(model="lenet5", paradigm={"name": "fusion", **options}, sparsity=0.0)
    folder = outcome.export(tmp_path / "out")
    done = check_alone(folder)
    assert done.returncode == 0 and "0 predictions differ" in done.stdout, done.stderr
    assert "network.set_submodule('conv2', torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(" in (folder / "model.py").read_text()
    manifest = json.loads((folder / "manifest.json").read_text())
    assert set(manifest["layers"]) == {"conv1.weight", "conv2.1.weight"} and manifest["sparsity"] == outcome.run.state.sparsity > 0.3


def test_a_users_own_class_is_imported_from_where_it_is(tmp_path: Path) -> None:
    (tmp_path / "my_net.py").write_text(
        "from torch import nn\n\n\ndef net(shape, classes, *, hidden=8):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(64, hidden), nn.ReLU(), nn.Linear(hidden, classes))\n"
    )
    sys.path.insert(0, str(tmp_path))
    try:
        folder = _run(model={"import": "my_net:net", "hidden": 16}).export(tmp_path / "out")
    finally:
        sys.path.remove(str(tmp_path))
    done = check_alone(folder, PYTHONPATH=str(tmp_path))
    assert done.returncode == 0 and "0 predictions differ" in done.stdout, done.stderr


def test_a_changed_file_is_noticed(tmp_path: Path) -> None:
    folder = _run(model="mlp").export(tmp_path / "out")
    weights = load_file(folder / "weights.safetensors")
    first = next(name for name in weights if name.endswith("weight"))
    save_file({**weights, first: torch.randn_like(weights[first])}, str(folder / "weights.safetensors"))
    done = check_alone(folder)
    assert done.returncode != 0 and "a removed weight is not zero" in done.stderr


def test_a_full_folder_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "something").write_text("mine")
    with pytest.raises(UserError, match=r"export folder must be empty, .* is not. Choose another with --to"):
        _run(model="mlp").export(tmp_path)
    assert (tmp_path / "something").read_text() == "mine"


@pytest.mark.parametrize("name", [name for name in registry.model.names() if name != "torchvision"])
def test_every_models_source_stands_alone(name: str) -> None:
    import inspect

    from distprune.export.code import standalone

    source = standalone(inspect.getsource(inspect.getmodule(registry.model.get(name).function)))  # type: ignore[arg-type]
    assert "distprune" not in "".join(line for line in source.splitlines() if "import" in line)
    exec(compile(source, name, "exec"), {"__name__": "alone"})
