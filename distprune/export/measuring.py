"""What the forms of an export answer and take, beside the network that they are forms of."""

from collections.abc import Callable, Container, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from distprune.core.latency import measure, quartiles, shares
from distprune.core.registry import Entry
from distprune.errors import UserError
from distprune.export.formats.two_four import half
from distprune.export.reading import Export
from distprune.export.source import Source

ROWS = 16  # inputs that forms are compared on, where there are so many
LIMIT = {"cpu": 1e-4, "cuda": 2e-2}  # of a form's error, as a share of the largest output; on a GPU it runs in half precision
SPREAD = 0.2  # of a ratio's quartiles, as a share of it: more is noise
ATTEMPTS = 3

Network = Callable[[Tensor], Tensor]


class Unfit(UserError):
    """A network that a form cannot hold."""

    def __init__(self, name: str, error: Exception) -> None:
        said = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        self.why = f"It cannot hold this network: {said}."
        super().__init__(f"Format {name} cannot hold this network: {said}. Nothing was written. Leave {name} out.")


class Differs(UserError):
    """A form answers otherwise than the network does."""

    def __init__(self, name: str, device: str, relative: float) -> None:
        super().__init__(
            f"Format {name} must answer as the network does within {LIMIT[device]:g} of its largest output, got {relative:.2g}. "
            f"Nothing was written. Leave {name} out."
        )
        self.why = f"It cannot hold this network: its answers were {relative:.2g} of the largest output away."


def measured(export: Export, source: Source, entries: Sequence[Entry], optional: Container[str] = ()) -> dict[str, dict[str, Any]]:
    """Format -> its `error` and `latency` for the manifest, and `notes`: why there is none; `left_out` for an optional form that fails.

    Raises UserError for another form that cannot be run, or answers otherwise than the network does.
    """
    found: dict[str, dict[str, Any]] = {}
    networks: dict[str, dict[str, Network]] = {"cpu": {}, "cuda": {}}
    for entry in entries:
        load, device = entry.facts["network"] or entry.facts["loaded"], entry.facts["device"]
        found[entry.name] = {"error": None, "latency": None, "notes": []}
        if load is None:
            found[entry.name]["notes"] = ["It holds no network: there is nothing to time."]
            continue
        try:
            try:
                network = load(export, torch.device(device))
            except UserError as error:
                if device == "cpu":
                    raise
                found[entry.name]["notes"] = [str(error)]  # one of other hardware
                continue
            found[entry.name]["error"] = _error(entry.name, network, export, source, device)
        except Exception as error:  # whatever torch, onnxruntime and the network's own code raise
            if entry.name in optional:
                found[entry.name]["left_out"] = (error if isinstance(error, Differs) else Unfit(entry.name, error)).why
                continue
            if isinstance(error, UserError) or entry.facts["always"]:
                raise
            raise Unfit(entry.name, error) from error
        networks[device][entry.name] = network
    for device, those in networks.items():
        if those:
            for name, facts in _latency(those, export, device).items():
                found[name] |= {"latency": facts} if "ratio" in facts else {"notes": [*found[name]["notes"], facts["why"]]}
    return found


@torch.no_grad()
def _error(name: str, network: Network, export: Export, source: Source, device: str) -> dict[str, Any]:
    """How far a form's answers are from the network's, at once and one alone."""
    inputs = export.inputs(min(ROWS, len(source.kind.rows["inputs"])))  # a network of one input may take no more at once
    due = source.network(inputs).float()
    there = inputs.to(device)
    both = [network(there).cpu().float() - due, network(there[:1]).cpu().float() - due[:1]]
    largest = max(float(difference.abs().max()) for difference in both)
    scale = float(due.abs().max())
    relative = largest / scale if scale else largest
    if not relative <= LIMIT[device]:  # NaN is not
        raise Differs(name, device, relative)
    return {"largest": largest, "relative": relative, "inputs": len(inputs)}


def _latency(networks: Mapping[str, Network], export: Export, device: str) -> dict[str, dict[str, Any]]:
    """Name -> time of one input as a share of the dense network's with its quartiles, or why it is not known."""
    dense: Any = export.network("dense", device=device)
    subjects = {"dense": half(dense) if device == "cuda" else dense, **networks}
    inputs = export.inputs(1).to(device)
    where = {"batch": 1, "device": device, **({"threads": torch.get_num_threads()} if device == "cpu" else {"precision": "fp16"})}
    found: dict[str, dict[str, Any]] = {}
    spreads: list[float] = []
    for _ in range(ATTEMPTS):
        took = measure(subjects, inputs)
        spreads = []
        for name in networks:
            low, median, high = quartiles(shares(took[name], took["dense"]))
            spreads.append((high - low) / median)
            if spreads[-1] <= SPREAD and name not in found:
                found[name] = {"ratio": median, "low": low, "high": high, **where}
        if len(found) == len(networks):
            break
    why = f"Its latency is not known: quartiles of the ratio to dense lay more than {SPREAD:.0%} apart in each of {ATTEMPTS} attempts."
    return {name: found.get(name, {"why": why}) for name in networks}
