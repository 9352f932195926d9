"""Heads of clusters for tests: a real one, and stubs that answer as other programs do."""

import http.server
import json
import os
import shutil
import signal
import socket
import socketserver
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

START_S, COMMAND_S = 300, 600
TOKEN = "0123456789abcdef" * 4


@dataclass(frozen=True)
class Head:
    """A head that runs, and what a client needs to talk to it."""

    address: str
    gcs: str
    environment: dict[str, str]
    folder: Path  # where clients run

    def distprune(self, *arguments: str, **changes: str | None) -> subprocess.CompletedProcess[str]:
        """Run a command; a change to None takes a variable away."""
        environment = {key: value for key, value in (self.environment | changes).items() if value is not None}
        command = [sys.executable, "-m", "distprune", *arguments]
        done = subprocess.run(
            command, env=environment, cwd=self.folder, capture_output=True, text=True, timeout=COMMAND_S, stdin=subprocess.DEVNULL
        )
        assert TOKEN not in done.stdout + done.stderr
        return done

    def begin(self, *arguments: str) -> "subprocess.Popen[str]":
        """Begin a command."""
        return subprocess.Popen(
            [sys.executable, "-m", "distprune", *arguments],
            env=self.environment,
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            stdin=subprocess.DEVNULL,
        )


def is_one_line(done: "subprocess.CompletedProcess[str]", says: str) -> None:
    """Whether a command was refused as every command is."""
    assert (done.returncode, done.stdout) == (2, ""), done.stdout + done.stderr
    assert done.stderr.startswith("Error: ") and done.stderr.count("\n") == 1, done.stderr
    assert says in done.stderr


def client_environment(home: Path) -> dict[str, str]:
    """Of a user who has a token."""
    token = home / "token"
    token.touch(mode=0o600)
    token.write_text(TOKEN)
    return {key: value for key, value in os.environ.items() if not key.startswith(("RAY_AUTH", "RAY_ADDRESS"))} | {
        "HOME": str(home),
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "OMP_NUM_THREADS": "1",
    }


@contextmanager
def real_head(home: Path, clients: Path) -> Iterator[Head]:
    """A Ray head that asks for a token. Its Python is a small environment of its own, with pip, that sees the packages of this one."""
    environment = client_environment(home)
    nodes = _environment_of_nodes(home / "nodes")
    scratch = tempfile.mkdtemp(prefix="dp", dir="/tmp")  # the path of a Unix socket has room for 107 characters
    names = ("port", "dashboard-port", "dashboard-agent-listen-port", "ray-client-server-port")
    ports = dict(zip(names, free_ports(4), strict=True))
    command = [str(nodes / "python"), "-m", "ray.scripts.scripts", "start", "--head", "--block", "--num-cpus=2"]
    command += ["--object-store-memory=100000000", "--disable-usage-stats", f"--temp-dir={scratch}", "--dashboard-host=127.0.0.1"]
    command += [f"--{name}={port}" for name, port in ports.items()]
    log = home / "head.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            command,
            env={**environment, "PATH": f"{nodes}{os.pathsep}{os.environ['PATH']}"},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        address = f"http://127.0.0.1:{ports['dashboard-port']}"
        _wait_for(address, process, log)
        yield Head(address, f"127.0.0.1:{ports['port']}", environment, clients)
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=5)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        shutil.rmtree(scratch, ignore_errors=True)


def _environment_of_nodes(folder: Path) -> Path:
    """Ray copies the environment of a node for a job that brings packages: this one is small."""
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True, capture_output=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    mine = [path for path in sys.path if path.endswith("site-packages")]
    (packages / "tests.pth").write_text("\n".join([*mine, str(Path(__file__).parents[2])]))
    if (uv := Path(sys.executable).with_name("uv")).exists():
        (folder / "bin" / "uv").symlink_to(uv)
    return folder / "bin"


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on just now."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [int(each.getsockname()[1]) for each in sockets]
    for each in sockets:
        each.close()
    return ports


def _wait_for(address: str, process: "subprocess.Popen[bytes]", log: Path) -> None:
    """Until the job server asks for a token."""
    until = time.monotonic() + START_S
    while time.monotonic() < until:
        assert process.poll() is None, log.read_text()
        try:
            urllib.request.urlopen(f"{address}/api/jobs/", timeout=5).close()
        except urllib.error.HTTPError as error:
            with error:
                if error.code == 401:
                    return
        except OSError:
            pass
        time.sleep(0.5)
    raise AssertionError(f"no head after {START_S} s: {log.read_text()}")


Answer = Callable[[str, str, dict[str, str]], tuple[int, object]]  # (method, path, headers in lower case) -> (status, body)


@contextmanager
def stub(answer: Answer) -> Iterator[str]:
    """A web server on loopback; a body that is no text is sent as JSON."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def _answer(self) -> None:
            body: object = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if isinstance(answer, Jobs) and (self.command, self.path) == ("POST", "/api/jobs/"):
                status, body = answer.submit(json.loads(body))
            else:
                status, body = answer(self.command, self.path, {name.lower(): value for name, value in self.headers.items()})
            data = body.encode() if isinstance(body, str) else json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = do_PUT = do_DELETE = _answer

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()


@contextmanager
def silent() -> Iterator[int]:
    """A port that takes connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield int(server.getsockname()[1])


class Cable:
    """A TCP connection to a port that can be cut, and put together again."""

    def __init__(self, to: int) -> None:
        self._to, self._open, self._sockets = to, threading.Event(), list[socket.socket]()
        self._open.set()
        cable = self

        class Handler(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                if not cable._open.is_set():
                    return
                with socket.create_connection(("127.0.0.1", cable._to)) as other:
                    cable._sockets += [self.request, other]
                    back = threading.Thread(target=_pour, args=(other, self.request), daemon=True)
                    back.start()
                    _pour(self.request, other)
                    back.join()

        self._server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    @property
    def address(self) -> str:
        """What clients are given."""
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def cut(self) -> None:
        """End all connections, and take no new ones."""
        self._open.clear()
        for each in self._sockets:
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def mend(self) -> None:
        """Take connections again."""
        self._open.set()

    def close(self) -> None:
        """The end."""
        self.cut()
        self._server.shutdown()
        self._server.server_close()


def _pour(source: socket.socket, target: socket.socket) -> None:
    with suppress(OSError):
        while data := source.recv(65536):
            target.sendall(data)
    for each in (source, target):
        with suppress(OSError):
            each.shutdown(socket.SHUT_RDWR)


class Jobs:
    """Answers as a head's job server does, and runs what it is sent as processes of this machine, in `home`."""

    def __init__(self, home: Path, *, version: str = "2.60.0") -> None:
        self.home, self.version, self.jobs, self.sent = home, version, dict[str, dict[str, object]](), list[dict[str, object]]()
        self.logs = home / "logs"
        self.logs.mkdir()

    def add(self, name: str, status: str, *, log: str = "", **facts: object) -> None:
        """A job that was there before."""
        (aside := self.logs / "aside").write_text(log)
        aside.replace(self._log(name))  # before its state: whoever sees that it has ended reads all of it
        self.jobs[name] = {"type": "SUBMISSION", "submission_id": name, "status": status, "entrypoint": "", "metadata": {}, **facts}

    def __call__(self, method: str, path: str, headers: dict[str, str]) -> tuple[int, object]:
        if path == "/api/version":
            return 200, {"version": "4", "ray_version": self.version, "ray_commit": "c"}
        name = path.removeprefix("/api/jobs/").split("/")[0]
        if path == "/api/jobs/" and method == "GET":
            return 200, list(self.jobs.values())
        if path.startswith("/api/packages/"):
            return 200, ""
        if name not in self.jobs:
            return 404, f"Job {name} does not exist"
        if path.endswith("/logs"):
            return 200, {"logs": self._log(name).read_text()}
        if method == "DELETE":
            del self.jobs[name]
            return 200, {"deleted": True}
        return (404, "no such page") if path.endswith("/tail") else (200, self.jobs[name])

    def submit(self, request: dict[str, object]) -> tuple[int, object]:
        """Run an entrypoint to its end."""
        name = str(request["submission_id"])
        if name in self.jobs:
            return 500, "already exists"
        self.sent.append(request)
        with self._log(name).open("w") as log:
            done = subprocess.run(
                str(request["entrypoint"]), shell=True, stdout=log, stderr=log, cwd=self.home, env={**os.environ, "HOME": str(self.home)}
            )
        log_of = self._log(name).read_text()
        status = "SUCCEEDED" if done.returncode == 0 else "FAILED"
        self.add(
            name, status, log=log_of, metadata=request.get("metadata") or {}, driver_exit_code=done.returncode, start_time=1, end_time=2
        )
        return 200, {"job_id": name, "submission_id": name}

    def _log(self, name: str) -> Path:
        return self.logs / f"job-driver-{name}.log"
