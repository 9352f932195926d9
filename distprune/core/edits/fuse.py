"""Fusion as an edit: one affine layer in the place of two and of all between them (Ghods et al. 2020, arXiv:2001.10509).

    residuals(network, batches)       # {"conv2+conv3": 0.31, "conv3+fc": 0.08}: what fusing would lose, a score of layers
    small = fuse(network, batches)    # a copy without the pair that loses least

Two Linear, a Conv2d and a Linear, or two Conv2d are fused where only modules of torch.nn connect them (`pairs.py`). The activation after
the second layer stays. `Fuse` does it in a plan.
"""

import copy
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from distprune.core.edits import structure
from distprune.core.edits.fusions import Form, fusions
from distprune.core.plan import Plan, Stage
from distprune.core.streams import global_stream, stream

if TYPE_CHECKING:
    from distprune.core.executor import Env
    from distprune.core.state import State


def _feed(batches: Iterable[Tensor]) -> Callable[[nn.Module], None]:
    def feed(network: nn.Module) -> None:
        for batch in batches:
            network(batch)

    return feed


def residuals(model: nn.Module, batches: Iterable[Tensor], **options: Any) -> dict[str, float]:
    """Pair -> share of its output's variance that fusing it would lose, smallest first; `options` as of `fusions`."""
    return {fusion.pair.name: fusion.residual for fusion in fusions(model, _feed(batches), **options)}


def fuse(model: nn.Module, batches: Iterable[Tensor], *, count: int = 1, **options: Any) -> nn.Module:
    """A copy of `model` in which `count` times the best pair of those that `options` (as of `fusions`) allow is one layer.

    With `form="random"` the fused layer is left as torch draws it. The global generator is left as it was.
    """
    network, batches = copy.deepcopy(model), list(batches)
    for _ in range(count):
        best = fusions(network, _feed(batches), **options)[0]
        with torch.random.fork_rng([]):
            structure.apply(network, best.edit)
        if options.get("form") != "random":
            best.set_values(network)
    return network


@dataclass(frozen=True, kw_only=True)
class Fuse(Stage):
    """Replace pairs of layers by their best affine maps, `count` times one pair, each measured on `batches` of `batch_size`.

    `form: data` is least squares, jointly over channels; `per_channel` does it for each input channel as if the others were independent
    of it, as in the code that the paper's authors released; `gaussian` is the closed form under Gaussian pre-activations; `random` leaves
    the fused layer as drawn: the control. `kernel` is the widest of a fused convolution, 0 for all that the two see.
    """

    measured: ClassVar[bool] = True
    count: int = 1
    batches: int = 16
    batch_size: int = 128
    pick: str = "smallest"
    form: Form = "data"
    ridge: float = 1e-4
    kernel: int = 0

    @property
    def options(self) -> dict[str, Any]:
        """What `fusions` takes."""
        return {"pick": self.pick, "form": self.form, "ridge": self.ridge, "kernel": self.kernel}

    def run(self, state: "State", env: "Env") -> Iterator[None]:
        for _ in range(self.count):
            place = ("fuse", state.lap, state.clock, len(state.edits))
            generator = stream(env.seed, *place)

            def feed(network: nn.Module, generator: torch.Generator = generator) -> None:
                with env.autocast():
                    for _ in range(self.batches):
                        env.task.outputs(network, env.task.draw(generator, self.batch_size))

            with global_stream(env.seed, *place):  # what the new layers hold before they are set
                best = fusions(state.model, feed, weights=state.weights, **self.options)[0]
                state.bill("scoring", self.batches * self.batch_size, env.task.example, passes=1)
                state.edit(best.edit)
            if self.form != "random":
                best.set_values(state.model)
        yield from ()

    def samples(self, clock: int) -> int:
        return self.count * self.batches * self.batch_size

    def describe(self) -> str:
        which = {"smallest": "the pair of the smallest residual", "last": "the last pair"}.get(self.pick, self.pick)
        times = f"{self.count} times " if self.count > 1 else ""
        how = {"data": "least squares", "per_channel": "least squares by channel", "gaussian": "closed form", "random": "drawn anew"}
        return f"{times}{which} into one layer, {how[self.form]} on {self.batches} batches"


def check_fusions(plan: Plan, state: "State", env: "Env") -> None:
    """Raise UserError if the network has no pair left for a Fuse of the plan, before anything is trained."""
    rounds = [stage.options for stage in plan.stages if isinstance(stage, Fuse) for _ in range(stage.count)]
    network, names = copy.deepcopy(state.model) if rounds else state.model, set(state.weights)
    with global_stream(env.seed, "check"):
        for options in rounds:
            edit = fusions(network, _feed([env.task.example()]), weights=names, **options)[0].edit
            structure.apply(network, edit)
            names |= structure.created(edit)
