"""Counter streams: every random number is a function of a seed, a purpose and counters, so no generator has to be saved."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def stream_seed(seed: int, purpose: str, *counters: int) -> int:
    """A 63-bit seed, independent for every (seed, purpose, counters)."""
    text = f"{seed}/{purpose}/" + "/".join(map(str, counters))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def stream(seed: int, purpose: str, *counters: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator at the start of its stream."""
    return torch.Generator(device).manual_seed(stream_seed(seed, purpose, *counters))


@contextmanager
def global_stream(seed: int, purpose: str, *counters: int) -> Iterator[None]:
    """Let code that knows only torch's global generator (module init, dropout) draw from a stream; the generator is left as it was."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
    with torch.random.fork_rng(devices):
        torch.manual_seed(stream_seed(seed, purpose, *counters))
        yield
