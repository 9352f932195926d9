"""Weights policies: what the kept weights start from, and the laws of least squares."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toys import ready

from distprune.core import compensation
from distprune.core.compensation import least_squares
from distprune.core.executor import Env
from distprune.core.masks import Masks
from distprune.core.stages import SetWeights, Snapshot
from distprune.core.state import State
from distprune.core.streams import global_stream
from distprune.core.tasks.given import GivenBatches


def _masked(state: State, *, density: float = 0.3) -> None:
    """Masks that keep a random share of each layer."""
    torch.manual_seed(1)
    state.set_masks(Masks({name: torch.rand(weight.shape) < density for name, weight in state.weights.items()}))


def _do(state: State, env: Env, policy: Any, **fields: Any) -> dict[str, Tensor]:
    """Run the stage; the values afterwards."""
    list(SetWeights(policy=policy, **fields).run(state, env))
    return state.values()


def _moved() -> tuple[State, Env, dict[str, Tensor]]:
    """A state with the snapshot 'early', other values since then, masks, and an optimizer that remembers something."""
    run = ready()
    list(Snapshot(tag="early").run(run.state, run.env))
    before = run.state.values()
    with torch.no_grad():
        for tensor in run.state.model.state_dict().values():
            tensor.add_(1)
    run.state.memory = {name: {"momentum": torch.ones_like(weight)} for name, weight in run.state.weights.items()}
    _masked(run.state)
    return run.state, run.env, before


@pytest.mark.parametrize("policy", ["rewind", "reinit", "shuffle", "sign"])
def test_removed_weights_are_zero_and_the_optimizer_starts_anew(policy: str) -> None:
    state, env, _ = _moved()
    masks = state.masks
    values = _do(state, env, policy, tag="early" if policy in ("rewind", "sign") else "")
    assert all(not values[name][~mask].any() and values[name][mask].any() for name, mask in masks.items())
    assert state.masks is masks and not state.memory
    assert state.ledger.cost == 0


@pytest.mark.parametrize("policy", ["reinit", "shuffle"])
def test_random_policies_repeat_themselves_at_the_same_place_only(policy: str) -> None:
    def drawn(lap: int) -> dict[str, Tensor]:
        state, env, _ = _moved()
        state.lap = lap
        torch.rand(lap)  # what the global generator has seen does not matter
        return _do(state, env, policy)

    first, again, later = drawn(0), drawn(0), drawn(1)
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    assert any(not torch.equal(value, later[name]) for name, value in first.items())


def test_rewind_takes_all_values_of_the_snapshot() -> None:
    state, env, early = _moved()
    values = _do(state, env, "rewind", tag="early")
    for name, value in values.items():
        assert torch.equal(value, early[name] * state.masks[name] if name in state.masks else early[name]), name


def test_reinit_is_a_fresh_network() -> None:
    state, env, _ = _moved()
    values = _do(state, env, "reinit")
    with global_stream(env.seed, "reinit", state.lap, state.clock):
        fresh = env.build().state_dict()
    for name, value in values.items():
        assert torch.equal(value, fresh[name] * state.masks[name] if name in state.masks else fresh[name]), name


def test_shuffle_permutes_the_kept_weights_of_each_layer() -> None:
    state, env, _ = _moved()
    before = state.values()
    values = _do(state, env, "shuffle")
    for name, value in values.items():
        if name in state.masks:
            kept = state.masks[name]
            assert torch.equal(value[kept].sort().values, before[name][kept].sort().values)
            assert not torch.equal(value[kept], before[name][kept])
        else:
            assert torch.equal(value, before[name])


def test_sign_keeps_signs_and_one_size_a_layer() -> None:
    state, env, early = _moved()
    values = _do(state, env, "sign", tag="early")
    for name, mask in state.masks.items():
        assert torch.equal(values[name].sign()[mask], early[name].sign()[mask])
        sizes = values[name][mask].abs()
        torch.testing.assert_close(sizes, early[name].std(correction=0).expand_as(sizes))


# Least squares for one matrix.


def _problem(rows: int = 5, inputs: int = 8, samples: int = 40) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    mixed = torch.randn(inputs, inputs, dtype=torch.double)
    x = torch.randn(samples, inputs, dtype=torch.double) @ mixed
    return x, torch.randn(rows, inputs, dtype=torch.double), torch.rand(rows, inputs) < 0.5


def test_least_squares_solves_each_row_for_its_own_inputs() -> None:
    x, weight, mask = _problem()
    mask[3] = mask[1]
    fitted = least_squares(x.T @ x, weight, mask, ridge=1e-12)
    for row, kept in enumerate(mask):
        best = torch.linalg.lstsq(x[:, kept], (x @ weight[row])[:, None]).solution[:, 0]
        torch.testing.assert_close(fitted[row][kept], best)
        assert not fitted[row][~kept].any()


def test_rows_of_one_pattern_are_solved_as_each_alone() -> None:
    x, weight, mask = _problem()
    mask[:] = mask[0]
    together = least_squares(x.T @ x, weight, mask, ridge=1e-4)
    alone = [least_squares(x.T @ x, weight[row : row + 1], mask[:1], ridge=1e-4) for row in range(len(weight))]
    torch.testing.assert_close(together, torch.cat(alone))


@pytest.mark.parametrize("samples", [3, 8, 40])
@pytest.mark.parametrize("ridge", [1e-12, 1e-4, 1e-1, 1e2])
def test_least_squares_is_never_worse_than_the_mask_alone(samples: int, ridge: float) -> None:
    x, weight, mask = _problem(rows=50, samples=samples)
    fitted = least_squares(x.T @ x, weight, mask, ridge=ridge)
    errors, plain = ((x @ (new - weight).T).square().sum(0) for new in (fitted, weight * mask))
    assert bool((errors <= plain * (1 + 1e-6) + 1e-9).all())


def test_what_stays_as_it_is() -> None:
    x, weight, mask = _problem()
    mask[0], mask[1] = True, False
    gram = x.T @ x
    fitted = least_squares(gram, weight, mask, ridge=1e-4)
    assert torch.equal(fitted[0], weight[0]), "a row that keeps everything"
    assert not fitted[1].any(), "a row that keeps nothing"
    assert torch.equal(least_squares(torch.zeros_like(gram), weight, mask, ridge=1e-4), weight * mask), "inputs that are always zero"
    x[:, :4] = 0
    fitted = least_squares(x.T @ x, weight, mask, ridge=1e-4)
    assert torch.equal((fitted * mask)[:, :4], (weight * mask)[:, :4]), "weights of inputs that are always zero"


# The policy on networks.


def _compensated(
    model: nn.Module, mask: Callable[[str, Tensor], Tensor], inputs: list[Tensor]
) -> tuple[State, dict[str, Tensor], dict[str, Tensor]]:
    """A state after the policy on `inputs`, with the dense and the masked values."""
    device = torch.device("cpu")
    task = GivenBatches([(batch, batch) for batch in inputs], lambda outputs, targets: outputs.sum())
    state = State.new(lambda: model, seed=0, device=device)
    env = Env(task=task, build=lambda: model, seed=0, device=device, report_every=1)
    list(Snapshot(tag="dense").run(state, env))
    dense = state.values()
    state.set_masks(Masks({name: mask(name, weight) for name, weight in state.weights.items()}))
    masked = state.values()
    list(SetWeights(policy="compensate", tag="dense", batches=len(inputs), batch_size=len(inputs[0])).run(state, env))
    return state, dense, masked


def _random(name: str, weight: Tensor) -> Tensor:
    return torch.rand(weight.shape) < 0.5


def _rows(name: str, weight: Tensor) -> Tensor:
    return (torch.rand(len(weight)) < 0.5).view(-1, *[1] * (weight.dim() - 1)).expand_as(weight)


def _columns(name: str, weight: Tensor) -> Tensor:
    """Every second input; where there is only one, every second position."""
    dim = 1 if weight.shape[1] > 1 else 2
    return (torch.arange(weight.shape[dim]) % 2 == 0).view(-1, *[1] * (weight.dim() - dim - 1)).expand_as(weight)


class _Tokens(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(input=x.flatten(2).transpose(1, 2))
        return out


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "conv": lambda: nn.Conv2d(4, 6, 3),
    "conv without bias": lambda: nn.Conv2d(4, 6, 3, bias=False),
    "stride, padding and dilation": lambda: nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(2, 1), dilation=(1, 2)),
    "groups": lambda: nn.Conv2d(4, 6, 3, groups=2, padding=1),
    "depthwise": lambda: nn.Conv2d(4, 8, 3, groups=4, bias=False),
    "same": lambda: nn.Conv2d(4, 6, (2, 4), padding="same"),
    "reflect": lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"),
    "linear": lambda: nn.Sequential(nn.Flatten(), nn.Linear(4 * 49, 6)),
    "linear over tokens": lambda: _Tokens(nn.Linear(4, 6, bias=False)),
}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("mask", [_random, _rows, _columns])
@pytest.mark.parametrize("layer", LAYERS)
def test_a_compensated_layer_is_never_further_from_the_dense_one(layer: str, mask: Callable[[str, Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    model = LAYERS[layer]()
    mixed = torch.randn(4, 4)
    inputs = [(torch.einsum("nchw,cd->ndhw", torch.randn(16, 4, 7, 7), mixed) + 1).relu() for _ in range(3)]
    state, dense, masked = _compensated(model, mask, inputs)
    fitted, x = state.values(), torch.cat(inputs)

    def outputs(values: dict[str, Tensor]) -> Tensor:
        model.load_state_dict(values)
        with torch.no_grad():
            return model(x).double()

    aim = outputs(dense)
    channel = 2 if layer == "linear over tokens" else 1
    errors, plain = ((outputs(values) - aim).movedim(channel, 0).flatten(1) for values in (fitted, masked))
    assert bool((errors.square().sum(1) <= plain.square().sum(1) * (1 + 1e-5) + 1e-6).all())
    assert errors.square().sum() < 0.9 * plain.square().sum() or mask is _rows
    for name, kept in state.masks.items():
        assert not fitted[name][~kept].any()
        if (name.rpartition(".")[0] + ".bias").lstrip(".") in fitted:
            assert errors.mean(1).abs().max() < 1e-5, "the bias takes the mean over"


def _duplicates(bias: bool) -> nn.Module:
    """Half of the channels of every hidden layer are multiples of the other half."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=bias),
        nn.ReLU(),
        nn.Conv2d(8, 6, 3, bias=bias),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(6 * 4, 10, bias=bias),
        nn.ReLU(),
        nn.Linear(10, 4, bias=bias),
    )
    with torch.no_grad():
        for index in (0, 2, 6):
            layer = model[index]
            half = len(layer.weight) // 2
            layer.weight[half:] = 2 * layer.weight[:half]
            if bias:
                layer.bias[half:] = 2 * layer.bias[:half]
        model[3].running_var[3:] = 4 * model[3].running_var[:3]  # makes the scaled channels equal ones
        model[3].eps = 0.0
    return model


@pytest.mark.parametrize("bias", [True, False])
def test_what_is_a_combination_of_kept_inputs_is_lost_without_a_loss(bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def second_half(name: str, weight: Tensor) -> Tensor:
        """Masks of filters: the second half of every hidden layer goes, with what reads it."""
        kept = torch.ones(weight.shape, dtype=torch.bool)
        if name != "8.weight":
            kept[len(weight) // 2 :] = False
        if name != "0.weight":
            kept[:, weight.shape[1] // 2 :] = False
        return kept

    monkeypatch.setattr(compensation, "_RIDGE", 1e-10)
    model = _duplicates(bias)
    inputs = [torch.randn(32, 3, 6, 6) for _ in range(4)]
    x = torch.randn(10, 3, 6, 6)
    with torch.no_grad():
        before = model.eval()(x)
    state, _, masked = _compensated(model, second_half, inputs)
    with torch.no_grad():
        after = state.model.eval()(x)
        state.model.load_state_dict(masked)
        assert (model(x) - before).abs().max() > 0.1
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)


def test_the_bias_takes_over_what_a_constant_input_did() -> None:
    model = nn.Linear(2, 1)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[3.0, 2.0]]))
        model.bias.fill_(1.0)
    inputs = [torch.cat([torch.randn(8, 1), torch.full((8, 1), 5.0)], dim=1)]
    state, _, _ = _compensated(model, lambda name, weight: torch.tensor([[True, False]]), inputs)
    torch.testing.assert_close(state.model.weight.data, torch.tensor([[3.0, 0.0]]))
    torch.testing.assert_close(state.model.bias.data, torch.tensor([1.0 + 2.0 * 5.0]))


class _Odd(nn.Module):
    """Layers that the policy cannot speak for, each after one that it can."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.tied = nn.Linear(6, 6)
        self.again = nn.Linear(6, 6)
        self.again.weight = self.tied.weight
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.transposed = nn.ConvTranspose1d(6, 6, 1)
        self.unused = nn.Linear(6, 6)
        self.own = type("Scaled", (nn.Linear,), {"forward": lambda self, x: nn.functional.linear(x, 2 * self.weight)})(6, 6)
        self.last = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.again(self.tied(self.first(x)))
        x = self.attention(x, x, x, need_weights=False)[0]
        x = self.transposed(x.mT).mT
        out: Tensor = self.last(self.own(x))
        return out


def test_layers_that_do_more_than_their_type_says_stay() -> None:
    torch.manual_seed(0)
    state, _, masked = _compensated(_Odd(), _random, [torch.randn(16, 5, 6)])
    values = state.values()
    changed = {name for name, value in values.items() if not torch.equal(value, masked[name])}
    assert changed == {"first.weight", "first.bias", "last.weight", "last.bias"}


def test_large_and_full_layers_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compensation, "_LARGEST", 7)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 7), nn.ReLU(), nn.Linear(7, 7), nn.ReLU(), nn.Linear(7, 3))

    def mask(name: str, weight: Tensor) -> Tensor:
        return torch.ones_like(weight, dtype=torch.bool) if name == "4.weight" else _random(name, weight)

    state, _, masked = _compensated(model, mask, [torch.randn(16, 8)])
    assert {name for name, value in state.values().items() if not torch.equal(value, masked[name])} == {"2.weight", "2.bias"}


def test_small_pieces_of_a_batch_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    def fitted() -> Tensor:
        torch.manual_seed(0)
        state, _, _ = _compensated(nn.Conv2d(3, 4, 3), _random, [torch.randn(5, 3, 6, 6)])
        return state.values()["weight"]

    whole = fitted()
    monkeypatch.setattr(compensation, "_CHUNK", 1)
    torch.testing.assert_close(fitted(), whole)


def test_compensation_leaves_the_rest_as_it_was_and_bills_what_it_draws() -> None:
    run = ready()
    state, env = run.state, run.env
    list(Snapshot(tag="dense").run(state, env))
    _masked(state)
    state.model.train()
    before, generator, drawn = state.values(), torch.get_rng_state(), []
    original = env.task.draw
    env.task.draw = lambda g, size: drawn.append(size) or original(g, size)  # type: ignore[method-assign,func-returns-value]
    values = _do(state, env, "compensate", tag="dense", batches=3, batch_size=16)
    assert drawn == [16] * 3 and state.ledger.scoring == state.ledger.cost == 48
    assert {name for name, value in values.items() if not torch.equal(value, before[name])} == {
        "0.weight", "0.bias", "6.weight", "6.bias", "8.weight", "8.bias",
    }  # fmt: skip
    assert all(not values[name][~mask].any() for name, mask in state.masks.items())
    assert torch.equal(torch.get_rng_state(), generator) and all(module.training for module in state.model.modules())
    state.model.load_state_dict(before)
    again = _do(state, env, "compensate", tag="dense", batches=3, batch_size=16)
    assert all(torch.equal(value, again[name]) for name, value in values.items())


def test_later_rounds_fit_to_what_earlier_ones_left() -> None:
    run = ready()
    state, env = run.state, run.env
    _masked(state, density=0.6)
    list(Snapshot(tag="unpruned").run(state, env))
    before = state.values()
    values = _do(state, env, "compensate", tag="unpruned", batches=2, batch_size=32)
    assert all(torch.equal(value, before[name]) for name, value in values.items()), "no more is removed, so there is nothing to make up for"
