"""A task made of a few batches, for pruning a network without a recipe."""

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Literal

import torch
from torch import Tensor, nn

from distprune.core.task import SplitName, Task
from distprune.errors import UserError

Batch = tuple[Tensor, Tensor]


class GivenBatches(Task):
    """Batches of (inputs, targets) that are drawn from in turn, and the user's loss of (outputs, targets).

    No more batches are read than are asked for: they may come from a loader of a data set that fits in no memory.
    """

    objective = "loss"
    direction: Literal["minimize"] = "minimize"

    def __init__(self, batches: Iterable[Batch], loss: Callable[[Tensor, Tensor], Tensor]) -> None:
        self._source: Iterator[Batch] = iter(batches)
        self._read, self._loss, self._next = list[Batch](), loss, 0

    @property
    def _batches(self) -> list[Batch]:
        """All of them."""
        self._read += self._source
        return self._read

    def _first(self) -> Batch:
        self._read += itertools.islice(self._source, 0 if self._read else 1)
        return self._read[0]

    @property
    def shape(self) -> tuple[int, int, int]:
        channels, height, width = [1, 1, 1, *self._first()[0].shape[1:]][-3:]
        return channels, height, width

    @property
    def classes(self) -> int:
        raise UserError("A network that is given is not built from a number of classes.")

    def to(self, device: torch.device) -> "GivenBatches":
        batches = itertools.chain(self._read, self._source)
        self._read, self._source = [], ((inputs.to(device), targets.to(device)) for inputs, targets in batches)
        return self

    def steps_per_epoch(self, batch_size: int) -> int:
        return len(self._batches)

    def batch(self, seed: int, lap: int, clock: int, size: int) -> Batch:
        return self._batches[clock % len(self._batches)]

    def draw(self, generator: torch.Generator, size: int) -> Batch:
        self._read += itertools.islice(self._source, max(self._next + 1 - len(self._read), 0))
        self._next += 1
        return self._read[(self._next - 1) % len(self._read)]

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
        return self._first()[0][:1]
