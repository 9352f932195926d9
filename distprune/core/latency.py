"""Latency of a smaller network as a share of the dense one's, measured in turn so that a busy machine slows both alike."""

import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

ROUNDS = 15  # pairs of blocks in an attempt
BLOCK_S = 0.004  # a block is as many forward passes as take the dense network this long: far above the clock's steps
_WARM_UP = 3


def compare(
    dense: nn.Module,
    small: nn.Module,
    inputs: torch.Tensor,
    *,
    spread: float,
    attempts: int,
    clock: Callable[[], float] = time.perf_counter,
) -> float | None:
    """Median over rounds of time(small) / time(dense); None if no attempt's interquartile range is within `spread` of its median.

    Each round times a block of the one and then of the other, in changing order. Both are left in the mode that they were in.
    """
    modes = dense.training, small.training
    dense.eval(), small.eval()
    try:
        with torch.inference_mode():
            for network in (dense, small):
                for _ in range(_WARM_UP):
                    network(inputs)
            passes = max(1, int(BLOCK_S / max(_block(dense, inputs, 1, clock), 1e-9)))
            for _ in range(attempts):
                ratios = []
                for turn in range(ROUNDS):
                    order = (dense, small) if turn % 2 else (small, dense)
                    took = {id(network): _block(network, inputs, passes, clock) for network in order}
                    ratios.append(took[id(small)] / took[id(dense)])
                low, median, high = statistics.quantiles(ratios, n=4)
                if high - low <= spread * median:
                    return median
    finally:
        dense.train(modes[0]), small.train(modes[1])
    return None


def _block(network: nn.Module, inputs: torch.Tensor, passes: int, clock: Callable[[], float]) -> float:
    if inputs.device.type == "cuda":
        torch.cuda.synchronize(inputs.device)
    began = clock()
    for _ in range(passes):
        network(inputs)
    if inputs.device.type == "cuda":
        torch.cuda.synchronize(inputs.device)
    return clock() - began
