"""Layer fusion: the affine maps against brute force and closed form, what can be fused, and the paradigm."""

import math
from typing import Any

import optuna
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from toys import BASE, finish, ready, recipe

from distprune.core import registry
from distprune.core.edits.fuse import Fuse, fuse, residuals
from distprune.core.edits.fusions import Fusion, fusions
from distprune.core.edits.linearise import linear_map
from distprune.core.edits.pairs import find_pairs, window
from distprune.core.executor import execute
from distprune.core.fusion import Moments, Window, linearised
from distprune.core.keys import keys
from distprune.core.legality import check_plan
from distprune.core.plan import Plan
from distprune.core.projection import project
from distprune.core.run import prepare
from distprune.core.stages import SetWeights, Snapshot, Train
from distprune.errors import UserError
from distprune.search.space import Space


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def _best(network: nn.Module, *batches: Tensor, **options: Any) -> Fusion:
    def feed(copy: nn.Module) -> None:
        for batch in batches:
            copy(batch)

    return fusions(network, feed, **{"ridge": 1e-12, **options})[0]


def _settled(network: nn.Sequential, inputs: Tensor) -> nn.Sequential:
    """With statistics of batch normalisation, and scales that are not one."""
    for module in network:
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 2.0)
            nn.init.normal_(module.bias)
            module.momentum = None
    network.train()(inputs)
    return network.eval()


# The closed form


def _gaussian(n: int, d: int) -> Tensor:
    return torch.randn(n, d) @ torch.randn(d, d) / d**0.5 + torch.randn(d)


def test_closed_form_is_the_empirical_optimum() -> None:
    """The numbers of the derivation: 20 inputs, 64 hidden units, 5 outputs, 200,000 samples."""
    network = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 5))
    x = _gaussian(200_000, 20)
    y = network(x).detach()
    first, second = network[0].weight.detach().double(), network[2].weight.detach().double()
    optimum, closed = _best(network, x).values, _best(network, x, form="gaussian").values
    assert abs(closed.error([(x, y)]) - optimum.error([(x, y)])) < 1e-3 < optimum.error([(x, y)])
    # W2 diag(Phi(alpha)) W1 and W2 (m Phi + s phi) + b2 - W mu, with what the layers say of m and s.
    mean = first @ x.double().mean(0) + network[0].bias.detach().double()
    std = (first @ x.double().T.cov() @ first.T).diagonal().sqrt()
    alpha = mean / std
    normal = torch.distributions.Normal(torch.zeros(1).double(), 1.0)
    share, density = normal.cdf(alpha), normal.log_prob(alpha).exp()
    weight = second * share @ first
    bias = second @ (mean * share + std * density) + network[2].bias.detach().double() - weight @ x.double().mean(0)
    assert torch.allclose(closed.weight, weight, atol=1e-4) and torch.allclose(closed.bias, bias, atol=1e-4)
    assert torch.allclose(closed.weight, optimum.weight, atol=0.05)
    product = type(closed)(second @ first, bias + (weight - second @ first) @ x.double().mean(0))
    assert product.error([(x, y)]) > 1.5 * optimum.error([(x, y)]), "the product of the weights alone is far from it"


@pytest.mark.parametrize("layers", [(nn.BatchNorm1d(64), nn.ReLU()), (nn.ELU(), nn.BatchNorm1d(64)), (nn.Tanh(), nn.Dropout(0.5)), ()])
def test_closed_form_with_batch_norm_on_either_side_and_other_activations(layers: tuple[nn.Module, ...]) -> None:
    x = _gaussian(40_000, 20)
    network = _settled(nn.Sequential(nn.Linear(20, 64), *layers, nn.Linear(64, 5)), x)
    y = network(x).detach()
    optimum, closed = _best(network, x).values, _best(network, x, form="gaussian").values
    assert abs(closed.error([(x, y)]) - optimum.error([(x, y)])) < 1e-3
    assert layers or closed.error([(x, y)]) < 1e-9, "without a curve between them the layers are one"


def test_closed_form_of_convolutions() -> None:
    """White inputs, padding that reaches nowhere: positions are alike and nearly Gaussian."""
    x = torch.randn(2000, 3, 12, 12)
    conv = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.AvgPool2d(2), nn.Conv2d(6, 4, 2, stride=2))
    dense = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ELU(), nn.AvgPool2d(3), nn.Flatten(), nn.Linear(96, 4))
    for network in (conv, dense):
        optimum, closed = _best(network, x), _best(network, x, form="gaussian")
        assert closed.layers == optimum.layers
        assert abs(closed.residual - optimum.residual) < 0.02 and 0.02 < optimum.residual < 0.9
        assert torch.allclose(closed.values.weight, optimum.values.weight, atol=0.05)
    line = nn.Sequential(conv[0], nn.AvgPool2d(2), conv[3])
    whole = linear_map(list(line), x, window=window(list(line)))
    outputs = F.conv2d(x.double(), whole.weight.view(4, 3, 6, 6), whole.bias, stride=4)
    assert torch.allclose(outputs, line(x).double(), atol=1e-5)


def test_the_line_of_an_activation() -> None:
    mean, std = torch.tensor([-2.0, -0.1, 0.0, 1.0, 3.0]).double(), torch.tensor([1.0, 2.0, 0.5, 0.1, 1.5]).double()
    normal = torch.distributions.Normal(torch.zeros(1).double(), 1.0)
    share, density = normal.cdf(mean / std), normal.log_prob(mean / std).exp()
    gain, value = linearised(nn.ReLU(), mean, std)
    assert torch.allclose(gain, share, atol=3e-5) and torch.allclose(value, mean * share + std * density, atol=3e-5)
    gain, value = linearised(nn.SiLU(), mean, std)
    z = (mean + std * torch.randn(400_000, 5).double()).requires_grad_()
    F.silu(z).sum().backward()
    assert z.grad is not None
    assert torch.allclose(gain, z.grad.mean(0), atol=5e-3) and torch.allclose(value, F.silu(z).mean(0), atol=2e-2)
    gain, value = linearised(nn.ReLU(), torch.tensor([2.0]), torch.tensor([0.0]))
    assert gain == 0.0 and math.isclose(value.item(), 2.0, rel_tol=1e-9), "a unit that never varies"


# Least squares


def _brute_force(network: nn.Sequential, x: Tensor, fused: nn.Conv2d) -> tuple[Tensor, Tensor]:
    """Least squares over all entries of a kernel, whose columns are convolutions with each of its unit vectors."""
    d = fused.weight[0].numel()
    units = torch.eye(d).double().view(d, *fused.weight.shape[1:])
    columns = F.conv2d(x.double(), units, stride=fused.stride, padding=fused.padding).movedim(1, 3).flatten(0, 2)
    targets = network(x).detach().double().movedim(1, 3).flatten(0, 2)
    found = torch.linalg.lstsq(torch.cat([columns, torch.ones(len(columns), 1)], 1), targets).solution
    return found[:-1].T.view(-1, *fused.weight.shape[1:]), found[-1]


CHAINS: dict[str, tuple[nn.Module, ...]] = {
    "the paper's": (nn.Conv2d(2, 3, 3, padding=1), nn.ELU(), nn.BatchNorm2d(3), nn.MaxPool2d(2), nn.Conv2d(3, 4, 3, padding=1)),
    "strides": (nn.Conv2d(2, 3, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(3, 4, 3, stride=2)),
    "uneven": (nn.Conv2d(2, 3, (1, 3), padding=(0, 1)), nn.Tanh(), nn.AvgPool2d(3, stride=2, padding=1), nn.Conv2d(3, 4, (2, 3))),
    "dilated and grouped": (nn.Conv2d(2, 4, 3, dilation=2, padding="same"), nn.GELU(), nn.Conv2d(4, 4, 2, groups=2, bias=False)),
}


@pytest.mark.parametrize("name", CHAINS)
def test_convolutions_are_fused_as_brute_force_would(name: str) -> None:
    x = torch.randn(600, 2, 11, 11)
    x[:, 1] += 0.8 * x[:, 0] + 1.0  # correlated channels with a mean
    network = _settled(nn.Sequential(*CHAINS[name]), x)
    fused = _best(network, x)
    small = fuse(network, [x], ridge=1e-12)
    layer = small[0]
    assert isinstance(layer, nn.Conv2d) and small(x).shape == network(x).shape
    weight, bias = _brute_force(network, x, layer)
    assert torch.allclose(layer.weight.double(), weight, atol=1e-4) and torch.allclose(layer.bias.double(), bias, atol=1e-4)
    assert fused.residual > 1e-3, "or the test would see nothing"
    alone = _best(network, x, form="per_channel")
    assert alone.residual > fused.residual + 1e-3, "channels are fitted jointly"


def test_a_fused_kernel_sees_all_that_two_convolutions_see() -> None:
    """Between linear layers nothing may be lost, wherever no padding of a layer in between reaches."""
    network = nn.Sequential(nn.Conv2d(2, 8, 3, padding=1), nn.AvgPool2d(2), nn.Conv2d(8, 3, 3))
    x = torch.randn(400, 2, 12, 12)
    seen = window(list(network))
    assert seen == Window((8, 8), (2, 2), (1, 1))
    open_border = nn.Sequential(nn.Conv2d(2, 8, 3), network[1], network[2])
    small = fuse(open_border, [x], ridge=1e-12)
    assert torch.allclose(small(x), open_border(x), atol=1e-4) and small[0].kernel_size == (8, 8)
    narrow = fuse(network, [x], ridge=1e-12, kernel=6)
    assert narrow[0].kernel_size == (6, 6) and narrow[0].padding == (0, 0) and narrow(x).shape == network(x).shape
    assert _best(network, x).residual < 0.01 < _best(network, x, kernel=6).residual


@pytest.mark.parametrize("sides", [(28, 28), (27, 13), (9, 16)])
def test_a_cut_kernel_keeps_the_positions(sides: tuple[int, int]) -> None:
    whole = Window().then((3, 3), (1, 1), (1, 1)).then((2, 2), (2, 2), (0, 0)).then((3, 3), (1, 1), (1, 1))
    for most in range(1, 9):
        cut = whole.cut(most, sides)
        assert cut.positions(sides) == whole.positions(sides) and cut.stride == whole.stride
        assert all(p >= 0 and abs(k - max(most, 2)) <= 1 for k, p in zip(cut.kernel, cut.padding, strict=True))


def test_convolution_and_dense_are_fused_as_least_squares_would() -> None:
    x = torch.randn(1500, 2, 6, 6)
    layers = (nn.Conv2d(2, 5, 3, padding=1), nn.ReLU(), nn.BatchNorm2d(5), nn.MaxPool2d(2), nn.Dropout(0.5), nn.Flatten(), nn.Linear(45, 4))
    network = _settled(nn.Sequential(*layers, nn.Softmax(1)), x)
    small = fuse(network, [x], ridge=1e-12)
    design = torch.cat([x.flatten(1), torch.ones(1500, 1)], 1).double()
    best = torch.linalg.lstsq(design, network[:-1](x).detach().double()).solution
    assert isinstance(small[0][0], nn.Flatten) and torch.allclose(small[0][1].weight.double(), best[:-1].T, atol=1e-4)
    assert torch.allclose(small[0][1].bias.double(), best[-1], atol=1e-4)
    assert isinstance(small[7], nn.Softmax) and all(isinstance(module, nn.Identity) for module in small[1:7]), "what follows stays"


def test_moments_are_streamed() -> None:
    x, y = torch.randn(700, 9) + 5, torch.randn(700, 2)
    whole, parts = Moments(9, 2, x.device), Moments(9, 2, x.device)
    whole.add(x, y)
    for rows in torch.split(torch.arange(700), 64):
        parts.add(x[rows], y[rows])
    a, b = whole.best(ridge=1e-6), parts.best(ridge=1e-6)
    assert torch.allclose(a.weight, b.weight) and torch.allclose(a.bias, b.bias)
    constant = Moments(3, 2, x.device)
    constant.add(torch.ones(50, 3), y[:50])
    assert not constant.best(ridge=1e-6).weight.any() and torch.allclose(constant.best(ridge=1e-6).bias, y[:50].double().mean(0))


def test_residuals_are_of_samples_that_were_not_fitted() -> None:
    """With fewer samples than inputs least squares loses nothing on its own samples, and would always be fused first."""
    network = nn.Sequential(nn.Linear(200, 40), nn.ReLU(), nn.Linear(40, 3))
    few, many = torch.randn(100, 200), torch.randn(6000, 200)
    fusion = _best(network, few, ridge=1e-6)
    assert fusion.values.error([(few, network(few))]) < 1e-3 and fusion.residual > 0.3
    fresh = torch.randn(6000, 200)
    found = _best(network, many)
    assert found.residual == pytest.approx(found.values.error([(fresh, network(fresh).detach())]), abs=0.03)


def test_the_pair_that_loses_least_goes_first() -> None:
    layers = [nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 24), nn.Identity(), nn.Linear(24, 20), nn.ReLU(), nn.Linear(20, 4)]
    network, x = nn.Sequential(*layers), 3 * torch.randn(3000, 16)
    found = residuals(network, [x], ridge=1e-9)
    assert list(found) == ["2+4", "0+2", "4+6"] and found["2+4"] < 1e-6 < 0.02 < found["0+2"] < found["4+6"]
    before = {name: value.clone() for name, value in network.state_dict().items()}
    state = torch.get_rng_state()
    small = fuse(network, [x], count=2, ridge=1e-9)
    assert [type(layer).__name__ for layer in small] == ["Linear", *["Identity"] * 4, "ReLU", "Linear"]
    assert small[0].weight.shape == (20, 16), "the second time it was fused layers that were fused"
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items()) and network.training
    assert isinstance(network[1], nn.Tanh) and torch.equal(torch.get_rng_state(), state)
    assert isinstance(fuse(network, [x], pick="last")[4], nn.Linear) and isinstance(fuse(network, [x], pick="0+2")[2], nn.Identity)
    with pytest.raises(UserError, match=r"Unknown pair to fuse '0\+4'"):
        fuse(network, [x], pick="0+4")


# What can be fused


class Joined(nn.Module):
    """Layers joined in ways that can and cannot be taken away."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.a, self.b, self.c, self.d, self.e = nn.Conv2d(1, 2, 3), *(nn.Linear(n, 8) for n in (32, 8, 8, 8, 8))
        self.f, self.g = nn.Linear(8, 8), nn.Linear(8, 8)
        self.relu, self.shared = nn.ReLU(), nn.ReLU()
        self.g.weight = self.f.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(torch.flatten(self.relu(self.conv(x)), 1))  # fused
        x = self.b(torch.relu(x))  # a function
        x = self.c(self.shared(x))  # a module that is used again
        x = self.d(x) + x  # its input goes elsewhere
        x = self.e(self.shared(x))
        return self.g(self.f(x))  # tied


def test_only_what_modules_connect_is_a_pair() -> None:
    network, x = Joined(), torch.randn(400, 1, 6, 6)
    assert [pair.name for pair in find_pairs(network)] == ["conv+a"]
    assert find_pairs(network, weights={"conv.weight"}) == []
    small = fuse(network, [x])
    assert small(x).shape == network(x).shape and isinstance(small.relu, nn.Identity)

    class Own(nn.Linear):
        pass

    class Decides(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    for other in (nn.Sequential(nn.Linear(3, 3), nn.ReLU(), Own(3, 3)), nn.Sequential(nn.Linear(3, 3), Decides(), nn.Linear(3, 3))):
        with pytest.raises(UserError, match="fusion needs neighbouring Linear or Conv2d layers .* Sequential has none"):
            fuse(other, [torch.randn(8, 3)])
    ceil = nn.Sequential(nn.Conv2d(1, 2, 3), nn.MaxPool2d(2, ceil_mode=True), nn.Conv2d(2, 2, 2))
    circular = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular"))
    even = nn.Sequential(nn.Conv2d(1, 2, 4, padding="same"), nn.Conv2d(2, 2, 3))
    assert not any(map(find_pairs, (ceil, circular, even)))


def test_what_does_not_fit_after_all_says_why() -> None:
    tokens = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Flatten(), nn.Linear(12, 2))
    with pytest.raises(UserError, match=r"No pair of Sequential can be fused: '0\+3': inputs of shape \(8, 3, 4\) .* not in step"):
        fuse(tokens, [torch.randn(8, 3, 4)])
    pooled = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(2, 2, 2))
    with pytest.raises(UserError, match="the closed form is for one elementwise activation, and for no max-pooling"):
        fuse(pooled, [torch.randn(8, 1, 8, 8)], form="gaussian")
    wide = nn.Sequential(nn.Linear(9000, 2), nn.Linear(2, 2))
    with pytest.raises(UserError, match="a fused layer would have 9000 inputs, more than 8192"):
        fuse(wide, [torch.randn(8, 9000)])


# The paradigm and what its configurations need


def test_rmsprop_keeps_zeros_and_is_the_rule() -> None:
    run = ready("at_init", 0.5, train={"optimizer": {"name": "rmsprop", "lr": 1e-2, "momentum": 0.9, "weight_decay": 1e-2}})
    finish(run)
    assert all(not run.state.weights[name][~mask].any() for name, mask in run.state.masks.items())
    weight = nn.Parameter(torch.tensor([2.0]))
    optimizer = registry.optimizer.choose("rmsprop", lr=0.1)([weight])
    for gradient in (3.0, -1.0):
        weight.grad = torch.tensor([gradient])
        optimizer.step()
    # Means of squares: 0.1 * 9, then 0.9 * 0.9 + 0.1 * 1.
    assert weight.item() == pytest.approx(2 - 0.1 * 3 / 0.9**0.5 + 0.1 / 0.91**0.5, rel=1e-5)


def test_plain_conv_by_hand() -> None:
    """Four blocks on 28x28x1: 9 (2 + 2 4 + 4 8 + 8 16) weights of convolutions, and 16 outputs of one pixel for each of ten classes."""
    deep = registry.model.choose("plain_conv")((1, 28, 28), 10)
    assert [layer.weight.numel() for layer in deep if hasattr(layer, "weight")] == [18, 72, 288, 1152, 160]
    small = fuse(deep, [torch.randn(64, 1, 28, 28)], pick="last")
    shallow = registry.model.choose("plain_conv", channels=[2, 4, 8])((1, 28, 28), 10)
    shapes = [[tuple(p.shape) for p in network.parameters()] for network in (small, shallow)]
    assert shapes[0] == shapes[1], "fused, it is the network of three blocks"
    six = {"channels": [32, 32, 64, 64, 128, 128], "pool_every": 2, "activation": "elu", "batch_norm": True, "init": "he"}
    paper = registry.model.choose("plain_conv", **six)((3, 32, 32), 10)
    assert [type(layer).__name__ for layer in paper[:7]] == ["Conv2d", "ELU", "BatchNorm2d", "Conv2d", "ELU", "BatchNorm2d", "MaxPool2d"]
    assert paper.fc.in_features == 128 * 4 * 4 and not paper.conv6.bias.any()
    assert paper.conv6.weight.std().item() == pytest.approx((2 / (128 * 9)) ** 0.5, rel=0.02)
    for options in ({"channels": []}, {"pool_every": 0}, {"channels": [2] * 6}):
        with pytest.raises(ValueError, match="plain_conv"):
            registry.model.choose("plain_conv", **options)((1, 28, 28), 10)


def test_fusion_is_a_choice_of_a_search() -> None:
    space = Space({**BASE, "equal_cost": True}, {"paradigm": ["dense", "finetune", "fusion"]}, seed=0)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    drawn = [
        made.paradigm for made in (space.build(study.ask()) for _ in range(60)) if made.paradigm.name == "fusion" and not made.sparsity
    ]
    assert {choice.option("layers") for choice in drawn} == {1, 2} and {choice.option("tune") for choice in drawn} == {"25%", "50%", "100%"}


def test_fusion_trains_fuses_and_retrains() -> None:
    stages = recipe({"name": "fusion", "layers": 2, "deep": "50%", "tune": "25%", "pick": "last"}, 0.0).plan(10).stages
    assert [type(stage) for stage in stages] == [Train, Fuse, Train, Fuse, Train]
    assert [(stage.since, stage.until) for stage in stages if isinstance(stage, Train)] == [(None, 20), (30, 40), (30, 40)]
    assert len(set(found := keys("root", Plan(stages)))) == len(found)
    run = ready({"name": "fusion", "layers": 2, "batches": 4}, 0.0)
    reports = finish(run)
    assert reports[-1].cost == run.plan.cost and len(run.state.edits) == 2 and len(list(run.state.weights)) == 1
    assert reports[-1].sparsity == pytest.approx(1 - run.state.masks.kept / 3446) and run.state.masks.sparsity == 0.0


def test_a_fused_start_is_worth_more_than_a_drawn_one() -> None:
    def start(form: str) -> float:
        run = ready({"name": "fusion", "form": form, "pick": "0+6"}, 0.0)
        return next(report.metrics["accuracy"] for report in execute(run.plan, run.state, run.env) if report.stage == 2)

    assert start("data") > 0.8 and start("per_channel") > 0.8, "as much as the deep network, before any retraining"
    assert start("random") < 0.4


def test_the_closed_form_in_a_run() -> None:
    run = ready({"name": "fusion", "form": "gaussian", "pick": "6+8"}, 0.0)
    start = next(report for report in execute(run.plan, run.state, run.env) if report.stage == 2)
    assert start.metrics["accuracy"] > 0.8 and run.state.edits[0]["fused"] == "6+8" and 0 < run.state.edits[0]["residual"] < 0.5


def test_rungs_score_the_fused_network() -> None:
    run = ready({"name": "fusion", "layers": 2, "pick": "last", "batches": 4}, 0.0)
    seen: list[int] = []
    original = run.env.task.metrics

    def metrics(model: nn.Module, split: Any) -> dict[str, float]:
        seen.append(sum(isinstance(module, nn.Linear | nn.Conv2d) for module in model.modules()))
        return original(model, split)

    run.env.task.metrics = metrics  # type: ignore[method-assign]
    for report in execute(run.plan, run.state, run.env):
        if not report.final:
            score, spent, _ = project(run.state, run.recipe, run.plan, run.env, recovery=5)
            left = sum(isinstance(stage, Fuse) for stage in run.plan.stages[report.stage :])
            assert seen[-1] == 1 and score > 0.2 and spent == 5 * 32 + left * 4 * 32
            assert len(run.state.edits) == 2 - left


def test_networks_without_a_pair_are_refused_before_anything_is_trained() -> None:
    with pytest.raises(UserError, match="fusion needs neighbouring Linear or Conv2d layers"):
        ready("fusion", 0.0, model={"name": "mlp", "hidden": []})
    with pytest.raises(UserError, match="fusion needs neighbouring Linear or Conv2d layers"):
        ready({"name": "fusion", "layers": 3}, 0.0)
    with pytest.raises(UserError, match="fusion needs neighbouring Linear or Conv2d layers"):
        ready("fusion", 0.0, model={"name": "resnet_cifar", "depth": 8, "width": 4}, data={"import": "toys:photos"})
    with pytest.raises(UserError, match="Unknown pair to fuse '1\\+2'"):
        prepare(recipe({"name": "fusion", "pick": "1+2"}, 0.0))
    with pytest.raises(UserError, match="The closed form is for all that two convolutions see, so kernel must be 0, got 3"):
        ready({"name": "fusion", "form": "gaussian", "kernel": 3}, 0.0)
    with pytest.raises(UserError, match="prunes nothing, so sparsity must be 0"):
        recipe("fusion", 0.5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": 0}, "paradigm.layers must be at least 1, got 0"),
        ({"batches": 0}, "paradigm.batches must be at least 1, got 0"),
        ({"ridge": 0.0}, "paradigm.ridge must be above 0, got 0.0"),
        ({"kernel": -1}, "paradigm.kernel must be at least 0, got -1"),
        ({"deep": "0%"}, "paradigm.deep must be in the training of 40 steps, got step 0"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        recipe({"name": "fusion", **options}, 0.0).plan(10)


def test_what_may_not_follow_a_fusion() -> None:
    made = recipe("finetune", 0.5)
    train, fused = Train(config=made.train, until=10), Fuse(batch_size=32)
    early, back = Snapshot(tag="early"), SetWeights(policy="rewind", tag="early")
    with pytest.raises(UserError, match="rewinds across a fusion, to weights of layers that are gone"):
        check_plan(Plan([early, train, fused, back, train]), "mine")
    with pytest.raises(UserError, match="rewinds across a fusion"):
        check_plan(Plan([train, fused, SetWeights(policy="reinit"), train]), "mine")
    with pytest.raises(UserError, match="prunes after a fusion, and its budget is of the network as it was built"):
        check_plan(Plan([train, fused, made.prune(0.5), train]), "mine")
    check_plan(Plan([train, made.prune(0.5), fused, early, train, back, train]), "mine")
