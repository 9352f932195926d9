"""A search as a Ray job: submit it to a cluster, look at it, stop it, go on with it.

Relative paths belong to the head, as with scp: a relative storage is taken below the home folder there (`runs` is `~/runs`), never in
the working folder of the job, which Ray deletes. Where trials run on several nodes, give `--storage` a folder that all of them see, or a
URL. What is sent along is packed by `packing`; distprune is expected to be installed on every node, and `aboard` looks whether it is.
"""

import json
import os
import re
import shlex
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from distprune.cli import packing
from distprune.cli.aboard import SCRIPT
from distprune.cli.following import end, logs
from distprune.cli.head import clock, ended, info_of, name_of, run_of, searches, talking
from distprune.core.config import read_yaml
from distprune.errors import UserError, command
from distprune.store.folder import RunFolder
from distprune.store.place import is_url, join, split

_STOP_S = 60  # that a driver has to put its tables in order, once it was told to stop
_IN_WORKING_FOLDER = "RAY_RUNTIME_ENV_CREATE_WORKING_DIR"


@dataclass(frozen=True)
class Environment:
    """Packages that the nodes install for a job: a requirements file, and which installer reads it."""

    pip: Path | None = None
    uv: Path | None = None

    def __post_init__(self) -> None:
        if self.pip and self.uv:
            raise UserError(f"--pip and --uv are two ways to do one thing, got {self.pip} and {self.uv}. Leave one out.")

    def read(self, folder: Path) -> dict[str, Any]:
        """Keys of Ray's runtime_env; archives that it names are copied into `folder`."""
        return {key: packing.requirements(path, folder) for key, path in (("pip", self.pip), ("uv", self.uv)) if path}


def submit(
    config: Path, *, address: str, name: str | None, storage: str | None, trials: int | None, environment: Environment, follow: bool
) -> int:
    """Submit a search; with `follow`, show its output until it ends and return its exit code. Raises UserError before any network if
    the search is wrong."""
    from distprune.search.config import Search

    search = Search.load(config, name=name, storage=storage, limits=None if trials is None else {"trials": trials})
    plain = json.loads(json.dumps(search.plain()))
    names = packing.module_names(plain)
    modules = packing.modules_here(names)
    run = _on_head(search.storage, search.name)
    storage_on_head = split(run)[0] if is_url(run) else str(PurePosixPath(run).parent)

    def pack(folder: Path, job: str) -> dict[str, Any]:
        packing.pack(folder, job=job, keep=_kept(run), plain=plain, modules=modules)
        return environment.read(folder)

    return _start(
        f"search search.yaml --storage {_shell(storage_on_head)}", run=run, modules=names, address=address, pack=pack, follow=follow
    )


def resume(what: str, *, address: str, limits: Mapping[str, Any], environment: Environment, follow: bool) -> int:
    """Go on with the search of an ended job, or with the run `what`: a folder, relative to the home folder of the head, or a URL.

    The user's modules are taken from here if all of them are, and else from where the earlier job left them on the storage.
    """
    with talking(address) as client:
        names, inherited = [], dict[str, Any]()
        if is_url(what):
            run = what
            names = packing.module_names(read_yaml(RunFolder.existing(run).search_yaml)["search"])
        elif "/" in what:
            run = _on_head(*os.path.split(what.rstrip("/")))
        else:
            info = info_of(client, what)
            run = run_of(what, info)
            names = [name for name in (info.metadata or {}).get("modules", "").split(",") if name]
            inherited = {key: value for key, value in (info.runtime_env or {}).items() if key in ("pip", "uv")}
        for other in searches(client):
            if run_of(other.submission_id, other) == run and not other.status.is_terminal():
                raise UserError(
                    f"{other.submission_id} is {other.status.value} and works on {run}. Wait for it, or stop it: "
                    f"{command(f'stop {other.submission_id} --address {address}')}"
                )
    here = [path for name in names for path in packing.files_of(name)]
    modules = here if len(here) == len(names) else []
    if names and not modules and _kept(run) is None:
        packing.modules_here(names)  # UserError, unless all are installed

    def pack(folder: Path, job: str) -> dict[str, Any]:
        packing.pack(folder, job=job, keep=_kept(run), modules=modules)
        given = environment.read(folder)
        if not given and _IN_WORKING_FOLDER in json.dumps(inherited):
            raise UserError(f"{what} was given packages from archives of its own. Send them again: --pip FILE or --uv FILE.")
        return given or inherited

    options = " ".join(f"--{key} {value}" for key, value in limits.items())
    return _start(f"resume {_shell(run)} {options}".strip(), run=run, modules=names, address=address, pack=pack, follow=follow)


def status(job: str | None, *, address: str) -> int:
    """Print the state of a job in one line, or a table of all that distprune submitted."""
    with talking(address) as client:
        if job is not None:
            info = info_of(client, job)
            code = f", exit code {info.driver_exit_code}" if info.driver_exit_code else ""
            done = f", {trials} trials" if (trials := _trials(client, info)) else ""
            times = f"started {clock(info.start_time)}, ended {clock(info.end_time)}"
            print(f"{job}: {info.status.value}{code}{done}, {times}, {(info.metadata or {}).get('run', 'not of distprune')}")
            return 0
        rows = [("job", "state", "trials", "started", "ended", "run folder")]
        for info in sorted(searches(client), key=lambda known: known.start_time or 0):
            begun_ended = clock(info.start_time), clock(info.end_time)
            trials = _trials(client, info) or "-"
            rows.append((info.submission_id, info.status.value, trials, *begun_ended, run_of(info.submission_id, info)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip())
    return 0


def stop(job: str, *, address: str) -> int:
    """Stop a job and wait until it has: its run folder is whole, and can be gone on with. Raises UserError if it had ended."""
    again = command(f"resume {job} --address {address}")
    with talking(address) as client:
        info = info_of(client, job)
        if info.status.is_terminal():
            raise UserError(f"{job} is {info.status.value} already. Nothing is left to stop; go on with it: {again}")
        client.stop_job(job)
        end(job, info := ended(client, job, within=_STOP_S + 30))
    if info.status.value == "STOPPED":
        print(f"Nothing is lost. Go on with it: {again}")
    return 0


def _trials(client: Any, info: Any) -> str | None:
    """Such as '12/30', of a job that runs: what its output said last."""
    if info.status.value != "RUNNING":
        return None
    said = re.findall(r"(\d+/\d+) trials done", client.get_job_logs(info.submission_id)[-20_000:])
    return said[-1] if said else None


def _start(arguments: str, *, run: str, modules: list[str], address: str, pack: Callable[[Path, str], dict[str, Any]], follow: bool) -> int:
    """Send a job, say what comes next, and follow it if asked to."""
    with tempfile.TemporaryDirectory(prefix="distprune-job-") as folder, talking(address) as client:
        job = _new_id(client, name_of(run))
        environment = pack(Path(folder), job)
        client.submit_job(
            entrypoint=f"python {SCRIPT} {arguments}",
            submission_id=job,
            # Ray kills a driver three seconds after it told it to stop, unless told otherwise
            runtime_env={"working_dir": folder, "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(_STOP_S)}, **environment},
            metadata={"run": run, "modules": ",".join(modules)},
        )
    print(f"submitted {job}; its run folder is {run}{'' if is_url(run) else ' on the head'}")
    print(f"follow it:      {command(f'logs {job} --address {address}')}")
    print(f"bring it here:  {command(f'fetch {job} --address {address}')}", flush=True)
    return logs(job, address=address, tail=None, follow=True) if follow else 0


def _new_id(client: Any, name: str) -> str:
    """A readable id that no job has had: Ray would answer 500."""
    base = f"{re.sub('[^A-Za-z0-9_.-]+', '-', name)}-{time.strftime('%Y%m%d-%H%M%S')}"
    taken = {known.submission_id for known in client.list_jobs()}
    return next(job for count in range(1, len(taken) + 2) if (job := base if count == 1 else f"{base}-{count}") not in taken)


def _on_head(storage: str, name: str) -> str:
    """The run folder as the head writes it: a URL, an absolute path, or one below ~."""
    if is_url(storage):
        return join(storage, name)
    head, *rest = PurePosixPath("~", PurePosixPath(storage)).parts  # "~" goes where storage is absolute
    rest = rest[1:] if rest[:1] == ["~"] else rest
    return str(PurePosixPath(head, *rest, name))


def _kept(run: str) -> str | None:
    """Where the head keeps what was sent: in the storage, under a name that no search can have. None for a URL."""
    return None if is_url(run) else str(PurePosixPath(run).parent / ".sent" / PurePosixPath(run).name)


def _shell(path: str) -> str:
    """A path of the head for its shell, which knows the home folder."""
    return '"${HOME:?}"/' + shlex.quote(path[2:]) if path.startswith("~/") else '"${HOME:?}"' if path == "~" else shlex.quote(path)
