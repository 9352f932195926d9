"""Laws of budgets: exact, feasible, monotone, and the formulas by hand."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distprune.core import registry
from distprune.core.budgets import Layer, allocate, check_sparsity, kept_for, layers_of, top_masks
from distprune.core.masks import Masks
from distprune.core.registry import Choice
from distprune.core.units import Weights
from distprune.errors import UserError

SHAPES = {"conv": (4, 1, 3, 3), "tiny": (2, 3), "wide": (50, 40), "head": (10, 50)}


def choices() -> list[Choice]:
    """Every allocator, with a number for some layers where it wants some."""
    return [registry.allocator.choose(entry.name, **_some(entry.name, {"conv": 0.05, "wide": 1.0})) for entry in registry.allocator]


def _some(name: str, numbers: dict[str, float]) -> dict[str, dict[str, float]]:
    return {option: numbers for option in registry.allocator.get(name).options if option in ("shares", "keep")}


def scores_of(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.rand(shape, generator=generator) for name, shape in shapes.items()}


@pytest.mark.parametrize("choice", choices(), ids=lambda choice: choice.name)
@settings(max_examples=40, deadline=None)
@given(sparsity=st.floats(0, 0.9983), seed=st.integers(0, 5))
def test_every_feasible_budget_is_met_exactly(choice: Choice, sparsity: float, seed: int) -> None:
    layers = layers_of(SHAPES)
    kept = kept_for(sparsity, layers)
    counts = allocate(choice, layers, kept, scores_of(SHAPES, seed))
    assert sum(counts.values()) == kept
    assert all(1 <= counts[layer.name] <= layer.units for layer in layers)


@pytest.mark.parametrize("choice", choices(), ids=lambda choice: choice.name)
def test_nested_budgets_never_ask_for_more_than_is_alive(choice: Choice) -> None:
    alive = Masks.ones(scores_of(SHAPES))
    for step in range(1, 40):
        scores = scores_of(SHAPES, step)
        layers = layers_of(SHAPES, alive)
        kept = kept_for(step / 40, layers)
        masks = top_masks(scores, allocate(choice, layers, kept, scores, alive), alive)
        assert masks.kept == kept and masks.nested_in(alive)
        alive = masks


def test_infeasible_budget_is_refused_with_the_largest_feasible_sparsity() -> None:
    with pytest.raises(UserError, match=r"at least one unit in each of 4 layers, got 0.9999 .* largest feasible sparsity is 0.998426"):
        kept_for(0.9999, layers_of(SHAPES))
    assert kept_for(0.998426, layers_of(SHAPES)) == 4


@pytest.mark.parametrize("value", [1.0, -0.1, 2.0])
def test_sparsity_says_rule_value_and_way_out(value: float) -> None:
    with pytest.raises(UserError, match=rf"sparsity must be in \[0, 1\), got {value}. To keep 5 % of the weights write 0.95."):
        check_sparsity(value)


def test_erk_by_hand() -> None:
    # Densities in proportion to (2+8)/16 and (8+8)/64: counts 10 : 16, and 13 weights of 80 are 5 and 8.
    layers = layers_of({"a": (2, 8), "b": (8, 8)})
    assert allocate(registry.allocator.choose("erk"), layers, 13) == {"a": 5, "b": 8}


def test_erk_makes_layers_dense_that_would_exceed_one() -> None:
    layers = layers_of({"a": (1, 3), "b": (10, 10)})
    assert allocate(registry.allocator.choose("erk"), layers, 53) == {"a": 3, "b": 50}


def test_global_is_one_threshold() -> None:
    scores = {"a": torch.tensor([5.0, 1.0, 4.0]), "b": torch.tensor([3.0, 2.0])}
    layers = layers_of({"a": (3,), "b": (2,)})
    counts = allocate(registry.allocator.choose("global"), layers, 3, scores)
    masks = top_masks(scores, counts)
    assert counts == {"a": 2, "b": 1}
    assert masks["a"].tolist() == [True, False, True] and masks["b"].tolist() == [True, False]


def test_global_leaves_one_weight_in_the_worst_layer() -> None:
    scores = {"a": torch.tensor([5.0, 4.0, 3.0]), "b": torch.tensor([0.1, 0.2])}
    assert allocate(registry.allocator.choose("global"), layers_of({"a": (3,), "b": (2,)}), 2, scores) == {"a": 1, "b": 1}


def test_lamp_by_hand() -> None:
    # a: 1, 4, 9 -> 1/14, 4/13, 1; b: 1, 1 -> 1/2, 1. The best three are a's 1, b's 1 and b's 1/2.
    scores = {"a": torch.tensor([1.0, 2.0, 3.0]), "b": torch.tensor([1.0, 1.0])}
    assert allocate(registry.allocator.choose("lamp"), layers_of({"a": (3,), "b": (2,)}), 3, scores) == {"a": 1, "b": 2}


def test_power_with_zero_exponents_is_uniform_and_negative_size_spares_small_layers() -> None:
    layers = layers_of({"small": (10,), "large": (1000,)})
    flat = allocate(registry.allocator.choose("power", size=0.0), layers, 101)
    assert flat == allocate(registry.allocator.choose("uniform"), layers, 101) == {"small": 1, "large": 100}
    assert allocate(registry.allocator.choose("power", size=-0.5), layers, 101)["small"] == 9


def test_per_layer_follows_its_shares() -> None:
    layers = layers_of({"a": (100,), "b": (100,)})
    counts = allocate(registry.allocator.choose("per_layer", shares={"a": 0.1, "b": 0.3}), layers, 40)
    assert counts == {"a": 10, "b": 30}
    with pytest.raises(UserError, match="Unknown layer in allocator.shares: 'c'. .*Known: a, b"):
        allocate(registry.allocator.choose("per_layer", shares={"c": 1.0}), layers, 40)


def test_ties_go_to_the_lower_index_and_never_keep_too_many() -> None:
    masks = top_masks({"a": torch.zeros(5)}, {"a": 2})
    assert masks["a"].tolist() == [True, True, False, False, False]


def test_scores_that_are_not_finite_are_refused() -> None:
    with pytest.raises(UserError, match="Scores of 'a' must be finite"):
        top_masks({"a": torch.tensor([1.0, math.nan])}, {"a": 1})


@pytest.mark.parametrize("name", registry.allocator.names())
def test_scores_that_are_not_finite_are_refused_whatever_the_allocator(name: str) -> None:
    scores = {"a": torch.tensor([1.0, math.nan, 2.0]), "b": torch.tensor([1.0, 2.0, 3.0])}
    units = Weights(scores)
    with pytest.raises(UserError, match="Scores of 'a' must be finite"):
        units.choose(scores, 0.5, registry.allocator.choose(name, **_some(name, {"a": 1.0})), None)


def test_lamp_does_not_see_removed_units() -> None:
    scores, alive = torch.tensor([-3.0, -1.0, 2.0]), torch.ones(3, dtype=torch.bool)
    more = torch.cat([scores, torch.zeros(5)]), torch.cat([alive, torch.zeros(5, dtype=torch.bool)])
    other = torch.tensor([0.05, 0.1, 1.0])
    for kept in range(2, 6):
        few = allocate(registry.allocator.choose("lamp"), layers_of({"a": (3,), "b": (3,)}), kept, {"a": scores, "b": other})
        masks = {"a": more[1], "b": alive}
        many = allocate(
            registry.allocator.choose("lamp"), layers_of({"a": (8,), "b": (3,)}, masks), kept, {"a": more[0], "b": other}, masks
        )
        assert few == many


def test_every_weight_is_a_unit_by_default() -> None:
    assert layers_of({"a": (2, 3)})[0] == Layer("a", (2, 3), 6, 6, 0.0)
