"""Recipes: everything that one trial's result depends on, as frozen plain data."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

from distprune.core import registry
from distprune.core.budgets import check_sparsity
from distprune.core.config import read_fields
from distprune.core.hooks.hook import Hook
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
    criterion: Choice = field(default_factory=lambda: registry.criterion.choose("magnitude"))
    allocator: Choice = field(default_factory=lambda: registry.allocator.choose("global"))
    regularizer: Choice = field(default_factory=lambda: registry.regularizer.choose("none"))
    train: TrainConfig = field(default_factory=TrainConfig)
    task: Choice = field(default_factory=lambda: registry.task.choose("classification"))
    include: tuple[str, ...] = ("*",)  # shell patterns over parameter names: what is prunable
    exclude: tuple[str, ...] = ()
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
            steps=criterion.entry.facts["steps"],
            batch_size=self.train.batch_size,
            **changes,
        )

    def resolved(self, steps_per_epoch: int) -> "Recipe":
        """The recipe with its training length in steps."""
        length = to_steps(self.train.length, steps_per_epoch=steps_per_epoch)
        if length < 1:
            raise UserError(f"train.length must be at least one step, got {self.train.length!r} with {steps_per_epoch} steps an epoch.")
        return replace(self, train=replace(self.train, length=length))

    def plan(self, steps_per_epoch: int) -> Plan:
        """The paradigm's stages, with every length in steps. Raises UserError where lengths do not fit together."""
        resolved = self.resolved(steps_per_epoch)
        lengths = {
            name: to_steps(self.paradigm.option(name), steps_per_epoch=steps_per_epoch, whole=resolved.train.length)
            for name, option in self.paradigm.entry.options.items()
            if option.is_length
        }
        plan: Plan = self.paradigm(resolved, **lengths)
        return plan


def violations(recipe: Recipe) -> dict[str, str]:
    """Why a recipe makes no sense: field to blame -> one line; empty if it does."""
    name, uses = recipe.paradigm.name, recipe.paradigm.entry.facts["uses"]
    found = {}
    if "sparsity" not in uses and recipe.sparsity:
        found["sparsity"] = (
            f"paradigm '{name}' prunes nothing, so sparsity must be 0, got {recipe.sparsity}. Leave it out or choose another paradigm."
        )
    if "sparsity" in uses and not recipe.sparsity:
        found["sparsity"] = (
            f"paradigm '{name}' needs a sparsity above 0, got 0. To keep 5 % of the weights write sparsity: 0.95, or use paradigm 'dense'."
        )
    if "allocator" in uses and "criterion" not in uses and recipe.allocator.entry.facts["needs_scores"]:
        found["allocator"] = (
            f"allocator '{recipe.allocator.name}' ranks scores, and paradigm '{name}' starts from random masks without any. "
            "Choose uniform, erk, power or per_layer."
        )
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, Choice):
        return value.plain()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {item.name: _plain(getattr(value, item.name)) for item in fields(value)}
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return list(value) if isinstance(value, tuple) else value
