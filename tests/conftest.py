"""What all tests share."""

import atexit
import os
import shutil
import sys
import tempfile
import time

# Before ray is imported anywhere: tests keep Ray's token out of the user's home, and its child processes quiet. Under `uv run` they are
# as without it: messages name the plain command, and Ray starts its workers with this interpreter.
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ["RAY_ENABLE_UV_RUN_RUNTIME_ENV"] = "0"
os.environ.pop("UV_RUN_RECURSION_DEPTH", None)
os.environ["TZ"] = "UTC"
# Data sets that workers share lie in the system's folder for temporary files; those of tests go when the tests end.
if "DISTPRUNE_NODE_CACHE" not in os.environ:
    os.environ["DISTPRUNE_NODE_CACHE"] = tempfile.mkdtemp(prefix="distprune-tests-")
    atexit.register(shutil.rmtree, os.environ["DISTPRUNE_NODE_CACHE"], ignore_errors=True)

from collections.abc import Iterator
from pathlib import Path

import postgres
import pytest
import torch
from hypothesis import settings

time.tzset()
settings.register_profile("tests", deadline=None, derandomize=True)  # no test depends on time or chance
settings.load_profile("tests")


@pytest.fixture(autouse=True, scope="module")
def no_ray_is_left() -> Iterator[None]:
    """A Ray that a test has begun has the environment of that test: the next file begins its own."""
    yield
    if (ray := sys.modules.get("ray")) and ray.is_initialized():
        ray.shutdown()


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Bits depend on the thread count."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[postgres.Postgres]:
    """A PostgreSQL server of the system's package; tests that want one are skipped where there is none."""
    if postgres.missing():
        pytest.skip(postgres.missing())
    server = postgres.Postgres()
    yield server
    server.close()


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Where an S3 server answers, as host:port; without the package that has one, what needs it is skipped."""
    from object_stores import serving

    with serving(tmp_path_factory.mktemp("s3")) as address:
        yield address


@pytest.fixture
def s3(s3_server: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """The URL of a storage in a new bucket. The environment holds credentials, and this machine has no copies of runs yet."""
    from object_stores import new_bucket

    for name, value in (("AWS_ACCESS_KEY_ID", "test"), ("AWS_SECRET_ACCESS_KEY", "test"), ("AWS_EC2_METADATA_DISABLED", "true")):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "machine"))
    return f"s3://{new_bucket(s3_server)}/my%20runs?endpoint_override={s3_server}&scheme=http"
