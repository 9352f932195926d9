"""A damaged, incomplete or foreign export is refused when it is opened, in one line, and nothing of it is run."""

import io
import json
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from toys import BASE

import distprune as dp
from distprune.errors import UserError
from distprune.export.reading import digest, facts_of

NETWORKS = ("slim", "onnx", "pt2")


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    recipe = {**BASE, "model": "lenet5", "paradigm": "at_init", "granularity": "filter", "allocator": "uniform", "sparsity": 0.5}
    outcome = dp.run({**recipe, "train": {**BASE["train"], "length": "10it"}})
    return outcome.export(tmp_path_factory.mktemp("reading") / "out", formats=[*NETWORKS, "torch", "recipe"])


@pytest.fixture
def copy(exported: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported, tmp_path / "copy"))


def _refused(folder: Path, match: str) -> None:
    with pytest.raises(UserError, match=match) as caught:
        dp.open_export(folder)
    assert "\n" not in str(caught.value)


def _seal(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change a manifest as somebody would who knows how it is made."""
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    manifest["sha256"] = digest(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_a_whole_export_is_opened_from_anywhere(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (copy / "notes.txt").write_text("mine")
    moved = copy.rename(copy.with_name("moved"))
    monkeypatch.chdir(moved.parent)
    assert dp.open_export("moved").networks == ("dense", "masked", "onnx", "pt2", "slim")


@pytest.mark.parametrize("how", ["a bit", "cut", "longer", "gone", "another", "link"])
def test_no_file_of_an_export_may_be_another(how: str, exported: Path, tmp_path: Path) -> None:
    manifest = json.loads((exported / "manifest.json").read_text())
    assert len(manifest["files"]) == 13
    for number, name in enumerate(manifest["files"]):
        copy = Path(shutil.copytree(exported, tmp_path / str(number)))
        file, data = copy / name, (copy / name).read_bytes()
        if how == "a bit":
            middle = len(data) // 2
            file.write_bytes(data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :])
        elif how == "cut":
            file.write_bytes(data[:-1])
        elif how == "longer":
            file.write_bytes(data + b"\n")
        elif how == "another":
            file.write_bytes((copy / ("model.py" if name != "model.py" else "check.py")).read_bytes())
        else:
            file.unlink()
        if how == "link":
            file.symlink_to(exported / name)
        _refused(copy, "is missing, and the manifest" if how in ("gone", "link") else "is not the file that was exported")


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"format": "distprune.export/1"}', '{"format": "distprune.export/2"}'])
def test_manifests_of_nothing(text: str, copy: Path) -> None:
    (copy / "manifest.json").write_text(text)
    _refused(copy, "manifest.json is not the manifest of an export")


def test_a_number_in_the_manifest_may_not_change(copy: Path) -> None:
    text = (copy / "manifest.json").read_text()
    manifest = json.loads(text)
    (copy / "manifest.json").write_text(json.dumps(manifest))
    dp.open_export(copy)  # it may be laid out otherwise
    (copy / "manifest.json").write_text(text.replace(f'"kept": {manifest["kept"]}', f'"kept": {manifest["kept"] - 1}', 1))
    _refused(copy, "it was changed after it was written")


def test_a_folder_that_is_none(tmp_path: Path) -> None:
    _refused(tmp_path, "is not an export: it has no manifest.json")
    _refused(tmp_path / "nowhere", "is not an export: it has no manifest.json")


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "sub/model.py", ".."])
def test_a_manifest_does_not_lead_out_of_its_folder(name: str, copy: Path) -> None:
    (copy.parent / "secret").write_text("secret")
    (copy / "sub").mkdir()
    shutil.copy(copy / "model.py", copy / "sub")
    there = copy / name
    facts = facts_of(there) if there.is_file() else {"bytes": 1, "sha256": "0"}
    _seal(copy, lambda manifest: manifest["files"].update({name: facts}))
    _refused(copy, "is missing, and the manifest")


def test_what_is_not_listed_is_not_read(copy: Path) -> None:
    _seal(copy, lambda manifest: manifest["files"].pop("slim.safetensors"))
    _refused(copy, "lists no slim.safetensors, which its formats need")


def test_names_of_networks(exported: Path) -> None:
    export = dp.open_export(exported)
    with pytest.raises(
        UserError, match="Unknown network of an export: 'slm'. Did you mean 'slim'\\? Known: 2:4, dense, masked, onnx, pt2, slim"
    ):
        export.network("slm")
    with pytest.raises(UserError, match="does not hold 2:4, it was exported as masks, weights, .* Export again with --formats 2:4"):
        export.network("2:4")


def test_dense_is_the_architecture_unpruned(exported: Path) -> None:
    export = dp.open_export(exported)
    dense, masked = export.network("dense"), export.network("masked")
    assert isinstance(dense, torch.nn.Module) and isinstance(masked, torch.nn.Module) and not (dense.training or masked.training)
    weights = dict(dense.named_parameters())
    assert {name: value.shape for name, value in weights.items()} == {name: value.shape for name, value in masked.named_parameters()}
    assert all(bool(weights[name].all()) for name in export.masks)
    assert torch.equal(dense(export.inputs(2)), export.network("dense")(export.inputs(2))), "the same each time"  # type: ignore[arg-type]


def test_the_global_generator_is_left_as_it_was(exported: Path) -> None:
    torch.manual_seed(3)
    due = torch.rand(1)
    torch.manual_seed(3)
    export = dp.open_export(exported)
    for name in export.networks:
        export.network(name)
    assert torch.equal(torch.rand(1), due)


def test_weights_of_other_code_are_refused(copy: Path) -> None:
    """As where a user's own network has changed since: every file is as it was exported, and fits no longer."""
    _seal(copy, lambda manifest: manifest["recipe"].update(model={"name": "mlp"}))
    export = dp.open_export(copy)
    with pytest.raises(UserError, match="does not fit the network that its recipe builds here: .* Use the code that it was made with"):
        export.network("masked")
    with pytest.raises(UserError, match="slim cannot be read from slim.safetensors, slim.json, slim.py: "):
        export.network("slim")


class _Evil:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("evil"),))


@pytest.mark.parametrize("where", ["data/weights/weight_0", "data/sample_inputs/model.pt", "data/constants/opaque_obj_0", "config"])
def test_a_program_with_a_pickle_is_refused_unread(where: str, copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even where somebody has sealed the export again: what torch would unpickle is looked for before torch reads the file."""
    monkeypatch.chdir(copy.parent)
    file = copy / "network.pt2"
    with zipfile.ZipFile(file) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    root = next(iter(entries)).split("/")[0]
    bad = pickle.dumps(_Evil())
    if where == "config":
        config = next(name for name in entries if name.endswith("weights_config.json"))
        entries[config] = entries[config].replace(b'"use_pickle": false', b'"use_pickle": true', 1)
    else:
        entries[f"{root}/{where}"] = bad
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
    file.write_bytes(made.getvalue())
    _seal(copy, lambda manifest: manifest["files"].update({"network.pt2": facts_of(file)}))
    # Where numbers are due, a pickle is taken for numbers, and there are too few of them.
    match = "pt2 cannot be read from network.pt2" if where.endswith("weight_0") else "network.pt2 must hold numbers and JSON alone, got a"
    with pytest.raises(UserError, match=match):
        dp.open_export(copy).network("pt2")
    assert not Path("evil").exists()


def test_files_that_are_sealed_and_senseless(copy: Path) -> None:
    for name, network in (("network.pt2", "pt2"), ("network.onnx", "onnx"), ("slim.json", "slim"), ("weights.safetensors", "masked")):
        (copy / name).write_bytes(b"{}")
        _seal(copy, lambda manifest, name=name: manifest["files"].update({name: facts_of(copy / name)}))  # type: ignore[misc]
        with pytest.raises(UserError) as caught:
            dp.open_export(copy).network(network)
        assert name in str(caught.value) and "\n" not in str(caught.value)


def test_a_changed_weight_is_refused_though_the_file_is_whole(copy: Path) -> None:
    weights = load_file(copy / "weights.safetensors")
    weights[next(iter(weights))] += 1e-6
    save_file(weights, str(copy / "weights.safetensors"))
    _refused(copy, "weights.safetensors is not the file that was exported")
