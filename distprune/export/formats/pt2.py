"""The network as a graph of torch operations."""

import copy
import json
import logging
import re
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from distprune.errors import UserError
from distprune.export.source import Source, Written
from distprune.export.tables import format

if TYPE_CHECKING:
    from distprune.export.reading import Export

FILE = "network.pt2"
_ENTRIES = re.compile(
    r"data/weights/weight_\d+|data/constants/tensor_\d+|data/(weights|constants)/model_\w+_config\.json|models/model\.json"
    r"|archive_format|archive_version|byteorder|\.format_version|\.storage_alignment|\.data/(version|serialization_id)"
)
_CALLED = ("torch.ops.", "_operator.", "torch.sym_", "torch._sym_")  # what a graph may call: operators, and arithmetic of sizes


def _network(export: "Export", device: torch.device) -> Callable[[Tensor], Tensor]:
    from distprune.export.reading import batched

    check_plain(export.path / FILE)
    with _quiet():
        program = torch.export.load(export.path / FILE)
        if device.type != "cpu":
            from torch.export.passes import move_to_device_pass

            program = move_to_device_pass(program, device)
        network = program.module()
    for module in network.modules():
        module.training = False  # it was traced so, and refuses to be told
    return batched(export, "pt2", network)


@contextmanager
def _quiet() -> Iterator[None]:
    """No warnings of torch about its own insides, and no log of what is raised as well."""
    log = logging.getLogger("torch.export")
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)


def check_plain(file: Path) -> None:
    """Raise UserError for a program that is not numbers, JSON and calls of torch's operators: torch.export.load reads pickles as well."""
    try:
        with zipfile.ZipFile(file) as archive:
            found = next((why for entry in archive.infolist() if (why := _foreign(entry, archive))), None)
    except (zipfile.BadZipFile, OSError, ValueError, KeyError) as error:
        raise UserError(f"{file} is not a program of torch.export: {error}. Export again.") from error
    if found:
        raise UserError(f"{file} must hold numbers and JSON alone, got {found}. Export again.")


def _foreign(entry: zipfile.ZipInfo, archive: zipfile.ZipFile) -> str:
    """What it is that does not belong into a program; empty if it does."""
    path = entry.filename.partition("/")[2]
    if path.endswith("sample_inputs/model.pt") and not entry.file_size:
        return ""  # torch writes an entry for examples, and here are none
    if not _ENTRIES.fullmatch(path):
        return f"an entry '{path}'"
    if path.endswith("config.json"):
        pickled = [name for name, facts in json.loads(archive.read(entry))["config"].items() if facts["use_pickle"]]
        return f"a pickle of '{pickled[0]}'" if pickled else ""
    if path.endswith(".json"):
        nodes = json.loads(archive.read(entry))["graph_module"]["graph"]["nodes"]
        called = [node["target"] for node in nodes if not node["target"].startswith(_CALLED)]
        return f"a call of '{called[0]}'" if called else ""
    return ""


@format("pt2", network=_network)
def pt2(source: Source, folder: Path) -> Written:
    """A program of torch.export: a graph with its values, which torch runs and compiles without the network's code.

    It holds the slim network where channels are taken out, and takes any number of inputs at once where the network's code does.
    """
    traced = source.traced
    with _quiet():
        program = copy.copy(traced.program)
        program.example_inputs = None  # the one thing that torch would write as a pickle
        torch.export.save(program, folder / FILE)
    notes = (source.slim.note, *([traced.note] if traced.note else ()))
    return Written(files=(FILE,), notes=notes, facts={"of": source.slim.name, "batch": None if traced.any_batch else 1})
