"""Recipes: everything that one trial's result depends on, as frozen plain data."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

from distprune.core import registry
from distprune.core.budgets import check_sparsity
from distprune.core.config import read_fields
from distprune.core.hooks.hook import Hook
from distprune.core.legality import check_plan, violations
from distprune.core.lengths import Length, check_length, to_steps
from distprune.core.plan import Plan
from distprune.core.registry import Choice
from distprune.core.stages import Prune, Train
from distprune.errors import UserError

Precision = Literal["fp32", "bf16"]


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training from start to end: the learning rate is a function of clock and `length`."""

    length: Length = "10ep"  # '20ep' or '500it'; integer steps in a resolved recipe
    batch_size: int = 128
    optimizer: Choice = field(default_factory=lambda: registry.optimizer.choose("sgd"))
    decay: Choice = field(default_factory=lambda: registry.decay.choose("cosine"))

    @classmethod
    def read(cls, value: Any, where: str) -> "TrainConfig":
        """From YAML."""
        config = cls(**read_fields(cls, value, where))
        check_length(config.length, f"{where}.length", relative=False)
        if config.batch_size < 1:
            raise UserError(f"{where}.batch_size must be at least 1, got {config.batch_size}.")
        return config


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A network, its data, and how it is trained and pruned."""

    model: Choice
    data: Choice
    paradigm: Choice
    sparsity: float = 0.0
    sparsity_of: Choice = registry.PARAMS  # the cost that sparsity is a share of: params, flops, memory
    criterion: Choice = field(default_factory=lambda: registry.criterion.choose("magnitude"))
    allocator: Choice = field(default_factory=lambda: registry.allocator.choose("global"))
    granularity: Choice = field(default_factory=lambda: registry.granularity.choose("weight"))
    regularizer: Choice = field(default_factory=lambda: registry.regularizer.choose("none"))
    train: TrainConfig = field(default_factory=TrainConfig)
    task: Choice = field(default_factory=lambda: registry.task.choose("classification"))
    include: tuple[str, ...] = ("*",)  # shell patterns over parameter names: what is prunable
    exclude: tuple[str, ...] = ()
    equal_cost: bool = False  # every paradigm bills what a dense training of train.length does, in samples
    precision: Precision = "fp32"
    seed: int = 0

    @classmethod
    def read(cls, value: Any, where: str = "recipe") -> "Recipe":
        """From YAML, checked: unknown keys and names, types, ranges and legality. Raises UserError."""
        recipe = cls(**read_fields(cls, value, where))
        check_sparsity(recipe.sparsity, f"{where}.sparsity")
        for problem in violations(recipe).values():
            raise UserError(problem)
        return recipe

    def plain(self) -> dict[str, Any]:
        """As YAML writes it, defaults included; `read` is the inverse."""
        return {item.name: _plain(getattr(self, item.name)) for item in fields(self)}

    # What paradigms are written with: stages that carry all that their result depends on.

    def training(self, *, until: int, since: int | None = None, hooks: tuple[Hook, ...] = ()) -> Train:
        """A Train stage under the recipe's configuration and regularizer."""
        penalty = self.regularizer()
        return Train(config=self.train, until=until, since=since, hooks=((penalty,) if penalty else ()) + hooks)

    def prune(self, sparsity: float, **changes: Any) -> Prune:
        """A Prune stage with the recipe's criterion and allocator."""
        criterion = changes.pop("criterion", self.criterion)
        return Prune(
            sparsity=sparsity,
            criterion=criterion,
            allocator=self.allocator,
            granularity=self.granularity,
            steps=criterion.entry.facts["steps"],
            batch_size=self.train.batch_size,
            **changes,
        )

    def resolved(self, steps_per_epoch: int) -> "Recipe":
        """The recipe with its training length in steps; with `equal_cost`, the longest with which the plan's bill is not exceeded."""
        length = to_steps(self.train.length, steps_per_epoch=steps_per_epoch)
        if length < 1:
            raise UserError(f"train.length must be at least one step, got {self.train.length!r} with {steps_per_epoch} steps an epoch.")
        if not self.equal_cost:
            return self._of_length(length)
        self._of_length(length)._stages(steps_per_epoch)  # what is wrong with its options at any length is said as it is
        low, high = 0, length
        while low < high:
            middle = (low + high + 1) // 2
            try:
                fits = self._of_length(middle)._stages(steps_per_epoch).cost <= length * self.train.batch_size
            except UserError:  # too short for its own parts
                fits = True
            low, high = (middle, high) if fits else (low, middle - 1)
        solved = self._of_length(low)
        try:
            if not low:
                raise UserError("even with trainings of one step it bills more.")
            solved._stages(steps_per_epoch)
        except UserError as error:
            raise UserError(
                f"equal_cost gives every trial {length} steps in all, and paradigm '{self.paradigm.name}' at sparsity {self.sparsity} "
                f"does not fit into them: {error} Raise train.length, or let a round remove more."
            ) from error
        return solved

    def plan(self, steps_per_epoch: int) -> Plan:
        """The paradigm's stages, with every length in steps. Raises UserError where lengths do not fit together."""
        plan = self.resolved(steps_per_epoch)._stages(steps_per_epoch)
        if not self.equal_cost:
            return plan
        bill = to_steps(self.train.length, steps_per_epoch=steps_per_epoch) * self.train.batch_size
        stages = list(plan.stages)
        if not any(isinstance(stage, Train) for stage in stages):
            raise UserError(
                f"equal_cost gives what is left to the last training, and paradigm '{self.paradigm.name}' has none. Leave it out."
            )
        last = max(index for index, stage in enumerate(stages) if isinstance(stage, Train))
        train = stages[last]
        assert isinstance(train, Train)
        open_end = any(isinstance(stage, Train) and stage.may_end_early for stage in stages[:last])
        rest = (bill - plan.cost) // self.train.batch_size
        stages[last] = replace(train, until=train.until + rest, spend=bill if open_end else None)
        return Plan(stages)

    def _of_length(self, steps: int) -> "Recipe":
        return replace(self, train=replace(self.train, length=steps))

    def _stages(self, steps_per_epoch: int) -> Plan:
        lengths = {
            name: to_steps(self.paradigm.option(name), steps_per_epoch=steps_per_epoch, whole=self.train.length)
            for name, option in self.paradigm.entry.options.items()
            if option.is_length
        }
        try:
            plan = self.paradigm(self, **lengths)
        except UserError:
            raise
        except Exception as error:  # a user's function may raise anything
            raise UserError(f"paradigm '{self.paradigm.name}' cannot make a plan: {type(error).__name__}: {error}") from error
        return check_plan(plan, self.paradigm.name, self.sparsity_of)


def _plain(value: Any) -> Any:
    if isinstance(value, Choice):
        return value.plain()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {item.name: _plain(getattr(value, item.name)) for item in fields(value)}
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return list(value) if isinstance(value, tuple) else value
