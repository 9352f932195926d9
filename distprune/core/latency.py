"""Latency of networks beside each other: measured in turn, so that a busy machine slows all alike, and read as shares of one of them."""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

Network = Callable[[Tensor], object]

ROUNDS = 15  # blocks of each network in an attempt
BLOCK_S = 0.004  # a block is as many forward passes as take the first network this long: far above the clock's steps
_WARM_UP = 3


def compare(
    dense: Network,
    small: Network,
    inputs: Tensor,
    *,
    spread: float,
    attempts: int,
    clock: Callable[[], float] = time.perf_counter,
) -> float | None:
    """Median over rounds of time(small) / time(dense); None if no attempt's interquartile range is within `spread` of its median."""
    networks = {"dense": dense, "small": small}
    with _evaluating(networks), torch.inference_mode():
        passes = _warmed(networks, inputs, BLOCK_S, clock)
        for _ in range(attempts):
            took = _timed(networks, inputs, passes, ROUNDS, clock, lambda done: None)
            low, median, high = quartiles(shares(took["small"], took["dense"]))
            if high - low <= spread * median:
                return median
    return None


def measure(
    networks: Mapping[str, Network],
    inputs: Tensor,
    *,
    rounds: int = ROUNDS,
    block_s: float = BLOCK_S,
    clock: Callable[[], float] = time.perf_counter,
    tell: Callable[[int], None] = lambda done: None,
) -> dict[str, list[float]]:
    """Seconds of a forward pass of `inputs` through each of `networks`, in each of `rounds`; `tell` hears how many are done.

    A round times a block of passes of each in turn, in changing order and as many for each as take the first network `block_s`. Modules
    are put into eval mode, and back; inference mode is on.
    """
    with _evaluating(networks), torch.inference_mode():
        return _timed(networks, inputs, _warmed(networks, inputs, block_s, clock), rounds, clock, tell)


def _warmed(networks: Mapping[str, Network], inputs: Tensor, block_s: float, clock: Callable[[], float]) -> int:
    """Passes of a block, after some that are not timed."""
    for network in networks.values():
        for _ in range(_WARM_UP):
            network(inputs)
    first = next(iter(networks.values()))
    return max(1, int(block_s / max(_block(first, inputs, 1, clock), 1e-9)))


def _timed(
    networks: Mapping[str, Network], inputs: Tensor, passes: int, rounds: int, clock: Callable[[], float], tell: Callable[[int], None]
) -> dict[str, list[float]]:
    took: dict[str, list[float]] = {name: [] for name in networks}
    for turn in range(rounds):
        for name in _order(list(networks), turn):
            took[name].append(_block(networks[name], inputs, passes, clock) / passes)
        tell(turn + 1)
    return took


def shares(took: list[float], of: list[float]) -> list[float]:
    """What one network took of another's time, by round."""
    return [mine / other for mine, other in zip(took, of, strict=True)]


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """First quartile, median, third quartile."""
    low, median, high = statistics.quantiles(values, n=4)
    return low, median, high


@contextmanager
def _evaluating(networks: Mapping[str, Network]) -> Iterator[None]:
    roots = [network for network in networks.values() if isinstance(network, nn.Module)]
    modes = [(module, module.training) for root in roots for module in root.modules()]
    for root in roots:
        if any(module.training for module in root.modules()):  # programs of torch.export have no modes to change
            root.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _order(names: list[str], turn: int) -> list[str]:
    """Each begins in turn, and each pair of rounds has both directions, so that no network always follows the same one."""
    start = turn // 2 % len(names)
    found = names[start:] + names[:start]
    return found[::-1] if turn % 2 else found


def _block(network: Network, inputs: Tensor, passes: int, clock: Callable[[], float]) -> float:
    if inputs.device.type == "cuda":
        torch.cuda.synchronize(inputs.device)
    began = clock()
    for _ in range(passes):
        network(inputs)
    if inputs.device.type == "cuda":
        torch.cuda.synchronize(inputs.device)
    return clock() - began
