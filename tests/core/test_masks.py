"""Masks, prunable weights, FLOPs and layer collapse."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import distprune as dp
from distprune.core.masks import Masks, prunable
from distprune.core.metrics import collapsed, flops, layer_flops
from distprune.errors import UserError


def _net() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(32, 3))


def _masks(model: nn.Module) -> Masks:
    return dp.prune(model, sparsity=0.5)


def test_prunable_are_trainable_weights_of_known_modules() -> None:
    model = _net()
    assert list(prunable(model)) == ["0.weight", "4.weight"]
    assert list(prunable(model, exclude=["4.*"])) == ["0.weight"] and list(prunable(model, include=["4.*"])) == ["4.weight"]
    model[0].weight.requires_grad_(False)
    assert list(prunable(model)) == ["4.weight"]


def test_tied_weights_are_masked_once_under_their_first_name() -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[1].weight = model[0].weight
    assert list(prunable(model)) == ["0.weight"]


def test_nothing_to_prune_is_said() -> None:
    with pytest.raises(UserError, match="BatchNorm1d must have trainable weights in one of Linear, .* got none"):
        prunable(nn.BatchNorm1d(3))
    with pytest.raises(UserError, match=r"exclude \['\*'\] leave no weight to prune"):
        prunable(_net(), exclude=["*"])


def test_round_trip_and_metadata(tmp_path: Path) -> None:
    masks = _masks(_net())
    masks.save(tmp_path / "m.safetensors", note="hello")
    assert Masks.load(tmp_path / "m.safetensors").equal(masks)
    from safetensors import safe_open

    with safe_open(str(tmp_path / "m.safetensors"), framework="pt") as file:
        assert file.metadata()["note"] == '"hello"' and set(file.keys()) == {"0.weight", "4.weight"}


def test_files_that_are_not_masks_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"nonsense")
    with pytest.raises(UserError, match="is not a readable safetensors file of masks"):
        Masks.load(tmp_path / "x")
    save_file({"a": torch.ones(2)}, str(tmp_path / "y"))
    with pytest.raises(UserError, match="masks must be bool tensors, 'a' is torch.float32"):
        Masks.load(tmp_path / "y")


@pytest.mark.parametrize("wrap", [lambda model: model, nn.DataParallel, torch.compile])
def test_apply_finds_weights_behind_wrappers(wrap: object) -> None:
    model = _net()
    masks = _masks(model)
    masks.apply_(wrap(model))  # type: ignore[operator]
    assert all(not dict(model.named_parameters())[name][~mask].any() for name, mask in masks.items())


def test_apply_says_what_does_not_match_and_changes_nothing() -> None:
    model, before = _net(), None
    before = model[4].weight.detach().clone()
    with pytest.raises(UserError, match="no weight 'other.weight' for its mask"):
        Masks({"4.weight": torch.zeros(3, 32, dtype=torch.bool), "other.weight": torch.ones(2, dtype=torch.bool)}).apply_(model)
    with pytest.raises(UserError, match=r"Mask '4.weight' must be shaped like its weight \(3, 32\), got \(2,\)"):
        Masks({"4.weight": torch.ones(2, dtype=torch.bool)}).apply_(model)
    assert torch.equal(model[4].weight, before)


def test_flops_by_hand() -> None:
    model = _net()
    dense = layer_flops(model, torch.zeros(1, 1, 4, 4), prunable(model))
    assert dense == {"0.weight": 2 * 16 * 2 * 9, "4.weight": 2 * 32 * 3}
    masks = Masks({"0.weight": torch.zeros(2, 1, 3, 3, dtype=torch.bool), "4.weight": torch.ones(3, 32, dtype=torch.bool)})
    assert flops(dense, masks) == 192
    alone = nn.Linear(3, 2)
    assert layer_flops(alone, torch.zeros(1, 3), prunable(alone)) == {"weight": 12}


def test_layer_collapse_is_about_paths_not_about_counts() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1))
    first = torch.tensor([[True, True], [False, False]])
    broken = Masks({"0.weight": first, "2.weight": torch.tensor([[False, True]])})
    whole = Masks({"0.weight": first, "2.weight": torch.tensor([[True, False]])})
    assert collapsed(model, broken, torch.ones(1, 2)) == ["0.weight", "2.weight"]
    assert collapsed(model, whole, torch.ones(1, 2)) == []


def test_scales_and_root_mean_square_norms_pass_the_signal_on() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.inner, self.head = nn.RMSNorm(3), nn.Linear(3, 3), nn.Linear(3, 2)
            self.scale = nn.Parameter(torch.full((3,), 1e-6))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(x + self.scale * self.inner(self.norm(x)))

    model = Scaled()
    assert collapsed(model, Masks.ones(prunable(model)), torch.ones(1, 3)) == []
