"""`distprune dashboard`: optuna-dashboard on the study of a run, which it can look at and not change."""

import json
import socket
import socketserver
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from distprune.errors import UserError
from distprune.store.folder import RunFolder
from distprune.store.readonly import open_study

LOOPBACK = ("127.0.0.1", "::1", "localhost")
_READING = ("GET", "HEAD")


class Dashboard(socketserver.ThreadingMixIn, WSGIServer):
    """A server of the dashboard, bound and not yet serving: `serve_forever` does, `server_close` gives the port back."""

    daemon_threads = True

    def __init__(self, path: str, *, host: str = "127.0.0.1", port: int = 8080) -> None:
        """Raises UserError for a run without a study, a missing package, and an address that cannot be had."""
        if not 0 <= port < 2**16:
            raise UserError(f"port must be in [0, {2**16 - 1}], got {port}. Write 8080, or 0 for one that is free.")
        folder = RunFolder.existing(path)
        application = _application(folder)
        self.host = host
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            super().__init__((host, port), _Quiet)
        except OSError as error:
            why = (error.strerror or str(error)).lower()
            raise UserError(f"The dashboard cannot listen on {host}, port {port}: {why}. Choose another: --port {port + 1}.") from error
        self.set_app(_guarded(application))

    def server_bind(self) -> None:
        """Bind without asking for the name of this machine, which takes long where no name server answers."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = self.host, self.server_address[1]
        self.setup_environ()

    @property
    def url(self) -> str:
        """Where a browser finds it."""
        return f"http://{f'[{self.host}]' if ':' in self.host else self.host}:{self.server_port}/"


class _Quiet(WSGIRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: a line a request would hide what matters."""


def _application(folder: RunFolder) -> Callable[..., Iterable[bytes]]:
    if find_spec("optuna_dashboard") is None:
        raise UserError('The dashboard needs optuna-dashboard, which is not installed. Write: pip install "distprune[dashboard]".')
    study = open_study(folder, _names(folder))
    from optuna_dashboard import wsgi  # takes seconds

    application: Callable[..., Iterable[bytes]] = wsgi(study)
    return application


def _names(folder: RunFolder) -> list[str]:
    """What the objectives of a search are called."""
    from distprune.core.config import read_yaml
    from distprune.report.data import label_of

    found = read_yaml(folder.search_yaml)
    minimized = (found.get("search") or {}).get("minimize") or []
    return ["objective", *(f"share of {label_of(cost)}" for cost in minimized)]


def _guarded(application: Callable[..., Iterable[bytes]]) -> Callable[..., Iterable[bytes]]:
    """Refuses all that is not to be looked at with a reason, before the dashboard sees it. The storage would refuse it, too."""

    def answer(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        if environ["REQUEST_METHOD"] in _READING:
            return application(environ, start_response)
        body = json.dumps({"reason": "This dashboard is read-only: nothing in it changes the study of a search."}).encode()
        headers = [("Content-Type", "application/json"), ("Content-Length", str(len(body))), ("Allow", ", ".join(_READING))]
        start_response("405 Method Not Allowed", headers)
        return [body]

    return answer


def serve(path: str, *, host: str = "127.0.0.1", port: int = 8080, say: Callable[[str], None] = print) -> None:
    """Serve the dashboard of the run at `path` until Ctrl-C; `say` hears where it is. Raises UserError as `Dashboard` does."""
    server = Dashboard(path, host=host, port=port)
    try:
        say(f"{path} is shown, read-only, at {server.url} until Ctrl-C")
        if host not in LOOPBACK:
            say(f"Whoever can reach {host} can look at it: there is no password.")
        server.serve_forever()
    except KeyboardInterrupt:
        say("")
    finally:
        server.server_close()
