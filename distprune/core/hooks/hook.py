"""Hooks: what is added to the training loop, called at five points of it."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

if TYPE_CHECKING:
    from distprune.core.executor import Env
    from distprune.core.state import State

Memory = dict[str, Any]  # tensors and plain numbers; saved with the state


@dataclass(frozen=True, kw_only=True)
class Hook:
    """Frozen options plus a memory that lives in the state. Subclasses override the points that they need.

    Order in a step: view, forward and backward, `grad`, masking of the gradient, optimizer, clock + 1, `step`.
    """

    version: ClassVar[int] = 1
    may_end: ClassVar[bool] = False  # `step` may end the stage before its time
    regrows: ClassVar[bool] = False  # removed weights may come back, so no stage may prune after it
    moves: ClassVar[bool] = False  # and in another layer, so that a budget in FLOPs or memory does not stay met

    def start(self, memory: Memory, state: "State", env: "Env") -> None:
        """Once, when the trajectory begins."""

    def view(self, memory: Memory, state: "State", env: "Env", train: bool) -> dict[str, Tensor]:
        """Effective weights by name, put in place of the parameters for a forward and backward pass or for an evaluation."""
        return {}

    def grad(self, memory: Memory, state: "State", env: "Env") -> None:
        """After backward: `parameter.grad` is the dense gradient and may be changed."""

    def step(self, memory: Memory, state: "State", env: "Env") -> bool:
        """After the optimizer's step. True ends the stage."""
        return False

    def end(self, memory: Memory, state: "State", env: "Env") -> None:
        """Once, when the trajectory ends; a view that should stay is written into the weights here."""


def slot(index: int, hook: Hook) -> str:
    """Where the memory of a stage's hook lives in `State.slots`."""
    return f"{index}.{type(hook).__name__}"


@contextmanager
def viewed(hooks: Sequence[Hook], state: "State", env: "Env", *, train: bool) -> Iterator[None]:
    """Put the hooks' views into the parameters' storage, and take them out again."""
    views = [hook.view(state.slots[slot(index, hook)], state, env, train) for index, hook in enumerate(hooks)]
    parameters = dict(state.model.named_parameters()) if any(views) else {}
    stored: dict[str, Tensor] = {}
    for view in views:
        for name, tensor in view.items():
            stored.setdefault(name, parameters[name].data)
            parameters[name].data = tensor
    try:
        yield
    finally:
        for name, tensor in stored.items():
            parameters[name].data = tensor
