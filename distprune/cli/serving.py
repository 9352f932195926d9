"""Runs on the head, in any Python: prints a part of a run folder into the log of its job. `fetch` sends this file along as a command."""

import base64
import hashlib
import json
import os
import sys
import zlib
from typing import Any, NoReturn

MARK = "distprune-fetch"
_FIRST = ("study.journal", "reports.arrows")  # what the one knows, the other has: reports come first on the disk
_LINE = 3 * 2**14  # bytes


def serve(run: str, spans: list[Any] | None, limit: int, most: int, own: str, earlier: str) -> None:
    """Print the bytes of `spans`; for None, plan parts of at most `limit` bytes and `most` files, and print the first with the plan.

    `own` is the id of this job, `earlier` that of the one before, whose log is emptied.
    """
    folder = os.path.expanduser(run)
    log = os.path.realpath("/proc/self/fd/1")
    if earlier and own in os.path.basename(log) and os.path.isfile(log.replace(own, earlier)):
        os.truncate(log.replace(own, earlier), 0)
    said: dict[str, Any] = {}
    if spans is None:
        if not os.path.isfile(os.path.join(folder, "search.yaml")):
            _refuse(f"there is no run folder {folder} on the head yet. See what the job says: distprune logs JOB --address ADDRESS.")
        said["plan"] = _plan(folder, limit, most)
        spans = said["plan"]["parts"][0]
    found = [_read(folder, *span) for span in spans]
    lengths = json.dumps([None if data is None else len(data) for data in found]).encode()
    data = zlib.compress(len(lengths).to_bytes(8, "big") + lengths + b"".join(data or b"" for data in found), 1)
    print(MARK, json.dumps({**said, "sha256": hashlib.sha256(data).hexdigest()}))
    for start in range(0, len(data), _LINE):
        print(base64.b64encode(data[start : start + _LINE]).decode())
    print(MARK, "end", flush=True)


def _plan(folder: str, limit: int, most: int) -> dict[str, Any]:
    """The folders, and the spans (name, start, length, size and inode of the file) of each part."""
    folders: list[str] = []
    names: list[str] = []
    for root, below, files in os.walk(folder):
        below[:] = sorted(name for name in below if not name.startswith("."))  # hidden: locks, and what is being written
        inside = os.path.relpath(root, folder)
        folders.append(inside)
        names += [os.path.normpath(os.path.join(inside, name)) for name in sorted(files) if not name.startswith(".")]
    names.sort(key=lambda name: _FIRST.index(name) if name in _FIRST else len(_FIRST))
    parts: list[list[Any]] = [[]]
    room = limit
    for name in names:
        path, start = os.path.join(folder, name), 0
        try:
            facts = os.lstat(path)
        except OSError:
            continue
        if os.path.islink(path):
            continue
        while True:
            if not room or len(parts[-1]) == most:
                parts.append([])
                room = limit
            length = min(facts.st_size - start, room)
            parts[-1].append([name, start, length, facts.st_size, facts.st_ino])
            start, room = start + length, room - length
            if start == facts.st_size:
                break
    return {"folders": folders, "parts": parts}


def _read(folder: str, name: str, start: int, length: int, size: int, inode: int) -> bytes | None:
    """The bytes of a span; None if its file is gone: a checkpoint that nobody needs any more."""
    try:
        with open(os.path.join(folder, name), "rb") as file:
            if os.fstat(file.fileno()).st_ino == inode:
                file.seek(start)
                return file.read(length)
            if length == size:
                return file.read()  # another has taken its place, whole
    except FileNotFoundError:
        return None
    _refuse(f"{name} has changed while it was copied. Remove the folder .fetch-JOB here, and fetch again.")


def _refuse(why: str) -> NoReturn:
    print(f"{MARK} error: {why}")
    sys.exit(2)
