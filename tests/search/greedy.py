"""A network that runs out of memory."""

import torch
from torch import nn


class Greedy(nn.Sequential):
    """Runs out of memory above `most` samples in training, from pass `after` on, and above `at_once` when it is measured."""

    most, at_once, after, passes = 10, 1000, 0, 0
    error: Exception = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        Greedy.passes += self.training
        if len(inputs) > (self.most if self.training else self.at_once) and Greedy.passes > self.after:
            raise self.error
        return super().forward(inputs)  # type: ignore[no-any-return]


def greedy(shape: tuple[int, int, int], classes: int, *, norm: bool = False) -> nn.Module:
    """A network that needs much memory."""
    middle: list[nn.Module] = [nn.BatchNorm1d(16)] if norm else []
    return Greedy(nn.Flatten(), nn.Linear(shape[0] * shape[1] * shape[2], 16), *middle, nn.ReLU(), nn.Linear(16, classes))
