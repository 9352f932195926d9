"""Groups of channels: the law that makes removal exact, what is excluded, and the bounds of the search for them."""

import math
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from distprune.core.edits.shrink import shrink
from distprune.core.granularity.bounded import bounded
from distprune.core.granularity.coupling import Group, coupled
from distprune.core.granularity.graph import propose
from distprune.core.masks import Masks, prunable
from distprune.core.metrics import flops, layer_flops
from distprune.core.models.lenet5 import lenet5
from distprune.core.models.mlp import mlp
from distprune.core.models.resnet_cifar import resnet_cifar
from distprune.core.models.vgg_cifar import vgg_cifar
from distprune.errors import UserError


def _torchvision(arch: str, **options: Any) -> nn.Module:
    from torchvision import models

    return models.get_model(arch, weights=None, num_classes=10, **options)


def _vgg11_bn() -> nn.Module:
    net = _torchvision("vgg11_bn")
    net.classifier[0], net.classifier[3], net.classifier[6] = nn.Linear(512 * 49, 32), nn.Linear(32, 32), nn.Linear(32, 10)
    return net


# How to build it, the sides of its input, and how many groups it has.
NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "mlp": (lambda: mlp((1, 8, 8), 10), (1, 8, 8), 2),
    "lenet5": (lambda: lenet5((1, 28, 28), 10), (1, 28, 28), 3),  # the second convolution is flattened: 16 columns a channel
    "resnet_cifar": (lambda: resnet_cifar((3, 32, 32), 10, depth=8), (3, 32, 32), 3),  # conv1 of each block; padding bars the rest
    "vgg_cifar": (lambda: vgg_cifar((3, 32, 32), 10, depth=11, width=0.5), (3, 32, 32), 8),
    "resnet18": (lambda: _torchvision("resnet18"), (3, 32, 32), 12),  # 8 inside the blocks, 4 stages
    "regnet_y_400mf": (lambda: _torchvision("regnet_y_400mf"), (3, 32, 32), 37),  # a unit of its grouped convolutions is a group of them
    "mobilenet_v3_small": (lambda: _torchvision("mobilenet_v3_small"), (3, 32, 32), 27),
    "densenet121": (lambda: _torchvision("densenet121"), (3, 32, 32), 120),
    "convnext_tiny": (lambda: _torchvision("convnext_tiny"), (3, 32, 32), 18),  # the stream is normalized across its channels
    "vgg11_bn": (_vgg11_bn, (3, 32, 32), 10),
    "efficientnet_b0": (lambda: _torchvision("efficientnet_b0"), (3, 32, 32), 40),
    "swin_t": (lambda: _torchvision("swin_t"), (3, 32, 32), 12),  # the hidden units of each block
    "shufflenet_v2_x0_5": (lambda: _torchvision("shufflenet_v2_x0_5"), (3, 32, 32), 16),  # the inner convolutions of each block
}
SLOW = {"vit_b_16": (lambda: _torchvision("vit_b_16", image_size=64), (3, 64, 64), 24)}  # heads and hidden units of each block
cases = [*NETWORKS, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]


def _random(model: nn.Module) -> nn.Module:
    """Nothing that is learned or measured is zero or one, so that nothing holds by chance."""
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith("running_var"):
                tensor.uniform_(0.5, 2)
            elif tensor.is_floating_point() and (tensor.dim() < 2 or "layer_scale" in name):
                tensor.add_(torch.randn(tensor.shape).mul_(0.3))
    return model


def _half(groups: list[Group]) -> dict[str, Tensor]:
    kept = {group.name: torch.rand(group.units) < 0.5 for group in groups}
    for group in groups:
        kept[group.name][torch.randint(group.units, ())] = True
    return kept


def _masks(model: nn.Module, groups: list[Group], kept: Mapping[str, Tensor]) -> Masks:
    weights = prunable(model)
    masks = {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in weights.items()}
    for group in groups:
        for part in group.parts:
            if part.role != "carries":
                masks[part.name].index_fill_(part.dim, part.index[~kept[group.name]].flatten(), False)
    return Masks(masks)


def _carried(groups: list[Group], model: nn.Module, kept: Mapping[str, Tensor]) -> int:
    """How many parameters (not buffers) go with the removed units besides weights."""
    parameters = dict(model.named_parameters())
    return sum(
        int((~kept[group.name]).sum()) * part.index.shape[1]
        for group in groups
        for part in group.parts
        if part.role == "carries" and part.name in parameters
    )


def _count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _lawful(model: nn.Module, groups: list[Group], x: Tensor) -> nn.Module:
    """Check the law on a random half of the units, in float64. Returns the shrunk network."""
    model = _random(model).double().eval()
    kept, x = _half(groups), x.double() if x.is_floating_point() else x
    small = shrink(model, groups, kept)
    masks = _masks(model, groups, kept)
    before = _count(model)
    with torch.no_grad():
        out = small(x)
        torch.testing.assert_close(masks.apply_(model)(x), out, rtol=1e-6, atol=1e-9 * float(out.abs().max()))
    assert _count(small) == before - (masks.total - masks.kept) - _carried(groups, model, kept) < before
    return small


@pytest.mark.parametrize("name", cases)
def test_the_masked_network_computes_what_the_shrunk_one_does(name: str) -> None:
    torch.manual_seed(0)
    build, shape, count = {**NETWORKS, **SLOW}[name]
    model, x = build().eval(), torch.randn(2, *shape)
    groups = coupled(model, x[:1])
    assert len(groups) == count
    assert len({group.name for group in groups}) == count
    assert all(group.name == next(part.name for part in group.parts if part.role == "produces") for group in groups)
    assert all(part.name in prunable(model) for group in groups for part in group.parts if part.role != "carries")

    kept = _half(groups)
    claimed = flops(layer_flops(model, x[:1], prunable(model)), _masks(model, groups, kept))
    small = shrink(model, groups, kept)
    assert sum(layer_flops(small, x[:1], prunable(small)).values()) == pytest.approx(claimed, rel=1e-12)
    if name in ("resnet18", "mobilenet_v3_small", "regnet_y_400mf", "densenet121"):  # convolutions and linear layers are all there is
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            small(x[:1])
        assert counter.get_total_flops() == pytest.approx(claimed, rel=1e-12)
    _lawful(model, groups, x)


class Glue(nn.Module):
    """A network from a function, for cases that no library has."""

    def __init__(self, forward: Callable[..., Tensor], **modules: nn.Module | nn.Parameter) -> None:
        super().__init__()
        self._function = forward
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, x: Tensor) -> Tensor:
        return self._function(self, x)


def _conv(before: int, after: int, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(before, after, 3, padding=1, **options)


def _chain(*middle: nn.Module, before: int = 8, after: int = 8) -> nn.Module:
    """A convolution, what is asked about, and two more layers."""
    return nn.Sequential(_conv(3, before), *middle, nn.ReLU(), _conv(after, 6), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 64, 5))


def _tied() -> nn.Module:
    net = Glue(
        lambda net, x: net.out(F.relu(net.b(F.relu(net.a(F.relu(net.first(x))))))),
        first=nn.Linear(8, 12),
        a=nn.Linear(12, 12),
        b=nn.Linear(12, 12),
        out=nn.Linear(12, 5),
    )
    net.b.weight = net.a.weight
    return net


def _encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(16, 4, 24, batch_first=True)
    return Glue(
        lambda net, x: net.head(net.stack(net.embed(x)).mean(1)),
        embed=nn.Linear(8, 16),
        stack=nn.TransformerEncoder(layer, 2, enable_nested_tensor=False),
        head=nn.Linear(16, 5),
    )


IMAGE, ROW = (2, 3, 8, 8), (2, 8)
# What to build, its input, and the units of its groups: (first producing weight, units).
SMALL: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], dict[str, int]]] = {
    "batch norm and prelu": (lambda: _chain(nn.BatchNorm2d(8), nn.PReLU(8)), IMAGE, {"0.weight": 8, "4.weight": 6}),
    "grouped convolution": (lambda: _chain(_conv(8, 16, groups=4), after=16), IMAGE, {"0.weight": 4, "3.weight": 6}),
    "depthwise with a multiplier": (lambda: _chain(_conv(8, 16, groups=8), after=16), IMAGE, {"0.weight": 8, "3.weight": 6}),
    "transposed": (
        lambda: _chain(nn.ConvTranspose2d(8, 10, 3, padding=1), after=10),
        IMAGE,
        {"0.weight": 8, "1.weight": 10, "3.weight": 6},
    ),
    "transposed, grouped": (
        lambda: _chain(nn.ConvTranspose2d(8, 12, 3, padding=1, groups=4), after=12),
        IMAGE,
        {"0.weight": 4, "3.weight": 6},
    ),
    "transposed, depthwise": (lambda: _chain(nn.ConvTranspose2d(8, 8, 3, padding=1, groups=8)), IMAGE, {"0.weight": 8, "3.weight": 6}),
    "group norm": (lambda: _chain(nn.GroupNorm(4, 8)), IMAGE, {"0.weight": 4, "3.weight": 6}),  # its groups are removed as a whole
    "instance norm": (lambda: _chain(nn.InstanceNorm2d(8, affine=True)), IMAGE, {"0.weight": 8, "3.weight": 6}),
    "one group of all channels": (lambda: _chain(nn.GroupNorm(1, 8)), IMAGE, {"3.weight": 6}),
    "layer norm": (lambda: _chain(nn.LayerNorm([8, 8, 8])), IMAGE, {"3.weight": 6}),
    "softmax over channels": (lambda: _chain(nn.Softmax(dim=1)), IMAGE, {"3.weight": 6}),
    "norm across channels": (lambda: _chain(nn.LocalResponseNorm(3)), IMAGE, {"3.weight": 6}),
    "pixel shuffle": (lambda: _chain(nn.PixelShuffle(2), nn.MaxPool2d(2), after=2), IMAGE, {"4.weight": 6}),
    "gate of torch": (lambda: _chain(nn.GLU(dim=1), after=4), IMAGE, {"3.weight": 6}),  # torch-pruning does not know it
    "gate of two halves": (lambda: _chain(Glue(_gate), after=4), IMAGE, {"0.weight": 4, "3.weight": 6}),
    "parametrized": (lambda: _chain(nn.utils.parametrizations.weight_norm(_conv(8, 8))), IMAGE, {"3.weight": 6}),
    "tied linear layers": (_tied, ROW, {"first.weight": 12}),
    "encoder of torch": (
        _encoder,
        (2, 5, 8),
        {f"stack.layers.{i}.{name}": n for i in (0, 1) for name, n in {"self_attn.in_proj_weight": 4, "linear1.weight": 24}.items()},
    ),
    "residual to the input": (
        lambda: Glue(lambda net, x: net.c(F.relu(x + net.b(F.relu(net.a(x))))).mean((2, 3)), a=_conv(3, 8), b=_conv(8, 3), c=_conv(3, 4)),
        IMAGE,
        {"a.weight": 8},
    ),
    "a parameter added": (
        lambda: Glue(
            lambda net, x: net.c(F.relu(net.b(net.a(x) + net.p))).mean((2, 3)),
            p=nn.Parameter(torch.ones(8, 1, 1)),
            a=_conv(3, 8),
            b=_conv(8, 6),
            c=_conv(6, 4),
        ),
        IMAGE,
        {"b.weight": 6},
    ),
    "concatenated, then added": (
        lambda: Glue(
            lambda net, x: net.d(F.relu(torch.cat([net.a(x), net.b(x)], 1) + net.c(x))).mean((2, 3)),
            a=_conv(3, 4),
            b=_conv(3, 6),
            c=_conv(3, 10),
            d=_conv(10, 4),
        ),
        IMAGE,
        {"a.weight": 4, "b.weight": 6},
    ),
    "used twice": (
        lambda: Glue(
            lambda net, x: net.b(F.relu(net.a(F.relu(net.a(F.relu(net.f(x))))))).mean((2, 3)), f=_conv(3, 8), a=_conv(8, 8), b=_conv(8, 4)
        ),
        IMAGE,
        {"f.weight": 8},
    ),
    "branches of the output": (
        lambda: Glue(lambda net, x: torch.cat([net.b(F.relu(net.a(x))), net.a(x)], 1), a=_conv(3, 8), b=_conv(8, 4)),
        IMAGE,
        {},
    ),
    "attention from one linear layer": (
        lambda: Glue(
            _attention, embed=nn.Linear(8, 12), qkv=nn.Linear(12, 36), proj=nn.Linear(12, 12), up=nn.Linear(12, 20), down=nn.Linear(20, 5)
        ),
        (2, 5, 8),
        {"embed.weight": 12, "proj.weight": 12, "up.weight": 20},
    ),
}


def _gate(_: Any, x: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=1)
    return a * b.sigmoid()


def _attention(net: Any, x: Tensor) -> Tensor:
    n, length, _ = x.shape
    q, k, v = net.qkv(net.embed(x)).reshape(n, length, 3, 3, 4).permute(2, 0, 3, 1, 4).unbind(0)
    mixed = ((q @ k.transpose(-2, -1)).softmax(-1) @ v).transpose(1, 2).reshape(n, length, 12)
    return net.down(F.gelu(net.up(net.proj(mixed)))).mean(1)


@pytest.mark.parametrize("name", SMALL)
def test_couplings_by_hand(name: str) -> None:
    torch.manual_seed(0)
    build, shape, units = SMALL[name]
    model, x = build(), torch.randn(shape)
    if not units:
        with pytest.raises(UserError, match="Glue must have channels that can be removed across layers, found none"):
            coupled(model, x)
        return
    groups = coupled(model, x)
    assert {group.name: group.units for group in groups} == units
    for _ in range(3):
        _lawful(model, groups, x)


def test_a_flattened_channel_has_all_its_pixels() -> None:
    conv2 = next(group for group in coupled(lenet5((1, 28, 28), 10), torch.zeros(1, 1, 28, 28)) if group.name == "conv2.weight")
    rows, bias, columns = conv2.parts
    assert [(part.name, part.dim, part.role) for part in conv2.parts] == [
        ("conv2.weight", 0, "produces"),
        ("conv2.bias", 0, "carries"),
        ("fc1.weight", 1, "consumes"),
    ]
    assert (rows.index == torch.arange(50)[:, None]).all()
    assert (bias.index == torch.arange(50)[:, None]).all()
    assert (columns.index == torch.arange(800).view(50, 16)).all()


@pytest.mark.parametrize(
    ("shares", "removed", "faster"),
    [
        ((0.5, 0.5, 0.5), 49.94, 1.99),
        ((0.7, 0.7, 0.7), 70.75, 3.59),
        ((0.9, 0.9, 0.9), 90.66, 11.58),
        ((0.925, 0.925, 0.925), 93.63, 15.2),
        ((0.95, 0.95, 0.95), 95.41, 19.85),
        ((0.75, 0.75, 0.32), 42.85, 2.55),
    ],
)
def test_table_of_greg_resnet56(resnet56: tuple[nn.Module, list[Group]], shares: tuple[float, ...], removed: float, faster: float) -> None:
    # Wang et al. 2021, arXiv:2012.09243: conv1 of each block loses ceil(share * n) of its n filters, never all.
    model, groups = resnet56
    _check_table(model, groups, lambda group: shares[int(group.name[5]) - 1], removed, faster)


@pytest.mark.parametrize(
    ("share", "removed", "faster"), [(0.5, 74.88, 3.61), (0.6, 84.01, 5.42), (0.7, 90.99, 8.89), (0.8, 95.96, 17.34), (0.9, 98.97, 45.53)]
)
def test_table_of_greg_vgg19(vgg19: tuple[nn.Module, list[Group]], share: float, removed: float, faster: float) -> None:
    model, groups = vgg19
    _check_table(model, [group for group in groups if group.name != "conv1_1.weight"], lambda _: share, removed, faster)


@pytest.fixture(scope="module")
def resnet56() -> tuple[nn.Module, list[Group]]:
    model = resnet_cifar((3, 32, 32), 10, depth=56)
    groups = coupled(model, torch.zeros(1, 3, 32, 32))
    assert len(groups) == 27
    assert all(group.name.endswith("conv1.weight") for group in groups)
    return model, groups


@pytest.fixture(scope="module")
def vgg19() -> tuple[nn.Module, list[Group]]:
    model = vgg_cifar((3, 32, 32), 100, depth=19)
    groups = coupled(model, torch.zeros(1, 3, 32, 32))
    assert len(groups) == 16
    return model, groups


def _check_table(model: nn.Module, groups: list[Group], share: Callable[[Group], float], removed: float, faster: float) -> None:
    kept = {}
    for group in groups:
        kept[group.name] = torch.arange(group.units) >= min(math.ceil(share(group) * group.units), group.units - 1)
    small, x = shrink(model, groups, kept), torch.zeros(1, 3, 32, 32)
    before, after = ({"weights": _weights(net), "flops": sum(layer_flops(net, x, prunable(net)).values())} for net in (model, small))
    assert 100 * (1 - after["weights"] / before["weights"]) == pytest.approx(removed, abs=0.006)
    assert before["flops"] / after["flops"] == pytest.approx(faster, abs=0.006)


def _weights(model: nn.Module) -> int:
    return sum(weight.numel() for weight in prunable(model).values())


def _same(a: list[Group], b: list[Group]) -> bool:
    def plain(groups: list[Group]) -> Any:
        return [(g.name, [(p.name, p.dim, p.index.tolist(), p.role) for p in g.parts]) for g in groups]

    return bool(plain(a) == plain(b))


def test_the_model_stays_as_it_is() -> None:
    torch.manual_seed(0)
    model, x = _torchvision("resnet18").train(), torch.randn(1, 3, 32, 32)
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    model.fc.weight.requires_grad_(False)
    model.bn1.eval()
    facts = {name: (t.clone(), t.requires_grad) for name, t in [*model.named_parameters(), *model.named_buffers()]}
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    modes, rng = [module.training for module in model.modules()], torch.get_rng_state()
    groups = coupled(model, x)
    assert all(
        torch.equal(t, facts[n][0]) and t.requires_grad == facts[n][1] for n, t in [*model.named_parameters(), *model.named_buffers()]
    )
    assert all(torch.equal(p.grad, gradients[n]) for n, p in model.named_parameters() if p.grad is not None)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), rng)

    with torch.no_grad():  # whatever is in it, and whoever asks
        for parameter in model.parameters():
            parameter.zero_()
        assert _same(groups, coupled(model.eval().half(), x.half()))


class Slow(nn.Module):
    """Two blocks, of which the graph of the whole never comes to an end."""

    def __init__(self, seconds: float = 0.0, memory: int = 0) -> None:
        super().__init__()
        self.seconds, self.memory = seconds, memory
        self.block = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 8))
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.block(x)
        if y.requires_grad:  # as in the graph, and not in the check
            time.sleep(self.seconds)
            torch.ones(self.memory, dtype=torch.uint8)
        return self.head(F.relu(y))


@pytest.mark.parametrize("limits", [{"seconds": 60.0}, {"memory": 2**31}], ids=str)
def test_a_network_whose_graph_takes_too_much_is_searched_inside_its_blocks(limits: Mapping[str, float]) -> None:
    groups = coupled(Slow(**limits), torch.ones(2, 8), seconds=5, memory=2**30)
    assert [group.name for group in groups] == ["block.0.weight"], "block.2 ends at the boundary of its block"


def test_names_and_boundaries_of_a_block_alone() -> None:
    model = Slow()
    assert [group.name for group in propose(model, torch.ones(2, 8))] == ["block.0.weight", "block.2.weight"]
    assert [group.name for group in propose(model, torch.ones(2, 8), "block")] == ["block.0.weight"]


class Hungry(nn.Sequential):
    """Asks for more address space than free memory of a process that ran for long may hide."""

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled():  # as in the graph
            torch.empty(2**32, dtype=torch.uint8)
        return super().forward(x)


@pytest.mark.parametrize("limits", [{"seconds": 0.002}, {"memory": 2**30}], ids=str)
def test_without_time_or_memory_the_error_names_the_network(limits: Mapping[str, Any]) -> None:
    model = Hungry(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 8))
    with pytest.raises(UserError, match=r"Hungry must have channels.*found none.*granularity: weight"):
        coupled(model, torch.zeros(1, 64), **limits)
    assert model(torch.zeros(1, 64)).shape == (1, 8), "this process is unharmed"


def test_a_network_without_channels_to_remove_is_refused_by_name() -> None:
    with pytest.raises(UserError, match="Linear must have channels that can be removed across layers, found none"):
        coupled(nn.Linear(4, 4), torch.zeros(1, 4))
    with pytest.raises(UserError, match=r"Sequential must have.*RuntimeError"):  # the input does not fit
        coupled(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), torch.zeros(1, 5))


def test_works_beside_threads_and_from_one() -> None:
    torch.set_num_threads(2)
    try:
        big = torch.randn(600, 600)
        F.conv2d(torch.randn(4, 16, 64, 64, requires_grad=True), torch.randn(16, 16, 3, 3)).sum().backward()
        big @ big  # torch's own threads exist now
        model, found = resnet_cifar((3, 32, 32), 10, depth=8), []
        threads = [threading.Thread(target=lambda: found.append(coupled(model, torch.zeros(1, 3, 32, 32), seconds=60))) for _ in range(2)]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            big @ big
    finally:
        torch.set_num_threads(1)
    assert len(found) == 2
    assert _same(*found)


def test_bounded_work_says_what_it_knew_when_it_ended() -> None:
    def work(say: Callable[[Any], None]) -> None:
        say([1, 2])
        say("x" * 10**6)
        while True:
            pass

    assert bounded(work, memory=2**30, seconds=5) == ([[1, 2], "x" * 10**6], "It took longer than 5 s.")
    assert bounded(lambda say: say(torch.get_num_threads()), memory=2**30, seconds=30) == ([1], "")
    assert bounded(lambda say: 1 / 0, memory=2**30, seconds=30) == ([], "ZeroDivisionError: division by zero.")  # type: ignore[func-returns-value]
    said, failure = bounded(lambda say: say(len(bytearray(2**31))), memory=2**30, seconds=30)
    assert (said, failure) == ([], "It needed more than 1 GiB of memory.")
