"""Sanity checks of a mask: does it know which weights to keep, or only how many in each layer?

Frankle et al. 2021 (arXiv:2009.08576, section 5) and Su et al. 2020 (arXiv:2009.11094) ask it of pruning at initialization, and the checks
hold for any mask. What it may know is taken away, the mask and the values each alone and both together, and what is left is retrained:

                                        the network's values    values drawn anew
    the mask                            as found                reinitialised
    a random one of equal layer counts  shuffled                random (a random ticket)

A mask shuffled within its layers and a random one of the same counts are one distribution, so the two rows differ in their values.
`inverted` keeps the units of the lowest score, as many in each layer. Within a seed, variants share the order of the data, the random mask
and the new values.
"""

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from distprune.core.budgets import top_masks
from distprune.core.executor import Env, execute
from distprune.core.lengths import to_steps
from distprune.core.loop import Diverged
from distprune.core.masks import Masks
from distprune.core.plan import Plan, Stage
from distprune.core.recipe import Recipe
from distprune.core.run import Run
from distprune.core.scoring import Probe, unit_scores
from distprune.core.stages import Prune, SetWeights, Train
from distprune.core.state import State
from distprune.core.streams import global_stream, stream
from distprune.core.units import Units
from distprune.errors import UserError

Variant = Literal["as found", "shuffled", "reinitialised", "random", "inverted"]
_AT_THE_END = 2**62  # steps between reports: variants are measured once


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A mask, the network as it was when the mask was chosen, and what is left to do from there."""

    run: Run
    masks: Masks
    state: State  # of the network before the mask: removed weights have the last value that they had
    values: tuple[Stage, ...]  # what the plan does to the values of a mask before it trains them
    plan: Plan
    stage: int  # of `plan`, where retraining begins
    prune: Prune | None  # what chose the masks; None where that is not a stage between trainings
    lowest: Masks | None  # the masks of its lowest scores
    differing: int = 0  # weights on which a mask that was made again is not the one given

    @property
    def variants(self) -> tuple[Variant, ...]:
        """Those that apply."""
        every: tuple[Variant, ...] = ("as found", "shuffled", "reinitialised", "random")
        return every if self.prune is None else (*every, "inverted")

    @property
    def protocol(self) -> str:
        """What is retrained, in one line."""
        length = full_training(self.run).until
        if self.prune is None:
            return (
                f"Paradigm '{self.run.recipe.paradigm.name}' does not choose its masks between trainings, so they are checked as a ticket: "
                f"each variant is the untrained network, trained in full under fixed masks, {length} steps. Inverted does not apply."
            )
        steps, clock = 0, self.state.clock
        for stage in self.plan.stages[self.stage :]:
            if isinstance(stage, Train):
                steps += stage.until - (clock if stage.since is None else stage.since)
            clock = stage.advance(clock)
        return (
            "Each variant starts from the network as it was when its masks were chosen and is finished as the recipe says: "
            f"{steps} steps, where a training from the start has {length}."
        )

    @property
    def notes(self) -> tuple[str, ...]:
        """What else must be known to read the numbers."""
        if not self.differing:
            return ()
        return (
            f"Made again, the mask differs on {self.differing:,} of {self.masks.total:,} weights: another machine, torch or number of "
            "threads. The mask given is checked, on the network made again.",
        )


@dataclass(frozen=True, kw_only=True)
class Retrained:
    """A variant after retraining with a seed."""

    variant: Variant
    seed: int
    before: dict[str, float]  # metrics of the validation split, under the masks and not yet retrained
    metrics: dict[str, float]  # the same after it; empty where training diverged
    overlap: float  # share of the kept weights that the mask as found keeps too


def subject_of(run: Run, masks: Masks) -> Subject:
    """Run the plan of `run`, as `prepare` gives it, to where its last masks are chosen. Raises UserError where there is no mask to check.

    Where a hook makes the masks, or nothing is trained after them, there is no such point: then `masks` are checked as a ticket, on the
    untrained network.
    """
    _check(run, masks)
    masks = masks.to(run.env.device)
    index = _last_prune(run.plan)
    if index is None:
        plan = Plan([full_training(run)])
        return Subject(run=run, masks=masks, state=run.state, values=(), plan=plan, stage=0, prune=None, lowest=None)
    prune, stages = run.plan.stages[index], run.plan.stages
    assert isinstance(prune, Prune)
    after = next(i for i in range(index + 1, len(stages)) if not isinstance(stages[i], SetWeights))
    with torch.random.fork_rng(_devices(run.env)):
        state, values = _before(run, index)
        lowest = _lowest(state, prune, masks, run.env)
        found = copy.deepcopy(state)
        _finish(Plan(stages[: index + 1]), found, run.env)
    with torch.no_grad():
        for name, weight in state.weights.items():
            weight.copy_(values[name])
    state.ledger = found.ledger
    return Subject(
        run=run,
        masks=masks,
        state=state,
        values=stages[index + 1 : after],
        plan=run.plan,
        stage=after,
        prune=prune,
        lowest=lowest,
        differing=sum(int((mask != found.masks[name]).sum()) for name, mask in masks.items()),
    )


def sanity(subject: Subject, seeds: int) -> Iterator[Retrained]:
    """Retrain every variant with `seeds` seeds, the run's own first: with it, `as found` is the run itself."""
    check_seeds(seeds)
    for seed in range(subject.run.env.seed, subject.run.env.seed + seeds):
        for variant in subject.variants:
            yield retrain(subject, variant, seed)


def check_seeds(seeds: int) -> None:
    """Raise UserError if there is no seed."""
    if seeds < 1:
        raise UserError(f"seeds must be at least 1, got {seeds}. Write 3: a verdict needs two.")


def retrain(subject: Subject, variant: Variant, seed: int) -> Retrained:
    """One variant, trained and measured; nothing of it stays in the subject. A network that diverges has no metrics."""
    run = subject.run
    env = replace(run.env, seed=seed, report_every=_AT_THE_END)
    with torch.random.fork_rng(_devices(env)):
        masks = masks_of(subject, variant, seed)
        state = start_of(subject, variant, masks, seed)
        with env.autocast():
            before = env.task.metrics(state.model, "validation")
    state.stage = subject.stage
    try:
        *_, last = execute(subject.plan, state, env)
        metrics = last.metrics
    except Diverged:
        metrics = {}
    if metrics and not state.masks.equal(masks):
        raise UserError(
            f"paradigm '{run.recipe.paradigm.name}' changes masks after its last Prune, in a hook that does not say so. "
            "Give that hook a field `sparsity`, or `regrows = True`."
        )
    both = sum(int((mask & subject.masks[name]).sum()) for name, mask in masks.items())
    return Retrained(variant=variant, seed=seed, before=before, metrics=metrics, overlap=both / masks.kept)


def masks_of(subject: Subject, variant: Variant, seed: int) -> Masks:
    """The masks of a variant."""
    if variant in ("shuffled", "random"):
        how = subject.prune or subject.run.recipe
        units = subject.state.units(how.granularity, subject.run.env.task.example)
        return shuffled(units, subject.masks, how, stream(seed, "sanity masks"))
    if variant == "inverted":
        assert subject.lowest is not None
        return subject.lowest
    return subject.masks


@torch.no_grad()
def start_of(subject: Subject, variant: Variant, masks: Masks, seed: int) -> State:
    """The state from which a variant is trained: a copy."""
    env = subject.run.env
    state = copy.deepcopy(subject.state)
    state.set_masks(masks)
    for stage in subject.values:
        for _ in stage.run(state, env):
            pass
    if variant in ("reinitialised", "random"):
        with global_stream(seed, "sanity values"):
            fresh = env.build()
        state.model.load_state_dict(fresh.state_dict())
        state.memory = {}
        state.zero_removed()
    return state


def shuffled(units: Units, masks: Masks, how: Prune | Recipe, generator: torch.Generator) -> Masks:
    """Random masks of as many units in each layer; patterns and whole layers, which set these numbers themselves, are drawn anew."""
    scores = {
        name: torch.rand(kept.shape, generator=generator, dtype=torch.float64).to(kept.device) for name, kept in units.alive(masks).items()
    }
    return _best(units, scores, masks, how)


def inverted(units: Units, scores: Mapping[str, Tensor], masks: Masks, prune: Prune, alive: Masks | None) -> Masks:
    """Masks of as many units in each layer, those of the lowest score; with `alive`, only of those that it keeps."""
    negative = {name: -score for name, score in scores.items()}
    return _best(units, negative, masks, prune, alive)


def _best(units: Units, scores: Mapping[str, Tensor], like: Masks, how: Prune | Recipe, alive: Masks | None = None) -> Masks:
    if how.granularity.entry.facts["allocator"]:  # the granularity decides itself what each layer keeps
        return units.choose(scores, how.sparsity, how.allocator, alive)
    counts = {name: int(kept.sum()) for name, kept in units.alive(like).items()}
    return units.expand(top_masks(scores, counts, None if alive is None else units.alive(alive)))


def _lowest(state: State, prune: Prune, masks: Masks, env: Env) -> Masks:
    """By the scores that the stage ranks first: an iterative criterion is inverted in one step."""
    units, draw = state.units(prune.granularity, env.task.example), (state.lap, state.clock, 1)
    probe = Probe(state.model, env.task, state.masks, seed=env.seed, draw=draw, batch_size=prune.batch_size, units=units)
    with global_stream(env.seed, "scoring", *draw), torch.enable_grad():
        scores = unit_scores(probe, prune.criterion)
    return inverted(units, scores, masks, prune, state.masks if prune.nested else None)


def _before(run: Run, index: int) -> tuple[State, dict[str, Tensor]]:
    """The state before stage `index`, and the weights with the removed ones as they were when they were removed.

    Between rounds removed weights are zero: a shuffled mask would keep these, and be blamed for it.
    """
    state = copy.deepcopy(run.state)
    values: dict[str, Tensor] = {}
    for position, stage in enumerate(run.plan.stages[: index + 1]):
        if isinstance(stage, Prune):
            _finish(Plan(run.plan.stages[:position]), state, run.env)
            for name, weight in state.weights.items():
                values[name] = torch.where(state.masks[name], weight.detach(), values.get(name, weight.detach()))
    return state, values


def _finish(plan: Plan, state: State, env: Env) -> None:
    for _ in execute(plan, state, replace(env, report_every=_AT_THE_END)):
        pass


def _last_prune(plan: Plan) -> int | None:
    """Where the final masks are chosen; None if a hook chooses them, or if nothing is trained afterwards."""
    index = max((i for i, stage in enumerate(plan.stages) if isinstance(stage, Prune)), default=None)
    after = () if index is None else tuple(stage for stage in plan.stages[index:] if isinstance(stage, Train))
    makes_masks = any(hook.regrows or hasattr(hook, "sparsity") for stage in after for hook in stage.hooks)
    return index if after and not makes_masks else None


def full_training(run: Run) -> Train:
    """The recipe's training from the start."""
    steps = to_steps(run.recipe.train.length, steps_per_epoch=run.env.task.steps_per_epoch(run.recipe.train.batch_size))
    recipe = replace(run.recipe, train=replace(run.recipe.train, length=steps))
    return recipe.training(until=steps)


def _check(run: Run, masks: Masks) -> None:
    if masks.kept == masks.total:
        raise UserError("There is no mask to check: it keeps every weight. Choose a pruned trial.")
    weights = run.state.weights
    wrong = next((n for n in [*weights, *masks] if n not in masks or n not in weights or masks[n].shape != weights[n].shape), None)
    if wrong is not None:
        given, due = (tuple(tensors[wrong].shape) if wrong in tensors else "none" for tensors in (masks, weights))
        raise UserError(
            f"The masks are of another network: '{wrong}' has a mask {given} and a weight {due}. Give masks together with their own recipe."
        )


def _devices(env: Env) -> list[torch.device]:
    return [env.device] if env.device.type == "cuda" else []
