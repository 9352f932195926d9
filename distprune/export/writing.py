"""Exports: what people take away from a trial, in one folder, each file checked after it was written.

masks.safetensors, masks.parquet, weights.safetensors    always there: what all else is checked against
test.safetensors      what the network answers: predictions for test images, or the image that it makes out of its input
model.py              the network as plain torch code
check.py              loads masks, weights, test and model with torch and safetensors alone and compares every answer
manifest.json         recipe, metrics, versions; each form with its error, size and latency against dense; sizes and hashes
torch.safetensors, slim.*, two_four.safetensors, network.onnx, network.pt2, recipe.yaml    the forms that were asked for
"""

import importlib.util
import json
import runpy
import shutil
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from distprune.core.registry import Entry
from distprune.core.run import Run
from distprune.errors import UserError, unknown
from distprune.export.code import CHECK, model_source
from distprune.export.measuring import Unfit, measured
from distprune.export.reading import FORMAT, MANIFEST, Export, digest, facts_of, open_export
from distprune.export.source import Source, Written
from distprune.export.tables import format as table

PLAIN = ("test.safetensors", "model.py", "check.py")


def chosen(formats: str | Iterable[str] | None) -> list[Entry]:
    """The entries of formats by name, those that every export holds first; by default those that need no further package.

    Raises UserError for a name that is none, and where a package is missing.
    """
    names = [formats] if isinstance(formats, str) else None if formats is None else list(formats)
    for name in names or ():
        if name not in table.names():
            raise unknown("export format", name, table.names())
    wanted = [entry for entry in table if (entry.facts["plain"] if names is None else entry.name in names)]
    for entry in wanted:
        missing = [package for package in entry.facts["packages"] if importlib.util.find_spec(package) is None]
        if missing:
            what = f'"distprune[{entry.facts["extra"]}]"' if entry.facts["extra"] else missing[0]
            raise UserError(
                f"Format {entry.name} needs {missing[0]}, which is not installed. pip install {what}, or leave {entry.name} out."
            )
    return [entry for entry in table if entry.facts["always"]] + [entry for entry in wanted if not entry.facts["always"]]


def check_target(to: str | Path) -> Path:
    """The folder to write. Raises UserError if something is in it."""
    folder = Path(to).absolute()
    try:
        if folder.exists() and any(folder.iterdir()):
            raise UserError(f"The export folder must be empty, {folder} is not. Choose another with --to.")
    except OSError as error:
        raise UserError(
            f"The export folder must be a new one, {folder} cannot be one: {error.strerror}. Choose another with --to."
        ) from error
    return folder


def export(run: Run, to: str | Path, facts: Mapping[str, Any], *, formats: str | Iterable[str] | None = None) -> Path:
    """Write a trained run to the new folder `to` and check what was written. `facts` go into the manifest.

    Nothing is at `to` before all of it is. A form that this network cannot have is left out where none was asked for by name. Raises
    UserError for a folder that is not empty, an unknown format and one asked for that this network cannot have; RuntimeError if the
    written files do not give the same network.
    """
    entries, target = chosen(formats), check_target(to)
    optional = {entry.name for entry in entries if formats is None and not entry.facts["always"]}
    aside = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}")
    try:
        try:
            aside.mkdir(parents=True)
        except OSError as error:
            raise UserError(f"{target} cannot be written: {error.strerror}. Choose another with --to.") from error
        _write(Source.of(run), entries, optional, aside, facts)
        open_export(aside)
        aside.rename(target)  # onto nothing, or an empty folder
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    return target


def _write(source: Source, entries: list[Entry], optional: set[str], folder: Path, facts: Mapping[str, Any]) -> None:
    run, kind, masks = source.run, source.kind, source.masks
    written, left_out = _forms(source, entries, optional, folder)
    entries = [entry for entry in entries if entry.name in written]
    save_file({name: tensor.cpu().contiguous() for name, tensor in kind.rows.items()}, str(folder / "test.safetensors"))
    (folder / "model.py").write_text(model_source(run.recipe.model, run.env.task, source.edits, kind))
    (folder / "check.py").write_text(CHECK.replace("COMPARE\n", kind.compare))
    _run_as_code(source, folder)
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "sha256": "",
        **facts,
        "recipe": run.recipe.plain(),
        "sparsity": run.state.sparsity,
        "kept": masks.kept,
        "edits": list(source.edits),
        "layers": {
            name: {"shape": list(mask.shape), "kept": kept, "sparsity": 1 - kept / mask.numel()}
            for (name, mask), kept in zip(masks.items(), masks.counts.values(), strict=True)
        },
        "metrics": {"validation": kind.validation, "test": dict(kind.metrics)},
        "network": {"shape": list(run.env.task.shape), "classes": run.env.task.classes, **kind.inputs},
        "dense": {"bytes": source.dense_bytes},
        "formats": {name: {"files": list(form.files), **form.facts} for name, form in written.items()},
        "files": {name: facts_of(folder / name) for name in (*PLAIN, *(file for form in written.values() for file in form.files))},
    }
    forms: dict[str, dict[str, Any]] = manifest["formats"]
    found = measured(Export(folder, manifest), source, entries, optional)
    unfit = {name: facts["left_out"] for name, facts in found.items() if "left_out" in facts}
    manifest["left_out"] = {**left_out, **unfit}
    for name in unfit:
        for file in forms.pop(name)["files"]:
            del manifest["files"][file]
            (folder / file).unlink()
    for name, form in forms.items():
        size = sum(manifest["files"][file]["bytes"] for file in form["files"])
        notes = [*written[name].notes, *found[name].pop("notes", ())]
        form |= {"bytes": size, "size": size / source.dense_bytes, **found[name], "notes": notes}
    manifest["sha256"] = digest(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")


def _forms(source: Source, entries: list[Entry], optional: set[str], folder: Path) -> tuple[dict[str, Written], dict[str, str]]:
    """What each form has written, and why an optional one cannot be had. Raises UserError for another that cannot."""
    written: dict[str, Written] = {}
    left_out: dict[str, str] = {}
    for entry in entries:
        before = set(folder.iterdir())
        try:
            written[entry.name] = entry.function(source, folder)
        except OSError:
            raise  # of the disk, not of the network
        except Exception as error:  # whatever exporters and the network's own code raise
            if entry.name in optional:
                left_out[entry.name] = Unfit(entry.name, error).why
                for file in set(folder.iterdir()) - before:
                    file.unlink()
            elif isinstance(error, UserError) or entry.facts["always"]:
                raise
            else:
                raise Unfit(entry.name, error) from error
    return written, left_out


def _run_as_code(source: Source, folder: Path) -> None:
    """Raise RuntimeError unless model.py with the written weights answers as the trial does."""
    module = runpy.run_path(str(folder / "model.py"))
    network = module["build"]().eval()
    network.load_state_dict(load_file(folder / "weights.safetensors"))
    with torch.no_grad():
        same = source.kind.same(module, network, load_file(folder / "test.safetensors"))
    if not same:
        raise RuntimeError("model.py does not predict as the trial does. This is a defect of distprune: please report it.")
