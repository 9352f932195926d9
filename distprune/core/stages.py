"""The stages that plans are made of."""

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import nn

from distprune.core.allocation import fits
from distprune.core.hooks.hook import Hook, slot, viewed
from distprune.core.hooks.updates import Gradual
from distprune.core.loop import train
from distprune.core.plan import Stage
from distprune.core.registry import WEIGHT, Choice
from distprune.core.scoring import choose_masks, scoring_samples
from distprune.core.streams import global_stream, stream
from distprune.core.weights import POLICIES

if TYPE_CHECKING:
    from distprune.core.executor import Env
    from distprune.core.state import State


@dataclass(frozen=True, kw_only=True)
class Train(Stage):
    """Train until the clock reads `until`.

    `since=None` goes on from where the clock is. A number sets the clock, begins a lap and clears the optimizer: 0 replays the
    learning-rate schedule, `config.length` trains at the last rate. A hook may end the stage earlier.
    `train="scores"` trains the state's leaves, which a hook makes at the start and gives gradients, in place of the weights.
    `spend` is the bill (samples) of the whole run at which the stage ends, in place of `until`: it takes what an earlier stage left.
    """

    measured: ClassVar[bool] = True
    config: Any  # TrainConfig with its length in steps
    until: int
    since: int | None = None
    hooks: tuple[Hook, ...] = ()
    train: Literal["weights", "scores"] = "weights"
    spend: int | None = None

    @property
    def is_empty(self) -> bool:
        return self.until == (self.since or 0)

    def joined(self, before: Stage) -> "Train | None":
        continues = isinstance(before, Train) and self.since is None and not self.may_end_early  # what has ended is not gone on with
        if isinstance(before, Train) and continues and replace(before, until=self.until, since=None) == self:
            return replace(self, since=before.since)
        return None

    def enter(self, state: "State", env: "Env") -> None:
        if self.since is not None:
            state.clock, state.lap, state.memory = self.since, state.lap + 1, {}
        for index, hook in enumerate(self.hooks):
            state.slots[slot(index, hook)] = {}
            hook.start(state.slots[slot(index, hook)], state, env)

    def run(self, state: "State", env: "Env") -> Iterator[None]:
        yield from train(self, state, env)

    def leave(self, state: "State", env: "Env") -> None:
        for index, hook in enumerate(self.hooks):
            hook.end(state.slots.pop(slot(index, hook)), state, env)

    def goes_on(self, state: "State") -> bool:
        """Whether there is another step."""
        if self.spend is not None:
            return state.ledger.cost + int(self.config.batch_size) <= self.spend
        return state.clock < self.until

    def reports_now(self, state: "State", env: "Env") -> bool:
        return state.clock % env.report_every == 0 and self.goes_on(state)

    def horizon(self, state: "State") -> int:
        """The step at which the learning rate has come to its end."""
        if self.spend is not None:
            return state.clock + (self.spend - state.ledger.cost) // int(self.config.batch_size)
        return int(self.config.length)

    @property
    def may_end_early(self) -> bool:
        """Whether `until` is only the most."""
        return any(hook.may_end for hook in self.hooks)

    def viewing(self, state: "State", env: "Env") -> AbstractContextManager[None]:
        return viewed(self.hooks, state, env, train=False)

    def advance(self, clock: int) -> int:
        return self.until

    def samples(self, clock: int) -> int:
        start = clock if self.since is None else self.since
        updates = [hook for hook in self.hooks if isinstance(hook, Gradual)]
        scoring = sum(hook.samples_per_update * sum(map(hook.due, range(start + 1, self.until + 1))) for hook in updates)
        return (self.until - start) * int(self.config.batch_size) + scoring

    def describe(self) -> str:
        hooks = "".join(f" + {type(hook).__name__}" for hook in self.hooks)
        since = "" if self.since is None else f" from {self.since}"
        most = "at most " if self.may_end_early else ""
        what = "learn scores" if self.train == "scores" else ""
        return f"{what}{since} {most}until step {self.until} of {self.config.length}{hooks}".strip()


@dataclass(frozen=True, kw_only=True)
class Prune(Stage):
    """Remove weights until the network has `sparsity`, in `steps` exponential steps with new scores at each.

    SynFlow is `steps=100`; FORCE is SNIP with steps and `nested=False`.
    """

    sparsity: float
    criterion: Choice
    allocator: Choice
    granularity: Choice = WEIGHT
    steps: int = 1
    nested: bool = True
    batch_size: int = 128

    def run(self, state: "State", env: "Env") -> Iterator[None]:
        masks = choose_masks(
            state.model,
            env.task,
            state.masks,
            sparsity=self.sparsity,
            criterion=self.criterion,
            allocator=self.allocator,
            units=state.units(self.granularity, env.task.example),
            steps=self.steps,
            nested=self.nested,
            seed=env.seed,
            draw=(state.lap, state.clock),
            batch_size=self.batch_size,
        )
        state.bill("scoring", self.samples(state.clock), env.task.example)
        state.set_masks(masks)
        yield from ()

    def samples(self, clock: int) -> int:
        return scoring_samples(self.criterion, self.steps, self.batch_size)

    def describe(self) -> str:
        steps = f" in {self.steps} steps" if self.steps > 1 else ""
        steps += "" if self.nested else " from which weights may return"
        units = "" if self.granularity.name == "weight" else f" of {self.granularity.name}s"
        return f"to sparsity {self.sparsity:.4g} by {self.criterion.name}, {self.allocator.name}{units}{steps}"


@dataclass(frozen=True, kw_only=True)
class Snapshot(Stage):
    """Remember parameters and buffers under a name."""

    tag: str

    @property
    def writes(self) -> str:
        return self.tag

    def run(self, state: "State", env: "Env") -> Iterator[None]:
        state.snapshots[self.tag] = state.values()
        yield from ()

    def describe(self) -> str:
        return f"remember the weights as '{self.tag}'"


@dataclass(frozen=True, kw_only=True)
class SetWeights(Stage):
    """Give the kept weights other values, by a policy of `weights.py`. Inheriting them needs no stage.

    `tag` is the snapshot that rewind, sign, compensate and rescale read; `batches` of `batch_size` is what the last two look at. `sigma_w`
    (draw, rescale) and `sigma_b` (draw) are the standard deviations of a layer's weights, times the root of its fan-in, and of its biases.
    """

    policy: Literal["rewind", "reinit", "shuffle", "sign", "compensate", "draw", "rescale"]
    tag: str = ""
    batches: int = 0
    batch_size: int = 0
    sigma_w: float = 0.0
    sigma_b: float = 0.0

    @property
    def reads(self) -> str | None:
        return self.tag or None

    def run(self, state: "State", env: "Env") -> Iterator[None]:
        POLICIES[self.policy](self, state, env)
        # `rescale` shows a batch to both networks and to each rescaled layer once more.
        state.bill("scoring", self.samples(state.clock), env.task.example, passes=3 if self.policy == "rescale" else 1)
        state.memory = {}
        state.zero_removed()
        yield from ()

    def samples(self, clock: int) -> int:
        return self.batches * self.batch_size

    def describe(self) -> str:
        return {
            "rewind": f"rewind the kept weights to '{self.tag}'",
            "reinit": "draw the kept weights anew",
            "shuffle": "shuffle the kept weights of each layer",
            "sign": f"give the kept weights the signs they have in '{self.tag}' and one size a layer",
            "compensate": f"fit the kept weights to what the layers of '{self.tag}' compute, on {self.batches} batches",
            "draw": f"draw weights with sigma_w = {self.sigma_w:.4g} and sigma_b = {self.sigma_b:.4g}",
            "rescale": "rescale each layer that no normalization follows to "
            + (f"the signals of '{self.tag}'" if self.tag else f"sigma_w = {self.sigma_w:.4g}"),
        }[self.policy]


@dataclass(frozen=True, kw_only=True)
class Calibrate(Stage):
    """Estimate the statistics of batch normalisation anew, as the plain mean over `batches` training batches."""

    measured: ClassVar[bool] = True
    batches: int
    batch_size: int

    def run(self, state: "State", env: "Env") -> Iterator[None]:
        calibrate(state, env, self.batches, self.batch_size)
        state.bill("scoring", self.samples(state.clock), env.task.example, passes=1)
        yield from ()

    def samples(self, clock: int) -> int:
        return self.batches * self.batch_size

    def describe(self) -> str:
        return f"estimate batch-norm statistics from {self.batches} batches"


@torch.no_grad()
def calibrate(state: "State", env: "Env", batches: int, batch_size: int) -> int:
    """Replace running statistics of batch normalisation by their mean over `batches` batches; other buffers and modes stay.

    Returns how many samples that took: none without such statistics.
    """
    norms = [
        module for module in state.model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats
    ]
    if not norms:
        return 0
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a cumulative average
    state.model.train()
    generator = stream(env.seed, "calibrate", state.lap, state.clock)
    with global_stream(env.seed, "calibrate", state.lap, state.clock), env.autocast():
        for _ in range(batches):
            for part in env.task.parts(env.task.draw(generator, batch_size)):
                with fits(env.task.samples(part)):
                    env.task.outputs(state.model, part)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return batches * batch_size
