"""A PostgreSQL server of the system's package for tests, in a folder and on a port of its own."""

import importlib.util
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path

PASSWORD = "correct horse/battery:staple@"  # a password with all that is hard in URLs
_HBA = "local all all trust\nhost all guarded 127.0.0.1/32 scram-sha-256\nhost all all 127.0.0.1/32 trust\n"


def binaries() -> Path | None:
    """Where the server's programs lie, which Debian keeps off the path."""
    found = sorted(
        Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[-3]) if path.parts[-3].isdigit() else 0
    )
    on_path = shutil.which("initdb")
    return found[-1].parent if found else Path(on_path).resolve().parent if on_path else None


def missing() -> str:
    """Why there can be no server here, and how to get one; empty where there can."""
    if binaries() is None or importlib.util.find_spec("psycopg") is None:
        return "PostgreSQL is not here. Get it: apt-get install -y postgresql; pip install 'distprune[postgresql]'"
    if os.getuid() == 0 and not (shutil.which("setpriv") and any(user.pw_name == "postgres" for user in pwd.getpwall())):
        return "PostgreSQL refuses root, and there is no user postgres or no setpriv. Run the tests as another user."
    return ""


class Postgres:
    """A server that can be stopped and started again; `url` is that of a database of it."""

    def __init__(self) -> None:
        found = binaries()
        assert found is not None
        self._bin, self._process, self._databases = found, None, 0
        self.folder = Path(tempfile.mkdtemp(prefix="distprune-pg-"))
        self._as_user: list[str] = []
        try:
            if os.getuid() == 0:  # which the server refuses to run as
                user = pwd.getpwnam("postgres")
                self._as_user = ["setpriv", f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups"]
                os.chown(self.folder, user.pw_uid, user.pw_gid)
            self._run("initdb", "--no-sync", "--auth=trust", "--username=postgres", "--encoding=UTF8", "--locale=C", "-D", str(self._data))
            (self._data / "pg_hba.conf").write_text(_HBA)
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                self.port = free.getsockname()[1]
            self.start()
            self.query(f"create role guarded login superuser password '{PASSWORD}'")
        except BaseException:
            self.close()
            raise

    @property
    def _data(self) -> Path:
        return self.folder / "data"

    def _run(self, program: str, *arguments: str) -> str:
        command = [*self._as_user, str(self._bin / program), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, cwd=self.folder, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def start(self) -> None:
        """Start it and wait until it answers. What it has said is never lost to a kill of a process, so nothing is synced."""
        settings = [
            f"port={self.port}",
            "listen_addresses=127.0.0.1",
            f"unix_socket_directories={self.folder}",
            "fsync=off",
            "max_connections=200",  # optuna's studies hold theirs until they are collected
        ]
        command = [
            *self._as_user,
            str(self._bin / "postgres"),
            "-D",
            str(self._data),
            *(part for item in settings for part in ("-c", item)),
        ]
        with open(self.folder / "log", "ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log, cwd=self.folder)
        until = time.monotonic() + 60
        ready = [str(self._bin / "pg_isready"), "-q", "-h", "127.0.0.1", "-p", str(self.port)]
        while subprocess.run(ready, check=False).returncode != 0:
            assert self._process.poll() is None and time.monotonic() < until, (self.folder / "log").read_text()[-2000:]
            time.sleep(0.05)

    def stop(self) -> None:
        """End it; whoever is connected loses the connection."""
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGINT)
            self._process.wait(60)

    def query(self, statement: str) -> str:
        """What psql answers."""
        return self._run("psql", "-h", "127.0.0.1", "-p", str(self.port), "-U", "postgres", "-AtX", "-c", statement, "postgres")

    def database(self, user: str = "postgres") -> str:
        """The URL of a new database."""
        self._databases += 1
        self.query(f"create database d{self._databases}")
        return f"postgresql://{user}@127.0.0.1:{self.port}/d{self._databases}"

    def close(self) -> None:
        """End it and remove all that it has written."""
        self.stop()
        shutil.rmtree(self.folder, ignore_errors=True)
