"""Running out of memory: what it looks like, and how many samples were in the forward pass that did not fit."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from distprune.errors import UserError

_WORDS = ("not enough memory", "can't allocate memory", "CUDA out of memory", "ALLOC_FAILED")  # CPU allocator, cuBLAS, cuDNN


class OutOfMemory(MemoryError):
    """A pass over `samples` samples did not fit."""

    def __init__(self, samples: int, error: BaseException) -> None:
        super().__init__(f"A pass of {samples} at once does not fit: {str(error) or type(error).__name__}")
        self.samples = samples


class Unsplittable(UserError):
    """The batches of a task cannot be taken apart."""


def is_shortage(error: BaseException) -> bool:
    """Whether an exception says that memory could not be had, on a GPU or on the host."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _WORDS)


@contextmanager
def fits(samples: int) -> Iterator[None]:
    """Around a pass over `samples` samples: raises OutOfMemory in place of what torch raises there."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, OutOfMemory) or not is_shortage(error):
            raise
        raise OutOfMemory(samples, error) from error
