"""How a driver gets into Ray: on this machine, or into a cluster that runs already. A token says who may.

Ray looks for it in RAY_AUTH_TOKEN, then in the file RAY_AUTH_TOKEN_PATH, then in ~/.ray/auth_token, and asks for it where RAY_AUTH_MODE is
`token`. Here that is the default: the mode is set wherever there is a token, and Ray on this machine gets one of its own, which is in no
file, and is dropped where another Ray is talked to. RAY_AUTH_MODE=disabled turns it off.
"""

import functools
import hashlib
import importlib
import logging
import os
import secrets
import signal
import socket
import stat
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from distprune.errors import UserError

WHERE = "Ray looks for the token in RAY_AUTH_TOKEN, then in the file RAY_AUTH_TOKEN_PATH, then in ~/.ray/auth_token"
_CONNECT_S, _ANSWER_S = 5.0, 10.0
_MADE = "DISTPRUNE_MADE_TOKEN"  # beside a token that was made here: its digest, and the mode before; child processes have both
_own = ""  # where the Ray listens that this process has started


def use_token() -> None:
    """Turn token authentication on where there is a token, unless RAY_AUTH_MODE says otherwise; warn of a file that others may read.

    A token that was made for Ray on this machine is none: it is dropped, and that Ray, if this process has started it, ends.
    """
    _drop_made()
    mode, file = os.environ.get("RAY_AUTH_MODE"), _token_file()
    if mode not in (None, "token") or not (file or os.environ.get("RAY_AUTH_TOKEN")):
        return
    if file and (rights := stat.S_IMODE(file.stat().st_mode)) & 0o077:
        _warn(file, rights)
    _turn_on()


def about_token(where: str, *, refused: bool) -> UserError:
    """The error of a client whose token is refused, or that has none."""
    mode = os.environ.get("RAY_AUTH_MODE")
    if refused:
        return UserError(f"{where} refuses this token. Take the one that its head was started with; {WHERE}.")
    if mode not in (None, "token"):
        return UserError(f"{where} wants a token, and RAY_AUTH_MODE is {mode}. First: export RAY_AUTH_MODE=token; {WHERE}.")
    return UserError(f"{where} wants a token, and there is none here. {WHERE}; copy it from the head, with mode 0600.")


def connect(address: str | None) -> None:
    """Start Ray on this machine, or join the cluster at `address`: 'ip:port', or 'auto' for the one that this machine belongs to.

    A Ray that runs in this process already is used, but for one of its own where a cluster is asked for: that one ends. Raises UserError,
    after a quarter of a minute where nobody answers.
    """
    global _own
    import ray

    if ray.is_initialized():
        if address in (None, _own) or not _is_own_running():
            return
        ray.shutdown()
    use_token()
    if address is None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing of a search here is told to anybody
        options: dict[str, Any] = {"address": "local", "include_dashboard": False, "num_cpus": os.cpu_count()}
        if os.environ.get("RAY_AUTH_MODE") in (None, "token") and not (os.environ.get("RAY_AUTH_TOKEN") or _token_file()):
            _make_token()  # else Ray writes one, for all to read, into the home folder
    else:
        options = {"address": _found(address)}
    try:
        begin = functools.partial(ray.init, **options, log_to_driver=False, logging_level=logging.ERROR)
        with _sigterm_kept():
            try:
                begin()
            except Exception:
                if address is not None:
                    raise
                ray.shutdown()  # it gives a node 30 seconds to begin, which a busy machine exceeds now and then
                begin()
        if address is None:
            _own = ray.get_runtime_context().gcs_address
    except Exception as error:  # Ray raises bare Exceptions too
        where = f"Ray at {address} cannot be joined" if address else "Ray did not start on this machine"
        way_out = "Is this machine one of its nodes? If not: distprune submit." if address else "Try again when it is less busy."
        raise UserError(f"{where}: {' '.join(str(error).split())[:300].rstrip('.')}. {way_out}") from error


def _is_own_running() -> bool:
    if not _own:
        return False
    import ray

    return ray.is_initialized() and bool(ray.get_runtime_context().gcs_address == _own)


def _make_token() -> None:
    token = secrets.token_hex(32)
    os.environ[_MADE] = f"{_digest(token)} {os.environ.get('RAY_AUTH_MODE', '')}"
    os.environ["RAY_AUTH_TOKEN"] = token
    _turn_on()


def _drop_made() -> None:
    """Leave the environment as it was before a token was made here, unless the user has set another one since."""
    digest, _, mode = os.environ.pop(_MADE, "").partition(" ")
    if digest != _digest(os.environ.get("RAY_AUTH_TOKEN", "")):
        return
    if _is_own_running():
        import ray

        ray.shutdown()
    del os.environ["RAY_AUTH_TOKEN"]
    if not mode and os.environ.get("RAY_AUTH_MODE") == "token":
        del os.environ["RAY_AUTH_MODE"]
    _look_again()


def _digest(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


def _token_file() -> Path | None:
    """The file that Ray reads the token from; None where it is in the environment, or there is none."""
    if os.environ.get("RAY_AUTH_TOKEN"):
        return None
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token").expanduser()
    return path if path.is_file() else None


@functools.cache
def _warn(file: Path, rights: int) -> None:
    print(f"Warning: others may read the token in {file}, mode {rights:04o}. First: chmod 600 {file}", file=sys.stderr, flush=True)


def _turn_on() -> None:
    if os.environ.get("RAY_AUTH_MODE") != "token":
        os.environ["RAY_AUTH_MODE"] = "token"
        _look_again()


def _look_again() -> None:
    from ray import _raylet

    inside: Any = _raylet  # no types
    inside.Config.initialize("")  # Ray reads the mode once, when it is imported,
    inside.AuthenticationTokenLoader.instance().reset_cache()  # and the token once


def _found(address: str) -> str:
    """Where Ray is to connect. Raises UserError if no head answers there, or one that this machine's Ray cannot join."""
    from ray._private import services

    if address.startswith("http"):
        raise UserError(f"--address must be ip:port or auto here, got {address!r}. A dashboard takes jobs: distprune submit.")
    if "://" in address:
        return address  # Ray's own client, which gives up by itself
    try:
        place = services.canonicalize_bootstrap_address_or_die(address)
        host, _, port = place.rpartition(":")
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_S).close()
    except (OSError, ValueError) as error:
        why = "there is none on this machine" if address == "auto" else str(error) or type(error).__name__
        raise UserError(f"No Ray cluster answers at {address}: {why.splitlines()[0]}. Is its head up? Write --address HEAD:6379.") from None
    _check_head(address, place)
    return place


def _check_head(address: str, place: str) -> None:
    """Raise UserError unless the head at `place` answers, to this token, and runs this version. Ray itself would try for minutes."""
    import ray

    try:
        grpc: Any = importlib.import_module("grpc")  # it has no types, nor have Ray's messages
        messages: Any = importlib.import_module("ray.core.generated.gcs_service_pb2")
        services: Any = importlib.import_module("ray.core.generated.gcs_service_pb2_grpc")
        from ray._private.grpc_utils import init_grpc_channel
    except ImportError:
        return  # Ray without its dashboard's packages
    from ray.exceptions import AuthenticationError

    try:
        with init_grpc_channel(place) as channel:
            answer = services.NodeInfoGcsServiceStub(channel).CheckAlive(messages.CheckAliveRequest(), timeout=_ANSWER_S)
    except AuthenticationError:
        raise about_token(address, refused=False) from None
    except grpc.RpcError as error:
        if error.code() == grpc.StatusCode.UNAUTHENTICATED:
            given = os.environ.get("RAY_AUTH_TOKEN") or _token_file()
            raise about_token(address, refused=bool(given) and os.environ.get("RAY_AUTH_MODE") == "token") from None
        raise UserError(
            f"What answers at {address} is no Ray head ({error.code().name.lower()}). Give the port of its GCS: --address HEAD:6379."
        ) from None
    if answer.ray_version != ray.__version__:
        raise UserError(
            f"{address} runs Ray {answer.ray_version}, and this is {ray.__version__}: a driver needs the same. Install it, "
            f"pip install ray=={answer.ray_version}, or send the search as a job: distprune submit."
        )


@contextmanager
def _sigterm_kept() -> Iterator[None]:
    """What this program does on SIGTERM, it does still: Ray puts a handler of its own in its place."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if callable(before) and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)
