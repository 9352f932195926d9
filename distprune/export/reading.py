"""An export read back: every byte is compared with its manifest first, and nothing in it is unpickled or run.

The hashes seal an export against damage, not against a forger, who can make them anew. And a network of your own is imported from the
module that the manifest names: never from the export's folder, but open only exports whose module you know.

export = open_export("out")
export.network("slim")(export.inputs(8))  # [8, classes]
"""

import hashlib
import importlib.machinery
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from distprune.core import registry
from distprune.core.edits import structure
from distprune.core.masks import Masks
from distprune.core.run import build_model
from distprune.core.streams import global_stream
from distprune.errors import UserError, unknown
from distprune.export.tables import format as formats

FORMAT = "distprune.export/2"
MANIFEST = "manifest.json"
_ALWAYS = ("dense", "masked")  # networks that every export has
_KEYS = {"format": str, "sha256": str, "recipe": dict, "edits": list, "network": dict, "formats": dict, "files": dict}


@dataclass(frozen=True)
class Export:
    """What was exported of one network. `open_export` makes it."""

    path: Path
    manifest: Mapping[str, Any] = field(repr=False)

    @property
    def formats(self) -> tuple[str, ...]:
        """The forms that it holds, such as ("masks", "weights", "slim")."""
        return tuple(self.manifest["formats"])

    @property
    def networks(self) -> tuple[str, ...]:
        """What `network` takes."""
        return _ALWAYS + tuple(name for name in self.formats if formats.get(name).facts["network"])

    @property
    def masks(self) -> Masks:
        """The masks."""
        return Masks.load(self.path / "masks.safetensors")

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The tensors of one of its safetensors files."""
        try:
            return load_file(self.path / name)
        except Exception as error:  # safetensors raises its own
            raise UserError(f"{self.path / name} is not a readable safetensors file: {error}. Export again.") from error

    def network(self, name: str, *, device: torch.device | str = "cpu") -> Callable[[Tensor], Tensor]:
        """A network in eval mode, [n, ...] to its outputs.

        "dense" is the architecture as it was built, unpruned and untrained: for what it costs, not for what it answers. "masked" has the
        removed weights at zero. The others are forms of the same network: "slim", "2:4", "onnx", "pt2".
        Raises UserError for a name that is none, a form that this export does not hold, and one that cannot run here.
        """
        if name == "dense":
            return self.build(edited=False).to(device).eval()
        if name == "masked":
            return self.masked().to(device).eval()
        known = [entry.name for entry in formats if entry.facts["network"]]
        if name not in known:
            raise unknown("network of an export:", name, (*_ALWAYS, *known))
        if name not in self.formats:
            raise UserError(
                f"{self.path} does not hold {name}, it was exported as {', '.join(self.formats)}. Export again with --formats {name}."
            )
        try:
            made: Callable[[Tensor], Tensor] = formats.get(name).facts["network"](self, torch.device(device))
        except UserError:
            raise
        except Exception as error:  # whatever torch, onnxruntime and JSON say of what they cannot read
            files = ", ".join(self.manifest["formats"][name]["files"])
            raise UserError(f"{self.path}: {name} cannot be read from {files}: {' '.join(str(error).split())} Export again.") from error
        return made

    def masked(self) -> nn.Module:
        """The network with its pruned weights, in training mode as it was built."""
        network = self.build()
        fill(network, self.tensors("weights.safetensors"), self.path / "weights.safetensors")
        return network

    def build(self, *, edited: bool = True) -> nn.Module:
        """The architecture with fresh values, by default with what was fused or replaced since it was built."""
        chosen = self.manifest["recipe"]["model"]
        name = f"import:{chosen['import']}" if isinstance(chosen, dict) and "import" in chosen else chosen
        name = str(name.get("name") if isinstance(name, dict) else name)
        if name.startswith("import:"):
            _check_module(name.split(":")[1], self.path)
        choice = registry.model.read(chosen, "model")
        options = {name: value for name, value in choice.options.items() if name not in choice.entry.facts["values_only"]}
        with global_stream(self.manifest["recipe"]["seed"], "init"):  # for what a network draws and does not save
            network = build_model(
                replace(choice, options=options), tuple(self.manifest["network"]["shape"]), self.manifest["network"]["classes"]
            )
            for edit in self.manifest["edits"] if edited else ():
                structure.apply(network, edit)
        return network

    def inputs(self, count: int) -> Tensor:
        """`count` float inputs as the network takes them: the first of test.safetensors, again and again where there are fewer."""
        rows = self.tensors("test.safetensors")["inputs"]
        rows = rows[torch.arange(count) % len(rows)]
        if rows.is_floating_point():
            return rows
        mean, std = (torch.tensor(self.manifest["network"][key]).view(1, -1, 1, 1) for key in ("mean", "std"))
        return (rows.float() / 255 - mean) / std

    def lines(self) -> list[str]:
        """A line a form, for people: size and time as shares of the dense network's, error, and what must be known."""
        rows = [("", "size", "of dense", "time of dense", "error")]
        for name, form in self.manifest["formats"].items():
            latency, error = form["latency"], form["error"]
            time = "-" if latency is None else f"{latency['ratio']:.2f} ({latency['low']:.2f}-{latency['high']:.2f})"
            exact = "0" if form.get("exact") else "-"
            rows.append((name, _size(form["bytes"]), f"{form['size']:.2f}", time, exact if error is None else f"{error['relative']:.1g}"))
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        table = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        notes: dict[str, list[str]] = {}
        for name, form in self.manifest["formats"].items():
            for note in form["notes"]:
                notes.setdefault(note, []).append(name)
        left_out = [f"{name}: left out. {why}" for name, why in self.manifest.get("left_out", {}).items()]
        return [*table, *(f"{', '.join(names)}: {note}" for note, names in notes.items()), *left_out]


def open_export(path: str | Path) -> Export:
    """The export in the folder `path`, once each of its files was found to be what its manifest says.

    Raises UserError for a folder that is no export, a manifest that was changed, and a file that is missing, damaged or another.
    """
    folder = Path(path)
    try:
        text = (folder / MANIFEST).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{folder} is not an export: it has no {MANIFEST} that can be read. Make one with distprune export.") from error
    try:
        manifest = json.loads(text)
        _check(manifest)
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise UserError(f"{folder / MANIFEST} is not the manifest of an export ({error}). Export again.") from error
    for name, facts in manifest["files"].items():
        _compare(folder, name, facts)
    return Export(folder, manifest)


def fill(network: nn.Module, values: Mapping[str, Tensor], file: Path) -> None:
    """Load values into a network. Raises UserError where they are of another: a user's own code may have changed since."""
    try:
        network.load_state_dict(values)
    except RuntimeError as error:
        raise UserError(
            f"{file} does not fit the network that its recipe builds here: {' '.join(str(error).split())} "
            "Use the code that it was made with."
        ) from error


def batched(export: Export, name: str, network: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """`network`, given its inputs one after the other where that is how it was traced."""
    if export.manifest["formats"][name]["batch"] is None:
        return network
    return lambda inputs: torch.cat([network(row) for row in torch.split(inputs, 1)])


def digest(manifest: Mapping[str, Any]) -> str:
    """SHA-256 of a manifest without its own `sha256`."""
    rest = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def facts_of(file: Path) -> dict[str, Any]:
    """Size (bytes) and SHA-256 of a file, for a manifest."""
    with file.open("rb") as stream:
        return {"bytes": file.stat().st_size, "sha256": hashlib.file_digest(stream, "sha256").hexdigest()}


def _size(count: int) -> str:
    """Bytes, for people.

    >>> _size(12_345_678)
    '12.3 MB'
    """
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count} B"


def _check(manifest: Any) -> None:
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ValueError(f"its format is not {FORMAT}")
    for key, kind in _KEYS.items():
        if not isinstance(manifest.get(key), kind):
            raise ValueError(f"it has no '{key}'")
    if manifest["sha256"] != digest(manifest):
        raise ValueError("it was changed after it was written")
    needed = ["test.safetensors", "masks.safetensors", "weights.safetensors"]
    for name, form in manifest["formats"].items():
        if name not in formats.names():  # `get` would import a function of any module
            raise ValueError(f"it has an unknown format {name!r}")
        needed += form["files"]
    needed += [entry.name for entry in formats if entry.facts["always"] and entry.name not in manifest["formats"]]
    for name in needed:
        if name not in manifest["files"]:
            raise ValueError(f"it lists no {name}, which its formats need")
    shape, classes = manifest["network"]["shape"], manifest["network"]["classes"]
    # The user's own function is called with these: with numbers, and with nothing else that a manifest may hold.
    if [type(number) for number in (*shape, classes)] != [int] * 4:
        raise ValueError(f"its network takes {shape} and {classes}, not four whole numbers")
    for name, facts in manifest["files"].items():
        if not isinstance(facts, dict) or facts.keys() != {"bytes", "sha256"}:
            raise ValueError(f"it does not say what {name} is")


def _check_module(module: str, folder: Path) -> None:
    """Raise UserError where a module, or a package that it is in, lies in an export: nothing of what came with one is run."""
    places: Sequence[str] = [*sys.path, os.getcwd()]  # as the registry looks for it
    for part in module.split("."):
        spec = importlib.machinery.PathFinder.find_spec(part, places)
        if spec is None:
            return  # nothing to be imported, or not from a file
        places = list(spec.submodule_search_locations or ())
        for place in (*places, *([spec.origin] if spec.origin else ())):
            if Path(place).resolve().is_relative_to(folder.resolve()):
                raise UserError(
                    f"The network of {folder} must be of a module outside the export, got '{module}' in {place}. "
                    "Move your module out of it, and run from there."
                )


def _compare(folder: Path, name: str, facts: Mapping[str, Any]) -> None:
    file = folder / name
    # A name is looked for in the folder itself, whatever the manifest writes, and a link is not followed.
    if Path(name).name != name or file.is_symlink() or not file.is_file():
        raise UserError(f"{file} is missing, and the manifest of {folder} lists it. Copy the whole folder, or export again.")
    if file.stat().st_size != facts["bytes"] or facts_of(file) != facts:
        raise UserError(f"{file} is not the file that was exported: its content does not fit the manifest. Copy it again, or export again.")
