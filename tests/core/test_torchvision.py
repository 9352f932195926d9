"""torchvision's families are pruned weight by weight, keep running, and export. Their channels: test_coupling.py."""

import math
from pathlib import Path

import pytest
import torch
from toys import check_alone

import distprune as dp
from distprune.core import registry
from distprune.core.masks import prunable
from distprune.core.metrics import collapsed, layer_flops

FAMILIES = ["resnet18", "vgg11_bn", "densenet121", "mobilenet_v3_small", "efficientnet_b0", "convnext_tiny", "vit_b_16", "swin_t"]


@pytest.mark.parametrize("arch", FAMILIES)
def test_every_family_is_pruned_and_keeps_running(arch: str) -> None:
    torch.manual_seed(0)
    model = registry.model.choose("torchvision", arch=arch)((3, 64, 64), 10).eval()
    weights = prunable(model)
    for weight in weights.values():  # ViT's head starts at zero
        if not weight.any():
            torch.nn.init.normal_(weight)
    matrices = {name for name, value in model.named_parameters() if value.dim() >= 2 and ("weight" in name or "proj" in name)}
    assert weights.keys() == matrices, "everything that multiplies, attention's packed projections included"
    masks = dp.prune(model, sparsity=0.9, allocator="uniform")
    assert masks.kept == math.floor(0.1 * masks.total + 0.5)
    example = torch.randn(2, 3, 64, 64)
    flops = layer_flops(model, example, weights)
    assert all(flops.values()), "every weight is read"
    assert collapsed(model, masks, example[:1]) == [], "a tenth of the weights still carries the signal"
    with torch.no_grad():
        before, after = model(example), masks.apply_(model)(example)
    assert after.shape == (2, 10) and torch.isfinite(after).all() and not torch.equal(before, after)
    assert all(not weights[name][~mask].any() for name, mask in masks.items())


def test_tied_weights_are_masked_once_under_their_first_name() -> None:
    first, second = torch.nn.Linear(8, 8, bias=False), torch.nn.Linear(8, 8, bias=False)
    second.weight = first.weight
    model = torch.nn.Sequential(first, torch.nn.ReLU(), second)
    masks = dp.prune(model, sparsity=0.5)
    assert list(masks) == ["0.weight"] and masks.total == 64
    masks.apply_(model)
    assert int(second.weight.count_nonzero()) == 32


@pytest.mark.parametrize(("arch", "granularity"), [("mobilenet_v3_small", "weight"), ("resnet18", "filter"), ("swin_t", "kernel")])
def test_a_trained_network_is_exported_and_read_without_distprune(arch: str, granularity: str, tmp_path: Path) -> None:
    outcome = dp.run(
        {
            "model": {"name": "torchvision", "arch": arch},
            "data": {"import": "toys:photos"},
            "paradigm": "at_init",
            "sparsity": 0.4,
            "criterion": "snip",
            "allocator": "uniform",
            "granularity": granularity,
            "train": {"length": "1it", "batch_size": 8},
        }
    )
    done = check_alone(folder := outcome.export(tmp_path / "out"))
    assert done.returncode == 0 and "0 predictions differ" in done.stdout, done.stderr
    uncalled = arch == "swin_t"  # its attention reads the weights of layers that it does not call, and torch's pruning acts in the call
    export = dp.open_export(folder)
    assert list(export.manifest["left_out"]) == ["torch"] * uncalled and ("torch" in export.formats) == (not uncalled)
    assert any("torch: left out. It cannot hold this network" in line for line in export.lines()) == uncalled
    if uncalled:
        with pytest.raises(dp.UserError, match=r"Format torch must answer as the network does .* Leave torch out\."):
            outcome.export(tmp_path / "named", formats=["torch"])
        assert not (tmp_path / "named").exists()
