"""`distprune.prune` as a newcomer calls it, and masks that no optimizer gets past."""

import itertools
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import distprune as dp
from distprune.errors import UserError


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 10))


def images(count: int = 32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, 1, 8, 8, generator=generator), torch.randint(10, (count,), generator=generator)


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    inputs, targets = images()
    optimizer.zero_grad()
    F.cross_entropy(model(inputs), targets).backward()
    optimizer.step()


OPTIMIZERS = {
    "sgd": lambda weights: torch.optim.SGD(weights, lr=0.1, momentum=0.9, weight_decay=0.01),
    "nesterov": lambda weights: torch.optim.SGD(weights, lr=0.1, momentum=0.9, nesterov=True),
    "adam": lambda weights: torch.optim.Adam(weights, lr=0.01, weight_decay=0.01, amsgrad=True),
    "adamw": lambda weights: torch.optim.AdamW(weights, lr=0.01, fused=True),
    "rmsprop": lambda weights: torch.optim.RMSprop(weights, lr=0.01, momentum=0.9, centered=True),
    "adagrad": lambda weights: torch.optim.Adagrad(weights, lr=0.01),
    "rprop": lambda weights: torch.optim.Rprop(weights, lr=0.01),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_removed_weights_stay_zero_and_so_does_the_memory_of_them(name: str) -> None:
    model = network()
    optimizer = OPTIMIZERS[name](model.parameters())
    for _ in range(3):
        step(model, optimizer)  # has momentum before it is pruned
    masks = dp.prune(model, sparsity=0.9)
    with dp.hold(model, masks, optimizer):
        for _ in range(20):
            step(model, optimizer)
            for key, weight in model.named_parameters():
                if key in masks:
                    assert not weight[~masks[key]].any()
    for key, weight in model.named_parameters():
        if key in masks:
            assert weight[masks[key]].count_nonzero() > 0.9 * masks.counts[key], "the others are trained"
            for value in optimizer.state[weight].values():
                if value.shape == weight.shape and name != "rprop":  # whose memory is a step width as well
                    assert not value[~masks[key]].any()
    before = {key: weight.detach().clone() for key, weight in model.named_parameters()}
    step(model, optimizer)
    assert any(weight[~masks[key]].any() for key, weight in model.named_parameters() if key in masks), "released, all are trained again"
    assert before.keys() == dict(model.named_parameters()).keys()


def test_without_it_momentum_brings_them_back() -> None:
    model = network()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    step(model, optimizer)
    masks = dp.prune(model, sparsity=0.9)
    masks.apply_(model)
    for key, weight in model.named_parameters():
        if key in masks:
            weight.register_hook(lambda gradient, mask=masks[key]: gradient * mask)
    step(model, optimizer)
    assert any(weight[~masks[key]].any() for key, weight in model.named_parameters() if key in masks)


def test_it_is_the_training_of_the_network_without_those_weights() -> None:
    """Gradient descent on w under the mask is gradient descent on the kept weights alone."""
    model, small = network(), network()
    masks = dp.prune(model, sparsity=0.8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    values = {key: nn.Parameter(weight.detach()[masks[key]]) if key in masks else weight for key, weight in small.named_parameters()}
    other = torch.optim.SGD(values.values(), lr=0.1, momentum=0.9)
    with dp.hold(model, masks, optimizer):
        for _ in range(5):
            step(model, optimizer)
            inputs, targets = images()
            filled = {
                k: torch.zeros_like(masks[k], dtype=torch.float32).masked_scatter(masks[k], v) if k in masks else v
                for k, v in values.items()
            }
            other.zero_grad()
            F.cross_entropy(torch.func.functional_call(small, filled, (inputs,)), targets).backward()
            other.step()
    for key, weight in model.named_parameters():
        expected = values[key]
        assert torch.allclose(weight.detach()[masks[key]] if key in masks else weight, expected, atol=1e-6)


def test_it_sets_the_weights_to_zero_at_once_behind_wrappers_too() -> None:
    model = network()
    masks = dp.prune(model, sparsity=0.9)
    wrapped = nn.DataParallel(model)
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1)
    with dp.hold(wrapped, masks, optimizer):
        assert sum(int(weight.count_nonzero()) for key, weight in model.named_parameters() if key in masks) == masks.kept


def test_an_optimizer_of_another_network_is_refused() -> None:
    model = network()
    with pytest.raises(UserError, match="trains none of them. Build it from the same network"):
        dp.hold(model, dp.prune(model, sparsity=0.9), torch.optim.SGD(network().parameters(), lr=0.1))


def test_no_more_of_a_loader_is_read_than_is_needed() -> None:
    read = []

    def endless() -> Iterator[tuple[Tensor, Tensor]]:
        for index in itertools.count():
            read.append(index)
            yield images()

    masks = dp.prune(network(), sparsity=0.9, criterion={"name": "snip", "batches": 3}, batches=endless())
    assert read == [0, 1, 2]
    again = dp.prune(network(), sparsity=0.9, criterion={"name": "snip", "batches": 3}, batches=[images()])
    assert again.equal(masks), "a short list is gone through again and again"


def test_a_loader_a_list_and_one_pair_are_the_same() -> None:
    inputs, targets = images()
    ways = (DataLoader(TensorDataset(inputs, targets), batch_size=32), [(inputs, targets)], (inputs, targets))
    found = [dp.prune(network(), sparsity=0.9, criterion="snip", batches=way) for way in ways]
    assert found[0].equal(found[1]) and found[1].equal(found[2])


@pytest.mark.parametrize(
    ("batches", "words"),
    [
        ([images()[0]], ["a pair of tensors, (inputs, targets)", "got Tensor", "Write batches=[(inputs, targets)]"]),
        ([(*images(), 1)], ["got 3 parts"]),
        ([{"image": 1}], ["got dict"]),
    ],
)
def test_batches_of_another_kind(batches: object, words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        dp.prune(network(), sparsity=0.9, criterion="snip", batches=batches)  # type: ignore[arg-type]
    assert all(word in str(caught.value) for word in words) and "\n" not in str(caught.value)


def test_a_pattern_is_a_pattern_and_one_that_matches_nothing_is_refused() -> None:
    model = network()
    assert list(dp.prune(model, sparsity=0.5, exclude="4.*")) == list(dp.prune(model, sparsity=0.5, exclude=["4.weight"])) == ["0.weight"]
    assert list(dp.prune(model, sparsity=0.5, include="4.*")) == ["4.weight"]
    with pytest.raises(
        UserError, match=r"exclude must hold patterns of parameter names, and '4' matches none of 0.weight, 4.weight.*'4\.\*'"
    ):
        dp.prune(model, sparsity=0.5, exclude=["4"])
    with pytest.raises(UserError, match="model must be a torch.nn.Module, got str"):
        dp.prune("resnet18", sparsity=0.5)  # type: ignore[arg-type]


def test_what_is_not_finite_is_held_at_zero_too() -> None:
    """In weights, gradients and the optimizer's memory, where a product with zero would keep it."""
    model = nn.Linear(2, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    model.weight.data[0, 0] = optimizer.state[model.weight]["momentum_buffer"][0, 0] = float("inf")
    with dp.hold(model, dp.Masks({"weight": torch.tensor([[False, True]])}), optimizer):
        model.weight.grad = torch.tensor([[float("nan"), 1.0]])
        optimizer.step()
        assert optimizer.state[model.weight]["momentum_buffer"][0].tolist() == pytest.approx([0, 1.9])
        assert model.weight.grad.tolist() == [[0, 1]] and model.weight[0, 0] == 0 and bool(model.weight.isfinite().all())


def test_a_refused_optimizer_leaves_the_network_as_it_was() -> None:
    model = network()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    masks = dp.prune(model, sparsity=0.9)
    with pytest.raises(UserError, match="trains none of them"):
        dp.hold(model, masks, torch.optim.SGD(network().parameters(), lr=0.1))
    with pytest.raises(UserError, match="Write hold\\(model, masks, optimizer\\)"):
        dp.hold(model, torch.optim.SGD(model.parameters(), lr=0.1), masks)  # type: ignore[arg-type]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": "0.5"}, "sparsity must be a number, got '0.5'. To keep 10 % of the weights write sparsity=0.9."),
        ({"sparsity": 0.5, "steps": -1}, "steps must be a number of at least 1, got -1."),
        ({"sparsity": 0.5, "steps": 0}, "steps must be a number of at least 1, got 0."),
    ],
)
def test_numbers_that_cannot_be(options: dict[str, object], message: str) -> None:
    with pytest.raises(UserError) as caught:
        dp.prune(network(), **options)  # type: ignore[arg-type]
    assert message in str(caught.value)
