"""Networks that people have: their slim, ONNX and torch.export forms answer as the masked network does, and are smaller."""

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import distprune as dp
from distprune.core.data.dataset import Dataset, Split

SIDE, CLASSES = 32, 5
FORMATS = ("slim", "onnx", "pt2")


def pictures() -> Dataset:
    """Noise in three channels."""
    generator = torch.Generator().manual_seed(0)

    def split(n: int) -> Split:
        images = torch.randint(256, (n, 3, SIDE, SIDE), generator=generator, dtype=torch.uint8)
        return Split(images, torch.randint(CLASSES, (n,), generator=generator))

    return Dataset("pictures", split(8), split(4), split(8), classes=CLASSES, mean=(0.5,) * 3, std=(0.25,) * 3)


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        inner = 3 * width
        self.gate = nn.Parameter(torch.ones(width, 1, 1))
        self.grow, self.norm = nn.Conv2d(width, inner, 3, padding=1), nn.BatchNorm2d(inner)
        self.each, self.shrink = nn.Conv2d(inner, inner, 3, padding=1, groups=inner), nn.Conv2d(inner, width, 1)

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs + self.gate * self.shrink(nn.functional.silu(self.each(self.norm(self.grow(inputs)))))


class _Own(nn.Module):
    def __init__(self, channels: int, classes: int, width: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(channels, width, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(width), nn.PReLU(width))
        self.blocks = nn.ModuleList([_Block(width) for _ in range(2)])
        self.mix = nn.MultiheadAttention(width, 4, batch_first=True)
        self.head = nn.Sequential(nn.Linear(width, 64), nn.ReLU(), nn.Dropout(0.1), nn.Linear(64, classes))

    def forward(self, inputs: Tensor) -> Tensor:
        found = self.stem(inputs)
        for block in self.blocks:
            found = block(found)
        rows = nn.functional.avg_pool2d(found, 4).flatten(2).transpose(1, 2)
        rows = rows + self.mix(rows, rows, rows, need_weights=False)[0]
        outputs: Tensor = self.head(rows.mean(1))
        return outputs


def own(shape: tuple[int, int, int], classes: int, *, width: int = 32) -> nn.Module:
    """A user's network: gates, depthwise convolutions, attention, and a loop in its forward method."""
    return _Own(shape[0], classes, width)


def shortened(shape: tuple[int, int, int], classes: int, *, arch: str) -> nn.Module:
    """A torchvision network in which three blocks stand for each row of equal ones; with WHOLE_NETWORKS in the environment all of it."""
    from torchvision.models import get_model

    network: Any = get_model(arch, num_classes=classes, **({"image_size": shape[1]} if arch == "vit_b_16" else {}))
    if "WHOLE_NETWORKS" not in os.environ:
        if arch == "vit_b_16":
            network.encoder.layers = network.encoder.layers[:3]
        if arch == "convnext_tiny":
            network.features[5] = network.features[5][:3]
    return network  # type: ignore[no-any-return]


# Architecture -> share of the weights that is removed, in whole channels and heads, with which each layer can keep some.
NETWORKS = {"own": 0.6, "mobilenet_v3_small": 0.5, "resnet18": 0.7, "convnext_tiny": 0.5, "vit_b_16": 0.5}


def _recipe(arch: str) -> dict[str, Any]:
    model = {"import": "test_architectures:own"} if arch == "own" else {"import": "test_architectures:shortened", "arch": arch}
    train = {"length": "1it", "batch_size": 2, "optimizer": {"name": "sgd", "lr": 1e-3}}
    pruning = {"paradigm": "at_init", "criterion": "magnitude", "allocator": "uniform", "granularity": "filter", "sparsity": NETWORKS[arch]}
    return {"model": model, "data": {"import": "test_architectures:pictures"}, "train": train, **pruning}


def _in_no_time(networks: Any, inputs: Tensor) -> dict[str, list[float]]:
    """How fast they are is not what is asked."""
    return {name: [1.0] * 4 for name in networks}


@pytest.mark.parametrize("arch", [name if name == "own" else pytest.param(name, marks=pytest.mark.slow) for name in NETWORKS])
def test_every_form_is_the_masked_network_and_smaller(arch: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from distprune.export import measuring

    monkeypatch.setattr(measuring, "measure", _in_no_time)
    outcome = dp.run(_recipe(arch))
    folder = outcome.export(tmp_path / "out", formats=FORMATS)
    model, masks = outcome.model.eval(), outcome.masks
    assert masks.sparsity > NETWORKS[arch] - 0.01 and not any(bool(model.get_parameter(name)[~mask].any()) for name, mask in masks.items())
    export = dp.open_export(folder)
    dense = sum(math.prod(tensor.shape) * tensor.element_size() for tensor in model.state_dict().values())
    assert export.manifest["dense"]["bytes"] == dense
    generator = torch.Generator().manual_seed(1)
    for name in FORMATS:
        form, network = json.loads((folder / "manifest.json").read_text())["formats"][name], export.network(name)
        with torch.no_grad():
            for batch in (1, 3):
                inputs = torch.randn(batch, 3, SIDE, SIDE, generator=generator)
                due = model(inputs)
                assert float((network(inputs) - due).abs().max() / due.abs().max()) < 1e-4, (name, batch)
        size = sum((folder / file).stat().st_size for file in form["files"])
        assert form["bytes"] == size and form["error"]["relative"] < 1e-4
        # What is kept, what is not prunable, and a graph whose size does not depend on the weights.
        assert size < dense and size < dense * (1 - masks.sparsity) * 1.1 + 400_000, (name, size / dense)
        assert "channels and heads are taken out" in form["notes"][0]
