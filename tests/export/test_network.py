"""An export is read without distprune, and gives the recorded test accuracy image for image."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from toys import BASE, check_alone, ready

import distprune as dp
from distprune import api
from distprune.cli import main
from distprune.core import registry
from distprune.errors import UserError
from distprune.export import kinds
from distprune.result import Result


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


SLIM = """
import sys
sys.path.insert(0, sys.argv[1])
import torch, slim
from safetensors.torch import load_file
network = slim.build()
network.load_state_dict(load_file(sys.argv[1] + "/slim.safetensors"))
test = load_file(sys.argv[1] + "/test.safetensors")
with torch.no_grad():
    found = network.eval()(slim.model.prepare(test["inputs"])).argmax(1)
print(int((found != test["predictions"]).sum()), "predictions differ", sys.path[0] == sys.argv[1])
"""


@pytest.mark.parametrize("module", ["my_net", "model"])
def test_a_users_own_network_is_imported_from_where_one_is(module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the pages say, `python out/check.py` in the folder of the network; also where its file is called like one of the export's."""
    (tmp_path / f"{module}.py").write_text(
        "from torch import nn\n\n\ndef net(shape, classes, *, hidden=8):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(64, hidden), nn.ReLU(), nn.Linear(hidden, classes))\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, module, raising=False)
    changes = {"granularity": "filter", "allocator": "uniform", "sparsity": 0.5}
    _run(model={"import": f"{module}:net", "hidden": 16}, **changes).export(tmp_path / "out", formats=["slim"])
    monkeypatch.delitem(sys.modules, module)
    for arguments in (["out/check.py"], ["-c", SLIM, "out"], ["-c", SLIM, str(tmp_path / "out")]):
        command = [sys.executable, *arguments]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, env={"OMP_NUM_THREADS": "1"})
        assert done.returncode == 0 and "0 predictions differ" in done.stdout, done.stderr
        assert "differ False" not in done.stdout, "the search path is as it was"


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


def test_a_folder_that_is_not_empty_is_said_before_anything_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "something").touch()
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({**BASE, "paradigm": "dense"}))
    monkeypatch.setattr(api, "run", lambda *arguments, **options: pytest.fail("it was trained"))
    assert main(["run", str(tmp_path / "recipe.yaml"), "--to", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("Error: The export folder must be empty") and error.count("\n") == 1


def test_a_part_of_the_test_split_is_counted_in_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Images as float32 take four times as much as those in bytes."""
    run = ready(model="mlp")
    dataset = run.env.task.dataset  # type: ignore[attr-defined]
    room = 10 * 64 * 4
    monkeypatch.setattr(kinds, "MOST_TEST_BYTES", room)
    assert len(kinds.kind_of(run.env.task, run.state.model).rows["inputs"]) == 40
    floats = replace(dataset, test=replace(dataset.test, inputs=dataset.test.inputs.float()))
    monkeypatch.setattr(run.env.task, "dataset", floats)
    assert len(kinds.kind_of(run.env.task, run.state.model).rows["inputs"]) == 10


def test_devices_that_cannot_be_timed_are_refused(tmp_path: Path) -> None:
    folder = _run(model="mlp").export(tmp_path / "out", formats=[])
    with pytest.raises(UserError, match="device must be cpu or cuda, where times can be measured, got 'meta'. Write --device cpu."):
        dp.bench(folder, device="meta")


@pytest.mark.parametrize(
    ("options", "got"), [({"max_density": 5}, "5"), ({"max_density": 0}, "0"), ({"max_density": 0.1, "trial": 3}, "0.1 and t")]
)
def test_a_density_is_a_share_and_chooses_alone(options: dict[str, Any], got: str) -> None:
    result = object.__new__(Result)  # nothing of the folder is read for it
    with pytest.raises(UserError, match=rf"max_density must be a share in \(0, 1\], without a trial, got {got}.*For 5 % write 0.05."):
        result.best(**options)
