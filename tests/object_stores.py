"""Object stores for tests: an S3 server on loopback, and a folder in place of a store that fails when it is told to."""

import importlib.util
import os
import socket
import subprocess
import sys
import time
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pyarrow.fs
import pytest

from distprune.store.place import Objects

_PATIENCE_S = 60.0


@contextmanager
def serving(folder: Path) -> Iterator[str]:
    """Run moto's server in a process of its own; its log lies in `folder`."""
    if importlib.util.find_spec("moto") is None or importlib.util.find_spec("flask") is None:
        pytest.skip("no S3 server: uv pip install 'moto[server]'")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with (folder / "log").open("w") as log:
        environment = {**os.environ, "AWS_EC2_METADATA_DISABLED": "true"}
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
        server = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True)
        try:
            until = time.monotonic() + _PATIENCE_S
            while True:
                try:
                    socket.create_connection(("127.0.0.1", port), 1).close()
                    break
                except OSError:
                    assert server.poll() is None and time.monotonic() < until, (folder / "log").read_text()[-2000:]
                    time.sleep(0.1)
            yield f"127.0.0.1:{port}"
        finally:
            server.kill()
            server.wait()


def new_bucket(address: str) -> str:
    """Make a bucket; returns its name."""
    name = f"b-{uuid.uuid4().hex[:12]}"
    urllib.request.urlopen(urllib.request.Request(f"http://{address}/{name}", method="PUT")).close()
    return name


class Store:
    """A folder that every URL leads into. `hook` hears (what is done, to which name) before, and (..., "") after it; what it raises, the
    store raises."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        folder.mkdir(parents=True)
        self.folder = folder
        self.hook: Callable[[str, str], None] = lambda what, name: None
        system = pyarrow.fs.SubTreeFileSystem(str(folder), pyarrow.fs.LocalFileSystem())

        def open_url(cls: Any, url: str) -> Objects:
            parts = urlsplit(url)
            return Objects(system, f"{parts.netloc}{unquote(parts.path)}")

        monkeypatch.setattr(Objects, "open", classmethod(open_url))
        for what, position in (("list", 0), ("get", 0), ("bring", 0), ("put", 0), ("send", 1), ("remove", 0), ("remove_all", 0)):
            monkeypatch.setattr(Objects, what, self._hooked(what, getattr(Objects, what), position))

    def _hooked(self, what: str, original: Any, position: int) -> Any:
        def hooked(objects: Objects, *args: Any, **given: Any) -> Any:
            self.hook(what, str(args[position]) if args else "")
            found = original(objects, *args, **given)
            self.hook(f"{what} done", str(args[position]) if args else "")
            return found

        return hooked

    def names(self) -> list[str]:
        """Of everything that is there, from the folder on."""
        return sorted(path.relative_to(self.folder).as_posix() for path in self.folder.rglob("*") if path.is_file())
