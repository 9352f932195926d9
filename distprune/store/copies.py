"""A run at a URL, brought into a folder of this machine: by its driver, who goes on with it, and by readers."""

import hashlib
import os
import re
import shutil
import uuid
from pathlib import Path
from typing import Literal

from distprune.errors import UserError, command
from distprune.store import files, parts
from distprune.store.place import Objects, answering, check_url, split

SEARCH = "search.yaml"
WHOLE = re.compile(rf"{re.escape(SEARCH)}|learned\.json|(trials|reports)\.parquet|masks/\d+\.safetensors")  # they go up as they are
_OWNERS = ".owners"  # the drivers of this folder: what they have not sent up is nobody else's


def here(url: str, kind: Literal["runs", "copies"]) -> Path:
    """Where this machine keeps the run at a URL: of drivers, or of readers, who so never touch what a driver writes."""
    storage, name = split(url)
    if not name or Path(name).name != name or name.startswith("."):
        raise UserError(f"{url} does not end with the name of a run. Write the storage and the name: s3://bucket/path/digits.")
    home = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return home / "distprune" / kind / hashlib.sha256(storage.encode()).hexdigest()[:16] / name


def copy_of(url: str) -> Path:
    """A copy of the run at a URL, for reading: what it was a moment ago. Raises UserError if there is none."""
    check_url(url, "The run")
    folder = here(url, "copies")
    folder.mkdir(parents=True, exist_ok=True)
    with files.lock(folder, wait=True):
        bring(url, folder)
    return folder


def bring(url: str, folder: Path) -> None:
    """Make `folder` what the run at a URL is; a driver's own stays as it is where it only holds more. Its lock is held.

    Raises UserError if there is no run, or the store does not answer.
    """
    with answering(url):
        objects = Objects.open(url)
        found = listed(objects)
        if SEARCH not in found:
            storage, name = split(url)
            begin = command(f"search FILE --storage '{storage}' --name {name}")
            raise UserError(f"{url} is not a run folder: it has no {SEARCH}. Start one with: {begin}")
        tables = parts.read(objects)
        if _is_ahead(folder, tables):
            return
        (folder / _OWNERS).unlink(missing_ok=True)  # killed from here on, it is brought again
        for name, data in tables.streams.items():
            if data:
                files.publish(folder / name, data)
            else:
                (folder / name).unlink(missing_ok=True)
        for name in whole_files(folder):
            if name not in found:
                (folder / name).unlink()
        for name, (size, changed) in found.items():
            _fetch(objects, name, folder / name, size, changed)


def listed(objects: Objects) -> dict[str, tuple[int, float]]:
    """Those of the files that go up whole that are there: name -> (bytes, time of change). Other names are never brought here."""
    there = [*objects.list(deep=False), *objects.list("masks", deep=False)]
    return {name: (size, changed) for name, size, changed in there if WHOLE.fullmatch(name)}


def whole_files(folder: Path) -> list[str]:
    """The names of the files of a run folder that go up whole."""
    names = (path.relative_to(folder).as_posix() for path in [*folder.glob("*"), *folder.glob("masks/*")] if path.is_file())
    return sorted(name for name in names if WHOLE.fullmatch(name))


def clear(folder: Path) -> None:
    """Empty a driver's folder of what an earlier run of that URL has left."""
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != ".lock":
            path.unlink()


def owned(folder: Path, owner: str) -> None:
    """Note who drives the run in this folder from now on, after those before."""
    files.append(folder / _OWNERS, f"{owner}\n".encode())


def _is_ahead(folder: Path, tables: parts.Tables) -> bool:
    """Whether a driver of this folder wrote those tables, and what it holds begins with them."""
    owners = (folder / _OWNERS).read_text().split() if (folder / _OWNERS).exists() else []
    return tables.driver[1] in owners and all(
        (folder / name).read_bytes().startswith(data) if (folder / name).exists() else not data for name, data in tables.streams.items()
    )


def _fetch(objects: Objects, name: str, target: Path, size: int, changed: float) -> None:
    """Bring a file, unless it is here: masks are large, and replaced when they change."""
    if name.startswith("masks/") and target.exists() and (target.stat().st_size, target.stat().st_mtime) == (size, changed):
        return
    target.parent.mkdir(exist_ok=True)
    aside = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}")
    try:
        objects.bring(name, aside)
        os.utime(aside, (changed, changed))
        os.replace(aside, target)
    finally:
        aside.unlink(missing_ok=True)
