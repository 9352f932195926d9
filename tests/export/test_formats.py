"""Every form of an export is the network that was pruned, and the manifest tells the truth about it."""

import hashlib
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.utils import prune
from toys import BASE, ready

import distprune as dp
from distprune.core.masks import prunable
from distprune.errors import UserError
from distprune.export.tables import format as formats

FORMATS = ("torch", "slim", "onnx", "pt2", "recipe")
CHANNELS: dict[str, Any] = {
    **BASE,
    "model": {"name": "resnet_cifar", "depth": 8, "width": 8},
    "paradigm": "at_init",
    "granularity": "filter",
    "allocator": "uniform",
    "sparsity": 0.6,
    "train": {**BASE["train"], "length": "1ep"},
}


def alone(shape: tuple[int, int, int], classes: int) -> nn.Module:
    """One layer: nothing in it can be taken out."""
    return nn.Sequential(nn.Flatten(), nn.Linear(math.prod(shape), classes))


class _OneByOne(nn.Module):
    def __init__(self, inputs: int, classes: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(inputs, 12), nn.Linear(12, classes)

    def forward(self, inputs: Tensor) -> Tensor:
        return torch.stack([self.second(self.first(row.flatten()).relu()) for row in inputs])


def one_by_one(shape: tuple[int, int, int], classes: int) -> nn.Module:
    """A network whose code counts its inputs, so that no graph of it can leave their number open."""
    return _OneByOne(math.prod(shape), classes)


@pytest.fixture(scope="module")
def outcome() -> Any:
    torch.set_num_threads(1)
    return dp.run(CHANNELS)


@pytest.fixture(scope="module")
def folder(outcome: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = outcome.export(tmp_path_factory.mktemp("formats") / "out", formats=FORMATS)
    return path


def _manifest(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "manifest.json").read_text()))


def _far(found: Tensor, due: Tensor) -> float:
    return float((found - due).abs().max() / due.abs().max())


@torch.no_grad()
@pytest.mark.parametrize("name", ["masked", "slim", "onnx", "pt2"])
def test_every_network_answers_as_the_pruned_one_at_any_batch(name: str, folder: Path, outcome: Any) -> None:
    export = dp.open_export(folder)
    network, pruned = export.network(name), outcome.model.eval()
    for batch in (1, 2, 7):
        inputs = torch.randn(batch, *export.inputs(1).shape[1:])
        found = network(inputs)
        assert found.shape == (batch, 10) and _far(found, pruned(inputs)) < 1e-4


def test_inputs_are_those_of_the_test_split(folder: Path, outcome: Any) -> None:
    task: Any = outcome.run.env.task
    export = dp.open_export(folder)
    torch.testing.assert_close(export.inputs(120)[:100], task.normalise(task.dataset.test.inputs))
    assert torch.equal(export.inputs(120)[100:], export.inputs(20)), "where there are fewer, they come again"
    found = export.network("slim")(export.inputs(100)).argmax(1)
    assert torch.equal(found, load_file(folder / "test.safetensors")["predictions"])


def test_the_manifest_is_true(folder: Path, outcome: Any) -> None:
    manifest, export = _manifest(folder), dp.open_export(folder)
    assert {path.name for path in folder.iterdir()} == {*manifest["files"], "manifest.json"}
    for name, facts in manifest["files"].items():
        data = (folder / name).read_bytes()
        assert facts == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    assert export.formats == ("masks", "weights", "onnx", "pt2", "recipe", "slim", "torch")
    dense = outcome.run.env.build().state_dict()
    whole = sum(tensor.nbytes for tensor in dense.values())
    assert manifest["dense"]["bytes"] == whole
    for name, form in manifest["formats"].items():
        assert form["bytes"] == sum((folder / file).stat().st_size for file in form["files"]) and form["size"] == form["bytes"] / whole
        assert (form["latency"] is None) <= bool(form["notes"]), "what is not known has a reason"
        if form["latency"] is not None:
            assert 0 < form["latency"]["low"] <= form["latency"]["ratio"] <= form["latency"]["high"] and form["latency"]["threads"] == 1
        assert (form["error"] is None) == (name in ("masks", "recipe"))
    with torch.no_grad():
        due, inputs = outcome.model.eval()(export.inputs(16)), export.inputs(16)
        for name in ("slim", "onnx", "pt2"):
            error = manifest["formats"][name]["error"]
            assert error["relative"] < 1e-4 and error["inputs"] == 16
            torch.testing.assert_close(error["largest"], float((export.network(name)(inputs) - due).abs().max()), rtol=0.2, atol=1e-6)
    assert manifest["formats"]["masks"]["exact"] and manifest["formats"]["masks"]["size"] < 1 and manifest["formats"]["slim"]["size"] < 1


def test_the_slim_network_is_smaller_by_the_channels_that_are_gone(folder: Path, outcome: Any) -> None:
    export = dp.open_export(folder)
    slim: Any = export.network("slim")
    small, whole = prunable(slim), prunable(outcome.model)
    assert sum(weight.numel() for weight in small.values()) == outcome.masks.kept, "masks of whole channels leave nothing to mask"
    assert {name for name in small if small[name].shape != whole[name].shape} <= set(export.manifest["layers"])
    facts = export.manifest["formats"]["slim"]
    assert facts["parameters"] == sum(parameter.numel() for parameter in slim.parameters())
    assert "channels and heads are taken out" in facts["notes"][0] and export.manifest["formats"]["onnx"]["of"] == "slim"


SLIM_ALONE = """
import sys
sys.modules |= dict.fromkeys(("distprune", "torch_pruning", "torchvision", "numpy.core"))
sys.path.insert(0, sys.argv[1])
import torch, model, slim
from safetensors.torch import load_file
network = slim.build()
network.load_state_dict(load_file(sys.argv[1] + "/slim.safetensors"))
test = load_file(sys.argv[1] + "/test.safetensors")
with torch.no_grad():
    found = network.eval()(model.prepare(test["inputs"])).argmax(1)
print(int((found != test["predictions"]).sum()), "differ")
"""


def test_the_slim_network_is_built_with_torch_alone(folder: Path) -> None:
    done = subprocess.run([sys.executable, "-c", SLIM_ALONE, str(folder)], capture_output=True, text=True, check=False)
    assert done.stdout == "0 differ\n", done.stderr


def test_torch_loads_its_own_pruning(folder: Path, outcome: Any) -> None:
    state = load_file(folder / "torch.safetensors")
    by_identity, by_mask = outcome.run.env.build(), outcome.run.env.build()
    for name, mask in outcome.masks.items():
        module, _, weight = name.rpartition(".")
        prune.identity(by_identity.get_submodule(module), weight)
        prune.custom_from_mask(by_mask.get_submodule(module), weight, torch.zeros_like(mask))
    inputs = dp.open_export(folder).inputs(5)
    for network in (by_identity, by_mask):
        assert set(network.state_dict()) == set(state)
        network.load_state_dict(state)
        with torch.no_grad():
            assert torch.equal(network.eval()(inputs), outcome.model.eval()(inputs))
    first = next(iter(outcome.masks)).rpartition(".")
    layer = by_mask.get_submodule(first[0])
    prune.remove(layer, first[2])
    assert torch.equal(getattr(layer, first[2]), dict(outcome.model.named_parameters())[".".join((first[0], first[2]))])


def test_the_recipe_runs_again_to_the_same_bits(folder: Path, outcome: Any) -> None:
    again = dp.run(folder / "recipe.yaml")
    assert again.masks.equal(outcome.masks)
    assert all(torch.equal(value, outcome.model.state_dict()[name]) for name, value in again.model.state_dict().items())


def test_the_recipe_of_a_stopped_network_does_not_say_that_it_makes_it_again(tmp_path: Path) -> None:
    from distprune.core.executor import execute
    from distprune.export.writing import export

    run = ready("at_init", 0.5, model="mlp")
    going = execute(run.plan, run.state, run.env)
    for made in (1, 2):
        next(going)
        out = export(run, tmp_path / str(made), {}, formats=["recipe"])
        due = f"Its full training; this network was stopped at report {made}"
        assert (out / "recipe.yaml").read_text().startswith(f"# {due}: ")
        assert f"{due}." in _manifest(out)["formats"]["recipe"]["notes"]
    assert list(going)[-1].final
    out = export(run, tmp_path / "end", {}, formats=["recipe"])
    assert (out / "recipe.yaml").read_text().startswith("# Makes this network again: ")
    assert not any("stopped" in note for note in _manifest(out)["formats"]["recipe"]["notes"])


def test_both_files_of_masks_are_the_masks(folder: Path, outcome: Any) -> None:
    for name in ("masks.safetensors", "masks.parquet"):
        assert dp.Masks.load(folder / name).equal(outcome.masks)
    assert (folder / "masks.parquet").stat().st_size < (folder / "masks.safetensors").stat().st_size / 2


def test_masks_of_single_weights_make_nothing_smaller_and_it_says_so(tmp_path: Path) -> None:
    export = dp.open_export(
        dp.run({**CHANNELS, "granularity": "weight", "sparsity": 0.3}).export(tmp_path / "out", formats=["slim", "pt2"])
    )
    form = export.manifest["formats"]["slim"]
    assert form["size"] > 0.99 and export.manifest["formats"]["pt2"]["of"] == "masked"
    assert "channels and heads is taken out, as masks of granularity 'weight' leave a weight in each of them" in form["notes"][0]
    assert "Masks of granularity filter or channel make it smaller" in form["notes"][0]
    with torch.no_grad():
        assert torch.equal(export.network("slim")(export.inputs(3)), export.network("masked")(export.inputs(3)))  # type: ignore[arg-type]


def test_a_network_without_channels_says_so(tmp_path: Path) -> None:
    recipe = {**CHANNELS, "model": {"import": "test_formats:alone"}, "granularity": "weight"}
    export = dp.open_export(dp.run(recipe).export(tmp_path / "out", formats=["slim"]))
    assert "No channel or head can be taken out: Sequential must have channels" in export.manifest["formats"]["slim"]["notes"][0]
    assert json.loads((tmp_path / "out" / "slim.json").read_text())["shapes"] == {}


def test_a_network_that_counts_its_inputs_is_traced_for_one(tmp_path: Path) -> None:
    recipe = {**CHANNELS, "model": {"import": "test_formats:one_by_one"}, "granularity": "filter", "sparsity": 0.4}
    outcome = dp.run(recipe)
    export = dp.open_export(outcome.export(tmp_path / "out", formats=["onnx", "pt2"]))
    inputs = export.inputs(5)
    for name in ("onnx", "pt2"):
        form = export.manifest["formats"][name]
        assert form["batch"] == 1 and any("It takes one input at a time, as its forward method fixes" in note for note in form["notes"])
        with torch.no_grad():
            assert _far(export.network(name)(inputs), outcome.model.eval()(inputs)) < 1e-4


@pytest.mark.parametrize("asked", ["slmi", ["masks", "slmi"]])
def test_an_unknown_format_is_one_line_and_nothing_is_written(asked: Any, outcome: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="Unknown export format 'slmi'. Did you mean 'slim'\\? Known: 2:4, masks, onnx, pt2, recipe"):
        outcome.export(tmp_path / "out", formats=asked)
    assert not list(tmp_path.iterdir())


def test_a_missing_package_is_one_line_that_names_the_extra(outcome: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    true = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxscript" else true(name))
    with pytest.raises(
        UserError, match='Format onnx needs onnxscript, which is not installed. pip install "distprune\\[onnx\\]", or leave'
    ):
        outcome.export(tmp_path / "out", formats=["onnx"])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("at", ["slim", "recipe", "opened"])
def test_an_export_that_fails_midway_leaves_nothing(at: str, outcome: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from distprune.export import writing

    def fails(*arguments: Any) -> Any:
        raise KeyboardInterrupt

    if at == "opened":
        monkeypatch.setattr(writing, "open_export", fails)
    else:
        monkeypatch.setitem(formats._entries, at, formats._entry(at, fails, "", 1, formats.get(at).facts))
    (tmp_path / "empty").mkdir()
    for target in ("new", "empty"):
        with pytest.raises(KeyboardInterrupt):
            outcome.export(tmp_path / target, formats=["slim", "recipe"])
    assert [path.name for path in tmp_path.rglob("*")] == ["empty"]


def test_an_answer_that_is_wrong_is_not_handed_out(outcome: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from distprune.export.source import Slim, Source

    wrong = outcome.run.env.build().eval()  # another network of the same shape
    monkeypatch.setattr(Source, "slim", Slim(wrong, 0, ""))
    with pytest.raises(
        UserError, match="Format slim must answer as the network does within 0.0001 of its largest output, got .* Leave slim out"
    ):
        outcome.export(tmp_path / "out", formats=["slim"])
    assert not list(tmp_path.iterdir())


def test_a_noisy_latency_is_null_with_its_reason(outcome: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from distprune.export import measuring

    def noisy(networks: Any, inputs: Tensor) -> dict[str, list[float]]:
        return {name: [1.0, 1.0, 1.0, 1.0] if name == "dense" else [0.5, 0.9, 1.1, 2.0] for name in networks}

    monkeypatch.setattr(measuring, "measure", noisy)
    form = dp.open_export(outcome.export(tmp_path / "out")).manifest["formats"]["torch"]
    assert form["latency"] is None and "quartiles of the ratio to dense lay more than 20% apart in each of 3 attempts" in form["notes"][-1]


def test_no_path_of_this_machine_is_handed_out(folder: Path) -> None:
    for path in filter(Path.is_file, folder.iterdir()):
        data = path.read_bytes()
        assert b"site-packages" not in data and str(Path(dp.__file__).parent).encode() not in data, path.name
