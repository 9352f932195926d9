"""What the forms of an export take of the dense network's time: measured beside it, in turn, with spread."""

import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from distprune.core.latency import Network, measure, quartiles, shares
from distprune.core.masks import prunable
from distprune.core.metrics import flops, layer_flops
from distprune.errors import UserError
from distprune.export.formats.two_four import half
from distprune.export.reading import Export
from distprune.export.tables import format as formats

ROUNDS = 30
BLOCK_S = 0.02
_ORDER = ("dense", "masked", "slim", "2:4", "onnx", "pt2")  # shares are of the first one's time
_RESTLESS = 0.1  # an interquartile range above this share of the median
_WHOLE = 0.99  # a share of the FLOPs from which on nothing was taken out

Listener = Callable[[str, dict[str, Any]], None]


@dataclass(frozen=True, kw_only=True)
class Timing:
    """A network at a batch size."""

    batch: int
    network: str
    ms: float  # of a forward pass of the batch, median over rounds
    share: float  # of the dense network's time in the same round, median
    low: float  # its first quartile
    high: float  # its third
    flops: float | None  # that it runs, as a share of the dense network's; zeros are multiplied too. None where they cannot be counted

    @property
    def speedup(self) -> float:
        """How many times as fast as the dense network it is."""
        return 1 / self.share

    @property
    def kept_promise(self) -> float | None:
        """The speed-up as a share of the one that its FLOPs promise."""
        return None if self.flops is None else self.flops / self.share

    @property
    def restless(self) -> bool:
        """Whether rounds differ too much to rely on the median."""
        return self.high - self.low > _RESTLESS * self.share

    @property
    def even(self) -> bool:
        """Whether it takes the dense network's time, as far as can be told."""
        return self.low <= 1 <= self.high or abs(self.share - 1) <= _RESTLESS / 2


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What was measured of an export; numbers and text alone."""

    export: str
    hardware: str  # processor or GPU
    device: str
    threads: int
    rounds: int
    density: float  # kept prunable weights
    kept_flops: float | None  # FLOPs of kept weights, as a share of the dense network's: what skipping zeros would leave
    timings: tuple[Timing, ...]
    left_out: Mapping[str, str]  # network -> why it was not measured

    def plain(self) -> dict[str, Any]:
        """As JSON writes it."""
        return asdict(self)

    def of(self, network: str) -> list[Timing]:
        """Its timings, a batch size each."""
        return [timing for timing in self.timings if timing.network == network]

    def lines(self) -> list[str]:
        """What the numbers say, a sentence each."""
        found = [*self._of_mask(), *(line for timing in self.of("slim") for line in _of_slim(timing))]
        for timing, plain in zip(self.of("2:4"), self.of("dense half"), strict=True):
            share = timing.share / plain.share
            found.append(f"At batch {timing.batch} 2:4, in half precision, takes {share:.2f} of the dense network's time in half.")
        if self.of("onnx"):
            found.append("onnx runs in onnxruntime: of its gain over dense, which runs in torch, a part is that library's.")
        if restless := [f"{timing.network} at batch {timing.batch}" for timing in self.timings if timing.restless]:
            found.append(f"Quartiles far apart: {', '.join(restless)}. Something else ran: measure again on a quiet machine.")
        return found + [f"Not measured: {name}. {why}" for name, why in self.left_out.items()]

    def _of_mask(self) -> list[str]:
        masked, slim = self.of("masked"), [timing for timing in self.of("slim") if timing.flops is not None and timing.flops < _WHOLE]
        if not masked or self.density == 1:
            return []
        took = ", ".join(f"{timing.share:.2f} at batch {timing.batch}" for timing in masked)
        left = "" if self.kept_flops is None else f" ({self.kept_flops:.1%} of the FLOPs)"
        what = f"{self.density:.1%} of the weights{left}, and masked takes of dense's time {took}"
        if any(not timing.even for timing in masked):
            found = [f"The mask keeps {what}. It skips nothing: zeros are multiplied like other numbers."]
        else:
            found = [f"The mask brings no speed: it keeps {what}, as zeros are multiplied like other numbers."]
        if not slim:
            found.append(
                "What would help: masks of whole channels (granularity: filter), exported as slim; or, on a GPU with sparse tensor cores, "
                "masks of two in four ({name: n_m, n: 2, m: 4}), exported as 2:4."
            )
        return found


def _of_slim(timing: Timing) -> list[str]:
    if timing.flops is None or timing.kept_promise is None:
        return []
    if timing.flops >= _WHOLE:
        return [f"At batch {timing.batch} slim is the dense network: the masks empty no channel that could be taken out."]
    line = f"At batch {timing.batch} slim is {timing.speedup:.2f} times as fast as dense with 1/{1 / timing.flops:.2f} of its FLOPs"
    if timing.even:
        return [f"{line}: no speed. The fixed cost of each call is what is left of its time; larger batches or networks have less of it."]
    return [f"{line}: {timing.kept_promise:.2f} of what these promise."]


def bench(
    export: Export,
    *,
    batches: Sequence[int] = (1, 64),
    threads: int | None = None,
    device: str = "cpu",
    rounds: int = ROUNDS,
    clock: Callable[[], float] = time.perf_counter,
    listen: Listener = lambda event, facts: None,
) -> Bench:
    """Measure all networks of an export at each batch size. `threads` are torch's as they are, by default.

    With `clock=time.process_time` and one thread, other programs on the machine hardly matter: seconds are the processor's own then.
    Raises UserError for a batch size, number or device that cannot be.
    """
    _check(batches, threads, device, rounds)
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)  # forms that run elsewhere take as many when they are loaded
    try:
        networks, left_out = _networks(export, device, listen)
        example = export.inputs(1).to(device)
        counted = _counted(export, networks, example)
        timings: list[Timing] = []
        for batch in batches:
            inputs = export.inputs(batch).to(device)

            def tell(done: int, batch: int = batch) -> None:
                listen("round", {"batch": batch, "done": done, "rounds": rounds})

            took = measure(networks, inputs, rounds=rounds, block_s=BLOCK_S, clock=clock, tell=tell)
            timings += [_timing(batch, name, took, counted) for name in networks]
            listen("measured", {"timings": timings[-len(networks) :]})
        return Bench(
            export=str(export.path),
            hardware=hardware(device),
            device=device,
            threads=torch.get_num_threads(),
            rounds=rounds,
            density=export.masks.kept / export.masks.total,
            kept_flops=_kept_flops(export),
            timings=tuple(timings),
            left_out=left_out,
        )
    finally:
        torch.set_num_threads(before)


def _check(batches: Sequence[int], threads: int | None, device: str, rounds: int) -> None:
    if not batches or min(batches) < 1 or len(set(batches)) < len(batches):
        raise UserError(f"batch must be different sizes of at least 1, got {', '.join(map(str, batches)) or 'none'}. Write --batch 1,64.")
    if threads is not None and threads < 1:
        raise UserError(f"threads must be at least 1, got {threads}. Leave it out for torch's own number.")
    if rounds < 4:
        raise UserError(f"rounds must be at least 4, as quartiles are read from them, got {rounds}. Leave it out for {ROUNDS}.")
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        raise UserError(f"device must be one that torch can use here, got '{device}'. Write cpu, or cuda where there is a GPU.") from error
    if torch.device(device).type not in ("cpu", "cuda"):  # of which it is known when they have done their work
        raise UserError(f"device must be cpu or cuda, where times can be measured, got '{device}'. Write --device cpu.")


def _networks(export: Export, device: str, listen: Listener) -> tuple[dict[str, Network], dict[str, str]]:
    """Those that run here by name, dense first, and why the others do not."""
    networks: dict[str, Network] = {}
    left_out: dict[str, str] = {}
    for name in sorted(export.networks, key=lambda name: _ORDER.index(name) if name in _ORDER else len(_ORDER)):
        listen("loading", {"network": name})
        try:
            networks[name] = export.network(name, device=device)
        except UserError as error:
            if name in ("dense", "masked"):
                raise
            left_out[name] = str(error)
    if "2:4" in networks:  # it computes in half precision, which is faster by itself
        networks["dense half"] = half(export.build(edited=False).to(device).eval())
    others = [entry.name for entry in formats if entry.facts["network"] and entry.name not in export.networks]
    return networks, {**left_out, **{name: "This export does not hold it." for name in others}}


def _timing(batch: int, name: str, took: Mapping[str, list[float]], counted: Mapping[str, int | None]) -> Timing:
    low, share, high = quartiles(shares(took[name], took["dense"]))
    mine, dense = counted[name], counted["dense"]
    return Timing(
        batch=batch,
        network=name,
        ms=1e3 * quartiles(took[name])[1],
        share=share,
        low=low,
        high=high,
        flops=mine / dense if mine and dense else None,
    )


def _counted(export: Export, networks: Mapping[str, Network], example: Tensor) -> dict[str, int | None]:
    """FLOPs of one sample by network; of a form that torch cannot see into, those of the network that it was made of."""
    found = {name: _flops(network, example) for name, network in networks.items()}
    for name, count in found.items():
        made_of = export.manifest["formats"].get(name, {}).get("of")
        found[name] = count or found.get(made_of)
    return found


def _flops(network: Network, example: Tensor) -> int | None:
    """FLOPs that torch runs; None for what it cannot see into."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # one opaque operation for a whole encoder layer
    try:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            network(example)
        return counter.get_total_flops() or None
    except Exception:  # formats have tensors of their own, which the counter may not know
        return None
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def _kept_flops(export: Export) -> float | None:
    network = export.masked()
    dense = layer_flops(network, export.inputs(1), prunable(network))
    dense = {name: count for name, count in dense.items() if name in export.masks}
    return flops(dense, export.masks) / sum(dense.values()) if sum(dense.values()) else None


def hardware(device: str) -> str:
    """The processor's or GPU's name."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        found = [line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    except OSError:
        found = []
    return found[0] if found else platform.processor() or platform.machine()
