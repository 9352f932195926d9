"""The memory that a trial on a share of a GPU may take: its share of it.

Torch then says that a greedy trial has run out of memory, in place of killing the trials beside it, and the trial goes on with smaller
parts of its batches or asks for more. What CUDA itself takes for a process, some hundred megabytes, is beyond it.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def capped(gpus: float, device: str) -> Iterator[None]:
    """Hold this process to its share of its GPU; the next trial of the process begins without a cap."""
    if device != "cuda" or not 0 < gpus < 1:
        yield
        return
    torch.cuda.set_per_process_memory_fraction(gpus)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
