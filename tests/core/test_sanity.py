"""Sanity checks of a mask: the law of each variant, that nothing leaks, and that the verdict is right where the answer is known."""

import copy
import math
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from toys import PARADIGMS, finish, ready, recipe

from distprune.core import registry
from distprune.core.executor import Env
from distprune.core.hooks.hook import Hook, Memory
from distprune.core.masks import Masks
from distprune.core.plan import Plan
from distprune.core.run import Run, prepare
from distprune.core.sanity import Retrained, Subject, inverted, masks_of, retrain, sanity, start_of, subject_of
from distprune.core.stages import Prune
from distprune.core.state import State
from distprune.core.units import Weights
from distprune.errors import UserError
from distprune.report.sanity import Sanity, beats, differ, factor, learned, verdict

ROUNDS: dict[str, Any] = {"paradigm": {"name": "finetune", "share": 0.6, "tune": "25%"}, "sparsity": 0.8}
RESNET = {"name": "resnet_cifar", "depth": 8, "width": 4}
# Their masks are made inside a training.
WHILE_TRAINING = {
    "gradual", "set", "rigl", "snfs", "dsr", "granet", "supermask", "edge_popup", "biprop", "movement", "soft_filters",
    "greg", "gibbs", "posterior", "eye_surgeon",
}  # fmt: skip


def _found(run: Run) -> tuple[Run, dict[str, float]]:
    """A finished copy of a run and its final metrics."""
    done = Run(recipe=run.recipe, plan=run.plan, state=copy.deepcopy(run.state), env=run.env)
    return done, finish(done)[-1].metrics


def _subject(paradigm: Any = "finetune", **changes: Any) -> Subject:
    run = ready(paradigm, **changes)
    return subject_of(run, _found(run)[0].state.masks)


@pytest.mark.parametrize("paradigm", [name for name in PARADIGMS if "sparsity" in registry.paradigm.get(name).facts["uses"]])
def test_as_found_with_its_own_seed_is_the_trial_bit_for_bit(paradigm: str) -> None:
    run = ready(paradigm)
    done, metrics = _found(run)
    subject = subject_of(run, done.state.masks)
    assert (subject.prune is None) == (paradigm in WHILE_TRAINING)
    result = retrain(subject, "as found", run.env.seed)
    assert result.overlap == 1 and subject.differing == 0 and subject.notes == ()
    if subject.prune is not None:
        assert result.metrics == metrics and "inverted" in subject.variants
    else:
        assert "inverted" not in subject.variants and f"'{paradigm}'" in subject.protocol and "trained in full" in subject.protocol


@pytest.mark.parametrize(
    "changes",
    [
        {"paradigm": {"name": "lth", "share": 0.5, "rewind_to": "10%", "weights": weights}, "sparsity": 0.8}
        for weights in ("rewind", "inherit", "sign", "reinit")
    ]
    + [ROUNDS, {"paradigm": "scratch", "equal_cost": True}, {"paradigm": {"name": "finetune", "weights": "compensate"}, "sparsity": 0.5}],
    ids=["rewind", "inherit", "sign", "reinit", "rounds", "equal_cost", "compensate"],
)
def test_rounds_and_weights_policies_too(changes: dict[str, Any]) -> None:
    run = ready(**changes)
    done, metrics = _found(run)
    assert retrain(subject_of(run, done.state.masks), "as found", run.env.seed).metrics == metrics


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"granularity": "kernel", "sparsity": 0.6},
        {"granularity": "filter", "sparsity": 0.6},
        {"granularity": "channel", "sparsity": 0.6},
        {"granularity": "n_m", "sparsity": 0.5, "allocator": "uniform"},
        {"granularity": {"name": "n_m", "n": 1, "m": 4}, "sparsity": 0.75, "allocator": "uniform"},
    ],
    ids=["weight", "kernel", "filter", "channel", "2:4", "1:4"],
)
def test_variants_keep_counts_and_structure(changes: dict[str, Any]) -> None:
    subject = _subject(model=RESNET, **changes)
    assert subject.prune is not None
    units = subject.state.units(subject.prune.granularity, subject.run.env.task.example)
    for variant in ("shuffled", "inverted"):
        masks = masks_of(subject, variant, 1)
        assert masks.counts == subject.masks.counts and not masks.equal(subject.masks)
        assert units.expand(units.alive(masks)).equal(masks)
        if subject.prune.granularity.name == "n_m":
            n, m = (subject.prune.granularity.option(name) for name in ("n", "m"))
            rows = masks["stage1.0.conv1.weight"].movedim(1, -1).reshape(4, -1, m)
            assert (rows.sum(-1) == n).all()
    assert masks_of(subject, "random", 1).equal(masks_of(subject, "shuffled", 1)), "within a seed the two differ in their values alone"
    assert not masks_of(subject, "shuffled", 2).equal(masks_of(subject, "shuffled", 1))
    assert masks_of(subject, "inverted", 2).equal(masks_of(subject, "inverted", 1))


def test_whole_layers_are_drawn_anew_within_the_budget() -> None:
    subject = _subject(model=RESNET, granularity="layer", allocator="global", sparsity=0.3)
    found = [masks_of(subject, "shuffled", seed) for seed in range(6)]
    assert all(masks.kept <= (1 - 0.3) * masks.total and masks["fc.weight"].all() for masks in found)
    assert len({tuple(masks.counts.values()) for masks in found}) > 1


def test_inverted_keeps_the_lowest_among_the_alive_by_hand() -> None:
    scores = {"a": torch.tensor([5.0, 1.0, 3.0, 2.0, 4.0]), "b": torch.tensor([[1.0, 2.0]])}
    like = Masks({"a": torch.tensor([1, 0, 0, 0, 1]), "b": torch.tensor([[0, 1]])})
    alive = Masks({"a": torch.tensor([1, 0, 1, 1, 1]), "b": torch.tensor([[1, 1]])})
    prune = Prune(sparsity=0.5, criterion=registry.criterion.choose("magnitude"), allocator=registry.allocator.choose("erk"))
    lowest = inverted(Weights(like), scores, like, prune, alive)
    assert lowest["a"].tolist() == [False, False, True, True, False] and lowest["b"].tolist() == [[True, False]]
    assert inverted(Weights(like), scores, like, prune, None)["a"].tolist() == [False, True, False, True, False]


def test_inverted_is_the_lowest_magnitude_of_the_network_before_its_mask() -> None:
    subject = _subject("finetune")
    masks = masks_of(subject, "inverted", 0)
    for name, weight in subject.state.weights.items():
        assert weight[masks[name]].abs().max() <= weight[~masks[name]].abs().min()


def test_values_of_each_variant() -> None:
    subject = _subject("finetune")
    starts = {variant: start_of(subject, variant, masks_of(subject, variant, 0), 0) for variant in subject.variants}
    before = subject.state.values()
    for variant, state in starts.items():
        fresh = variant in ("reinitialised", "random")
        for name, weight in state.weights.items():
            mask = state.masks[name]
            assert not weight[~mask].any()
            assert not torch.equal(weight[mask], before[name][mask]) if fresh else torch.equal(weight[mask], before[name][mask])
        mean = state.model.get_buffer("1.running_mean")
        assert not mean.any() if fresh else torch.equal(mean, before["1.running_mean"])
    assert starts["reinitialised"].masks.equal(subject.masks) and starts["as found"].masks.equal(subject.masks)
    one, other = (starts[variant].weights["8.weight"] for variant in ("reinitialised", "random"))
    both = starts["reinitialised"].masks["8.weight"] & starts["random"].masks["8.weight"]
    assert both.any() and torch.equal(one[both], other[both]), "within a seed the new values are the same"


def test_weights_removed_in_earlier_rounds_come_back_with_their_last_values() -> None:
    subject = _subject(**ROUNDS)
    assert subject.state.masks.sparsity > 0
    masks = masks_of(subject, "shuffled", 0)
    assert not masks.nested_in(subject.state.masks), "the whole mask is shuffled, not what the last round did to it"
    state = start_of(subject, "shuffled", masks, 0)
    assert all(bool(weight[masks[name]].all()) for name, weight in state.weights.items())


def test_nothing_leaks_between_variants() -> None:
    subject = _subject(**ROUNDS)
    before, generator = subject.state.values(), torch.get_rng_state()
    first = list(sanity(subject, 2))
    assert all(torch.equal(value, before[name]) for name, value in subject.state.values().items())
    assert torch.equal(torch.get_rng_state(), generator)
    assert [(result.variant, result.seed) for result in first] == [(variant, seed) for seed in (0, 1) for variant in subject.variants]
    assert [retrain(subject, result.variant, result.seed) for result in reversed(first)] == first[::-1]
    assert first[0].metrics != first[5].metrics, "another seed is another order of the data"


def test_a_mask_that_is_not_made_again_is_checked_itself() -> None:
    run = ready("finetune")
    other = masks_of(subject_of(run, _found(run)[0].state.masks), "shuffled", 5)
    subject = subject_of(run, other)
    assert subject.masks.equal(other) and masks_of(subject, "as found", 0).equal(other)
    assert subject.differing > 0 and f"differs on {subject.differing:,} of {other.total:,} weights" in subject.notes[0]
    assert masks_of(subject, "inverted", 0).counts == other.counts


@dataclass(frozen=True, kw_only=True)
class Sly(Hook):
    """Changes masks and says nothing of it."""

    def step(self, memory: Memory, state: State, env: Env) -> bool:
        state.set_masks(
            Masks({name: mask & (torch.arange(len(mask.flatten())).view(mask.shape) > 0) for name, mask in state.masks.items()})
        )
        return False


def test_a_hook_that_changes_masks_unseen_is_an_error_and_not_a_number() -> None:
    run = ready("at_init", sparsity=0.5)
    prune, train = run.plan.stages
    run = Run(recipe=run.recipe, plan=Plan([prune, replace(train, hooks=(Sly(),))]), state=run.state, env=run.env)
    subject = subject_of(run, _found(ready("at_init", sparsity=0.5))[0].state.masks)
    with pytest.raises(UserError, match="changes masks after its last Prune, in a hook that does not say so"):
        retrain(subject, "as found", 0)


def test_what_cannot_be_checked() -> None:
    run = ready("finetune")
    with pytest.raises(UserError, match="it keeps every weight"):
        subject_of(run, run.state.masks)
    with pytest.raises(UserError, match="'0.weight' has a mask none and a weight"):
        subject_of(run, Masks({name: torch.zeros_like(mask) for name, mask in run.state.masks.items() if name != "0.weight"}))
    with pytest.raises(UserError, match=r"'6.weight' has a mask \(16, 96\) and a weight \(32, 96\)"):
        other = ready("finetune", model={"import": "toys:network", "hidden": 16}).state.masks
        subject_of(run, Masks({name: torch.zeros_like(mask) for name, mask in other.items()}))
    with pytest.raises(UserError, match="seeds must be at least 1, got 0"):
        list(sanity(_subject(), 0))


def _check(subject: Subject, seeds: int) -> Sanity:
    task = subject.run.env.task
    return Sanity(
        protocol=subject.protocol,
        notes=subject.notes,
        objective=task.objective,
        maximize=task.direction == "maximize",
        results=tuple(sanity(subject, seeds)),
    )


def test_a_mask_that_was_trained_for_is_known_from_a_random_one() -> None:
    """Magnitudes of a trained network, hardly fine-tuned, carry what it learned; a random mask carries its counts alone."""
    trained = _check(_subject({"name": "finetune", "tune": "2it"}, sparsity=0.7, train={"length": "12ep"}), 3)
    assert trained.verdict.weights is True and trained.verdict.values is True, trained.verdict.text
    at_random = _check(_subject("at_init", sparsity=0.7, criterion="random", train={"length": "12ep"}), 3)
    assert at_random.verdict.weights is False, at_random.verdict.text
    assert "Only layer budgets show" in at_random.verdict.text


def test_rows_by_hand() -> None:
    def result(variant: Any, seed: int, accuracy: float | None) -> Retrained:
        metrics = {} if accuracy is None else {"accuracy": accuracy}
        return Retrained(variant=variant, seed=seed, before={"accuracy": 0.1}, metrics=metrics, overlap=0.5)

    found = Sanity(
        protocol="",
        notes=(),
        objective="accuracy",
        maximize=True,
        results=[
            *(result("as found", seed, accuracy) for seed, accuracy in enumerate([0.9, 0.8, 1.0])),
            *(result("shuffled", seed, accuracy) for seed, accuracy in enumerate([0.8, 0.4, None])),
        ],
    )
    first, second = found.rows
    assert first.mean == pytest.approx(0.9) and first.std == pytest.approx(0.1) and first.difference is None
    assert second.mean == pytest.approx(0.6) and second.difference == pytest.approx(-0.25), "the seed that diverged is left out"
    assert second.error == pytest.approx(0.15), "differences -0.1 and -0.4: deviation 0.3 / sqrt(2), over sqrt(2)"
    assert second.overlap == 0.5 and math.isnan(second.values[2]) and found.seeds == [0, 1, 2]


def test_the_rule_by_hand() -> None:
    assert [factor(seeds) for seeds in (2, 3, 10, 50)] == [12.71, 4.30, 2.26, 2.26]
    assert differ([3.0, 5.0, 4.0], [1.0, 1.0, 1.0]) == (3.0, pytest.approx(1 / math.sqrt(3)))
    assert beats([3.0, 5.0, 4.0], [1.0, 1.0, 1.0], maximize=True) is True, "3 > 4.3 * 0.577 = 2.48"
    assert beats([3.0, 5.0, 4.0], [2.0, 2.0, 2.0], maximize=True) is False, "2 < 2.48"
    assert beats([3.0, 5.0, 4.0], [1.0, 1.0, 1.0], maximize=False) is False
    assert beats([1.0, 1.0, 1.0], [3.0, 5.0, 4.0], maximize=False) is True
    assert beats([1.0], [0.0], maximize=True) is None and beats([1.0, math.nan], [0.0, 0.0], maximize=True) is None


def test_verdicts_by_hand() -> None:
    good, bad = [0.90, 0.91, 0.92], [0.50, 0.52, 0.51]

    def of(shuffled: list[float], reinitialised: list[float], random: list[float], found: list[float] = good) -> Any:
        values: Any = {"as found": found, "shuffled": shuffled, "reinitialised": reinitialised, "random": random}
        return verdict(values, [0.08, 0.12], maximize=True)

    everything = of(bad, bad, bad)
    assert everything.weights and everything.values
    assert everything.text == (
        "The mask knows which weights to keep, not only how many in each layer: it beats shuffled (+0.4000 ± 0.0058). "
        "Its values count: it beats reinitialised (+0.4000 ± 0.0058)."
    )
    budgets = of(good, good, good)
    assert budgets.weights is False and budgets.values is False
    assert "Only layer budgets show" in budgets.text and "New values do as well" in budgets.text
    structure = of(bad, good, bad)
    assert structure.weights and structure.values is False
    assert "Mask and values count together only: it beats random" in of(good, good, bad).text
    assert "worse than its own layer budgets" in of(good, bad, bad, found=bad).text
    one = of(bad[:1], bad[:1], bad[:1], found=good[:1])
    assert one.weights is None and one.text == "One seed is not enough for a verdict. Take more seeds."
    assert of([math.nan] * 3, bad, bad).weights is None


def test_what_learned_nothing_by_hand() -> None:
    assert learned([0.19, 0.19], [0.08, 0.12, 0.10], maximize=True), "0.19 > 0.12 + 0.04"
    assert not learned([0.15, 0.15], [0.08, 0.12, 0.10], maximize=True)
    assert learned([1.9, math.nan], [2.3, 2.2], maximize=False) and not learned([2.15], [2.3, 2.2], maximize=False)
    found, nothing = [0.90, 0.91, 0.92], [0.10, 0.12, 0.11]
    values: Any = {"as found": found, "shuffled": nothing, "reinitialised": found, "random": nothing}
    text = verdict(values, [0.08, 0.12], maximize=True).text
    assert text.endswith("But shuffled learned nothing: in a longer training the gap may close.")
    values = {"as found": nothing, "shuffled": nothing, "reinitialised": nothing, "random": nothing}
    none = verdict(values, [0.08, 0.12], maximize=True)
    assert none.weights is None and none.values is None and none.text.startswith("No verdict: retrained as found, the network is no better")


def test_a_training_that_diverges_is_a_row_without_numbers() -> None:
    run = prepare(recipe("at_init", sparsity=0.5))
    masks = _found(run)[0].state.masks
    wild = prepare(recipe("at_init", sparsity=0.5, train={"optimizer": {"name": "sgd", "lr": 1e12}}))
    result = retrain(subject_of(wild, masks), "as found", 0)
    assert result.metrics == {}
