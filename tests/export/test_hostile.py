"""Exports made to harm: sealed again by somebody who knows how, they are refused before anything that they name or hold is run."""

import io
import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toys import BASE

import distprune as dp
from distprune.errors import UserError
from distprune.export.formats import pt2
from distprune.export.reading import digest, facts_of
from distprune.result import found_masks

EVIL = "__import__('pathlib').Path('evil').touch()"


@pytest.fixture(scope="module")
def outcome() -> Any:
    torch.set_num_threads(1)
    recipe = {**BASE, "model": "lenet5", "paradigm": "at_init", "granularity": "filter", "allocator": "uniform", "sparsity": 0.5}
    return dp.run({**recipe, "train": {**BASE["train"], "length": "2it"}})


@pytest.fixture(scope="module")
def exported(outcome: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(outcome.export(tmp_path_factory.mktemp("hostile") / "out", formats=["pt2"]))


@pytest.fixture
def copy(exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copytree(exported, tmp_path / "copy"))


def _seal(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    manifest["sha256"] = digest(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def _refused(act: Callable[[], Any], match: str) -> None:
    with pytest.raises(UserError, match=match) as caught:
        act()
    assert "\n" not in str(caught.value) and not Path("evil").exists()


def _entries(file: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(file) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def _zipped(entries: dict[str, bytes]) -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
    return made.getvalue()


def _exchange(folder: Path, data: bytes) -> None:
    file = folder / "network.pt2"
    file.write_bytes(data)
    _seal(folder, lambda manifest: manifest["files"].update({file.name: facts_of(file)}))


def _size(model: Any) -> dict[str, Any]:
    found: dict[str, Any] = model["graph_module"]["graph"]["tensor_values"]["input"]["sizes"][0]["as_expr"]
    return found


def _renamed(model: Any) -> Any:
    return json.loads(json.dumps(model).replace('"input"', json.dumps(f"input={EVIL}")))


def _nested(model: Any) -> None:
    graph = json.loads(json.dumps(model["graph_module"]["graph"]))
    graph["nodes"][0]["target"] = "torch.ops.load_library"
    inner = {"name": "", "arg": {"as_graph": {"name": "inside", "graph": graph}}, "kind": 1}
    model["graph_module"]["graph"]["nodes"][0]["inputs"].append(inner)


def _spec(model: Any) -> None:
    signature = model["graph_module"]["module_call_graph"][0]["signature"]
    signature["in_spec"] = signature["in_spec"].replace("builtins.dict", "os.system")


ATTACKS: dict[str, Callable[[Any], Any]] = {
    "size": lambda model: _size(model).update(expr_str=f"{EVIL} or {_size(model)['expr_str']}"),
    "symbol": lambda model: _size(model).update(expr_str="Symbol('s31').func('evil')"),
    "assumption": lambda model: _size(model).update(expr_str="Symbol('s31', positive=open('evil', 'w'), integer=True)"),
    "list of sizes": lambda model: _size(model).update(expr_str=[EVIL]),
    "name": _renamed,
    "argument": lambda model: model["graph_module"]["graph"]["nodes"][0]["inputs"][0].update(name=f"x={EVIL}"),
    "forward": lambda model: model["graph_module"]["module_call_graph"][0]["signature"].update(forward_arg_names=[f"x={EVIL}"]),
    "layout": _spec,
    "guards": lambda model: model.update(guards_code=[EVIL]),
    "library": lambda model: model["graph_module"]["graph"]["nodes"][0].update(target="torch.ops.load_library"),
    "file": lambda model: model["graph_module"]["graph"]["nodes"][0].update(target="torch.ops.aten.from_file.default"),
    "nested": _nested,
    "operator": lambda model: model["graph_module"]["graph"]["nodes"][0]["inputs"][0].update(arg={"as_operator": "torch.load"}),
    "metadata": lambda model: model["graph_module"]["graph"]["nodes"][0].update(metadata={"stack_trace": f"x\n{EVIL}"}),
    "range": lambda model: model["range_constraints"].update({EVIL: {"min_val": 2, "max_val": None}}),
    "dunder": lambda model: model["graph_module"]["signature"]["input_specs"][0]["parameter"].update(parameter_name="__class__.weight"),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_program_of_more_than_names_and_operators_is_refused(attack: str, copy: Path) -> None:
    entries = _entries(copy / "network.pt2")
    name = next(name for name in entries if name.endswith("models/model.json"))
    model = json.loads(entries[name])
    changed = ATTACKS[attack](model) or model
    _exchange(copy, _zipped({**entries, name: json.dumps(changed).encode()}))
    _refused(lambda: dp.open_export(copy).network("pt2")(torch.zeros(1, 1, 8, 8)), "network.pt2 must hold numbers and JSON alone, got ")


def test_a_program_with_two_lists_of_entries_is_read_as_torch_reads_it(copy: Path) -> None:
    """Python's zipfile takes the list before the file's end, and torch the one that the end points to."""
    good = _entries(copy / "network.pt2")
    config = next(name for name in good if name.endswith("weights_config.json"))
    bad = {**good, config: good[config].replace(b'"use_pickle": false', b'"use_pickle": true ', 1)}
    first, second = _zipped(bad), _zipped(good)
    assert len(first) == len(second), "so that the places in the second list hold beside the first"
    both = first[:-22] + second[:-22] + first[-22:]  # 22 bytes at the end say where the list of entries is
    _exchange(copy, both)
    assert _entries(copy / "network.pt2") == good, "the reader of Python sees nothing of it"
    _refused(lambda: dp.open_export(copy).network("pt2"), "network.pt2 must hold numbers and JSON alone, got a pickle")


def test_an_older_kind_of_program_is_not_read(copy: Path) -> None:
    """torch.export.load falls back to entries that it unpickles; here there is nothing to fall back to."""
    _exchange(copy, _zipped({"version": b"8.20", "serialized_state_dict.pt": b"evil"}))
    _refused(lambda: dp.open_export(copy).network("pt2"), "network.pt2")


class _Sizes(nn.Module):
    def forward(self, inputs: Tensor) -> Tensor:
        with torch.no_grad():
            wide = torch.cat([inputs, inputs], 0)
        rows = wide.view(2, inputs.shape[0], -1).mean(0)
        halves = rows.view(inputs.shape[0] * 2, -1)
        return torch.einsum("bi,bi->b", halves, nn.functional.gelu(halves, approximate="tanh")).view(-1, 2)


@pytest.mark.parametrize("arch", ["sizes", "mobilenet_v3_small", "vit_b_16"])
def test_programs_of_other_networks_pass(arch: str, tmp_path: Path) -> None:
    from test_architectures import shortened

    network = _Sizes() if arch == "sizes" else shortened((3, 32, 32), 5, arch=arch)
    program = torch.export.export(network.eval(), (torch.zeros(2, 3, 32, 32),), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    metadata = [dict(node.meta) for node in program.graph.nodes]
    pt2.save(program, tmp_path / "network.pt2")
    pt2.check_plain(tmp_path / "network.pt2")
    assert [dict(node.meta) for node in program.graph.nodes] == metadata, "the graph is as it was"
    assert str(tmp_path).encode() not in (tmp_path / "network.pt2").read_bytes()


def test_no_module_is_imported_that_a_format_names(copy: Path) -> None:
    Path("harm.py").write_text(f"{EVIL}\nmake = 0\n")
    _seal(copy, lambda manifest: manifest["formats"].update({"import:harm:make": {**manifest["formats"]["pt2"]}}))
    _refused(lambda: dp.open_export(copy), "manifest.json is not the manifest of an export .it has an unknown format")


@pytest.mark.parametrize("where", ["inside", "package", "text"])
def test_no_network_is_imported_from_an_export(where: str, copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (copy / "harm.py").write_text(f"{EVIL}\nmake = 0\n")
    model: Any = {"import": "harm:make"} if where == "inside" else {"import": "copy_of.deep.harm:make"}
    if where == "package":
        Path("copy_of").mkdir()
        copy = copy.rename(Path("copy_of").absolute() / "deep")
    else:
        monkeypatch.chdir(copy)
    if where == "text":
        model = "import:harm:make"
    _seal(copy, lambda manifest: manifest["recipe"].update(model=model))
    _refused(lambda: dp.open_export(copy).network("masked"), "must be of a module outside the export, got '")


def test_masks_of_a_damaged_export_are_not_taken(copy: Path) -> None:
    due = found_masks(copy)
    assert due.masks.kept == dp.open_export(copy).masks.kept
    data = bytearray((copy / "masks.safetensors").read_bytes())
    data[-1] ^= 1
    (copy / "masks.safetensors").write_bytes(bytes(data))
    _refused(lambda: found_masks(copy), "masks.safetensors is not the file that was exported")


class _Broken(Exception):
    pass


def test_a_form_that_cannot_be_made_is_said_in_a_line(outcome: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **extra: Any) -> Any:
        raise _Broken("No such operator\nand a hundred lines more")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.export, "save", fail)
    _refused(
        lambda: outcome.export(tmp_path / "out", formats=["pt2"]),
        "Format pt2 cannot hold this network: No such operator. Nothing was written. Leave pt2 out.",
    )
    assert not list(tmp_path.iterdir())
    monkeypatch.undo()
    monkeypatch.setattr("distprune.export.reading.batched", lambda export, name, network: fail)
    _refused(lambda: outcome.export(tmp_path / "out", formats=["pt2"]), "Format pt2 cannot hold this network: No such operator.")


def test_an_optional_form_that_cannot_be_made_is_left_out(outcome: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(source: Any, folder: Path) -> Any:
        (folder / "half.yaml").write_text("half")
        raise _Broken("Not this one.\nmore")

    from distprune.export.tables import format as formats

    entry = formats.get("recipe")
    monkeypatch.setitem(formats._entries, "recipe", type(entry)(**{**vars(entry), "function": fail}))
    folder = Path(outcome.export(tmp_path / "out"))
    export = dp.open_export(folder)
    assert export.manifest["left_out"] == {"recipe": "It cannot hold this network: Not this one."}
    assert "recipe" not in export.formats and "torch" in export.formats and not (folder / "half.yaml").exists()
