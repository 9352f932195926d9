"""Packed 2:4 layers: what is a 2:4 mask, that packing loses nothing, and that it says where it cannot run."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from toys import BASE

import distprune as dp
from distprune.errors import UserError
from distprune.export.formats.two_four import check_hardware, is_two_four, pack, unpack

RECIPE: dict[str, Any] = {
    **BASE,
    "model": {"name": "mlp"},
    "paradigm": "at_init",
    "allocator": "uniform",
    "granularity": {"name": "n_m", "n": 2, "m": 4},
    "sparsity": 0.5,
    "train": {**BASE["train"], "length": "10it"},
}


def test_which_masks_are_two_of_four() -> None:
    for four in itertools.product([True, False], repeat=4):
        whole = torch.tensor([[True, True, False, False, *four], [*four, False, False, True, False]])
        assert is_two_four(whole) == (sum(four) <= 2)
    assert not is_two_four(torch.ones(2, 8, dtype=torch.bool))
    shifted = torch.tensor([[False, False, True, True, True, True, False, False]])  # 2 of 4 in place, 4 of 4 across
    assert is_two_four(shifted) and not is_two_four(shifted.roll(-2, 1))
    assert not is_two_four(torch.zeros(2, 6, dtype=torch.bool)), "rows whose length 4 does not divide"
    assert not is_two_four(torch.zeros(2, 4, 3, 3, dtype=torch.bool)), "no matrix"


@pytest.mark.parametrize("shape", [(3, 4), (5, 8), (2, 12), (1, 20), (7, 64)])
def test_packing_loses_nothing_and_takes_half_and_two_bits(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    rows, columns = shape
    mask = torch.rand(rows, columns // 4, 4, generator=generator).argsort(2) < torch.randint(
        0, 3, (rows, columns // 4, 1), generator=generator
    )
    mask = mask.view(shape)
    weight = torch.randn(shape, generator=generator)
    values, places = pack(weight, mask)
    assert values.shape == (rows, columns // 2) and places.shape == (rows, -(-columns // 8)) and places.dtype == torch.uint8
    assert torch.equal(unpack(values, places), weight * mask)


def test_places_by_hand() -> None:
    weight = torch.tensor([[0.0, 5.0, 0.0, 7.0, 0.0, 0.0, 3.0, 0.0]])
    values, places = pack(weight, weight != 0)
    # 1 and 3 of the first four; of the second four 2, and 0 with a zero in the place that is free: 01 11 | 00 10, the first lowest.
    assert values.tolist() == [[5.0, 7.0, 0.0, 3.0]] and places.tolist() == [[1 | 3 << 2 | 0 << 4 | 2 << 6]]


def test_torch_reads_the_same_two_of_four() -> None:
    """torch's own conversion, which libraries lay out from, keeps the same values in the same order."""
    from torch.sparse._semi_structured_conversions import sparse_semi_structured_from_dense_cutlass

    generator = torch.Generator().manual_seed(1)
    mask = (torch.rand(32, 16, 4, generator=generator).argsort(2) < 2).view(32, 64)
    weight = torch.randn(32, 64, generator=generator).half()
    due, _ = sparse_semi_structured_from_dense_cutlass(weight * mask)
    assert torch.equal(pack(weight, mask)[0], due)


def test_an_export_is_packed_without_a_gpu_and_says_where_it_runs(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU, on which the form is measured")
    outcome = dp.run(RECIPE)
    export = dp.open_export(outcome.export(tmp_path / "out", formats=["2:4"]))
    form = export.manifest["formats"]["2:4"]
    assert form["exact"] and form["error"] is None and form["latency"] is None and 0.5 < form["size"] < 0.75
    linear = [name for name, module in outcome.model.named_modules() if isinstance(module, torch.nn.Linear)]
    packed = [f"{name}.weight" for name in linear if is_two_four(outcome.masks[f"{name}.weight"])]
    assert form["layers"] == packed and f"{len(packed)} of {len(linear)} linear layers are packed" in form["notes"][0]
    assert form["notes"][1] == (
        "Packed 2:4 layers run on NVIDIA GPUs of compute capability 8.0 or higher, and there is none here. "
        "Take the file to one, or the masked network."
    )
    found = load_file(tmp_path / "out" / "two_four.safetensors")
    for name in packed:
        assert torch.equal(unpack(found[name], found[f"{name}.places"]), outcome.model.state_dict()[name])
    with pytest.raises(UserError, match="compute capability 8.0 or higher, and there is none here"):
        export.network("2:4", device="cuda")
    with pytest.raises(UserError, match="compute capability 8.0 or higher, and there is none here"):
        export.network("2:4")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"granularity": "weight"}, "got [34] of 4 in 'fc1.weight'. Take granularity: n_m"),
        ({"granularity": {"name": "n_m", "n": 1, "m": 2}}, ""),
        ({"granularity": {"name": "n_m", "n": 4, "m": 8}}, "got [34] of 4 in 'fc1.weight'"),
    ],
)
def test_other_masks_are_refused_and_nothing_is_written(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    outcome = dp.run({**RECIPE, **changes})
    if not message:  # 1 of 2 is 2 of 4 as well
        assert "2:4" in dp.open_export(outcome.export(tmp_path / "out", formats=["2:4"])).formats
        return
    with pytest.raises(UserError, match=f"Format 2:4 needs a linear layer that keeps at most 2 of every 4 inputs, {message}"):
        outcome.export(tmp_path / "out", formats=["2:4"])
    assert not list(tmp_path.iterdir())


def test_old_gpus_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    with pytest.raises(UserError, match="and Tesla T4 has 7.5. Take the masked network."):
        check_hardware(torch.device("cuda"))
