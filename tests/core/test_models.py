"""Models: sizes that can be counted by hand, shapes of every entry, and files that stand alone."""

import ast
from pathlib import Path

import pytest
import torch
from torch import nn

from distprune.core import models, registry
from distprune.core.models.resnet_cifar import Block, Shortcut
from distprune.errors import UserError

ENTRIES = {entry.name: entry for entry in registry.model}
GENERATORS = {"hourglass", "two_layer"}
REQUIRED = {"torchvision": {"arch": "shufflenet_v2_x0_5"}}  # options without a default
ALONE = sorted(path for path in Path(models.__file__).parent.glob("*.py") if path.stem not in ("__init__", "torchvision"))


def build(name: str, shape: tuple[int, int, int], classes: int, **options: object) -> nn.Module:
    return registry.model.choose(name, **{**REQUIRED.get(name, {}), **options})(shape, classes)


def weights(net: nn.Module) -> int:
    return sum(module.weight.numel() for module in net.modules() if isinstance(module, nn.Conv2d | nn.Linear))


@pytest.mark.parametrize(
    ("name", "shape", "classes", "options", "count"),
    [
        ("mlp", (1, 28, 28), 10, {}, 784 * 300 + 300 * 100 + 100 * 10),
        ("mlp", (1, 8, 8), 10, {"hidden": []}, 64 * 10),
        ("lenet5", (1, 28, 28), 10, {}, 430_500),
        ("lenet5", (1, 8, 8), 10, {"width": 0.1}, 2 * 25 + 2 * 5 * 25 + 5 * 2 * 2 * 50 + 50 * 10),
        ("resnet_cifar", (3, 32, 32), 10, {"depth": 56}, 848_944),
        ("resnet_cifar", (3, 32, 32), 10, {"depth": 8, "width": 1}, 27 + 2 * 9 + 9 * (1 * 2 + 2 * 2 + 2 * 4 + 4 * 4) + 40),
        ("vgg_cifar", (3, 32, 32), 100, {"depth": 19}, 20_070_080),
        ("vgg_cifar", (3, 32, 32), 10, {"depth": 11, "width": 0.001}, 27 + 7 * 9 + 10),
    ],
)
def test_weights_counted_by_hand(name, shape, classes, options, count):
    assert weights(build(name, shape, classes, **options)) == count


@pytest.mark.parametrize("shape", [(3, 32, 32), (3, 33, 47)])
@pytest.mark.parametrize("name", ENTRIES)
def test_every_entry_maps_images_to_logits_or_images_and_back(name, shape):
    net = build(name, shape, 7)
    outputs = net(torch.rand(2, *shape))
    assert outputs.shape == ((2, 7, *shape[1:]) if name in GENERATORS else (2, 7))
    outputs.sum().backward()
    assert all(parameter.grad is not None for parameter in net.parameters() if parameter.requires_grad)


@pytest.mark.parametrize("shape", [(1, 4, 4), (1, 8, 8), (1, 15, 15), (1, 16, 16), (1, 28, 28), (2, 9, 40)])
@pytest.mark.parametrize("name", ["mlp", "lenet5", "resnet_cifar"])
def test_small_models_take_small_images(name, shape):
    assert build(name, shape, 3)(torch.rand(2, *shape)).shape == (2, 3)


@pytest.mark.parametrize("name", ENTRIES)
def test_a_seed_determines_the_weights(name):
    first, second = (torch.manual_seed(0) and build(name, (3, 32, 32), 3).state_dict() for _ in range(2))
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_option_a_shortcut_copies_every_second_pixel_and_adds_zeros():
    shortcut, x = Shortcut(2, 5), torch.rand(1, 2, 5, 4)
    assert not list(shortcut.parameters())
    assert torch.equal(shortcut(x)[:, :2], x[:, :, ::2, ::2])
    assert shortcut(x).shape == (1, 5, 3, 2) and not shortcut(x)[:, 2:].any()


def test_a_block_without_its_convolutions_is_the_shortcut():
    block, x = Block(2, 4).eval(), torch.rand(1, 2, 6, 6)
    nn.init.zeros_(block.conv2.weight)
    assert torch.equal(block(x), block.shortcut(x))


def test_resnet_convolutions_start_with_the_variance_of_fan_out():
    convs = [module for module in build("resnet_cifar", (3, 32, 32), 10).modules() if isinstance(module, nn.Conv2d)]
    assert all(float(conv.weight.detach().std()) == pytest.approx((2 / (9 * conv.out_channels)) ** 0.5, rel=0.2) for conv in convs)


@pytest.mark.parametrize(
    ("name", "shape", "options", "words"),
    [
        ("mlp", (1, 8, 8), {"hidden": [10, 0]}, ["mlp.hidden must", "got [10, 0]", "write hidden: []"]),
        ("lenet5", (1, 3, 8), {}, ["at least 4x4", "got 3x8", "take mlp"]),
        ("lenet5", (1, 8, 8), {"width": 0.0}, ["lenet5.width must", "got 0.0", "write 0.5"]),
        ("resnet_cifar", (3, 32, 32), {"depth": 21}, ["6n + 2", "got 21", "Write 20"]),
        ("resnet_cifar", (3, 32, 32), {"depth": 2}, ["6n + 2", "got 2.", "Write 20"]),
        ("resnet_cifar", (3, 32, 32), {"width": 0}, ["resnet_cifar.width must", "got 0", "16"]),
        ("vgg_cifar", (1, 28, 28), {}, ["at least 32x32", "got 28x28", "take lenet5"]),
        ("vgg_cifar", (3, 32, 32), {"width": -1.0}, ["vgg_cifar.width must", "got -1.0", "write 0.5"]),
        ("vgg_cifar", (3, 32, 32), {"depth": 12}, ["depth", "'12'", "Known: 11, 13, 16, 19"]),
        ("torchvision", (3, 32, 32), {"arch": "resnet8"}, ["arch 'resnet8'", "Did you mean 'resnet"]),
        ("torchvision", (1, 32, 32), {}, ["3 channels", "got 1", "Take lenet5"]),
        ("torchvision", (3, 32, 32), {"pretrained": "DEFAULTS"}, ["'DEFAULTS'", "Did you mean 'DEFAULT'", "IMAGENET1K_V1"]),
    ],
)
def test_what_cannot_be_built_says_rule_value_and_way_out(name, shape, options, words):
    with pytest.raises(ValueError) as caught:
        build(name, shape, 10, **options)
    text = str(caught.value)
    assert "\n" not in text and all(word in text for word in words), text


@pytest.fixture
def offline(monkeypatch):
    """Pretrained weights of torchvision are fresh ones: nothing is downloaded."""
    from torchvision.models._api import WeightsEnum

    def state_dict(self, **_):
        arch = self.__class__.__name__.removesuffix("_Weights").lower()
        return build("torchvision", (3, 32, 32), 1000, arch=arch).state_dict()

    monkeypatch.setattr(WeightsEnum, "get_state_dict", state_dict)


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("classes", [1000, 7])
def test_a_pretrained_head_stays_or_is_replaced(classes):
    net = build("torchvision", (3, 32, 32), classes, arch="mobilenet_v3_small", pretrained="DEFAULT")
    assert net.eval()(torch.rand(1, 3, 32, 32)).shape == (1, classes)


@pytest.mark.usefixtures("offline")
def test_a_pretrained_head_that_is_not_linear_is_refused():
    with pytest.raises(UserError, match=r"squeezenet1_1 .* keeps its 1000 classes, got 7\. Leave pretrained out\."):
        build("torchvision", (3, 32, 32), 7, arch="squeezenet1_1", pretrained="DEFAULT")


def test_weights_that_cannot_be_downloaded_are_a_user_error(monkeypatch):
    from torchvision.models._api import WeightsEnum

    def fail(self, **_):
        raise OSError("no\nnetwork")

    monkeypatch.setattr(WeightsEnum, "get_state_dict", fail)
    with pytest.raises(UserError, match=r"DEFAULT could not be downloaded .*no network.* leave pretrained out"):
        build("torchvision", (3, 32, 32), 7, pretrained="DEFAULT")


@pytest.mark.filterwarnings("ignore:The default weight initialization of GoogleNet")
def test_auxiliary_heads_are_dropped():
    net = build("torchvision", (3, 64, 64), 7, arch="googlenet")
    assert net(torch.rand(2, 3, 64, 64)).shape == (2, 7)
    assert not [name for name, _ in net.named_parameters() if name.startswith("aux")]


@pytest.mark.parametrize("path", ALONE, ids=lambda path: path.stem)
def test_a_model_file_without_distprune_is_a_program(path):
    tree = ast.parse(path.read_text())
    imported = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    packages = {
        name.split(".")[0]
        for node in imported
        for name in ([node.module] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names])
    }
    assert packages <= {"torch", "collections", "typing", "distprune"}
    tree.body = [node for node in tree.body if not (isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "distprune")]
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            node.decorator_list = []
    names = {"__name__": path.stem}
    exec(compile(tree, path.name, "exec"), names)
    for entry in [entry for entry in registry.model if entry.file == path]:
        assert names[entry.function.__name__]((3, 32, 32), 5)(torch.rand(2, 3, 32, 32)).shape[:2] == (2, 5)
