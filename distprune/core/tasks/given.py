"""A task made of a few batches, for pruning a network without a recipe."""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from distprune.core.task import SplitName, Task
from distprune.errors import UserError

Batch = tuple[Tensor, Tensor]


class GivenBatches(Task):
    """Batches of (inputs, targets) that are drawn from in turn, and the user's loss of (outputs, targets)."""

    objective = "loss"
    direction: Literal["minimize"] = "minimize"

    def __init__(self, batches: Sequence[Batch], loss: Callable[[Tensor, Tensor], Tensor]) -> None:
        self._batches, self._loss, self._next = batches, loss, 0

    @property
    def shape(self) -> tuple[int, int, int]:
        channels, height, width = [1, 1, 1, *self._batches[0][0].shape[1:]][-3:]
        return channels, height, width

    @property
    def classes(self) -> int:
        raise UserError("A network that is given is not built from a number of classes.")

    def to(self, device: torch.device) -> "GivenBatches":
        self._batches = [(inputs.to(device), targets.to(device)) for inputs, targets in self._batches]
        return self

    def steps_per_epoch(self, batch_size: int) -> int:
        return len(self._batches)

    def batch(self, seed: int, lap: int, clock: int, size: int) -> Batch:
        return self._batches[clock % len(self._batches)]

    def draw(self, generator: torch.Generator, size: int) -> Batch:
        self._next += 1
        return self._batches[(self._next - 1) % len(self._batches)]

    def samples(self, batch: Batch) -> int:
        return len(batch[0])

    def split(self, batch: Batch, parts: int) -> list[Batch]:
        return list(zip(*(tensor.tensor_split(parts) for tensor in batch), strict=True))

    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        outputs: Tensor = model(batch[0])
        return outputs

    def loss_of(self, outputs: Tensor, batch: Batch) -> Tensor:
        return self._loss(outputs, batch[1])

    @torch.no_grad()
    def metrics(self, model: nn.Module, split: SplitName) -> dict[str, float]:
        losses = [self.loss(model, batch).item() for batch in self._batches]
        return {"loss": sum(losses) / len(losses)}

    def example(self) -> Tensor:
        return self._batches[0][0][:1]
