"""Tables, options and the reading of configurations."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from toys import BASE

from distprune.core import registry
from distprune.core.lengths import check_length, to_steps
from distprune.core.options import REQUIRED, Choices, LogRange, Range
from distprune.core.recipe import Recipe
from distprune.core.registry import TABLES, Table
from distprune.core.schedules import cubic, exponential, rounds
from distprune.errors import UserError

CORE_TABLES = [table for table in TABLES.values() if table._room.startswith("distprune.core")]


@pytest.mark.parametrize("table", CORE_TABLES, ids=lambda table: table.kind)
def test_every_entry_is_documented_and_its_defaults_pass_its_own_check(table: Table) -> None:
    assert table.names()
    for entry in table:
        assert entry.summary, f"{entry.name} has no docstring"
        assert entry.file.exists()
        for option in entry.options.values():
            if option.default not in (REQUIRED, None):
                assert option.check(option.default, "default") == option.default
            if isinstance(option.search, Choices):
                assert all(option.check(value, "search") == value for value in option.values)
            if isinstance(option.search, Range):
                assert option.search.low < option.search.high and (not option.search.log or option.search.low > 0)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"paradigm": "lhh"}, "Unknown paradigm 'lhh'. Did you mean 'lth'?"),
        ({"paradim": "lth"}, "Unknown key in recipe: 'paradim'. Did you mean 'paradigm'?"),
        ({"criterion": {"name": "snip", "batch": 2}}, "Unknown option of recipe.criterion snip: 'batch'. Did you mean 'batches'?"),
        ({"criterion": {"name": "snip", "batches": "two"}}, "recipe.criterion.batches must be a whole number, got 'two'"),
        ({"sparsity": 1.0}, r"recipe.sparsity must be in \[0, 1\), got 1.0. To keep 5 % of the weights write 0.95."),
        ({"sparsity": "much"}, "recipe.sparsity must be a number, got 'much'"),
        ({"sparsity": "95 %"}, "recipe.sparsity must be a number, got '95 %'. Write 0.95."),
        ({"train": {"batch_size": "64"}}, "train.batch_size must be a whole number, got '64'. Write 64."),
        ({"train": "20ep"}, "recipe.train must be a mapping of keys, got '20ep'. Write {length: ..., batch_size: ..., optimizer: ...}."),
        ({"train": {"length": 20}}, "train.length must be a length with a unit, got 20. Write '20ep'"),
        ({"train": {"length": "20%"}}, "train.length must be in epochs or steps, got '20%'"),
        ({"train": {"batch_size": 0}}, "batch_size must be at least 1, got 0"),
        ({"precision": "fp8"}, "Unknown value for recipe.precision: 'fp8'. .*Known: bf16, fp32"),
        ({"allocator": "per_layer"}, "recipe.allocator per_layer needs shares"),
        ({"model": {"import": "nowhere:net"}}, "model.import: cannot import 'nowhere'"),
        ({"model": {"import": "toys:netwrk"}}, "Unknown name in toys: 'netwrk'. Did you mean 'network'?"),
        ({"model": {"import": "toys"}}, "model.import must be 'package.module:function', got 'toys'"),
        ({"model": 3}, "recipe.model must be a name or a mapping with 'name' or 'import', got 3"),
    ],
)
def test_mistakes_are_one_line_with_rule_value_and_way_out(value: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        Recipe.read({**BASE, "paradigm": "at_init", "sparsity": 0.5, **value})
    assert "\n" not in str(caught.value)


def test_missing_keys_are_named() -> None:
    with pytest.raises(UserError, match="recipe needs 'data'"):
        Recipe.read({"model": "mlp", "paradigm": "dense"})


def test_a_recipe_is_what_its_plain_form_reads_as() -> None:
    value = {
        **BASE,
        "paradigm": {"name": "lth", "share": 0.3},
        "sparsity": 0.5,
        "allocator": {"name": "per_layer", "shares": {"0.weight": 0.5}},
    }
    recipe = Recipe.read(value)
    assert Recipe.read(recipe.plain()) == recipe


def test_an_entry_cannot_be_entered_twice() -> None:
    with pytest.raises(TypeError, match="criterion 'snip' is entered twice"):
        registry.criterion.names() and registry.criterion("snip")(lambda probe: {})


def test_lengths() -> None:
    assert to_steps("2ep", steps_per_epoch=10) == 20 and to_steps("0.5ep", steps_per_epoch=5) == 3
    assert to_steps("25%", steps_per_epoch=1, whole=40) == 10 and check_length("7it", "x") == "7it"


@given(st.floats(0.01, 0.999), st.floats(0.05, 1.0))
def test_rounds_rise_to_exactly_the_target(sparsity: float, share: float) -> None:
    steps = rounds(sparsity, share=share)
    assert steps[-1] == sparsity and steps == sorted(set(steps))


def test_schedules_by_hand() -> None:
    assert rounds(0.6, share=0.5) == [0.5, 0.6]
    assert rounds(0.75, share=0.5) == [0.5, 0.75], "the last round is not split by rounding"
    assert cubic(0.0, 0.8, 0.5) == pytest.approx(0.7) and cubic(0.2, 0.8, 0) == pytest.approx(0.2) and cubic(0, 0.8, 2) == 0.8
    assert exponential(0.0, 0.99, 0.5) == pytest.approx(0.9) and exponential(0.3, 0.9, 1.0) == 0.9
    assert LogRange(1, 2).log and not Range(1, 2).log
