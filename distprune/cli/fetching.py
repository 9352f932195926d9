"""Bring the run folder of a job here.

Ray has no way to read a file of the head, so further jobs there write it into their own logs, a part each. What has arrived stays, so
that a fetch that broke off goes on where it was. A search that still runs is copied as it is: its journal first, and each table as long as
it was then, which is what a driver that dies there leaves behind.
"""

import base64
import binascii
import hashlib
import json
import os
import re
import secrets
import shutil
import zlib
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any

from distprune.cli import serving
from distprune.cli.head import ended, info_of, name_of, run_of, talking
from distprune.errors import UserError
from distprune.store.folder import RunFolder
from distprune.store.place import Objects, answering, is_url

PART_BYTES = 32 * 2**20  # a log passes through the memory of the dashboard
MOST_FILES = 1000  # of a part: they are named in a command
_PART_S = 900.0


def fetch(job: str, *, address: str, to: Path) -> Path:
    """Copy the run folder of a job into `to`. Raises UserError if it is there already, or does not arrive as it was."""
    with talking(address) as client:
        run = run_of(job, info_of(client, job))
        folder = to / name_of(run)
        if folder.exists():
            raise UserError(f"{folder} exists already. Remove it, or fetch into another folder: --to FOLDER.")
        aside = to / f".fetch-{job}"
        aside.mkdir(parents=True, exist_ok=True)
        if is_url(run):
            _copy(run, aside)
            return _publish(aside, folder)
        packers = _Packers(client, job, run)
        if not (aside / "plan.json").exists():
            data, said = packers.part(None)
            _write(aside / "0.part", data)
            _write(aside / "plan.json", json.dumps(said["plan"]).encode())
        plan = json.loads((aside / "plan.json").read_text())
        for index, spans in enumerate(plan["parts"]):
            if not (aside / f"{index}.part").exists():
                print(f"part {index + 1} of {len(plan['parts'])}", flush=True)
                _write(aside / f"{index}.part", packers.part(spans)[0])
    _assemble(plan, aside)
    return _publish(aside, folder)


class _Packers:
    """The jobs that print parts of a run folder."""

    def __init__(self, client: Any, job: str, run: str) -> None:
        self._client, self._job, self._run, self._latest = client, job, run, ""

    def part(self, spans: list[Any] | None) -> tuple[bytes, dict[str, Any]]:
        """The bytes of one part, and what the head says of it; of the first part, for None, the plan of all."""
        name = f"{self._job}-fetch-{secrets.token_hex(3)}"
        wanted = base64.b64encode(zlib.compress(json.dumps([self._run, spans, PART_BYTES, MOST_FILES, name, self._latest]).encode()))
        source = base64.b64encode(zlib.compress(Path(serving.__file__).read_bytes())).decode()
        program = f"import base64, json, zlib; exec(zlib.decompress(base64.b64decode('{source}'))); "
        program += f"serve(*json.loads(zlib.decompress(base64.b64decode('{wanted.decode()}'))))"
        self._client.submit_job(entrypoint=f'python -c "{program}"', submission_id=name)
        info = ended(self._client, name, within=_PART_S)
        log = self._client.get_job_logs(name)
        self._client.delete_job(name)  # from the list of jobs; the next one empties its log
        self._latest = name
        if refusal := re.search(rf"^{serving.MARK} error: (.*)$", log, re.MULTILINE):
            raise UserError(refusal[1])
        found = re.search(rf"^{serving.MARK} (\{{.*\}})$(.*)^{serving.MARK} end$", log, re.MULTILINE | re.DOTALL)
        try:
            said = json.loads(found[1]) if found else {}
            data = base64.b64decode(found[2]) if found else b""
        except (ValueError, binascii.Error):
            said, data = {}, b""
        if hashlib.sha256(data).hexdigest() != said.get("sha256"):
            last = next((line for line in reversed(log.splitlines()) if line.strip()), info.message or "no output")
            raise UserError(f"{self._run} did not arrive whole; the last line on the head was: {last[:300]}. Fetch again.")
        return zlib.decompress(data), said


def _copy(url: str, aside: Path) -> None:
    """Make a folder of the run at a URL, which this machine reads itself."""
    whole = _emptied(aside)
    shutil.copytree(RunFolder.existing(url).path, whole, ignore=shutil.ignore_patterns(".*"))
    with answering(url):
        objects = Objects.open(url)
        for name, *_ in objects.list("checkpoints"):
            target = _below(whole, name)
            target.parent.mkdir(parents=True, exist_ok=True)
            with suppress(FileNotFoundError):  # a checkpoint that nobody needs any more
                objects.bring(name, target)


def _publish(aside: Path, folder: Path) -> Path:
    """What is refused before leaves nothing in its place."""
    (aside / "run").rename(folder)
    shutil.rmtree(aside)
    return folder


def _emptied(aside: Path) -> Path:
    shutil.rmtree(aside / "run", ignore_errors=True)
    return aside / "run"


def _assemble(plan: dict[str, Any], aside: Path) -> None:
    """Make a folder of the parts."""
    whole = _emptied(aside)
    for inside in plan["folders"]:
        _below(whole, inside).mkdir(parents=True, exist_ok=True)
    gone = set()
    for index, spans in enumerate(plan["parts"]):
        data = memoryview((aside / f"{index}.part").read_bytes())
        start = 8 + int.from_bytes(data[:8], "big")
        for (name, *_), length in zip(spans, json.loads(bytes(data[8:start])), strict=True):
            path = _below(whole, name)
            if length is None:
                gone.add(path)
                continue
            with path.open("ab") as file:
                file.write(data[start : start + length])
            start += length
    for path in gone:
        path.unlink(missing_ok=True)


def _below(folder: Path, name: str) -> Path:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts:
        raise UserError(f"The head names a file {name!r}, which is not below the run folder: refused.")
    return folder / path


def _write(path: Path, data: bytes) -> None:
    """At once: a part that is there is whole."""
    aside = path.with_name(f".{path.name}")
    aside.write_bytes(data)
    os.replace(aside, path)
