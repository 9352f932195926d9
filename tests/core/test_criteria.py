"""The contract of every criterion, and its formula by hand."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from toys import ready

from distprune.core import registry
from distprune.core.masks import Masks, prunable
from distprune.core.metrics import collapsed
from distprune.core.prune import prune
from distprune.core.registry import Choice
from distprune.core.run import Run
from distprune.core.scoring import Probe, choose_masks, scoring_samples, unit_scores
from distprune.core.streams import global_stream
from distprune.core.tasks.given import GivenBatches
from distprune.core.units import Network, Units
from distprune.errors import UserError

CRITERIA = [registry.criterion.choose(name) for name in registry.criterion.names()]
each = pytest.mark.parametrize("criterion", CRITERIA, ids=lambda choice: choice.name)
ERK = registry.allocator.choose("erk")
Batch = tuple[Tensor, Tensor]


def _run(criterion: Choice) -> Run:
    """A network that the criterion can score: every removable channel of the residual one has a batch norm."""
    return ready(model={"name": "resnet_cifar", "depth": 8, "width": 4}) if criterion.entry.facts["of_units"] else ready()


def _units(run: Run, criterion: Choice) -> Units:
    name = "filter" if criterion.entry.facts["of_units"] else "weight"
    return run.state.units(registry.granularity.choose(name), run.env.task.example)


def _masks(criterion: Choice, *, sparsity: float = 0.8, start: Masks | None = None) -> Masks:
    run = _run(criterion)
    return choose_masks(
        run.state.model,
        run.env.task,
        start or run.state.masks,
        sparsity=sparsity,
        criterion=criterion,
        allocator=ERK,
        units=_units(run, criterion),
        steps=criterion.entry.facts["steps"],
    )


def _scores(run: Run, criterion: Choice, seed: int = 0) -> dict[str, Tensor]:
    units = _units(run, criterion)
    probe = Probe(run.state.model, run.env.task, run.state.masks, seed=seed, draw=(), batch_size=32, units=units)
    with global_stream(seed, "scoring"):  # dropout
        return unit_scores(probe, criterion)


@each
def test_scoring_changes_nothing(criterion: Choice) -> None:
    run = _run(criterion)
    model = run.state.model
    model.train()
    first = next(model.children())
    first.eval()  # a network may be in both modes at once
    next(model.parameters()).grad = torch.ones_like(next(model.parameters()))
    frozen = [parameter for parameter in model.parameters() if parameter.dim() == 1]
    for parameter in frozen:
        parameter.requires_grad_(False)
    before, grads = copy.deepcopy(model.state_dict()), [p.grad if p.grad is None else p.grad.clone() for p in model.parameters()]
    generator = torch.get_rng_state()
    units = _units(run, criterion)
    choose_masks(model, run.env.task, run.state.masks, sparsity=0.8, criterion=criterion, allocator=ERK, units=units, batch_size=32)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(
        (p.grad is None) == (g is None) and (g is None or torch.equal(p.grad, g)) for p, g in zip(model.parameters(), grads, strict=True)
    )
    assert torch.equal(torch.get_rng_state(), generator), "dropout in the scratch copy drew from the global generator"
    assert all(module.training == (module is not first) for module in model.modules())
    assert not any(parameter.requires_grad for parameter in frozen)


@each
def test_one_finite_score_a_unit_and_the_same_for_the_same_seed(criterion: Choice) -> None:
    run = _run(criterion)
    scores = _scores(run, criterion)
    due = [(layer.name, layer.units) for layer in _units(run, criterion).layers()]
    assert [(name, score.numel()) for name, score in scores.items()] == due
    assert all(bool(score.isfinite().all()) and not score.requires_grad for score in scores.values())
    assert any(bool(score.any()) for score in scores.values())
    again = _scores(run, criterion)
    assert all(torch.equal(score, again[name]) for name, score in scores.items())
    other = _scores(run, criterion, seed=1)
    draws = criterion.entry.facts["passes"] or criterion.name == "random"
    assert all(torch.equal(score, other[name]) for name, score in scores.items()) != bool(draws), "a seed matters where something is drawn"


@each
def test_same_seed_same_masks_exact_count_and_nested(criterion: Choice) -> None:
    first, again = _masks(criterion), _masks(criterion)
    due = round(0.2 * first.total)
    assert first.equal(again) and (first.kept <= due if criterion.entry.facts["of_units"] else first.kept == due)
    deeper = _masks(criterion, sparsity=0.85, start=first)
    assert deeper.nested_in(first)


@each
def test_bill_is_what_is_drawn(criterion: Choice) -> None:
    run = _run(criterion)
    drawn = []
    task = run.env.task
    original = task.draw
    task.draw = lambda generator, size: drawn.append(size) or original(generator, size)  # type: ignore[method-assign,func-returns-value]
    units = _units(run, criterion)
    choose_masks(run.state.model, task, run.state.masks, sparsity=0.5, criterion=criterion, allocator=ERK, units=units, batch_size=32)
    passes = criterion.entry.facts["passes"]
    assert scoring_samples(criterion, 1, 32) == (passes(criterion) if callable(passes) else passes) * sum(drawn)


def test_hutchinson_bills_its_probes() -> None:
    choice = registry.criterion.choose("obd_hutchinson", probes=7, batches=2)
    assert scoring_samples(choice, 3, 32) == 3 * 2 * 32 * (1 + 7)
    with pytest.raises(UserError, match="criterion.probes must be at least 1, got 0. Write 4."):
        registry.criterion.choose("obd_hutchinson", probes=0)(_probe(*_linear()))


def _linear() -> tuple[nn.Module, list[Batch]]:
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 1, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, 2.0], [3.0, -4.0]]))
        model[1].weight.copy_(torch.tensor([[1.0, 2.0]]))
    return model, [(torch.tensor([[1.0, 1.0]]), torch.tensor([[0.0]]))]


def _sum(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs - targets).sum()


def _probe(
    model: nn.Module,
    batches: list[Batch],
    loss: Callable[[Tensor, Tensor], Tensor] = _sum,
    *,
    granularity: str = "weight",
    masks: bool = False,
) -> Probe:
    """A probe of all weights, or with `masks` of a random half of them."""
    weights = prunable(model)
    units = registry.granularity.choose(granularity)(Network(model, weights, lambda: batches[0][0][:1]))
    kept = Masks({name: torch.rand(weight.shape) < (0.5 if masks else 2) for name, weight in weights.items()})
    return Probe(model, GivenBatches(batches, loss), kept, seed=0, draw=(), batch_size=1, units=units)


def _score(name: str, probe: Probe, **options: int) -> dict[str, Tensor]:
    return unit_scores(probe, registry.criterion.choose(name, **options))


def _classified(features: int, *, batches: int = 1, size: int = 16) -> list[Batch]:
    return [(torch.randn(size, features, dtype=torch.double), torch.randint(3, (size,))) for _ in range(batches)]


@pytest.mark.parametrize("name", ["magnitude", "snip", "taylor", "synflow"])
def test_a_larger_weight_is_kept(name: str) -> None:
    # In a linear network with a linear loss each of these scores grows with the weight and nothing else.
    model, batches = _linear()
    for row in (0, 1):
        for column in (0, 1):
            scaled = copy.deepcopy(model)
            with torch.no_grad():
                scaled[0].weight[row, column] *= 100
            units = _probe(scaled, batches).units
            scores = _score(name, _probe(scaled, batches))
            masks = units.choose(scores, 0.5, registry.allocator.choose("uniform"), None)
            assert masks["0.weight"][row, column] and scores["0.weight"].argmax() == 2 * row + column


def test_magnitude_by_hand() -> None:
    scores = registry.criterion.choose("magnitude")(_probe(*_linear()))
    assert scores["0.weight"].tolist() == [[1, 2], [3, 4]]


def test_snip_by_hand() -> None:
    # y = 1 * (w00 + w01) + 2 * (w10 + w11), so dy/dw = [[1, 1], [2, 2]] and the hidden units are 3 and -1.
    scores = registry.criterion.choose("snip")(_probe(*_linear()))
    assert scores["0.weight"].tolist() == [[1, 2], [6, 8]]
    assert scores["1.weight"].tolist() == [[3, 2]]


def test_taylor_by_hand() -> None:
    scores = registry.criterion.choose("taylor")(_probe(*_linear()))
    assert scores["0.weight"].tolist() == [[1, 4], [36, 64]]
    assert scores["1.weight"].tolist() == [[9, 4]]


def test_synflow_by_hand() -> None:
    # Absolute weights: hidden 3 and 7, output 3 + 14 = 17; each layer's flow sums to it.
    scores = registry.criterion.choose("synflow")(_probe(*_linear()))
    assert scores["0.weight"].tolist() == [[1, 2], [6, 8]]
    assert scores["1.weight"].tolist() == [[3, 14]]


def test_snip_is_the_gradient_of_a_gate_on_each_weight() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3)).double()
    batches = _classified(5, batches=2)
    got = _score("snip", _probe(model, batches, nn.functional.cross_entropy), batches=2)
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def loss(gates: dict[str, Tensor]) -> Tensor:
        gated = parameters | {name: parameters[name] * gate for name, gate in gates.items()}
        losses = [nn.functional.cross_entropy(torch.func.functional_call(model, gated, x), y) for x, y in batches]
        return torch.stack(losses).mean()

    expected = torch.func.grad(loss)({name: torch.ones_like(parameters[name]) for name in got})
    for name, score in got.items():
        torch.testing.assert_close(score, expected[name].abs())


def _flowing() -> nn.Module:
    """No biases and ReLU only, so that every layer passes on what it gets."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, bias=False), nn.ReLU(), nn.Conv2d(4, 3, 3, bias=False), nn.ReLU(), nn.Flatten(),
        nn.Linear(3 * 16, 8, bias=False), nn.ReLU(), nn.Linear(8, 5, bias=False),
    )  # fmt: skip


@pytest.mark.parametrize("masked", [False, True])
def test_synflow_is_conserved_from_layer_to_layer(masked: bool) -> None:
    probe = _probe(_flowing(), [(torch.randn(1, 2, 8, 8), torch.zeros(1, 5))], masks=masked)
    scores = _score("synflow", probe)
    sums = torch.stack([score.sum() for score in scores.values()])
    torch.testing.assert_close(sums, sums[:1].expand(4))
    assert all(bool((score[~probe.masks[name]] == 0).all()) for name, score in scores.items()), "no flow through a removed weight"


def test_synflow_is_conserved_at_every_hidden_unit() -> None:
    scores = _score("synflow", _probe(_flowing(), [(torch.randn(1, 2, 8, 8), torch.zeros(1, 5))]))
    torch.testing.assert_close(scores["5.weight"].sum(1), scores["7.weight"].sum(0))
    torch.testing.assert_close(scores["0.weight"].sum((1, 2, 3)), scores["2.weight"].sum((0, 2, 3)))


def test_synflow_in_many_steps_lets_a_signal_through_where_others_do_not() -> None:
    torch.manual_seed(0)
    widths = [64] + 9 * [128] + [10]
    layers = [layer for i in range(10) for layer in (nn.Linear(widths[i], widths[i + 1], bias=False), nn.ReLU())]
    model, batches = nn.Sequential(*layers[:-1]), [(torch.randn(4, 64), torch.randint(10, (4,)))]

    def dead(name: str, steps: int) -> list[str]:
        masks = prune(model, criterion=name, sparsity=0.999, batches=batches, steps=steps)
        assert masks.kept == round(0.001 * masks.total)
        return collapsed(model, masks, batches[0][0][:1])

    assert registry.criterion.get("synflow").facts["steps"] == 100
    assert not dead("synflow", 100)
    assert dead("synflow", 1) and dead("snip", 1) and dead("magnitude", 1)


def test_grasp_is_w_times_hessian_times_gradient() -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 2, bias=False).double()
    batch = (torch.randn(4, 3, dtype=torch.double), torch.randint(2, (4,)))
    got = _score("grasp", _probe(model, [batch], nn.functional.cross_entropy))["weight"]

    def loss(flat: Tensor) -> Tensor:
        return nn.functional.cross_entropy(batch[0] @ flat.view(2, 3).T / 200, batch[1])

    flat = model.weight.detach().flatten()
    gradient = torch.autograd.functional.jacobian(loss, flat)
    hessian = torch.autograd.functional.hessian(loss, flat)
    torch.testing.assert_close(got.flatten(), flat * (hessian @ gradient))


def test_grasp_by_finite_differences_of_the_gradient() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    batches = _classified(4, batches=2)
    got = _score("grasp", _probe(model, batches, nn.functional.cross_entropy), batches=2)
    moved = copy.deepcopy(model)
    weights = {name: parameter for name, parameter in moved.named_parameters() if name in got}

    def gradient(offset: float, along: dict[str, Tensor]) -> dict[str, Tensor]:
        moved.load_state_dict({**model.state_dict(), **{n: model.state_dict()[n] + offset * v for n, v in along.items()}})
        loss = sum(nn.functional.cross_entropy(moved(x) / 200, y) for x, y in batches)
        return dict(zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True))

    along = gradient(0, {})
    step = 1e-3 / torch.stack([value.norm() for value in along.values()]).norm().item()
    up, down = gradient(step, along), gradient(-step, along)
    for name, score in got.items():
        product = (up[name] - down[name]) / (2 * step)
        torch.testing.assert_close(score, model.state_dict()[name] * product, rtol=1e-4, atol=1e-12)


class _Gate(nn.Module):
    """A multiplier of channels, [units]; each unit has as many features next to each other as there are a unit."""

    def __init__(self, units: int, features: int = 1) -> None:
        super().__init__()
        self.z = nn.Parameter(torch.ones(units, dtype=torch.double))
        self.features = features

    def forward(self, x: Tensor) -> Tensor:
        return x * self.z.repeat_interleave(self.features).view(-1, *[1] * (x.dim() - 2))


def _slopes(model: nn.Module, batches: list[Batch], *gates: _Gate) -> Tensor:
    """The mean over batches of the squared dL/dz of one gate in many places."""
    found = []
    for inputs, targets in batches:
        loss = nn.functional.cross_entropy(model.train()(inputs), targets)
        found.append(torch.stack(torch.autograd.grad(loss, [gate.z for gate in gates])).sum(0).square())
    return torch.stack(found).mean(0)


def _images(batches: int = 2) -> list[Batch]:
    return [(torch.randn(8, 2, 6, 6, dtype=torch.double), torch.randint(3, (8,))) for _ in range(batches)]


@pytest.mark.parametrize("norm", ["affine", "plain", "none"])
def test_taylor_gates_are_gates_after_batch_normalisation(norm: str) -> None:
    torch.manual_seed(0)
    middle = nn.Identity() if norm == "none" else nn.BatchNorm2d(5, affine=norm == "affine")
    model = nn.Sequential(
        nn.Conv2d(2, 5, 3), middle, nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(20, 7), nn.ReLU(), nn.Linear(7, 3)
    )
    model.double()
    if norm == "affine":
        nn.init.uniform_(middle.weight, -1, 2)
        nn.init.normal_(middle.bias)
    batches = _images()
    probe = _probe(model, batches, nn.functional.cross_entropy, granularity="filter")
    scores = _score("taylor_gates", probe, batches=2)
    gates = _Gate(5), _Gate(7)
    gated = nn.Sequential(model[0], model[1], gates[0], *model[2:6], gates[1], *model[6:])
    assert list(scores) == ["0.weight", "5.weight"]
    torch.testing.assert_close(scores["0.weight"], _slopes(gated, batches, gates[0]), rtol=1e-5, atol=1e-12)
    torch.testing.assert_close(scores["5.weight"], _slopes(gated, batches, gates[1]), rtol=1e-5, atol=1e-12)
    # A gate before a ReLU scales what reads the channel just as well.
    one = _score("taylor_gates", _probe(model, batches[:1], nn.functional.cross_entropy, granularity="filter"))
    readers = _probe(model, batches[:1], nn.functional.cross_entropy, granularity="channel")
    gradients = readers.gradients(1)
    read = readers.units.reduce({name: value * gradients[name] for name, value in readers.values.items()}, "squared_sum")
    for name, score in one.items():
        torch.testing.assert_close(score, read[name], rtol=1e-5, atol=1e-12)


class _Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.stem_norm = nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.conv, self.norm = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.gates = nn.ModuleList([nn.Identity(), nn.Identity()])
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.gates[0](self.stem_norm(self.stem(x))).relu()
        x = (x + self.gates[1](self.norm(self.conv(x)))).relu()
        out: Tensor = self.fc(x.mean((2, 3)))
        return out


def test_a_gate_on_a_residual_stream_is_divided_by_its_places() -> None:
    torch.manual_seed(0)
    model = _Residual().double()
    batches = _images()
    scores = _score("taylor_gates", _probe(model, batches, nn.functional.cross_entropy, granularity="filter"), batches=2)
    gates = _Gate(4), _Gate(4)
    model.gates = nn.ModuleList(gates)
    torch.testing.assert_close(scores["stem.weight"], _slopes(model, batches, *gates) / 2, rtol=1e-5, atol=1e-12)


class _Attention(nn.Module):
    def __init__(self, **options: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 3, batch_first=True, **options)
        self.fc = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(2).transpose(1, 2)
        x = torch.cat([x, x, x], dim=2)
        other = x[:, :, : self.attention.kdim]
        out: Tensor = self.fc(self.attention(x, other, other, need_weights=False)[0].mean(1))
        return out


@pytest.mark.parametrize("options", [{}, {"kdim": 4, "vdim": 4}], ids=["packed", "apart"])
def test_a_gate_on_a_head_is_one_on_its_values(options: dict[str, int]) -> None:
    torch.manual_seed(0)
    model = _Attention(**options).double()
    nn.init.normal_(model.attention.in_proj_bias)
    batches = _images(1)
    probe = _probe(model, batches, nn.functional.cross_entropy, granularity="filter")
    (score,) = _score("taylor_gates", probe).values()
    out = model.attention.out_proj.weight
    loss = nn.functional.cross_entropy(model(batches[0][0]), batches[0][1])
    read = (torch.autograd.grad(loss, out)[0] * out).sum(0).view(3, 2).sum(1)  # each head has two columns of what reads it
    torch.testing.assert_close(score, read.detach().square(), rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("name", ["grasp", "obd_hutchinson"])
def test_second_derivatives_go_through_attention(name: str) -> None:
    torch.manual_seed(0)
    scores = _score(name, _probe(_Attention().double(), _images(1), nn.functional.cross_entropy))
    assert all(bool(score.any()) for score in scores.values())


def test_taylor_of_a_unit_sums_squares_as_the_sum_over_a_normalised_filter_is_nothing() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Flatten(), nn.Linear(80, 3)).double()
    batches = _images()
    scores = _score("taylor", _probe(model, batches, nn.functional.cross_entropy, granularity="filter"), batches=2)["0.weight"]
    contributions = []
    for inputs, targets in batches:
        (gradient,) = torch.autograd.grad(nn.functional.cross_entropy(model(inputs), targets), [model[0].weight])
        contributions.append((model[0].weight * gradient).detach().flatten(1))
    torch.testing.assert_close(scores, torch.stack(contributions).square().mean(0).sum(1))
    for each_batch in contributions:
        assert each_batch.sum(1).abs().max() < 1e-3 * each_batch.abs().sum(1).min()


def _quadratic(inputs: list[list[float]], targets: list[float], weight: list[float]) -> tuple[nn.Module, list[Batch]]:
    """(w x - y)^2 / 2 on average, whose Hessian is the mean of x x^T."""
    model = nn.Linear(len(weight), 1, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(torch.tensor([weight]))
    return model, [(torch.tensor(inputs, dtype=torch.double), torch.tensor(targets, dtype=torch.double)[:, None])]


def _half_squares(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs - targets).square().mean() / 2


def test_obd_fisher_is_the_mean_of_squares_and_not_the_square_of_the_mean() -> None:
    # Outputs 1, 2, 3, 5 miss their targets by 1 up and down, where the empirical Fisher is the Hessian; batch-mean gradients cancel.
    model, batches = _quadratic([[1, 0], [1, 0], [0, 3], [0, 3]], [3.0, 1.0, 4.0, 2.0], [2.0, 1.0])
    scores = _score("obd_fisher", _probe(model, batches, _half_squares))["weight"]
    inputs = batches[0][0]
    hessian = inputs.T @ inputs / 4
    torch.testing.assert_close(scores, (0.5 * hessian.diagonal() * model.weight.detach().square()))
    assert scores.tolist() == [[0.5 * 0.5 * 4, 0.5 * 4.5 * 1]]
    assert _probe(model, batches, _half_squares).gradients(1)["weight"].tolist() == [[0, 0]]


def test_obd_fisher_of_many_batches_is_that_of_one_large_one() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Dropout(0.9), nn.Linear(5, 3)).double()
    batches = _classified(4, batches=2)
    whole = [(torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches]))]
    apart = _score("obd_fisher", _probe(model, batches, nn.functional.cross_entropy), batches=2)
    together = _score("obd_fisher", _probe(model, whole, nn.functional.cross_entropy))
    for name, score in apart.items():
        torch.testing.assert_close(score, together[name])
    model.eval()  # no dropout, running statistics
    gradients = [
        torch.autograd.grad(nn.functional.cross_entropy(model(x[None]), y[None]), [model[0].weight])[0]
        for x, y in zip(*whole[0], strict=True)
    ]
    expected = 0.5 * model[0].weight.detach().square() * torch.stack(gradients).square().mean(0)
    torch.testing.assert_close(apart["0.weight"], expected)


def test_obd_hutchinson_is_exact_for_a_diagonal_hessian() -> None:
    model, batches = _quadratic([[1, 0], [0, 3]], [0.0, 0.0], [2.0, 1.0])
    scores = _score("obd_hutchinson", _probe(model, batches, _half_squares), probes=1)["weight"]
    assert scores.tolist() == [[0.5 * 0.5 * 4, 0.5 * 4.5 * 1]]


def test_obd_hutchinson_nears_the_diagonal_of_any_hessian() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    batches = _classified(3, size=32)
    scores = _score("obd_hutchinson", _probe(model, batches, nn.functional.cross_entropy), probes=3000)
    bias = model[2].bias.detach()

    def loss(weight: Tensor) -> Tensor:
        return nn.functional.cross_entropy(model[:2](batches[0][0]).detach() @ weight.T + bias, batches[0][1])

    weight = model[2].weight.detach()
    diagonal = torch.autograd.functional.hessian(loss, weight).reshape(12, 12).diagonal().view(3, 4)
    torch.testing.assert_close(scores["2.weight"], 0.5 * diagonal * weight.square(), rtol=0.1, atol=1e-3)


def test_negative_curvature_counts_as_none() -> None:
    model, batches = _quadratic([[1, 0], [0, 3]], [0.0, 0.0], [2.0, 1.0])
    assert _score("obd_hutchinson", _probe(model, batches, lambda o, t: -_half_squares(o, t)))["weight"].tolist() == [[0, 0]]


def test_slimming_ranks_channels_by_their_scales() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(32, 3)
    )
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([0.5, -2.0, 0.25]))
        model[4].weight.copy_(torch.tensor([3.0, -4.0]))
    batches = [(torch.randn(2, 1, 8, 8), torch.randint(3, (2,)))]
    scores = _score("slimming", _probe(model, batches, granularity="filter"))
    assert {name: score.tolist() for name, score in scores.items()} == {"0.weight": [0.5, 2.0, 0.25], "3.weight": [3.0, 4.0]}
    masks = prune(model, criterion="slimming", granularity="filter", allocator="uniform", sparsity=0.5, batches=batches)
    assert masks["0.weight"].flatten(1).any(1).tolist() == [True, True, False]


def test_slimming_takes_the_mean_over_the_norms_of_a_residual_stream() -> None:
    model = _Residual()
    with torch.no_grad():
        model.stem_norm.weight.copy_(torch.tensor([1.0, 2.0, 3.0, 4.0]))
        model.norm.weight.copy_(torch.tensor([-3.0, 0.0, 3.0, 0.0]))
    batches = [(torch.randn(2, 2, 6, 6), torch.randint(3, (2,)))]
    assert _score("slimming", _probe(model, batches, granularity="filter"))["stem.weight"].tolist() == [2.0, 1.0, 3.0, 2.0]


def test_slimming_needs_batch_normalisation() -> None:
    run = ready()
    with pytest.raises(UserError, match=r"those of '6.weight' go through none. Choose taylor_gates"):
        choose_masks(
            run.state.model,
            run.env.task,
            run.state.masks,
            sparsity=0.3,
            criterion=registry.criterion.choose("slimming"),
            allocator=ERK,
            units=_units(run, registry.criterion.choose("slimming")),
        )


def test_units_have_the_reduction_of_their_criterion() -> None:
    model = nn.Conv2d(1, 2, (1, 2), bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[[[1.0, 2.0]]], [[[3.0, -5.0]]]]))
    batches = [(torch.tensor([[[[1.0, 10.0]]]]), torch.zeros(1, 2, 1, 1))]  # the gradient of each kernel is the input

    def scores(name: str) -> list[list[float]]:
        found: list[list[float]] = _score(name, _probe(model, batches, granularity="kernel"))["weight"].tolist()
        return found

    assert scores("magnitude") == [[1.5], [4.0]], "the mean, whatever the size of the kernel"
    assert scores("snip") == [[1 + 20], [3 + 50]]
    assert scores("taylor") == [[1 + 400], [9 + 2500]]
    assert scores("synflow") == [[1 + 2], [3 + 5]]
    assert scores("obd_fisher") == [[0.5 * (1 + 400)], [0.5 * (9 + 2500)]]
    single = _score("random", _probe(model, batches))["weight"]
    assert scores("random") == single[..., 0, 0].tolist(), "the score of one weight: a mean of many would be nearer to a half"
    assert {entry.name: entry.facts["reduction"] for entry in registry.criterion if not entry.facts["of_units"]} == {
        "magnitude": "mean",
        "random": "first",
        **dict.fromkeys(("snip", "grasp", "synflow", "taylor", "obd_fisher", "obd_hutchinson"), "sum"),
    }


def test_prune_leaves_the_model_and_needs_batches_only_where_data_is_looked_at() -> None:
    model, batches = _linear()
    masks = prune(model, criterion="magnitude", sparsity=0.5)
    assert masks.kept == 3 and model[0].weight[0, 0] == 1
    masks.apply_(model)
    assert model[0].weight.flatten().count_nonzero() + model[1].weight.count_nonzero() == 3
    with pytest.raises(UserError, match=r"runs the network: pass batches="):
        prune(model, criterion="snip", sparsity=0.5)
    assert prune(model, criterion={"name": "snip", "batches": 1}, sparsity=0.5, batches=batches, loss=lambda o, t: (o - t).sum()).kept == 3
    with pytest.raises(UserError, match="Unknown criterion 'magnitud'. Did you mean 'magnitude'?"):
        prune(model, criterion="magnitud", sparsity=0.5)


def test_a_criterion_that_returns_the_wrong_shape_is_named() -> None:
    run = ready()
    wrong = Choice("criterion", "import:wrong_criterion:scores")
    import sys
    import types

    module = types.ModuleType("wrong_criterion")
    module.scores = lambda probe: {name: value.flatten() for name, value in probe.values.items()}
    sys.modules["wrong_criterion"] = module
    with pytest.raises(UserError, match=r"must return one score a weight: '0.weight' has shape \(6, 1, 3, 3\), its scores \(54,\)"):
        choose_masks(
            run.state.model, run.env.task, run.state.masks, sparsity=0.5, criterion=wrong, allocator=registry.allocator.choose("erk")
        )
