"""Robust pruning at initialization: the edge of chaos, stable residual networks, and what pruning does to both."""

import copy
import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from toys import finish, ready

from distprune.core import registry
from distprune.core.edits import structure
from distprune.core.edits.branches import Fold, ScaleBranches, branch_ends
from distprune.core.executor import Env, execute
from distprune.core.initialization import before_norms, sigma_w
from distprune.core.stages import Prune, SetWeights, Snapshot, Train
from distprune.core.state import State
from distprune.core.tasks.given import GivenBatches
from distprune.errors import UserError
from distprune.export.writing import export

# The edge of chaos.


@pytest.mark.parametrize(
    ("sigma_b", "due", "q_due"),
    [(0.0, 1.0, 0.0), (0.05, 1.1225, 0.154), (0.1, 1.1934, 0.273), (0.2, 1.3041, 0.512), (0.3, 1.3956, 0.764), (0.5, 1.5497, 1.318)],
)
def test_the_edge_of_tanh(sigma_b: float, due: float, q_due: float) -> None:
    sigma = sigma_w("tanh", sigma_b)
    assert sigma == pytest.approx(due, abs=1e-3)
    # The definition, by another quadrature and by iterating the variance: chi = 1 at its fixed point.
    nodes, weights = np.polynomial.hermite_e.hermegauss(100)
    q = 0.0 if sigma_b == 0 else 1.0  # without biases the variance falls as 1/depth, too slowly to iterate
    for _ in range(2000 if sigma_b else 0):
        q = sigma**2 * float(weights @ np.tanh(math.sqrt(q) * nodes) ** 2 / weights.sum()) + sigma_b**2
    chi = sigma**2 * float(weights @ (1 - np.tanh(math.sqrt(q) * nodes) ** 2) ** 2 / weights.sum())
    assert q == pytest.approx(q_due, abs=1e-3) and chi == pytest.approx(1, abs=1e-6)


def test_the_edge_of_relu_is_one_point() -> None:
    assert sigma_w("relu") == math.sqrt(2)
    with pytest.raises(UserError, match="sigma_b must be 0 for relu"):
        sigma_w("relu", 0.1)
    with pytest.raises(UserError, match=r"sigma_b must be in \[0, 2.0\], got 2.5"):
        sigma_w("tanh", 2.5)
    assert sigma_w("tanh", 2.0) == pytest.approx(2.3254, abs=1e-3)


def _ready(build: Callable[[], nn.Module], inputs: Tensor, labels: Tensor, seed: int = 0) -> tuple[State, Env]:
    device = torch.device("cpu")
    task = GivenBatches([(inputs, labels)], nn.functional.cross_entropy)
    env = Env(task=task, build=build, seed=seed, device=device, report_every=1)
    return State.new(build, seed=seed, device=device), env


def _do(state: State, env: Env, policy: str, **options: Any) -> None:
    list(SetWeights(policy=policy, **options).run(state, env))  # type: ignore[arg-type]


def test_draws_have_the_variance_of_their_fan_in() -> None:
    def build() -> nn.Module:
        tied = nn.Linear(40, 40)
        again = nn.Linear(40, 40)
        again.weight = tied.weight
        convs = [nn.Conv2d(8, 32, 3, groups=2), nn.ConvTranspose2d(32, 40, 3, groups=4), nn.BatchNorm2d(40)]
        return nn.Sequential(*convs, nn.AdaptiveAvgPool2d(1), nn.Flatten(), tied, again)

    state, env = _ready(build, torch.randn(4, 8, 6, 6), torch.zeros(4, dtype=torch.long))
    before = state.values()
    _do(state, env, "draw", sigma_w=1.5, sigma_b=0.5)
    first = state.values()
    for name, products in (("0", 4 * 9), ("1", 8 * 9), ("5", 40)):
        weight = first[f"{name}.weight"]
        assert float(weight.std()) == pytest.approx(1.5 / products**0.5, rel=5 / (2 * weight.numel()) ** 0.5)
    biases = torch.cat([first[f"{name}.bias"] for name in ("0", "1", "5", "6")])
    assert float(biases.std()) == pytest.approx(0.5, rel=0.25) and torch.equal(first["5.weight"], first["6.weight"])
    assert all(torch.equal(first[name], before[name]) for name in before if name.startswith("2."))
    _do(state, env, "draw", sigma_w=1.5, sigma_b=0.5)
    assert all(torch.equal(value, first[name]) for name, value in state.values().items()), "a stream of its own"


def test_what_is_not_trained_is_not_drawn() -> None:
    def build() -> nn.Module:
        network = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4), nn.Linear(4, 3))
        network[1].requires_grad_(False)
        network[2].bias.requires_grad_(False)
        return network

    state, env = _ready(build, torch.randn(4, 6), torch.zeros(4, dtype=torch.long))
    before = state.values()
    _do(state, env, "draw", sigma_w=1.5, sigma_b=0.5)
    stayed = {name for name, value in state.values().items() if torch.equal(value, before[name])}
    assert stayed == {"1.weight", "1.bias", "2.bias"}


# Pruning deep networks.


def _mlp(activation: str, layers: int, *, sigma: float, sigma_b: float = 0.0, seed: int = 0) -> tuple[State, Env]:
    """Width 100, drawn with sigma; 128 random inputs with random labels of 10 classes."""
    generator = torch.Generator().manual_seed(seed)
    inputs, labels = torch.randn(128, 1, 10, 10, generator=generator), torch.randint(10, (128,), generator=generator)
    model = registry.model.choose("mlp", hidden=(100,) * (layers - 1), activation=activation)
    state, env = _ready(functools.partial(model, (1, 10, 10), 10), inputs, labels, seed)
    _do(state, env, "draw", sigma_w=sigma, sigma_b=sigma_b)
    return state, env


def _prune(state: State, env: Env, criterion: str = "snip") -> list[float]:
    """Densities of the layers after pruning 90 % globally."""
    chosen, allocator = registry.criterion.choose(criterion), registry.allocator.choose("global")
    list(Prune(sparsity=0.9, criterion=chosen, allocator=allocator, batch_size=128).run(state, env))
    return [kept / mask.numel() for kept, mask in zip(state.masks.counts.values(), state.masks.values(), strict=True)]


# Without biases the product of signal and gradient is the same in every layer of a homogeneous network, on the edge or off it; with them
# signals stay and gradients fall off exponentially towards the input, or in the chaotic phase grow.
@pytest.mark.parametrize(
    ("activation", "edge", "ordered", "floor"), [("tanh", 0.05, (0.9, 0.05), 0.05), ("relu", 0.0, (1.0, 0.1), 0.1)], ids=["tanh", "relu"]
)
def test_a_hundred_layers_are_pruned_alike_on_the_edge_and_emptied_off_it(
    activation: Any, edge: float, ordered: tuple[float, float], floor: float
) -> None:
    for seed in (0, 1):
        flat = _prune(*_mlp(activation, 100, sigma=sigma_w(activation, edge), sigma_b=edge, seed=seed))
        assert min(flat) > floor * max(flat) and min(flat) > 0.01, (min(flat), max(flat))
        steep = _prune(*_mlp(activation, 100, sigma=ordered[0], sigma_b=ordered[1], seed=seed))
        assert min(steep) < 0.001 * max(steep)
        assert sum(density <= 1e-4 for density in steep) > 40, "layers that only the one weight is left of that every layer keeps"
        assert sum(steep[:40]) < 0.01 * sum(steep) and sum(steep[-30:]) > 0.7 * sum(steep), "it is the first layers that go"


def test_in_the_chaotic_phase_the_last_layers_go() -> None:
    densities = _prune(*_mlp("tanh", 100, sigma=2.2, sigma_b=0.3))
    assert sum(densities[-40:]) < 0.01 * sum(densities) and sum(densities[:30]) > 0.7 * sum(densities)


def _variance(state: State, seed: int) -> float:
    """Mean square of the outputs for inputs that nothing was chosen or measured on."""
    with torch.no_grad():
        inputs = torch.randn(200, 1, 10, 10, generator=torch.Generator().manual_seed(1000 + seed))
        return float(state.model(inputs).double().square().mean())


@pytest.mark.parametrize(("activation", "criterion"), [("relu", "random"), ("tanh", "random"), ("tanh", "snip")])
def test_the_papers_factors_bring_the_variance_of_thirty_layers_back(activation: Any, criterion: str) -> None:
    sigma = sigma_w(activation)
    for seed in (0, 1):
        state, env = _mlp(activation, 30, sigma=sigma, seed=seed)
        dense = _variance(state, seed)
        _prune(state, env, criterion)
        assert _variance(state, seed) < 1e-10 * dense
        masked = state.values()
        _do(state, env, "rescale", sigma_w=sigma)
        assert 0.05 < _variance(state, seed) / dense < 20
        for name, weight in state.weights.items():
            assert weight[0].numel() * float(weight.detach().double().square().mean()) == pytest.approx(sigma**2, rel=1e-5)
            kept = state.masks[name]
            factors = weight.detach()[kept] / masked[name][kept]
            assert float(factors.max() / factors.min()) == pytest.approx(1, abs=1e-5) and not weight.detach()[~kept].any()


def test_factors_of_signals_hold_where_those_of_weights_explode() -> None:
    # SNIP keeps what leads from active ReLUs to active ones: one quarter of a layer has all of its energy.
    for seed in (0, 1):
        state, env = _mlp("relu", 30, sigma=sigma_w("relu"), seed=seed)
        dense = _variance(state, seed)
        list(Snapshot(tag="unpruned").run(state, env))
        _prune(state, env)
        pruned, masked = _variance(state, seed), state.values()
        assert pruned < 0.02 * dense
        _do(state, env, "rescale", sigma_w=sigma_w("relu"))
        exponent = math.log(_variance(state, seed) / dense) / math.log(4) / 30
        assert 0.8 < exponent < 1.2, "a factor of 4 in each of 30 layers"
        state.model.load_state_dict(masked)
        _do(state, env, "rescale", tag="unpruned", batches=1, batch_size=128)
        assert 0.5 < _variance(state, seed) / dense < 2
        assert all(not weight.detach()[~state.masks[name]].any() for name, weight in state.weights.items())


def test_factors_of_signals_match_every_layer_on_the_batch_that_they_are_measured_on() -> None:
    state, env = _mlp("relu", 6, sigma=1.0, sigma_b=0.7)
    inputs = env.task.batch(0, 0, 0, 128)[0]

    def products() -> list[float]:
        found: list[float] = []

        def note(layer: nn.Linear, args: tuple[Tensor], output: Tensor) -> None:
            found.append(float((output - layer.bias).double().square().mean()))

        handles = [layer.register_forward_hook(note) for layer in state.model if isinstance(layer, nn.Linear)]  # type: ignore[attr-defined,arg-type]
        with torch.no_grad():
            state.model(inputs)
        for handle in handles:
            handle.remove()
        return found

    due = products()
    list(Snapshot(tag="unpruned").run(state, env))
    _prune(state, env)
    _do(state, env, "rescale", tag="unpruned", batches=1, batch_size=128)
    assert products() == pytest.approx(due, rel=1e-4)


def test_layers_before_a_normalization_are_not_rescaled() -> None:
    def named(name: str, shape: tuple[int, int, int], **options: Any) -> set[str]:
        model = registry.model.choose(name, **options)(shape, 10)
        every = {path for path, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)}
        return every - before_norms(model, torch.randn(1, *shape))

    assert named("lenet5", (1, 28, 28), batch_norm=True, width=0.2) == {"fc2"}
    assert named("resnet_cifar", (3, 16, 16), depth=8) == {"fc"}
    assert named("mlp", (1, 4, 4), hidden=[5]) == {"fc1", "fc2"}
    run = ready({"name": "sbp_sr", "rescale": "weights"}, model={"name": "resnet_cifar", "depth": 8, "width": 4})
    state = run.state
    for stage in run.plan.stages[:3]:
        list(stage.run(state, run.env))
    before = state.values()
    list(run.plan.stages[3].run(state, run.env))
    assert {name for name, value in state.values().items() if not torch.equal(value, before[name])} == {"fc.weight"}


def test_a_layer_without_a_signal_cannot_be_rescaled() -> None:
    state, env = _mlp("tanh", 3, sigma=1.0)
    nn.init.zeros_(state.weights["fc2.weight"])
    with pytest.raises(UserError, match="rescaling needs a signal in every layer, 'fc2' passes none on"):
        _do(state, env, "rescale", sigma_w=1.0)


# Stable residual networks.


@pytest.mark.parametrize(
    ("name", "options", "ends"),
    [
        ("resnet_cifar", {"depth": 20}, [f"stage{stage}.{block}.bn2" for stage in (1, 2, 3) for block in range(3)]),
        ("torchvision", {"arch": "resnet18"}, [f"layer{layer}.{block}.bn2" for layer in (1, 2, 3, 4) for block in range(2)]),
        ("torchvision", {"arch": "resnet50"}, [f"layer{i}.{j}.bn3" for i, n in ((1, 3), (2, 4), (3, 6), (4, 3)) for j in range(n)]),
        ("torchvision", {"arch": "mobilenet_v2"}, [f"features.{i}.conv.3" for i in (3, 5, 6, 8, 9, 10, 12, 13, 15, 16)]),
        ("mlp", {}, []),
        ("lenet5", {"batch_norm": True}, []),
        ("vgg_cifar", {"width": 0.1}, []),
    ],
)
def test_branches_are_found(name: str, options: dict[str, Any], ends: list[str]) -> None:
    assert branch_ends(registry.model.choose(name, **options)((3, 32, 32), 10)) == ends


class _Residual(nn.Module):
    """Residual blocks of two linear layers, with dropout at the end of a branch; `named` is what they add with."""

    def __init__(self, blocks: int = 3, width: int = 8, end: nn.Module | None = None) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width), end or nn.Dropout(0.0)) for _ in range(blocks)
        )
        self.position = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1) + self.position  # adds two values, but joins no branch
        for branch in self.branches:
            x = x + branch(x)
        return x


def test_the_scale_is_one_over_the_root_of_the_number_of_branches() -> None:
    torch.manual_seed(0)
    model = _Residual()
    state, env = _ready(lambda: model, torch.randn(4, 8), torch.zeros(4, dtype=torch.long))
    x = torch.randn(5, 8)
    due = x.clone()
    for branch in model.branches:
        due = due + branch(due) / math.sqrt(3)
    plain = model(x)
    list(ScaleBranches().run(state, env))
    assert state.edits == [{"kind": "scale", "modules": [f"branches.{i}.2" for i in range(3)], "factor": 3**-0.5}]
    torch.testing.assert_close(model(x), due)
    assert not torch.allclose(due, plain, atol=1e-2)
    list(Fold().run(state, env))
    torch.testing.assert_close(model(x), due, rtol=1e-5, atol=1e-5)
    assert not state.edits and not any(module._forward_hooks for module in model.modules())


def test_with_it_signals_and_gradients_stay_bounded_at_any_depth() -> None:
    def sizes(stages: list[Any]) -> list[float]:
        """How much larger the outputs are than the inputs, in mean square; and the gradients at the inputs than those at the outputs."""
        x = torch.randn(50, 40, generator=torch.Generator().manual_seed(0))
        state, env = _ready(lambda: _Residual(60, 40), x, torch.zeros(50, dtype=torch.long))
        for stage in stages:
            list(stage.run(state, env))
        y, back = torch.func.vjp(state.model, x)
        direction = torch.randn(50, 40, generator=torch.Generator().manual_seed(1))
        gradient = back(direction)[0]
        return [float(a.detach().square().mean() / b.square().mean()) for a, b in ((y, x), (gradient, direction))]

    drawn = SetWeights(policy="draw", sigma_w=math.sqrt(2))
    plain, stable = sizes([drawn]), sizes([ScaleBranches(), drawn])
    # A branch on the edge doubles the mean square, 2^60 or 1e18 in all; scaled it multiplies it by 1 + 1/60, e in all, at infinite width.
    assert plain[0] > 1e12 and plain[1] > 1e12
    assert stable[0] < 20 and stable[1] < 20


def test_branches_by_name_and_none() -> None:
    model = registry.model.choose("resnet_cifar", depth=8)((1, 8, 8), 10)
    assert branch_ends(model, ("stage[12].*.bn2",)) == ["stage1.0.bn2", "stage2.0.bn2"]
    assert branch_ends(model, "none") == []
    with pytest.raises(UserError, match=r"'\*.bn9' fits none"):
        branch_ends(model, ("*.bn9",))
    plan = ready({"name": "sbp_sr", "branches": "none"}).plan
    assert not any(isinstance(stage, ScaleBranches | Fold) for stage in plan.stages)


class _Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc(x) if x.sum() > 0 else x


class _Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.fc(x)
        return x + self.fc(x)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (_Branching(), "torch.fx cannot trace _Branching"),
        (_Shared(), "module 'fc' is called more than once"),
        (_Residual(end=nn.Sigmoid()), "ends in 'branches_0_3', which has no weights that a scale can be folded into"),
        (_Residual(end=nn.BatchNorm1d(8, affine=False)), "which has no weights"),
        (nn.TransformerEncoderLayer(8, 2, batch_first=True), "inside torch's transformer layers cannot be scaled"),
    ],
    ids=["control flow", "shared", "no weights", "not affine", "transformer"],
)
def test_what_cannot_be_scaled_says_how(model: nn.Module, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        branch_ends(model)
    assert "\n" not in str(caught.value) and "branches: none" in str(caught.value)


def test_a_scale_that_could_not_be_folded_is_refused_before_it_is_made() -> None:
    model = _Residual()
    with pytest.raises(UserError, match=r"'branches.0.3' must have weights that a scale can be folded into, Dropout has none"):
        structure.apply(model, {"kind": "scale", "modules": ["branches.0.3"], "factor": 0.5})


@pytest.mark.parametrize(
    "end", [nn.LayerNorm(8), nn.GroupNorm(2, 8), nn.RMSNorm(8), nn.Linear(8, 8, bias=False)], ids=lambda m: type(m).__name__
)
def test_folding_keeps_the_function(end: nn.Module) -> None:
    torch.manual_seed(0)
    model, x = _Residual(1, end=end), torch.randn(5, 8)
    for parameter in end.parameters():
        nn.init.normal_(parameter)
    edit = {"kind": "scale", "modules": branch_ends(model), "factor": 0.3}
    assert edit["modules"] == ["branches.0.3"]
    structure.apply(model, edit)
    before = model(x)
    structure.fold(model, edit)
    torch.testing.assert_close(model(x), before, rtol=1e-5, atol=1e-5)
    assert not any(module._forward_hooks for module in model.modules())


def test_training_keeps_the_scale_and_the_result_is_a_plain_network(tmp_path: Path) -> None:
    run = ready("sbp_sr", 0.8)
    state, seen = run.state, []
    inputs = run.env.task.batch(0, 0, 0, 32)[0]
    logits: list[Tensor] = []
    for report in execute(run.plan, state, run.env):
        with torch.no_grad():
            logits.append(copy.deepcopy(state.model).eval()(inputs))
        seen.append((report.final, len(state.edits), sum(bool(module._forward_hooks) for module in state.model.modules())))
    assert seen[-1] == (True, 0, 0) and set(seen[:-1]) == {(False, 1, 3)}
    torch.testing.assert_close(logits[-1], logits[-2], rtol=1e-5, atol=1e-5)  # trained, and trained and folded
    plain = run.env.build()
    plain.load_state_dict(state.values())
    torch.testing.assert_close(plain.eval()(inputs), logits[-1])
    assert (export(run, tmp_path / "out", {}) / "check.py").exists(), "the export predicts as the run does"


def test_a_run_goes_on_across_scale_and_fold(tmp_path: Path) -> None:
    whole = ready("sbp_sr")
    for report in execute(whole.plan, whole.state, whole.env):
        whole.state.save(tmp_path / f"{report.index}.safetensors")
    for index in range(report.index + 1):
        again = ready("sbp_sr")
        again.state.load(tmp_path / f"{index}.safetensors")
        finish(again)
        assert all(torch.equal(value, whole.state.values()[name]) for name, value in again.state.values().items()) and not again.state.edits


def test_the_plan() -> None:
    plan = ready({"name": "sbp_sr", "scores": "grasp", "batches": 2, "rescale": "signals"}).plan
    kinds = [type(stage) for stage in plan.stages]
    assert kinds == [ScaleBranches, SetWeights, Snapshot, Prune, SetWeights, Train, Fold]
    prune = plan.stages[3]
    assert isinstance(prune, Prune) and prune.criterion.plain() == {"name": "grasp", "batches": 2} and prune.steps == 1
    with pytest.raises(UserError, match="paradigm.batches must be at least 1, got 0"):
        ready({"name": "sbp_sr", "batches": 0})


def test_without_its_parts_it_is_snip() -> None:
    with_branches: dict[str, Any] = {"allocator": "global", "model": {"name": "resnet_cifar", "depth": 8, "width": 4}}
    bare = ready({"name": "sbp_sr", "branches": "none", "init": "model"}, **with_branches)
    snip = ready("at_init", criterion="snip", **with_branches)
    scaled = ready({"name": "sbp_sr", "init": "model"}, **with_branches)
    for run in (bare, snip, scaled):
        finish(run)
    assert bare.state.masks.equal(snip.state.masks) and not scaled.state.masks.equal(snip.state.masks)
