"""Work that may take too much memory or time, in a copy of this process that can be ended."""

import gc
import json
import os
import resource
import selectors
import signal
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any, NoReturn

import torch

Say = Callable[[Any], None]
_END = b"}\n"  # of an object, which only the last line is


def bounded(work: Callable[[Say], None], *, memory: int, seconds: float) -> tuple[list[Any], str]:
    """Run `work(say)` in a fork of this process, with one thread, `memory` more bytes and `seconds`.

    Returns what it said, plain data that goes as JSON through a pipe, and why it did not come to its end ("" if it did). The fork shares
    nothing that it changes with this process; it has the objects as they are, without pickling, and works from any thread.
    """
    if seconds <= 0:
        return [], "The time was over before it began."
    read, write = os.pipe()
    with warnings.catch_warnings() if sys.version_info >= (3, 12) else nullcontext():
        if sys.version_info >= (3, 12):  # it warns that locks of other threads stay locked in the fork: hence the bound on time
            warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        _child(work, write, memory, seconds)
    os.close(write)
    try:
        text, ended = _read(read, time.monotonic() + seconds)
    finally:
        os.close(read)
        with suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        with suppress(ChildProcessError):
            os.waitpid(child, 0)
    *said, last = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith(b"\n")] or [None]
    if isinstance(last, dict):
        return said, last["failure"]
    said = [*said, last] if last is not None else []
    return said, f"It died with {memory / 2**30:.2g} GiB of memory." if ended else f"It took longer than {seconds:.3g} s."


def _read(pipe: int, deadline: float) -> tuple[bytes, bool]:
    """All that comes until the mark of the end, or until the other side is closed, or the deadline; and whether it was not the deadline."""
    chunks: list[bytes] = []
    with selectors.DefaultSelector() as selector:
        selector.register(pipe, selectors.EVENT_READ)
        while (left := deadline - time.monotonic()) > 0:
            if not selector.select(left):
                break
            chunks.append(chunk := os.read(pipe, 1 << 20))
            if not chunk or chunk.endswith(_END):  # a fork of another thread may hold the pipe open longer than its own
                return b"".join(chunks), True
    return b"".join(chunks), False


def _child(work: Callable[[Say], None], pipe: int, memory: int, seconds: float) -> NoReturn:
    """Never returns: what the parent would do at its end (flush, remove temporary files, leave its cluster) is not for its copy to do."""

    def say(value: Any) -> None:
        line = json.dumps(value).encode() + b"\n"
        while line:
            line = line[os.write(pipe, line) :]

    try:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, seconds + 1)  # in case the parent dies
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        warnings.simplefilter("ignore")
        gc.freeze()  # the parent's garbage is not to be finalized here
        _limit(memory)
        torch.set_num_threads(1)  # the fork has none of its parent's other threads
        torch.backends.mha.set_fastpath_enabled(False)  # one opaque operation for a whole encoder layer
        # whatever context the caller is in; an accelerator cannot be used in a fork
        with torch.device("cpu"), torch.inference_mode(False), torch.enable_grad(), torch.autocast("cpu", enabled=False):
            work(say)
        say({"failure": ""})
    except BaseException as error:
        text = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}."
        say({"failure": f"It needed more than {memory / 2**30:.2g} GiB of memory." if out_of_memory(error) else text})
    finally:
        os._exit(0)


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says so: Python's own, or torch's RuntimeError."""
    return isinstance(error, MemoryError) or "allocate memory" in str(error)


def _limit(memory: int) -> None:
    with suppress(OSError, ValueError):  # /proc is Linux's; elsewhere only the time is bounded
        now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        limit = now + memory
        resource.setrlimit(resource.RLIMIT_AS, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))
