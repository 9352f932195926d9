"""The network as a graph of torch operations."""

import ast
import copy
import json
import logging
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
# What a graph may call: torch's own operators, without those that touch files, arithmetic of sizes, and blocks such as torch.no_grad.
_CALLED = re.compile(
    r"torch\.ops\.aten\.(?!from_file)\w+\.\w+|torch\.(sym_|_sym_)\w+"
    r"|torch\.ops\.higher_order\.(cond|map_impl|scan|while_loop|wrap_with_autocast|wrap_with_set_grad_enabled)"
    r"|_operator\.(add|and_|eq|floordiv|ge|getitem|gt|le|lshift|lt|mod|mul|ne|neg|or_|pos|pow|rshift|sub|truediv)",
    re.ASCII,
)
_WORD = re.compile(r"(?!(.*\.)?__\w*__(\.|$))[\w.]*", re.ASCII)  # torch makes code of names, which must not be more than names
_PLAIN = re.compile(r"[\w .,:+>-]*", re.ASCII)  # of an argument, such as "none" of gelu or "bij,bjk->bik" of einsum
_SIZE = re.compile(r"[\w ,.'=()-]*", re.ASCII)
_SIZES = {"Integer", "Add", "Mul", "Pow", "Max", "Min", "Mod", "PythonMod", "FloorDiv", "CleanDiv", "CeilDiv", "ModularIndexing"} | {
    "Equality",
    "Unequality",
    "LessThan",
    "GreaterThan",
    "StrictLessThan",
    "StrictGreaterThan",
}
_CONTAINERS = (None, "builtins.tuple", "builtins.list", "builtins.dict")
_NOTED = ("stack_trace", "nn_module_stack", "source_fn_stack", "torch_fn", "custom", "from_node")
_EMPTY = {"metadata", "guards_code", "treespec_namedtuple_fields", "custom_obj_values"}  # torch reads them as code, or need not have them


def _network(export: "Export", device: torch.device) -> Callable[[Tensor], Tensor]:
    from torch.export.pt2_archive._package import load_pt2

    from distprune.export.reading import batched

    check_plain(export.path / FILE)
    with _quiet():
        # Not torch.export.load, which falls back to an older kind of file that is all pickles.
        program = load_pt2(str(export.path / FILE)).exported_programs["model"]
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
    """Raise UserError for a program that is more than numbers, names and calls of torch's operators.

    torch unpickles some entries, and makes code of names and sizes, which it runs. What it will read is looked at with its own reader:
    of a file with two lists of entries another reader may take the other one.
    """
    try:
        reader = torch._C.PyTorchFileReader(str(file))
        found = next((why for path in reader.get_all_records() if (why := _foreign(path, reader))), "")
    except (RuntimeError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        said = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{file} is not a program of torch.export: {said}. Export again.") from error
    if found:
        raise UserError(f"{file} must hold numbers and JSON alone, got {found}. Export again.")


def _foreign(path: str, reader: Any) -> str:
    """What it is that does not belong into a program; empty if it does."""
    if path == "data/sample_inputs/model.pt":  # torch writes an entry for examples, and here are none
        return "a pickle of examples" if reader.get_record(path) else ""
    if not _ENTRIES.fullmatch(path):
        return f"an entry {path!r}"
    return next(_strange(json.loads(reader.get_record(path).decode())), "") if path.endswith(".json") else ""


def _strange(value: Any, key: str = "") -> Iterator[str]:
    """What in a program's JSON is more than a number or a name, at any depth; `key` is that of the mapping that it stands in."""
    if isinstance(value, dict):
        for name, item in value.items():
            if not _WORD.fullmatch(name) or name in ("as_custom_obj", "custom_obj"):
                yield f"the name {name!r}"
            if name == "use_pickle" and item is not False:
                yield "a pickle"
            if name in _EMPTY and item:
                yield f"{name}"
            yield from _strange(item, name)
    elif isinstance(value, list):
        for item in value:
            yield from _strange(item, key)
    elif isinstance(value, str) and not _RULES.get(key, _WORD.fullmatch)(value):
        yield f"{value[:80]!r} as {key}"


def _is_size(text: str) -> bool:
    """Whether it is an expression of whole numbers and symbols, as sympy writes it and evaluates it again."""
    try:
        return bool(_SIZE.fullmatch(text)) and _is_term(ast.parse(text, mode="eval").body)
    except SyntaxError:
        return False


def _is_term(node: ast.expr) -> bool:
    if isinstance(node, ast.UnaryOp):
        return isinstance(node.op, ast.USub) and _is_term(node.operand)
    if not isinstance(node, ast.Call):
        return isinstance(node, ast.Constant) and type(node.value) in (int, float)
    if not isinstance(node.func, ast.Name):
        return False
    flags = all(word.arg and isinstance(word.value, ast.Constant) and type(word.value.value) is bool for word in node.keywords)
    if node.func.id == "Symbol":
        return flags and [bool(isinstance(part, ast.Constant) and re.fullmatch(r"[su][0-9]+", str(part.value))) for part in node.args] == [
            True
        ]
    return flags and node.func.id in _SIZES and all(_is_term(part) for part in node.args)


def _is_layout(text: str) -> bool:
    """Whether it says of tensors alone how they lie in tuples, lists and dicts: torch imports the types that it names."""

    def plain(part: Any) -> bool:
        return (
            part.keys() == {"type", "context", "children_spec"}
            and part["type"] in _CONTAINERS
            and part["context"] in (None, "null", "[]")
            and all(plain(child) for child in part["children_spec"])
        )

    version, layout = json.loads(text)
    return version == 1 and plain(layout)


_RULES: dict[str, Callable[[str], object]] = {
    "target": _CALLED.fullmatch,
    "as_operator": _CALLED.fullmatch,
    "expr_str": _is_size,
    "in_spec": _is_layout,
    "out_spec": _is_layout,
    "as_string": _PLAIN.fullmatch,
    "as_strings": _PLAIN.fullmatch,
    "torch_version": _PLAIN.fullmatch,
    "path_name": re.compile(r"(weight|tensor)_[0-9]+").fullmatch,
}


def save(program: torch.export.ExportedProgram, file: Path) -> None:
    """Write a program without what torch notes of the code that it was traced from: classes, names and paths of this machine."""
    nodes = [node for module in program.graph_module.modules() if isinstance(module, torch.fx.GraphModule) for node in module.graph.nodes]
    before = [node.meta for node in nodes]
    made = copy.copy(program)
    made.example_inputs = None  # torch would write them as a pickle
    made._guards_code = []
    try:
        for node in nodes:
            node.meta = {key: value for key, value in node.meta.items() if key not in _NOTED}
        with _quiet():
            torch.export.save(made, file)
    finally:
        for node, meta in zip(nodes, before, strict=True):
            node.meta = meta


@format("pt2", network=_network)
def pt2(source: Source, folder: Path) -> Written:
    """A program of torch.export: a graph with its values, which torch runs and compiles without the network's code.

    It holds the slim network where channels are taken out, and takes any number of inputs at once where the network's code does.
    Raises UserError for a network whose program is more than torch's own operators and plain names: it could not be read back.
    """
    traced = source.traced
    save(traced.program, folder / FILE)
    check_plain(folder / FILE)
    notes = (source.slim.note, *([traced.note] if traced.note else ()))
    return Written(files=(FILE,), notes=notes, facts={"of": source.slim.name, "batch": None if traced.any_batch else 1})
