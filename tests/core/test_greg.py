"""Growing regularization: the penalty and the state machine by hand, and what is left to remove when it has grown."""

import copy
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from toys import finish, ready, recipe, same, tensors

from distprune.core import registry
from distprune.core.budgets import allocate, layers_of
from distprune.core.edits.shrink import shrink
from distprune.core.executor import Env, execute
from distprune.core.hooks.greg import Greg
from distprune.core.masks import prunable
from distprune.core.metrics import layer_flops
from distprune.core.models.resnet_cifar import resnet_cifar
from distprune.core.plan import Plan
from distprune.core.recipe import TrainConfig
from distprune.core.stages import Train
from distprune.core.state import State
from distprune.core.tasks.given import GivenBatches
from distprune.core.units import Network
from distprune.errors import UserError

UNIFORM = registry.allocator.choose("uniform")
WEIGHT, KERNEL, FILTER = (registry.granularity.choose(name) for name in ("weight", "kernel", "filter"))
ENV: Any = SimpleNamespace(seed=0, task=SimpleNamespace(example=lambda: torch.ones(1, 1, 8, 8)))


class Free(nn.Module):
    """A network that computes its own weights."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return torch.cat([layer.weight.flatten() for layer in self.layers])  # type: ignore[arg-type]


def steady(shape: tuple[int, int, int], classes: int) -> nn.Module:
    """A ResNet-8 whose batch normalisation adds 1 to variances.

    Below the root of what it adds, a filter's size is no longer normalised away. With the usual 1e-5 a filter that small is amplified 300
    times, gradients too, and hundreds of steps do for it what the paper takes tens of thousands for.
    """
    network = resnet_cifar(shape, classes, depth=8, width=4)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 1.0
    return network


def linear(*values: float) -> nn.Linear:
    layer = nn.Linear(len(values), 1, bias=False)
    layer.weight.data = torch.tensor([values])
    return layer


def kernels(*values: float) -> nn.Conv2d:
    """One 2x2 kernel a value, all of its weights the same."""
    layer = nn.Conv2d(1, len(values), 2, bias=False)
    layer.weight.data = torch.tensor(values).view(-1, 1, 1, 1).expand(-1, 1, 2, 2).clone()
    return layer


def state_of(*layers: nn.Module) -> State:
    return State.new(lambda: Free(*layers), seed=0, device=torch.device("cpu"))


def hook(**changes: Any) -> Greg:
    fields: dict[str, Any] = {"variant": "greg1", "delta": 0.1, "every": 2, "ceiling": 0.25, "pick": 0.03, "recover": -1e-4}
    fields |= {"ratio": 1000.0, "stabilise": 4, "sparsity": 0.5, "allocator": UNIFORM, "granularity": WEIGHT}
    return Greg(**{**fields, **changes})


def coefficients(greg: Greg, memory: dict[str, Any], state: State) -> list[float]:
    """One step's coefficient of each weight, read off the gradient that the hook adds to one of zero."""
    for weight in state.weights.values():
        weight.grad = torch.zeros_like(weight)
    greg.grad(memory, state, ENV)
    return [float(c) for weight in state.weights.values() for c in (weight.grad / weight).detach().flatten()]  # type: ignore[operator]


# The penalty


def test_the_penalty_is_lambda_w_once_besides_the_optimizers_decay() -> None:
    """Gradient descent on |w - target|^2 / 2 against the same by hand; the two smallest of four weights are pushed."""
    start, target, lr, decay = [1.0, -0.2, 0.4, -2.0], [1.5, -0.5, 0.3, -1.0], 0.1, 0.05
    optimizer = registry.optimizer.choose("sgd", lr=lr, momentum=0.0, weight_decay=decay)
    config = TrainConfig(length=11, batch_size=1, optimizer=optimizer, decay=registry.decay.choose("constant"))
    goal = torch.tensor(target)
    task = GivenBatches([(goal, goal)], lambda outputs, targets: 0.5 * (outputs - targets).square().sum())
    state = state_of(linear(*start))
    env = Env(task=task, build=lambda: Free(linear(*start)), seed=0, device=torch.device("cpu"), report_every=10**9)
    greg = hook(delta=0.5, every=3, ceiling=9.0)
    ends: list[list[float]] = []
    watched = Plan([Train(config=config, until=11, hooks=(greg, Watch(seen=ends)))])
    list(execute(watched, state, env))
    expected = list(start)
    for step in range(11):
        growing = 0.5 * (step // 3 + 1)
        expected = [
            w - lr * (w - a + decay * w + growing * w * (i in (1, 2))) for i, (w, a) in enumerate(zip(expected, target, strict=True))
        ]
    assert ends[-1] == pytest.approx(expected, rel=1e-5)
    assert state.weights["layers.0.weight"].tolist() == [[pytest.approx(expected[0]), 0.0, 0.0, pytest.approx(expected[3])]], "then removed"


class Watch:
    """Not a hook of ours: writes down the weights after every step."""

    may_end, regrows = False, False

    def __init__(self, seen: list[list[float]]) -> None:
        self.seen = seen

    def start(self, *_: Any) -> None: ...

    def view(self, *_: Any) -> dict[str, torch.Tensor]:
        return {}

    def grad(self, *_: Any) -> None: ...

    def step(self, memory: Any, state: State, env: Any) -> bool:
        self.seen.append([float(w) for weight in state.weights.values() for w in weight.detach().flatten()])
        return False

    def end(self, *_: Any) -> None: ...


def test_only_what_makes_a_removed_filter_is_pushed() -> None:
    """Not the layers that read it, whose mean size does not say how large it is; not the stem and the head, which are in no unit."""
    state = State.new(lambda: resnet_cifar((1, 8, 8), 10, depth=8, width=4), seed=0, device=torch.device("cpu"))
    greg = hook(granularity=FILTER, sparsity=0.4)
    greg.start(memory := {}, state, ENV)
    coefficients(greg, memory, state)
    for name, weight in state.weights.items():
        grad = weight.grad
        assert grad is not None
        if not name.endswith("conv1.weight"):
            assert not grad.any()
            continue
        sizes = weight.detach().abs().mean((1, 2, 3))
        pushed = grad.flatten(1).any(1)
        assert 0 < int(pushed.sum()) < len(pushed) and sizes[pushed].max() < sizes[~pushed].min()
        torch.testing.assert_close(grad[pushed], 0.1 * weight.detach()[pushed])


# The state machine


def test_greg1_by_hand() -> None:
    state, greg = state_of(linear(1.0, 0.1, 0.2, 2.0)), hook()
    greg.start(memory := {}, state, ENV)
    found, ended = [], []
    for _ in range(9):
        found.append([round(c, 6) for c in coefficients(greg, memory, state)])
        ended.append(greg.step(memory, state, ENV))
    pushed = [0.1, 0.1, 0.2, 0.2, 0.3, 0.3, 0.3, 0.3, 0.3]  # above the ceiling at step 4, and four steps as it is
    assert found == [[0.0, c, c, 0.0] for c in pushed]
    assert ended == [False] * 7 + [True] * 2 and greg.most == 4


def test_greg2_by_hand() -> None:
    state, greg = state_of(linear(1.0, 0.1, 0.2, 2.0)), hook(variant="greg2")
    greg.start(memory := {}, state, ENV)
    found, ended = [], []
    for _ in range(14):
        found.append([round(c, 6) for c in coefficients(greg, memory, state)])
        ended.append(greg.step(memory, state, ENV))
    together = [[c] * 4 for c in (0.01, 0.01, 0.02, 0.02, 0.03, 0.03)]  # a tenth of delta, until lambda is at 0.03
    apart = [[-1e-4, c, c, -1e-4] for c in (0.13, 0.13, 0.23, 0.23, 0.33, 0.33, 0.33, 0.33)]  # goes on from there
    assert found == together + apart
    assert ended == [False] * 13 + [True] and greg.most == 10


def test_greg2_picks_by_what_growing_tells_and_greg1_by_size() -> None:
    """On h (w - a)^2 / 2 a penalty moves w to a h / (h + lambda): the larger weight lies in the flatter direction, and goes."""
    curvature, goal = torch.tensor([10.0, 0.1]), torch.tensor([1.0, 1.1])
    task = GivenBatches([(goal, goal)], lambda outputs, targets: 0.5 * (curvature * (outputs - targets).square()).sum())
    optimizer = registry.optimizer.choose("sgd", lr=0.05, momentum=0.0, weight_decay=0.0)
    config = TrainConfig(length=200, batch_size=1, optimizer=optimizer, decay=registry.decay.choose("constant"))
    kept = {}
    for variant in ("greg1", "greg2"):
        state = state_of(linear(1.0, 1.1))
        env = Env(task=task, build=lambda: Free(linear(1.0, 1.1)), seed=0, device=torch.device("cpu"), report_every=10**9)
        greg = hook(variant=variant, delta=0.01, every=1, ceiling=1.0, pick=0.1, stabilise=0)
        list(execute(Plan([Train(config=config, until=greg.most, hooks=(greg,))]), state, env))
        kept[variant] = state.masks["layers.0.weight"].tolist()
    assert kept == {"greg1": [[False, True]], "greg2": [[True, False]]}


def _update(greg: Greg, memory: dict[str, Any], state: State, *ratios: float) -> None:
    """One update after the layers were given kernels of these ratios."""
    for weight, ratio in zip(state.weights.values(), ratios, strict=True):
        weight.data = kernels(ratio, 1.0).weight.data
    coefficients(greg, memory, state)


@pytest.mark.parametrize("variant", ["greg1", "greg2"])
def test_the_ratio_ends_growth_in_all_layers_or_in_each(variant: str) -> None:
    state = state_of(kernels(2.0, 1.0), kernels(2.0, 1.0))
    greg = hook(variant=variant, granularity=KERNEL, every=1, ceiling=99.0, pick=0.01)
    greg.start(memory := {}, state, ENV)
    if variant == "greg2":
        _update(greg, memory, state, 2.0, 2.0)  # picks
    _update(greg, memory, state, 2000.0, 10.0)  # the first value is the average
    after = len(memory["open"])
    assert memory["ratio"] == pytest.approx({"layers.0.weight": 2000.0, "layers.1.weight": 10.0}) and memory["finished"] < 0
    _update(greg, memory, state, 2000.0, 9000.0)  # 0.9 * 10 + 0.1 * 9000 = 909
    assert memory["ratio"]["layers.1.weight"] == pytest.approx(909.0) and memory["finished"] < 0
    first, second = memory["lambda"].values()
    _update(greg, memory, state, 2000.0, 9000.0)
    assert memory["finished"] == memory["steps"] - 1
    if variant == "greg1":
        assert after == 2 and first == second, "none before all"
    else:
        assert after == 1 and second == pytest.approx(first + 0.1), "the finished layer stays where it is"


def test_weights_know_no_ratio_and_a_ratio_over_zero_is_a_number() -> None:
    state = state_of(kernels(1e6, 1.0))
    for granularity, finished in ((WEIGHT, -1), (KERNEL, 0)):
        greg = hook(granularity=granularity, ceiling=99.0)
        greg.start(memory := {}, state, ENV)
        coefficients(greg, memory, state)
        assert memory["finished"] == finished
    greg.start(memory := {}, state, ENV)
    state.weights["layers.0.weight"].data[1] = 0.0
    greg.grad(memory, state, ENV)
    assert math.isfinite(memory["ratio"]["layers.0.weight"])


def test_what_is_picked_is_what_goes() -> None:
    state, greg = state_of(linear(1.0, 0.1, 0.2, 2.0)), hook()
    greg.start(memory := {}, state, ENV)
    state.weights["layers.0.weight"].data = torch.tensor([[0.1, 5.0, 5.0, 0.1]])
    greg.end(memory, state, ENV)
    assert state.masks["layers.0.weight"].tolist() == [[True, False, False, True]]


def test_the_papers_numbers() -> None:
    """100,000 steps in equal parts every 10 to a ceiling of 1 are 1e-4 each; GReg-2 takes 10,000 more to pick and saves 1,000."""
    changes: dict[str, Any] = {"granularity": "filter", "train": {"length": "200ep", "batch_size": 128}}
    for variant, steps in (("greg1", 110_000), ("greg2", 119_000)):
        options = {"name": "greg", "variant": variant, "grow": "100000it", "stabilise": "10000it"}
        options |= {"ceiling": 1.0, "lr": 1e-3, "tune": "100ep"}
        base, growth, tune = recipe(options, 0.5, **changes).plan(351).stages
        assert isinstance(base, Train) and isinstance(growth, Train) and isinstance(tune, Train)
        (greg,) = growth.hooks
        assert isinstance(greg, Greg) and greg.delta == pytest.approx(1e-4) and greg.pick == pytest.approx(1e-2) and greg.recover == -1e-4
        assert growth.until - growth.since == steps and growth.may_end_early  # type: ignore[operator]
        assert growth.config.optimizer.option("lr") == 1e-3 and [growth.config.decay(at) for at in (0.0, 0.5, 1.0)] == [1.0] * 3
        assert tune.config == base.config and (tune.since, tune.until) == (100 * 351, 200 * 351)


# What growth leaves to remove


def test_after_growth_removal_takes_nothing_but_the_shifts_of_batch_normalisation(monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"name": "greg", "grow": "150%", "stabilise": "450%", "lr": 1e-2, "ceiling": 90.0}
    train = {"batch_size": 64, "length": "100ep", "optimizer": {"name": "sgd", "lr": 0.05, "weight_decay": 0.0}}
    model, data = {"import": "test_greg:steady"}, {"import": "toys:blobs", "train": 64}
    changes: dict[str, Any] = {"model": model, "data": data, "granularity": "filter", "allocator": "uniform", "train": train}
    run = ready(options, 0.5, report_every="1000ep", **changes)
    grown: dict[str, Any] = {}
    original = Greg.end

    def watched(self: Greg, memory: Any, state: State, env: Any) -> None:
        grown["memory"], grown["model"] = copy.deepcopy(memory), copy.deepcopy(state.model).eval()
        original(self, memory, state, env)
        grown["removed"] = copy.deepcopy(state.model).eval()

    monkeypatch.setattr(Greg, "end", watched)
    finish(run)
    memory, model, removed = grown["memory"], grown["model"], grown["removed"]
    units = run.state.units(FILTER, run.env.task.example)
    for name in (group.name for group in units.channels):
        kept, sizes = memory[f"kept:{name}"], model.get_parameter(name).detach().abs().mean((1, 2, 3))
        assert sizes[kept].mean() / sizes[~kept].mean() > 1000
    inputs = torch.randn(50, *run.env.task.shape)
    maps: list[torch.Tensor] = []
    with torch.no_grad():
        for network in (model, removed):
            network.stage1[0].conv2.register_forward_hook(lambda module, args, output: maps.append(output))
        missing = (model(inputs) - removed(inputs)).abs().max()
        lost = (maps[0] - maps[1])[0]
        assert missing > 0.01, "a removed channel has sent its shift"
        inside = lost[:, 1:-1, 1:-1]
        uneven = (inside - inside.mean((1, 2), keepdim=True)).abs().max()
        assert (lost[:, 0, 0] - inside[:, 2, 2]).abs().max() > 20 * uneven, "a constant inside, another at the border: no bias is both"
        for group in units.channels:
            for part in group.parts:
                if part.role == "carries" and part.name.endswith("bias"):
                    model.get_parameter(part.name)[part.index[~memory[f"kept:{group.name}"]].flatten()] = 0
        assert (model(inputs) - removed(inputs)).abs().max() < 1e-3


def test_greg1_removes_the_filters_of_one_shot() -> None:
    changes: dict[str, Any] = {"granularity": "filter", "allocator": "uniform", "train": {"length": "1ep"}}
    changes["model"] = {"name": "resnet_cifar", "depth": 8, "width": 4}
    runs = [ready(name, 0.5, **changes) for name in ("finetune", "greg")]
    for run in runs:
        finish(run)
    assert runs[0].state.masks.equal(runs[1].state.masks) and not same(tensors(runs[0]), tensors(runs[1]))


# Plans by stage


def test_the_plan_of_resnet56() -> None:
    """[0, .75, .75, .32, 0]: 42.85 % of the weights and 2.55 times fewer multiplications, as in the paper's table 2."""
    model, x = resnet_cifar((3, 32, 32), 10, depth=56), torch.zeros(1, 3, 32, 32)
    units: Any = FILTER(Network(model, prunable(model), lambda: x))
    plan = registry.allocator.choose("per_layer", shares={"stage[12].*": 0.25, "stage3.*": 0.68})
    scores = {layer.name: torch.rand(layer.units) for layer in units.layers()}
    masks = units.choose(scores, 0.4284, plan, None)
    kept = units.alive(masks)
    left = {int(value.sum()) for value in kept.values()}
    assert left == {4, 8, 43}, "ceil(.75 * 16), ceil(.75 * 32) and ceil(.32 * 64) fewer"
    assert 100 * masks.sparsity == pytest.approx(42.85, abs=0.006)
    small = shrink(model, units.channels, kept)
    before, after = (sum(layer_flops(net, x, prunable(net)).values()) for net in (model, small))
    assert before / after == pytest.approx(2.55, abs=0.006)


def test_a_layer_takes_its_own_share_or_that_of_the_longest_pattern() -> None:
    rows = layers_of({name: (100,) for name in ("a.0.w", "a.1.w", "a.2.w", "b.w")})
    shares = {"*": 0.4, "a.*": 0.2, "a.0.w": 0.1, "a.[2-9].w": 0.3}
    wanted = {"a.0.w": 10, "a.1.w": 20, "a.2.w": 30, "b.w": 40}
    for order in (shares, dict(reversed(shares.items()))):
        assert allocate(registry.allocator.choose("per_layer", shares=order), rows, 100) == wanted, "whatever the order, as keys are"
    with pytest.raises(UserError, match=r"Unknown layer in allocator.shares: 'aa.\*'. Did you mean 'a.\*'\? Known: a.\*, b.\*"):
        allocate(registry.allocator.choose("per_layer", shares={"aa.*": 0.1}), rows, 100)


# As a choice


@pytest.mark.parametrize(("variant", "granularity"), [("greg2", "filter"), ("greg2", "weight"), ("greg1", "kernel")])
def test_budget_and_resume(variant: str, granularity: str, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"granularity": granularity, "allocator": "global", "train": {"length": "2ep"}, "report_every": "3it"}
    options = {"name": "greg", "variant": variant, "grow": "100%", "every": 2, "pick": 0.05}
    run = ready(options, 0.3, **changes)
    reports = []
    for report in execute(run.plan, run.state, run.env):
        reports.append(report)
        run.state.save(tmp_path / f"{report.index}.safetensors")
    assert reports[-1].sparsity >= 0.3 and reports[-1].cost <= run.plan.cost
    for index in range(5, len(reports), 2):
        again = ready(options, 0.3, **changes)
        again.state.load(tmp_path / f"{index}.safetensors")
        assert finish(again) == reports[index + 1 :]
        assert same(tensors(again), tensors(run)) and again.state.ledger == run.state.ledger


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"grow": "0it"}, "paradigm.grow must be at least one step, got 0"),
        ({"every": 0}, "paradigm.every must be at least 1, got 0"),
        ({"ceiling": 0.0}, "paradigm.ceiling must be above 0, got 0.0"),
        ({"lr": 0.1, "ceiling": 30.0}, "a step would go beyond zero"),
        ({"pick": 1.0}, r"paradigm.pick must be in \(0, 1\), got 1.0"),
        ({"ratio": 1.0}, "paradigm.ratio must be above 1, got 1.0"),
    ],
    ids=str,
)
def test_options_that_make_no_sense_say_why(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        recipe({"name": "greg", **options}, 0.3, granularity="filter").plan(10)
