"""The network for ONNX runtimes."""

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from distprune.errors import UserError
from distprune.export.source import Source, Written
from distprune.export.tables import format

if TYPE_CHECKING:
    from distprune.export.reading import Export

FILE = "network.onnx"
MOST_BYTES = 1_900_000_000  # of an ONNX file that holds its values: protobuf ends at 2 GiB
_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


def _network(export: "Export", device: torch.device) -> Callable[[Tensor], Tensor]:
    from distprune.export.reading import batched

    return batched(export, "onnx", session(export.path / FILE, device))


def session(file: Path, device: torch.device) -> Callable[[Tensor], Tensor]:
    """The network in `file` under onnxruntime, on as many threads as torch has."""
    try:
        import onnxruntime
    except ImportError as error:
        raise UserError('Networks in ONNX need onnxruntime, which is not installed. pip install "distprune[onnx]".') from error
    wanted = _PROVIDERS.get(device.type, device.type)
    if wanted not in onnxruntime.get_available_providers():
        raise UserError(
            f"onnxruntime must have {wanted} to run on '{device}', got {', '.join(onnxruntime.get_available_providers())}. Take cpu."
        )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = torch.get_num_threads(), 1
    options.log_severity_level = 3
    found: Any = onnxruntime.InferenceSession(str(file), options, providers=[wanted])
    name = found.get_inputs()[0].name

    def network(inputs: Tensor) -> Tensor:
        outputs: Tensor = torch.from_numpy(found.run(None, {name: inputs.cpu().numpy()})[0])
        return outputs.to(inputs.device)

    return network


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """None of what torch, onnxscript and onnx_ir print, warn and log about their steps; what goes wrong is raised."""
    logs = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [log.level for log in logs]
    for log in logs:
        log.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for log, level in zip(logs, levels, strict=True):
            log.setLevel(level)


@format("onnx", packages=("onnx", "onnxscript", "onnxruntime"), extra="onnx", network=_network)
def onnx(source: Source, folder: Path) -> Written:
    """An ONNX file with its values, by torch's dynamo exporter.

    It holds the slim network where channels are taken out, and takes any number of inputs at once where the network's code does.
    """
    import onnx as library

    traced = source.traced
    size = sum(tensor.numel() * tensor.element_size() for tensor in source.slim.network.state_dict().values())
    apart = size > MOST_BYTES
    with _quiet():
        torch.onnx.export(
            traced.program,
            f=folder / FILE,
            dynamo=True,
            external_data=apart,
            input_names=["inputs"],
            output_names=["outputs"],
            verbose=False,
        )
        library.checker.check_model(str(folder / FILE))
    notes = (source.slim.note, *([traced.note] if traced.note else ()))
    files = (FILE, f"{FILE}.data") if apart else (FILE,)
    return Written(files=files, notes=notes, facts={"of": source.slim.name, "batch": None if traced.any_batch else 1})
