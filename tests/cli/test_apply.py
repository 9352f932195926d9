"""`distprune apply`: masks on a user's own network, and each mistake as one line with exit code 2 and nothing written."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file, save_model
from torch import nn
from toys import BASE

import distprune as dp
from distprune.cli import main
from distprune.core.masks import Masks
from distprune.errors import UserError

MODULE = """
import torch
from torch import nn

three = 3
ready = nn.Linear(4, 4)


def network(hidden=6, tied=False):
    torch.manual_seed(0)
    found = nn.Sequential(nn.Linear(4, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, 4))
    if tied:
        found.add_module("again", nn.Linear(4, hidden))
        found.again.weight = found[0].weight
    return found


def wants(shape, classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(shape[0] * shape[1], classes))


class Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = torch.compile(network())


def broken():
    raise OSError("no such\\ndisk")


def number():
    return 3
"""


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with a module of a name that no other test has."""
    (tmp_path / f"{tmp_path.name}_own.py".replace("-", "_")).write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


@pytest.fixture
def own(place: Path) -> str:
    return f"{place.name}_own".replace("-", "_")


def _network(hidden: int = 6) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, 4))


def _masks(hidden: int = 6) -> Masks:
    return dp.prune(_network(hidden), sparsity=0.5)


def _error(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    before = sorted(Path().iterdir())
    assert main(["apply", *arguments]) == 2
    output = capsys.readouterr()
    assert output.err.startswith("Error: ") and output.err.count("\n") == 1 and not output.out, output
    assert [path for path in sorted(Path().iterdir()) if path.name != "__pycache__"] == [p for p in before if p.name != "__pycache__"]
    return output.err


@pytest.mark.parametrize("form", ["safetensors", "parquet"])
def test_the_pruned_state_is_the_state_with_zeros(form: str, own: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every tensor under its name and in its type, bit for bit but for removed weights; the file's metadata stays."""
    masks, state = _masks(), {name: tensor.clone() for name, tensor in _network().state_dict().items()}
    state["0.weight"], state["3.bias"] = state["0.weight"].bfloat16(), state["3.bias"].double()
    save_file(state, "in.safetensors", metadata={"format": "pt", "note": "mine"})
    masks.save(f"m.{form}")
    assert main(["apply", f"m.{form}", "--model", f"{own}:network", "--weights", "in.safetensors", "--to", "out.safetensors"]) == 0
    written = load_file("out.safetensors")
    assert written.keys() == state.keys() and all(written[name].dtype == state[name].dtype for name in state)
    for name, tensor in state.items():
        expected = torch.where(masks[name], tensor, torch.zeros((), dtype=tensor.dtype)) if name in masks else tensor
        assert torch.equal(written[name], expected)
    with safe_open("out.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt", "note": "mine"}
    output = capsys.readouterr().out
    assert "Sequential: 2 of 2 masks applied" in output and "written to out.safetensors" in output
    for name, mask in masks.items():
        assert any(name in line and f" {masks.counts[name]} " in line and f" {mask.numel()} " in line for line in output.splitlines())
    assert not list(place.glob(".*"))


def test_names_behind_wrappers_on_all_three_sides(own: str) -> None:
    """Masks of a compiled network, on one with a compiled part, with a state that was saved behind DataParallel."""
    masks = Masks({f"_orig_mod.body.{name}": mask for name, mask in _masks().items()})
    state = {f"module.body.{name}": tensor for name, tensor in _network().state_dict().items()}
    save_file(state, "in.safetensors")
    found = dp.apply(masks, f"{own}:Own", weights="in.safetensors", to="out.safetensors")
    written = load_file("out.safetensors")
    assert written.keys() == state.keys() and not found.lines()
    for name, mask in _masks().items():
        assert torch.equal(written[f"module.body.{name}"], state[f"module.body.{name}"] * mask)
        assert torch.equal(dict(found.model.named_parameters())[f"body._orig_mod.{name}"], written[f"module.body.{name}"])


def test_without_weights_those_that_the_function_gives_are_pruned(own: str, capsys: pytest.CaptureFixture[str]) -> None:
    masks = _masks(hidden=5)
    masks.save("m.safetensors")
    assert main(["apply", "m.safetensors", "--model", f"{own}:network", "--option", "hidden=5", "--to", "out.safetensors"]) == 0
    torch.manual_seed(0)
    weight = nn.Linear(4, 5).weight
    assert torch.equal(load_file("out.safetensors")["0.weight"], weight * masks["0.weight"])
    capsys.readouterr()
    assert main(["apply", "m.safetensors", "--model", f"{own}:network", "--option", "hidden=5"]) == 0
    assert "Nothing was written: name a file with --to" in capsys.readouterr().out


def test_a_network_of_ones_own_is_changed_in_place() -> None:
    masks, model = _masks(), _network()
    state = {name: torch.full_like(tensor, 2) for name, tensor in model.state_dict().items()}
    save_file(state, "in.safetensors")
    found = dp.apply(masks, model, weights="in.safetensors")
    assert found.model is model and torch.equal(model[0].weight, 2.0 * masks["0.weight"]) and bool((model[1].running_var == 2).all())
    with pytest.raises(UserError, match="options are for a function that builds the network"):
        dp.apply(masks, model, options={"hidden": 3})


def test_tied_weights_may_come_under_one_of_their_names(own: str) -> None:
    torch.manual_seed(3)
    model = _network()
    model.add_module("again", nn.Linear(4, 6))
    model.again.weight = model[0].weight
    save_model(model, "in.safetensors")  # writes one of them
    assert len({"0.weight", "again.weight"} & load_file("in.safetensors").keys()) == 1
    masks = Masks({"again.weight": _masks()["0.weight"]})
    found = dp.apply(masks, f"{own}:network", options={"tied": True}, weights="in.safetensors", to="out.safetensors")
    due = model[0].weight * masks["again.weight"]
    assert torch.equal(found.model[0].weight, due) and found.match.unmasked == ("3.weight",)
    assert [torch.equal(value, due) for name, value in load_file("out.safetensors").items() if name in ("0.weight", "again.weight")] == [
        True
    ]


def test_what_does_not_match_is_said_and_left_out_only_when_asked(own: str, capsys: pytest.CaptureFixture[str]) -> None:
    masks = _masks()
    Masks({"0.weight": masks["0.weight"], "head.weight": masks["3.weight"]}).save("m.safetensors")
    state = {**_network().state_dict(), "extra": torch.ones(2)}
    del state["3.bias"]
    save_file(state, "in.safetensors")
    command = ["m.safetensors", "--model", f"{own}:network", "--weights", "in.safetensors", "--to", "out.safetensors"]
    error = _error(capsys, *command)
    assert "The model has no weight 'head.weight' for its mask. Nearest: '3.weight'." in error and "--partial" in error
    masks.save("whole.safetensors")
    error = _error(capsys, "whole.safetensors", *command[1:])
    assert "no place for what the file of weights calls 'extra'" in error and "The file of weights lacks '3.bias'" in error
    assert main(["apply", *command, "--partial"]) == 0
    output = " ".join(capsys.readouterr().out.split())
    for line in (
        "Sequential: 1 of 2 masks applied",
        "The model has no weight 'head.weight' for its mask. Nearest: '3.weight'.",
        "Prunable weights without a mask stay whole: '3.weight'.",
        "The network has no place for what the file of weights calls 'extra'.",
        "The file of weights lacks '3.bias': they keep the values that the network was built with.",
    ):
        assert line in output
    written = load_file("out.safetensors")
    assert written.keys() == state.keys() and torch.equal(written["3.weight"], state["3.weight"])
    assert torch.equal(written["0.weight"], state["0.weight"] * masks["0.weight"])


def test_no_mask_that_fits_is_an_error_even_then(own: str, capsys: pytest.CaptureFixture[str]) -> None:
    Masks({"encoder.weight": torch.zeros(7, 7, dtype=torch.bool)}).save("m.safetensors")
    error = _error(capsys, "m.safetensors", "--model", f"{own}:network", "--partial", "--to", "out.safetensors")
    assert "At least one of 1 masks must have its weight in Sequential, none has." in error


def test_masks_of_an_export_and_of_a_run(own: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = {
        **BASE,
        "model": {"import": "toys:network", "hidden": 8},
        "paradigm": "at_init",
        "sparsity": 0.5,
        "allocator": "erk",
        "train": {**BASE["train"], "length": "2it"},
    }
    outcome = dp.run(recipe)
    out = outcome.export(place / "export")
    (place / f"{own}.py").write_text("from toys import network\n")
    command = ["--model", f"{own}:network", "--option", "shape=[1, 8, 8]", "--option", "classes=10", "--option", "hidden=8"]
    assert main(["apply", str(out), *command, "--weights", str(out / "weights.safetensors"), "--to", "out.safetensors"]) == 0
    assert all(torch.equal(value, outcome.run.state.values()[name]) for name, value in load_file("out.safetensors").items())
    capsys.readouterr()
    assert "so there is none to choose, got --trial 3" in _error(capsys, str(out), *command, "--trial", "3")
    raw = bytearray((out / "masks.safetensors").read_bytes())
    raw[-1] ^= 1
    (out / "masks.safetensors").write_bytes(raw)
    assert "masks.safetensors" in _error(capsys, str(out), *command)
    shutil.rmtree(out)
    assert "does not exist. Give a file of masks, an export folder or a run folder." in _error(capsys, str(out), *command)
    assert "neither a run folder" in _error(capsys, str(place), *command)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "own"], "--model must be 'package.module:function', got 'own'"),
        (["--model", "nowhere:network"], "cannot import 'nowhere' (ModuleNotFoundError"),
        (["--model", "OWN:netwrk"], "Did you mean 'network'?"),
        (["--model", "OWN:three"], "must be a function that returns a torch network, got a int"),
        (["--model", "OWN:number"], "must return a torch.nn.Module, got a int"),
        (["--model", "OWN:broken"], "could not be built (OSError: no such disk)."),
        (["--model", "OWN:wants"], "It takes (shape, classes): give what it needs by --option name=value."),
        (["--model", "torch:tensor"], "--model 'torch:tensor' could not be built (TypeError"),
        (["--model", "OWN:ready", "--option", "a=1"], "is a network already, so that options have no use, got a"),
        (["--model", "OWN:network", "--option", "hidden"], "--option must be name=value, each name once, got 'hidden'"),
        (["--model", "OWN:network", "--option", "hidden=[1"], "--option must be name=value, each name once, got 'hidden=[1'"),
        (["--model", "OWN:network", "--option", "hidden=3", "--option", "hidden=4"], "each name once, got 'hidden=4'"),
        (["--model", "OWN:network", "--option", "hidden=7"], "Mask '0.weight' must be shaped like its weight (7, 4), got (6, 4)."),
        (["--model", "OWN:network", "--weights", "pickled.pt"], "Pickled checkpoints are not read: write one with"),
        (["--model", "OWN:network", "--weights", "gone.safetensors"], "gone.safetensors is not a readable safetensors file of weights"),
        (
            ["--model", "OWN:network", "--weights", "wide.safetensors"],
            "wide.safetensors: '1.bias' must be shaped like its place in the netw",
        ),
        (["--model", "OWN:network", "--weights", "other.safetensors", "--partial"], "other.safetensors does not fit the network"),
        (
            ["--model", "OWN:network", "--to", "m.safetensors"],
            "--to must be a new file in an existing folder, m.safetensors exists already",
        ),
        (["--model", "OWN:network", "--to", "no/where.safetensors"], "is in a folder that does not exist"),
        ([], "Missing option '--model'"),
    ],
)
def test_mistakes(arguments: list[str], message: str, own: str, capsys: pytest.CaptureFixture[str]) -> None:
    _masks().save("m.safetensors")
    torch.save(_network().state_dict(), "pickled.pt")
    save_file({"1.bias": torch.ones(9)}, "wide.safetensors")
    save_file({"stem.bias": torch.ones(9)}, "other.safetensors")
    assert message in _error(capsys, "m.safetensors", *(argument.replace("OWN", own) for argument in arguments))
    assert Masks.load("m.safetensors").equal(_masks())


def test_an_error_leaves_the_network_as_it_was() -> None:
    model, masks = _network(), _masks()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save_file({**{name: torch.ones_like(tensor) for name, tensor in before.items()}, "extra": torch.ones(1)}, "in.safetensors")
    with pytest.raises(UserError, match="extra"):
        dp.apply(masks, model, weights="in.safetensors")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_tensors_of_another_shape_are_left_out_when_asked(own: str, capsys: pytest.CaptureFixture[str]) -> None:
    """And the strict error is about them, not about something else, such as the layers without a mask."""
    masks = Masks({"0.weight": _masks()["0.weight"]})
    masks.save("m.safetensors")
    state = {**_network().state_dict(), "3.weight": torch.ones(9, 6)}
    save_file(state, "in.safetensors")
    command = ["m.safetensors", "--model", f"{own}:network", "--weights", "in.safetensors", "--to", "out.safetensors"]
    error = _error(capsys, *command)
    line = "'3.weight' must be shaped like its place in the network, (4, 6), got (9, 6)."
    assert f"in.safetensors: {line}" in error and "--partial" in error and "without a mask" not in error
    built = dp.apply(masks, f"{own}:network").model[3].weight
    found = dp.apply(masks, f"{own}:network", weights="in.safetensors", strict=False)
    assert torch.equal(found.model[3].weight, built) and torch.equal(found.model[0].weight, state["0.weight"] * masks["0.weight"])
    assert found.lines()[1:] == [line] and not found.unread and not found.unset
    assert main(["apply", *command, "--partial"]) == 0
    assert line in " ".join(capsys.readouterr().out.split())
    assert torch.equal(load_file("out.safetensors")["3.weight"], state["3.weight"])


def test_what_cannot_go_on_is_not_told_how_to(own: str, capsys: pytest.CaptureFixture[str]) -> None:
    Masks({"0.weight": _masks()["0.weight"]}).save("m.safetensors")
    save_file({"stem.bias": torch.ones(9), "1.bias": torch.ones(9)}, "other.safetensors")
    error = _error(capsys, "m.safetensors", "--model", f"{own}:network", "--weights", "other.safetensors", "--partial")
    assert "'1.bias' must be shaped like" in error and "'stem.bias'" in error and "--partial" not in error and "without a mask" not in error


def test_a_file_that_cannot_be_written_leaves_the_network_as_it_was(place: Path) -> None:
    model, masks = _network(), _masks()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(UserError, match="cannot be written: .* Choose another with --to."):
        dp.apply(masks, model, to="a" * 240 + ".safetensors")  # with what is added while it is written, longer than names can be
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not list(place.glob("*a.safetensors*"))
