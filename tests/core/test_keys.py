"""Content keys: pinned, and equal exactly where the work is."""

from dataclasses import replace

import pytest
from toys import ready, recipe

from distprune.core.keys import canonical, digest, keys
from distprune.core.plan import Plan
from distprune.core.recipe import Recipe
from distprune.core.stages import SetWeights, Snapshot, Train

PINNED = {
    "at_init": "b58a3c3456075770",
    "dense": "4a65e0d403d9da95",
    "finetune": "6665415de4c75f50",
    "gradual": "92342405bc51422c",
    "lth": "673c321399b2cff2",
    "rigl": "4a2e1c8b088bf17f",
    "scratch": "b2376dd51f5b80c8",
}


def _recipe(paradigm: str) -> Recipe:
    train = {"length": "20it", "batch_size": 32}
    return Recipe.read(
        {
            "model": "lenet5",
            "data": "digits",
            "paradigm": paradigm,
            "sparsity": 0 if paradigm == "dense" else 0.5,
            "allocator": "erk",
            "train": train,
        }
    )


@pytest.mark.parametrize("paradigm", PINNED)
def test_keys_are_pinned(paradigm: str) -> None:
    """A change here orphans every cached stage of every user: raise a version instead of changing what a field means."""
    assert keys("root", _recipe(paradigm).plan(10))[-1][:16] == PINNED[paradigm]


def test_a_train_in_two_parts_has_the_key_of_the_whole() -> None:
    (whole,) = ready("dense").plan.stages
    assert isinstance(whole, Train)
    part = replace(whole, until=10)
    one = keys("root", Plan([whole]))[-1]
    assert keys("root", Plan([part, whole]))[-1] == one
    assert keys("root", Plan([part, Snapshot(tag="a"), whole]))[-1] == one, "a snapshot is transparent"
    again = replace(whole, since=0)
    assert keys("root", Plan([whole, replace(again, until=10), whole]))[-1] == keys("root", Plan([whole, again]))[-1]
    assert keys("root", Plan([whole, again]))[-1] != one, "a second lap is not a continuation"


def test_a_stage_that_reads_a_snapshot_has_its_key() -> None:
    (whole,) = ready("dense").plan.stages
    assert isinstance(whole, Train)
    rewind = SetWeights(policy="rewind", tag="r")

    def plan(step: int) -> Plan:
        return Plan([replace(whole, until=step), Snapshot(tag="r"), whole, rewind])

    assert keys("root", plan(10))[-1] != keys("root", plan(18))[-1], "rewinding to 10 and to 18 must not collide"
    assert keys("root", plan(10))[-2] == keys("root", plan(18))[-2], "what comes before is the same work"


def test_defaults_are_not_in_a_key() -> None:
    from distprune.core import registry

    assert registry.criterion.choose("snip", batches=1) == registry.criterion.choose("snip")
    assert canonical(registry.criterion.choose("snip", batches=2)) == {"name": "snip", "batches": 2}


def test_a_users_function_counts_with_its_file() -> None:
    assert set(canonical(recipe().model)) == {"name", "file"}


def test_two_targets_of_lth_share_their_rounds() -> None:
    a = keys("root", ready({"name": "lth", "share": 0.5}, sparsity=0.9).plan)
    b = keys("root", ready({"name": "lth", "share": 0.5}, sparsity=0.8).plan)
    shared = sum(x == y for x, y in zip(a, b, strict=False))
    assert shared == 2 + 2 * 3, "snapshot, dense training and the rounds at 0.5 and 0.75"


def test_digest_sees_every_part() -> None:
    assert len({digest("a"), digest("b"), digest("a", 1), digest({"a": 1})}) == 4
