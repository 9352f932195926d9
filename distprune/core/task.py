"""What a network is for: the loop, the criteria and the reports see a task only, never labels or accuracy."""

import math
from abc import ABC, abstractmethod
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from distprune.core.allocation import Unsplittable
from distprune.core.ranks import ALONE, Ranks
from distprune.errors import UserError

SplitName = Literal["train", "validation", "test"]
T = TypeVar("T", bound="Task")


class Task(ABC):
    """Batches, a loss and metrics. `objective` names the metric by which trials are compared.

    `micro_batch` is the most samples that may be in one pass through the network, None for no limit: it is set where memory is short, and
    is no part of a recipe, as the bill stays what it is and numbers differ by rounding, but for what batch normalisation sees. `ranks` are
    the processes that share the batches of a training.
    """

    objective: str
    direction: Literal["maximize", "minimize"]
    bounds: tuple[float, float] = (-math.inf, math.inf)  # that the objective lies in
    micro_batch: int | None = None
    ranks: Ranks = ALONE

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of what a network for this task takes."""

    @property
    @abstractmethod
    def classes(self) -> int:
        """How many outputs it has: classes, or channels of an image that it generates."""

    @abstractmethod
    def to(self: T, device: torch.device) -> T:
        """Move the data to `device` and return self."""

    @abstractmethod
    def steps_per_epoch(self, batch_size: int) -> int:
        """Steps in which the training data is seen once; at least 1."""

    @abstractmethod
    def batch(self, seed: int, lap: int, clock: int, size: int) -> Any:
        """The training batch at a position of the schedule: a pure function of its arguments."""

    @abstractmethod
    def draw(self, generator: torch.Generator, size: int) -> Any:
        """A random training batch without augmentation, for scoring."""

    @abstractmethod
    def samples(self, batch: Any) -> int:
        """How many samples a batch bills."""

    def parts(self, batch: Any) -> list[Any]:
        """The batch in as few parts as keep to `micro_batch`, their sizes equal but for one sample; mostly the batch itself."""
        samples = self.samples(batch)
        if self.micro_batch is None or samples <= self.micro_batch:
            return [batch]
        return self.split(batch, math.ceil(samples / self.micro_batch))

    def share(self, batch: Any) -> list[tuple[int, Any]]:
        """(number among those of all ranks, part) of what this process trains on: as many parts on each rank, all of them on one alone."""
        size, samples = self.ranks.size, self.samples(batch)
        if size == 1:
            return list(enumerate(self.parts(batch)))
        if samples < size:
            raise UserError(f"A batch of {samples} cannot be shared by {size} ranks. Write workers.ranks: 1, or raise train.batch_size.")
        own = self.split(batch, size)[self.ranks.rank]
        least = samples // size  # in the smallest slice: no part is empty, and at a micro-batch of 1 some may hold two samples for it
        parts = min(math.ceil(math.ceil(samples / size) / self.micro_batch), least) if self.micro_batch else 1
        return [(self.ranks.rank * parts + index, part) for index, part in enumerate(self.split(own, parts) if parts > 1 else [own])]

    def split(self, batch: Any, parts: int) -> list[Any]:
        """That many batches which make up `batch`. Raises Unsplittable where a batch is one whole."""
        raise Unsplittable(f"The batches of {type(self).__name__} cannot be split. Lower train.batch_size, or take a smaller network.")

    @abstractmethod
    def outputs(self, model: nn.Module, batch: Any) -> Tensor:
        """The network's outputs for a batch."""

    @abstractmethod
    def loss_of(self, outputs: Tensor, batch: Any) -> Tensor:
        """Scalar mean loss of outputs."""

    def nll_of(self, outputs: Tensor, batch: Any) -> Tensor:
        """Scalar mean of minus the output of each sample's label, with no softmax before it. Raises UserError where there are no labels."""
        raise UserError("loss 'nll_logits' is minus the output of a sample's label, and this task has no labels. Write loss: task.")

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """Scalar mean loss of a network on a batch."""
        return self.loss_of(self.outputs(model, batch), batch)

    @abstractmethod
    def metrics(self, model: nn.Module, split: SplitName) -> dict[str, float]:
        """Metrics of a network, `objective` among them. The network is left in the mode it was in."""

    @abstractmethod
    def example(self) -> Tensor:
        """One input, [1, ...], on the task's device."""
