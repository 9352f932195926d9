"""The contract of every granularity: whole units, budgets at or below, nested, and the patterns by hand."""

import copy

import pytest
import torch
from toys import ready

from distprune.core import registry
from distprune.core.granularity.n_m import Pattern
from distprune.core.masks import prunable
from distprune.core.models.resnet_cifar import resnet_cifar
from distprune.core.prune import prune, shrink
from distprune.core.registry import Choice
from distprune.core.scoring import choose_masks
from distprune.core.units import Network, Units
from distprune.errors import UserError

EVERY = [registry.granularity.choose(name) for name in registry.granularity.names()]
each = pytest.mark.parametrize("granularity", EVERY, ids=lambda choice: choice.name)
WEIGHT_CRITERIA = [entry.name for entry in registry.criterion if not entry.facts["of_units"]]


def _network() -> Network:
    torch.manual_seed(0)
    model = resnet_cifar((1, 8, 8), 10, depth=8, width=8)
    return Network(model, prunable(model), lambda: torch.ones(1, 1, 8, 8))


def _values(network: Network, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.rand(weight.shape, generator=generator) for name, weight in network.weights.items()}


def _allocator(granularity: Choice) -> Choice:
    return registry.allocator.choose(granularity.entry.facts["allocator"] or "uniform")


def _sparsity(granularity: Choice) -> float:
    fixed = granularity.entry.facts["sparsity"]
    return fixed(granularity) if fixed else 0.5


@each
def test_units_of_a_mask_are_whole_and_within_the_budget(granularity: Choice) -> None:
    network = _network()
    units: Units = granularity(network)
    scores = units.reduce(_values(network), "mean")
    masks = units.choose(scores, _sparsity(granularity), _allocator(granularity), None)
    assert masks.keys() == network.weights.keys()
    assert all(masks[name].shape == weight.shape for name, weight in network.weights.items())
    due = round((1 - _sparsity(granularity)) * units.total)
    assert masks.kept == due if granularity.name == "weight" else masks.kept <= due
    assert masks.kept > 0.5 * due or granularity.name == "layer", "no more is removed than whole units ask for"
    assert units.expand(units.alive(masks)).equal(masks), "a mask is made of units"


@each
def test_one_score_a_unit_and_the_highest_are_kept(granularity: Choice) -> None:
    network = _network()
    units: Units = granularity(network)
    scores = units.reduce(_values(network), "mean")
    assert [(layer.name, layer.units) for layer in units.layers()] == [(name, score.numel()) for name, score in scores.items()]
    if granularity.name in ("weight", "kernel", "filter", "channel"):
        masks = units.choose(scores, 0.5, registry.allocator.choose("uniform"), None)
        for name, kept in units.alive(masks).items():
            assert scores[name][kept].min() >= scores[name][~kept].max()


@each
def test_nested_budgets_on_the_way_to_the_target(granularity: Choice) -> None:
    network = _network()
    units: Units = granularity(network)
    masks, target = None, _sparsity(granularity)
    for step in range(1, 6):
        scores = units.reduce(_values(network, step), "mean")
        found = units.choose(scores, target * step / 5, _allocator(granularity), masks)
        assert masks is None or found.nested_in(masks)
        masks = found
    assert masks is not None and masks.kept <= round((1 - target) * units.total)


@each
def test_spread_gives_every_weight_the_value_of_its_unit(granularity: Choice) -> None:
    network = _network()
    units: Units = granularity(network)
    ones = {layer.name: score for layer, score in zip(units.layers(), units.reduce(_values(network), "first").values(), strict=True)}
    spread = units.spread({name: torch.full_like(score, 2.0) for name, score in ones.items()})
    assert all(spread[name].shape == weight.shape for name, weight in network.weights.items())
    assert all(set(value.unique().tolist()) <= {1.0, 2.0} for value in spread.values())
    again = units.reduce(units.spread(ones), "mean")
    assert all(torch.allclose(again[name], ones[name]) for name in ones), "the mean over a unit of its own value is that value"


@each
@pytest.mark.parametrize("criterion", WEIGHT_CRITERIA)
def test_every_weight_criterion_works_at_every_granularity(granularity: Choice, criterion: str) -> None:
    run = ready(model={"name": "resnet_cifar", "depth": 8, "width": 4})
    choice = registry.criterion.choose(criterion)
    masks = choose_masks(
        run.state.model,
        run.env.task,
        run.state.masks,
        sparsity=_sparsity(granularity),
        criterion=choice,
        allocator=_allocator(granularity),
        units=run.state.units(granularity, run.env.task.example),
        steps=min(choice.entry.facts["steps"], 3),
    )
    assert 0 < masks.kept <= round((1 - _sparsity(granularity)) * masks.total)


def test_reductions_by_hand() -> None:
    model = torch.nn.Conv2d(1, 2, (1, 2), bias=False)
    units: Units = registry.granularity.choose("kernel")(Network(model, {"weight": model.weight}, lambda: torch.ones(1, 1, 1, 2)))
    values = {"weight": torch.tensor([[[[1.0, 2.0]]], [[[3.0, -5.0]]]])}
    assert units.reduce(values, "mean")["weight"].tolist() == [[1.5], [-1.0]]
    assert units.reduce(values, "sum")["weight"].tolist() == [[3.0], [-2.0]]
    assert units.reduce(values, "squared_sum")["weight"].tolist() == [[9.0], [4.0]]
    assert units.reduce(values, "first")["weight"].tolist() == [[1.0], [3.0]]


def test_two_of_four_by_hand() -> None:
    units = Pattern({"w": torch.zeros(2, 6)}, 2, 4)
    scores = {"w": torch.tensor([[1.0, 4.0, 3.0, 2.0, 9.0, 8.0], [5.0, 5.0, 5.0, 5.0, 0.0, 1.0]])}
    masks = units.choose(scores, 0.5, registry.allocator.choose("uniform"), None)
    # Pieces of four, then a rest of two that keeps 2 * 2 / 4 = 1.
    assert masks["w"].int().tolist() == [[0, 1, 1, 0, 1, 0], [1, 1, 0, 0, 0, 1]]


def test_pattern_runs_along_input_channels_of_a_convolution() -> None:
    units = Pattern({"w": torch.zeros(1, 4, 1, 2)}, 1, 4)
    score = torch.zeros(1, 4, 1, 2)
    score[0, 2, 0, 0] = score[0, 1, 0, 1] = 1.0
    mask = units.choose({"w": score}, 0.75, registry.allocator.choose("uniform"), None)["w"]
    assert mask.nonzero().tolist() == [[0, 1, 0, 1], [0, 2, 0, 0]], "one of four input channels at each position"


@pytest.mark.parametrize(("n", "m"), [(1, 4), (2, 4), (3, 8), (1, 2)])
def test_every_pattern_keeps_at_most_n_of_m(n: int, m: int) -> None:
    network = _network()
    units = registry.granularity.choose("n_m", n=n, m=m)(network)
    masks = units.choose(_values(network), 1 - n / m, registry.allocator.choose("uniform"), None)
    for mask in masks.values():
        rows = mask.movedim(1, -1).reshape(len(mask), -1)
        pieces = rows[:, : rows.shape[1] // m * m].reshape(len(rows), -1, m).sum(-1)
        assert bool((pieces == n).all())
    with pytest.raises(UserError, match=f"granularity n_m keeps {n} of {m} weights, so sparsity must be"):
        units.choose(_values(network), 0.95, registry.allocator.choose("uniform"), None)
    with pytest.raises(UserError, match=r"granularity.n must be at least 1 and below granularity.m, got 4 and 4"):
        registry.granularity.choose("n_m", n=4)(network)


def test_a_removed_block_is_gone_with_all_that_only_it_feeds_and_the_signal_passes() -> None:
    network = _network()
    units = registry.granularity.choose("layer")(network)
    assert units.blocks == [(f"stage{i}.0.conv1.weight", f"stage{i}.0.conv2.weight") for i in (1, 2, 3)]
    values = {name: torch.full_like(weight, 5.0) for name, weight in network.weights.items()}
    values["stage2.0.conv1.weight"].fill_(0.1)
    values["stage2.0.conv2.weight"].fill_(0.1)
    masks = units.choose(units.reduce(values, "mean"), 0.1, registry.allocator.choose("global"), None)
    assert [name for name, count in masks.counts.items() if not count] == list(units.blocks[1])
    model = copy.deepcopy(network.model)
    masks.apply_(model)
    inputs = torch.randn(4, 1, 8, 8)
    assert model(inputs).std(0).min() > 0, "the shortcut carries the signal"


def test_a_plain_chain_has_no_layer_to_spare() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
    batches = [(torch.ones(1, 4), torch.tensor([0]))]
    with pytest.raises(UserError, match="granularity 'layer' needs layers that a signal can go around, Sequential has none"):
        prune(model, sparsity=0.5, granularity="layer", batches=batches)


def test_infeasible_budgets_name_the_largest_feasible_one() -> None:
    network = _network()
    for name in ("filter", "layer", "kernel"):
        units = registry.granularity.choose(name)(network)
        with pytest.raises(UserError, match="The largest feasible sparsity") as caught:
            units.check(0.9999)
        largest = float(str(caught.value).rstrip(".").split()[-1])
        units.check(largest)


def test_prune_takes_a_granularity() -> None:
    model = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3, bias=False), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(4 * 36, 2))
    batches = [(torch.ones(1, 1, 8, 8), torch.tensor([0]))]
    masks = prune(model, sparsity=0.5, granularity="filter", batches=batches)
    rows = masks["0.weight"].flatten(1).any(1)
    assert rows.sum() == 2 and torch.equal(masks["3.weight"].view(2, 4, 36).any(2).all(0), rows), "what reads a removed filter goes with it"
    with pytest.raises(UserError, match=r"granularity 'filter' runs the network: pass batches="):
        prune(model, sparsity=0.5, granularity="filter")
    with pytest.raises(UserError, match="allows one sparsity only, 0.5"):
        prune(model, sparsity=0.7, granularity="n_m", allocator="uniform")
    with pytest.raises(UserError, match="decides itself what each layer keeps, so allocator must be uniform, got 'global'"):
        prune(model, sparsity=0.5, granularity="n_m", allocator="global")
    assert prune(model, sparsity=0.5, granularity="n_m").sparsity >= 0.5, "left out, the allocator is the one that it asks for"
    for n, m in ((2, 0), (5, 4), (0, 4)):
        with pytest.raises(UserError, match="granularity.n must be at least 1 and below granularity.m"):
            prune(model, sparsity=0.5, granularity={"name": "n_m", "n": n, "m": m})


class Branches(torch.nn.Module):
    """Two parallel branches, either of which can go, but not both."""

    def __init__(self, first: int, second: int) -> None:
        super().__init__()
        self.a = torch.nn.Sequential(torch.nn.Linear(4, first), torch.nn.ReLU(), torch.nn.Linear(first, 4))
        self.b = torch.nn.Sequential(torch.nn.Linear(4, second), torch.nn.ReLU(), torch.nn.Linear(second, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.a(x) + self.b(x)


@pytest.mark.parametrize("widths", [(2, 30), (30, 2)])
def test_a_small_block_does_not_keep_a_large_one_in_place(widths: tuple[int, int]) -> None:
    model = Branches(*widths)
    small = model.a if widths[0] < widths[1] else model.b
    with torch.no_grad():
        for parameter in small.parameters():
            parameter.mul_(1e-3)  # by its score it goes first
    batches = [(torch.ones(1, 4), torch.tensor([0]))]
    masks = prune(model, sparsity=0.5, granularity="layer", batches=batches)
    assert masks.kept == sum(weight.numel() for weight in small.parameters() if weight.dim() > 1)
    torch.testing.assert_close(shrink(model, masks, batches[0][0])(batches[0][0]), masks.apply_(model)(batches[0][0]))


def test_pattern_of_a_transposed_convolution_is_along_its_inputs() -> None:
    model = torch.nn.ConvTranspose2d(8, 4, 1, bias=False)
    assert bool((prune(model, sparsity=0.5, granularity="n_m")["weight"].sum(0) == 4).all())


def test_shrink_takes_removed_channels_out_and_computes_the_same() -> None:
    network = _network()
    model = network.model.eval()
    batches = [(torch.randn(4, 1, 8, 8), torch.zeros(4, dtype=torch.long))]
    masks = prune(model, sparsity=0.4, granularity="filter", batches=batches)
    small = shrink(model, masks, batches[0][0][:1])
    assert sum(p.numel() for p in small.parameters()) < 0.65 * sum(p.numel() for p in model.parameters())
    assert sum(weight.numel() for weight in prunable(small).values()) == masks.kept
    before = copy.deepcopy(model)
    torch.testing.assert_close(small(batches[0][0]), masks.apply_(before)(batches[0][0]))
    scattered = prune(model, sparsity=0.5)
    sparse = scattered.apply_(copy.deepcopy(model))
    torch.testing.assert_close(shrink(model, scattered, batches[0][0][:1])(batches[0][0]), sparse(batches[0][0]))
