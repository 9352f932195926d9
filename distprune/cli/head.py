"""Talking to the head of a cluster: Ray's job client over HTTP, with errors that are one line and say the way out. None holds the token."""

import logging
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import PurePosixPath
from typing import Any

from distprune.errors import UserError, unknown
from distprune.search import access
from distprune.store.place import is_url, split

POLL_S = 1.0
_OLDEST_RAY, _NEXT_RAY = (2, 60), (3,)  # as in pyproject.toml; nodes need it for the search itself
_CONNECT_S, _ANSWER_S, _UPLOAD_S = 10.0, 60.0, 600.0


@contextmanager
def talking(address: str) -> Iterator[Any]:
    """A client of the head; what goes wrong with it inside is a UserError."""
    if not re.match(r"https?://[^/]", address):
        raise UserError(f"--address must be the URL of the head's dashboard, got {address!r}. Write http://HEAD:8265.")
    os.environ["RAY_API_SERVER_ADDRESS"] = address  # Ray takes it, and else RAY_ADDRESS, before the argument
    try:
        import requests
        from ray.exceptions import AuthenticationError
    except ImportError as error:
        raise _no_jobs() from error
    access.use_token()
    try:
        yield _client(address)
    except AuthenticationError as error:
        raise access.about_token(address, refused="Authentication failed" in error.message) from None
    except OSError as error:  # requests' errors too
        why = "no answer in time" if isinstance(error, requests.Timeout | TimeoutError) else "no connection"
        raise UserError(
            f"No Ray dashboard answers at {address}: {why}. Is the head up, and is its port open or forwarded to here?"
        ) from None
    except RuntimeError as error:
        if "ray[default]" in str(error):
            raise _no_jobs() from error
        raise UserError(f"{address} refused: {' '.join(str(error).split())[:300]}") from error


def _client(address: str) -> Any:
    import requests
    from ray.job_submission import JobSubmissionClient

    class Client(JobSubmissionClient):  # type: ignore[misc]
        """Ray's own waits for ever."""

        def _do_request(self, method: str, endpoint: str, **options: Any) -> Any:
            answer = _CONNECT_S if endpoint == "/api/version" else _UPLOAD_S if method == "PUT" else _ANSWER_S
            return super()._do_request(method, endpoint, **{"timeout": (_CONNECT_S, answer), **options})

    for name in ("dashboard_sdk", "job.sdk"):
        logging.getLogger(f"ray.dashboard.modules.{name}").setLevel(logging.WARNING)
    logging.getLogger("ray._private.runtime_env.packaging").setLevel(logging.WARNING)
    stranger = UserError(f"What answers at {address} is no Ray dashboard. Give the one that `ray start` printed: http://HEAD:8265.")
    answer = requests.get(f"{address.rstrip('/')}/api/version", timeout=_CONNECT_S)
    if answer.status_code not in (200, 401, 403):
        raise stranger
    try:
        if answer.ok:
            _check_version(address, answer.json()["ray_version"])
        client = Client(address)
    except UserError:
        raise
    except (ValueError, KeyError, TypeError):  # its answer is no JSON, or says something else
        raise stranger from None
    _check_version(address, client._server_ray_version or "")
    return client


def _check_version(address: str, theirs: str) -> None:
    """Raise UserError for a Ray that distprune cannot run on. The job client itself talks to any."""
    if not _OLDEST_RAY <= tuple(map(int, re.findall(r"\d+", theirs)[:2])) < _NEXT_RAY:
        needs = f"{'.'.join(map(str, _OLDEST_RAY))} or newer, below {'.'.join(map(str, _NEXT_RAY))}"
        raise UserError(f"{address} runs Ray {theirs}; distprune needs {needs}. Install that on its nodes.")


def _no_jobs() -> UserError:
    return UserError('Ray is installed without its job client. Install it: pip install "distprune[cluster]".')


def info_of(client: Any, job: str) -> Any:
    """What Ray knows of a job. Raises UserError for one that it does not know."""
    try:
        return client.get_job_info(job)
    except RuntimeError as error:
        if "status code 404" not in str(error):
            raise
        newest = sorted(searches(client), key=lambda known: known.start_time or 0)[-8:]
        raise unknown("job", job, [known.submission_id for known in newest]) from None


def run_of(job: str, info: Any) -> str:
    """The run folder, or the URL, of a search that was submitted. Raises UserError for another kind of job."""
    run = str((info.metadata or {}).get("run", ""))
    if name_of(run) in ("", ".."):
        raise UserError(f"{job} is no search that distprune submitted: it names no run folder.")
    return run


def name_of(run: str) -> str:
    """The name of a run, from its folder or URL."""
    return split(run)[1] if is_url(run) else PurePosixPath(run).name


def searches(client: Any) -> list[Any]:
    """The jobs of the cluster that distprune submitted, in no order."""
    return [info for info in client.list_jobs() if info.submission_id and (info.metadata or {}).get("run")]


def ended(client: Any, job: str, *, within: float) -> Any:
    """Wait until a job has ended; what Ray knows of it then. Raises UserError after `within` seconds."""
    until = time.monotonic() + within
    while not (info := client.get_job_info(job)).status.is_terminal():
        if time.monotonic() > until:
            raise UserError(f"{job} is {info.status.value} still, after {within:.0f} s. Look at it in the dashboard, and try again.")
        time.sleep(POLL_S)
    return info


def clock(milliseconds: int | None) -> str:
    """Local time as people write it."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(milliseconds / 1000)) if milliseconds else "-"
