"""A search as a Ray job: submit it to a cluster, follow it, bring its run folder here.

Relative paths belong to the head, as with scp: a relative storage is taken below the home folder there (`runs` is `~/runs`), never in
the working folder of the job, which Ray deletes. Where trials run on several nodes, give `--storage` a folder that all of them see. A
relative data folder is left as it is; it must exist on the nodes, so write it absolute: the job's working folder holds only what is
sent along, the search and the user's modules. distprune itself is expected to be installed on every node.
"""

import asyncio
import base64
import hashlib
import importlib.util
import inspect
import io
import json
import logging
import os
import re
import secrets
import shlex
import shutil
import tarfile
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from distprune.errors import UserError, command, unknown

MOST_BYTES = 64 * 2**20  # of a run folder that is fetched, compressed: it travels through a job's log
_OLDEST_RAY = (2, 60)  # as in pyproject.toml; nodes need it for the search itself
_CONNECT_S, _SILENCE_S, _LOST_S, _POLL_S = 10.0, 60.0, 120.0, 1.0
_MARK = "distprune-fetch"
_TOKEN = "Ray looks for the token in RAY_AUTH_TOKEN, then in the file RAY_AUTH_TOKEN_PATH, then in ~/.ray/auth_token"


def submit(config: Path, *, address: str, name: str | None, storage: str | None, trials: int | None, follow: bool) -> int:
    """Submit a search; with `follow`, show its output until it ends and return its exit code. Raises UserError before any network if
    the search is wrong. Modules named by `import:` are taken along from this folder: of a package all, of a module its one file."""
    import yaml

    from distprune.search.config import Search

    search = Search.load(config, name=name, storage=storage, limits=None if trials is None else {"trials": trials})
    plain = json.loads(json.dumps(search.plain()))
    modules = _user_modules(plain)
    head, *rest = PurePosixPath("~", PurePosixPath(search.storage)).parts  # "~" goes where storage is absolute
    rest = rest[1:] if rest[:1] == ["~"] else rest
    run = str(PurePosixPath(head, *rest, search.name))
    on_head = '"${HOME:?}"/' + shlex.quote("/".join(rest)) if head == "~" else shlex.quote(search.storage)
    job = f"{re.sub('[^A-Za-z0-9_.-]+', '-', search.name)}-{time.strftime('%Y%m%d-%H%M%S')}"
    with tempfile.TemporaryDirectory(prefix="distprune-job-") as folder:
        Path(folder, "search.yaml").write_text(yaml.safe_dump(plain, sort_keys=False))
        for module in modules:
            if module.is_dir():
                shutil.copytree(module, Path(folder, module.name), ignore=shutil.ignore_patterns("__pycache__", ".*"))
            else:
                shutil.copy(module, folder)
        with _talking(address) as client:
            client.submit_job(
                entrypoint=f"python -m distprune search search.yaml --storage {on_head}",
                submission_id=job,
                runtime_env={"working_dir": folder},
                metadata={"run": run},
            )
    print(f"submitted {job}; on the head its run folder is {run}")
    print(f"follow it:      {command(f'status {job} --address {address}')}")
    print(f"bring it here:  {command(f'fetch {job} --address {address}')}", flush=True)
    return _follow(job, address) if follow else 0


def follow(job: str, *, address: str) -> int:
    """Show a job's state and its output until it ends; of an ended one the last lines. Returns its exit code."""
    with _talking(address) as client:
        info = _info(client, job)
        print(f"{job}: {info.status.value}, started {_clock(info.start_time)}, ended {_clock(info.end_time)}", flush=True)
        if not info.status.is_terminal():
            return _follow(job, address)
        print("\n".join(client.get_job_logs(job).splitlines()[-40:]))
        return _end(job, info)


def fetch(job: str, *, address: str, to: Path) -> Path:
    """Copy the run folder of a job into `to`. A job that still runs is copied as it is now.

    Ray has no way to read a file of the head, so a second job there writes it into its own log. Above 64 MiB the checkpoints, and with them
    the weights, stay behind; raises UserError if the rest is larger still.
    """
    with _talking(address) as client:
        run = (_info(client, job).metadata or {}).get("run", "")
        folder = to / PurePosixPath(run).name
        if not run or folder.name in ("", ".."):
            raise UserError(f"{job} is no search that distprune submitted: it names no run folder.")
        if folder.exists():
            raise UserError(f"{folder} exists already. Remove it, or fetch into another folder: --to FOLDER.")
        source = f"{inspect.getsource(_pack)}\n_pack({run!r}, {MOST_BYTES}, {_MARK!r})"
        packer = client.submit_job(
            entrypoint=f"""python -c "import base64; exec(base64.b64decode('{base64.b64encode(source.encode()).decode()}'))" """,
            submission_id=f"{job}-fetch-{secrets.token_hex(3)}",
        )
        while not (info := client.get_job_info(packer)).status.is_terminal():
            time.sleep(_POLL_S)
        log = client.get_job_logs(packer)
        client.delete_job(packer)  # from the list of jobs; the log stays on the head as long as its Ray session
    if refusal := re.search(rf"^{_MARK} error: (.*)$", log, re.MULTILINE):
        raise UserError(refusal[1])
    found = re.search(rf"^{_MARK} sha256 (\w+)$(.*)^{_MARK} end$", log, re.MULTILINE | re.DOTALL)
    data = base64.b64decode(found[2]) if found else b""
    if found is None or hashlib.sha256(data).hexdigest() != found[1]:
        last = next((line for line in reversed(log.splitlines()) if line.strip()), info.message or "no output")
        raise UserError(f"{run} did not arrive whole; the last line on the head was: {last[:300]}. Fetch again, or copy it from the head.")
    _unpack(data, folder)
    return folder


def _pack(run: str, limit: int, mark: str) -> None:
    """Sent to the head as source: prints the run folder as a tar.gz in base64. Knows the standard library only."""
    import base64
    import hashlib
    import os
    import sys
    import tarfile
    import tempfile

    folder = os.path.expanduser(run)

    def refuse(why: str) -> None:
        print(f"{mark} error: {why}")
        sys.exit(2)

    if not os.path.isfile(os.path.join(folder, "search.yaml")):
        refuse(f"there is no run folder {folder} on the head yet. See what the job says: distprune status JOB --address ADDRESS.")
    with tempfile.TemporaryFile() as file:
        # Checkpoints hold the weights of the front, which exports need; where they are too large, the rest travels without them.
        for left_out in ({".lock"}, {".lock", "checkpoints"}):
            file.seek(0)
            file.truncate()
            with tarfile.open(fileobj=file, mode="w:gz", compresslevel=6) as archive:
                for name in sorted(set(os.listdir(folder)) - left_out):
                    archive.add(os.path.join(folder, name), arcname=name, filter=lambda member: member if file.tell() <= limit else None)
            if file.tell() <= limit:
                break
        if file.tell() > limit:
            refuse(f"{folder} is above {limit // 2**20} MiB. Copy it from shared storage, or from the head with scp or rsync.")
        file.seek(0)
        print(mark, "sha256", hashlib.sha256(file.read()).hexdigest())
        file.seek(0)
        while chunk := file.read(3 * 2**14):
            print(base64.b64encode(chunk).decode())
        print(mark, "end", flush=True)


def _unpack(data: bytes, folder: Path) -> None:
    """Into the new `folder`, at once: what is refused leaves nothing behind."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=folder.parent) as aside, tarfile.open(fileobj=io.BytesIO(data)) as archive:
        for member in archive:
            path = PurePosixPath(member.name)
            if path.is_absolute() or ".." in path.parts or not (member.isfile() or member.isdir()):
                raise UserError(f"The archive from the head holds {member.name!r}, which is no plain file below the run folder: refused.")
        part = Path(aside, folder.name)
        archive.extractall(part, filter="data")
        part.rename(folder)


@contextmanager
def _talking(address: str) -> Iterator[Any]:
    """A client of the head; what goes wrong with it inside is a UserError. No message may hold the token."""
    if not address.startswith(("http://", "https://")):
        raise UserError(f"--address must be the URL of the head's dashboard, got {address!r}. Write http://HEAD:8265.")
    os.environ["RAY_API_SERVER_ADDRESS"] = address  # Ray takes it, and else RAY_ADDRESS, before the argument
    try:
        import requests
        from ray.exceptions import AuthenticationError
        from ray.job_submission import JobSubmissionClient
    except ImportError as error:
        raise _no_jobs() from error
    for name in ("dashboard_sdk", "job.sdk"):
        logging.getLogger(f"ray.dashboard.modules.{name}").setLevel(logging.WARNING)
    logging.getLogger("ray._private.runtime_env.packaging").setLevel(logging.WARNING)
    try:
        requests.get(address, timeout=_CONNECT_S)  # Ray's client would wait for minutes
        client = JobSubmissionClient(address)
        theirs = str(getattr(client, "_server_ray_version", None) or "")
        if theirs and tuple(map(int, re.findall(r"\d+", theirs)[:2])) < _OLDEST_RAY:
            raise UserError(f"{address} runs Ray {theirs}; distprune needs {'.'.join(map(str, _OLDEST_RAY))} or newer. Update it there.")
        yield client
    except AuthenticationError as error:
        raise UserError(_about_token(address, error.message)) from None
    except OSError as error:  # requests' errors too
        why = type(error).__name__
        raise UserError(
            f"No Ray dashboard answers at {address} ({why}). Is the head up, and is its port open or forwarded to here?"
        ) from None
    except RuntimeError as error:
        if "ray[default]" in str(error):
            raise _no_jobs() from error
        raise UserError(f"{address} refused: {str(error)[:300]}") from error


def _no_jobs() -> UserError:
    return UserError('Ray is installed without its job client. Install it: pip install "distprune[cluster]".')


def _about_token(address: str, message: str) -> str:
    mode = os.environ.get("RAY_AUTH_MODE")
    if "Authentication failed" in message:
        return f"{address} refuses this token (403). Take the one that its head was started with; {_TOKEN}."
    if mode != "token":
        return f"{address} wants a token, and RAY_AUTH_MODE is {mode or 'not set'}. First: export RAY_AUTH_MODE=token; {_TOKEN}."
    return f"RAY_AUTH_MODE is token, and there is none. {_TOKEN}; copy it from the head, with mode 0600."


def _info(client: Any, job: str) -> Any:
    try:
        return client.get_job_info(job)
    except RuntimeError as error:
        if "status code 404" not in str(error):
            raise
        newest = sorted(client.list_jobs(), key=lambda known: known.start_time or 0)[-8:]
        raise unknown("job", job, [known.submission_id for known in newest if known.submission_id]) from None


def _follow(job: str, address: str) -> int:
    """Print a job's output from its start until it ends. A lost connection is taken up again; in the end the log is polled."""
    seen, streams, lost_at = 0, 3, time.monotonic()

    def show(text: str, start: int) -> None:  # text is the log from character `start` on
        nonlocal seen
        try:
            print(text[max(seen - start, 0) :], end="", flush=True)
        except BrokenPipeError:  # `| head`: nobody reads on, the job needs nobody
            raise SystemExit(141) from None
        seen = max(seen, start + len(text))

    async def stream(client: Any) -> None:
        start = 0  # each connection sends the log from its start
        async with asyncio.timeout(_SILENCE_S) as limit:
            async for text in client.tail_job_logs(job):
                show(text, start)
                start += len(text)
                limit.reschedule(asyncio.get_running_loop().time() + _SILENCE_S)

    with _talking(address) as client:
        try:
            while True:
                try:
                    info, lost_at = client.get_job_info(job), time.monotonic()
                    if info.status.is_terminal() or not streams:
                        show(client.get_job_logs(job), 0)
                    if info.status.is_terminal():
                        return _end(job, info)
                except OSError:
                    if time.monotonic() - lost_at > _LOST_S:
                        raise
                try:
                    if streams:
                        asyncio.run(stream(client))
                except TimeoutError:
                    pass  # silent, or cut off without a sign: ask, and connect anew
                except Exception:  # aiohttp's errors have no common base with Ray's
                    streams -= 1
                time.sleep(_POLL_S)
        except KeyboardInterrupt:
            print(f"\n{job} goes on. Follow it: distprune status {job} --address {address}", flush=True)
            raise


def _end(job: str, info: Any) -> int:
    """Say how a job ended; returns its exit code."""
    code = info.driver_exit_code
    print(f"{job}: {info.status.value}" + (f", exit code {code}" if code else ""))
    if info.status.value == "SUCCEEDED":
        return 0
    if code is None and info.message:  # it never started: there is no log
        print(info.message)
    return code if code and code > 0 else 1


def _clock(milliseconds: int | None) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(milliseconds / 1000)) if milliseconds else "not yet"


def _imports(value: Any) -> Iterator[str]:
    """Every 'package.module:function' in a search."""
    if isinstance(value, dict):
        yield from [item for key, item in value.items() if key == "import"]
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from _imports(item)
    elif isinstance(value, str) and value.startswith("import:"):
        yield value.removeprefix("import:")


def _user_modules(plain: dict[str, Any]) -> list[Path]:
    """Files and folders of this folder to send along; installed packages are expected on the nodes. UserError for what is neither."""
    found = []
    for name in sorted({path.split(":")[0].split(".")[0] for path in _imports(plain)} - {"distprune"}):
        package, module, spec = Path(name), Path(f"{name}.py"), importlib.util.find_spec(name)
        if (package / "__init__.py").is_file():
            found.append(package)
        elif module.is_file():
            found.append(module)
        elif package.is_dir() and (spec is None or spec.origin is None):  # without __init__.py: comes after installed ones
            found.append(package)
        elif spec is None:
            raise UserError(f"'{name}' of an import is neither in {Path.cwd()} nor installed. Run from the folder that holds it.")
    return found
