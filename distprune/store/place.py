"""URLs of object stores, and what lies below one.

Nothing there is renamed or appended to: an object is there, whole, when its upload is complete. Credentials are those of each node's
environment (AWS_ACCESS_KEY_ID and so on, or its role), never of a URL, as URLs are written into run folders.
"""

import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import parse_qsl, quote, unquote, urlsplit, urlunsplit

from distprune.errors import UserError

T = TypeVar("T")

_CONNECT_S, _SILENT_S, _ATTEMPTS = 4.0, 8.0, 2  # a store that does not answer is known in seconds; who can wait asks again
_TRY_AGAIN_S = 2.0
_S3_OPTIONS = ("endpoint_override", "region", "scheme")
_SECRET = re.compile(r"secret|password|token|credential|signature|sas|key", re.IGNORECASE)
_CHUNK = 2**22

# What stores say, and what that means. Who is refused need not ask again.
_NO_BUCKET = re.compile(
    r"NO_SUCH_BUCKET|bucket '[^']*' (not found|does not exist)|HTTP status 404|NOT_FOUND|ContainerNotFound", re.IGNORECASE
)
_DENIED = re.compile(
    r"ACCESS_DENIED|PERMISSION_DENIED|UNAUTHENTICATED|INVALID_ACCESS_KEY_ID|SIGNATURE|EXPIRED|InvalidAuthentication|HTTP status 40[13]|"
    r"no credentials|permission denied",
    re.IGNORECASE,
)
_SILENT = re.compile(r"NETWORK_CONNECTION|curlCode|couldn't (connect|resolve)|timed? ?out|UNAVAILABLE|connection refused", re.IGNORECASE)

_sleep = time.sleep


def is_url(where: object) -> bool:
    """Whether that is a URL and no path."""
    return "://" in str(where)


def local_path(where: str) -> Path | None:
    """The folder that a path or a file:// URL names; None for the URL of an object store."""
    if not is_url(where):
        return Path(where)
    parts = urlsplit(where)
    return Path(unquote(parts.path)) if (parts.scheme, parts.netloc) == ("file", "") else None


def check_url(url: str, where: str) -> None:
    """Raise UserError for a URL that names no place in an object store, or holds a secret, which is not repeated."""
    try:
        parts = urlsplit(url)
        user, password = parts.username, parts.password
    except ValueError:  # whose text holds what was written, and that may be a secret
        raise UserError(f"{where} must be a folder or a URL, and what was written is none. Write s3://bucket/path.") from None
    secret = next((name for name, _ in parse_qsl(parts.query, keep_blank_values=True) if _SECRET.search(name)), None)
    bucket, _, rest = url.partition("://")[2].partition("/")
    keys = parts.scheme == "s3" and (user is not None or ":" in bucket or "@" in bucket + rest)  # a secret key may hold a / or a ?
    if password is not None or keys or secret is not None:
        named = secret if secret and secret.isidentifier() else "some"
        raise UserError(
            f"{where} must hold no credentials, as it is written into run folders, got {named} in a URL of {parts.scheme}://. "
            "Set them in the environment of every node, such as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY."
        )
    if parts.scheme == "file":
        raise UserError(f"{where} must be a folder or the URL of an object store, got {url!r}. Write {unquote(parts.path) or 'a folder'}.")
    if not parts.scheme or not parts.netloc or parts.fragment:
        raise UserError(f"{where} must be a folder or a URL such as s3://bucket/path, got {url!r}.")
    if {".", ".."} & set(unquote(parts.path).split("/")):
        raise UserError(f"{where} must not hold '.' or '..' as a part of its path, got {url!r}. Write the path itself.")
    unknown = [name for name, _ in parse_qsl(parts.query, keep_blank_values=True) if name not in _S3_OPTIONS]
    if parts.scheme == "s3" and unknown:
        raise UserError(f"{where} must have no options but {', '.join(_S3_OPTIONS)}, got '{unknown[0]}' in {url!r}. Leave it out.")


def join(url: str, *names: str) -> str:
    """The URL of something below another; its options stay."""
    parts = urlsplit(url)
    return urlunsplit(parts._replace(path="/".join([parts.path.rstrip("/"), *(quote(name, safe="") for name in names)])))


def split(url: str) -> tuple[str, str]:
    """(URL of what it lies in, its name)."""
    parts = urlsplit(url)
    folder, _, name = parts.path.rstrip("/").rpartition("/")
    return urlunsplit(parts._replace(path=folder)), unquote(name)


def why(error: BaseException) -> str:
    """What went wrong at a store, for people."""
    text = " ".join(str(error).split())
    if _NO_BUCKET.search(text):
        return "there is no such bucket"
    if _DENIED.search(text):
        return "access is denied with the credentials of this machine, or without any"
    if _SILENT.search(text):
        return "no store answers there"
    return text[:300].rstrip(".")


def is_refusal(error: BaseException) -> bool:
    """Whether a store has answered, and would answer the same again."""
    text = str(error)
    return isinstance(error, FileNotFoundError | PermissionError) or bool(_DENIED.search(text) or _NO_BUCKET.search(text))


def insist(work: Callable[[], T]) -> T:
    """Do `work` again and again while the store does not answer. Raises OSError where it refuses, or where this machine fails."""
    while True:
        try:
            return work()
        except OSError as error:
            if error.errno is not None or is_refusal(error):
                raise
        _sleep(_TRY_AGAIN_S)


@contextmanager
def answering(url: str) -> Iterator[None]:
    """Raise a UserError for what goes wrong at the store of a URL."""
    try:
        yield
    except UserError:
        raise
    except (OSError, ValueError, NotImplementedError) as error:  # pyarrow raises all of them
        raise UserError(f"{url} cannot be used: {why(error)}. Check the URL, and the credentials in this machine's environment.") from error


def file_system(url: str) -> tuple[Any, str]:
    """(a file system of pyarrow, the base path of the URL in it). Raises OSError or ValueError."""
    import pyarrow.fs

    parts = urlsplit(url)
    if parts.scheme != "s3":
        return pyarrow.fs.FileSystem.from_uri(url)  # type: ignore[no-any-return]
    options = dict(parse_qsl(parts.query))
    known = options.keys() & {"region", "endpoint_override"} or os.environ.keys() & {"AWS_REGION", "AWS_DEFAULT_REGION", "AWS_ENDPOINT_URL"}
    if not known:
        options["region"] = pyarrow.fs.resolve_s3_region(parts.netloc)
    system = pyarrow.fs.S3FileSystem(
        connect_timeout=_CONNECT_S,
        request_timeout=_SILENT_S,
        retry_strategy=pyarrow.fs.AwsStandardS3RetryStrategy(max_attempts=_ATTEMPTS),
        allow_delayed_open=True,  # a small object is one request
        **options,
    )
    return system, f"{parts.netloc}/{unquote(parts.path).strip('/')}".rstrip("/")


class Objects:
    """What lies below a base path of a file system of pyarrow. Names are paths from there on. All methods raise OSError."""

    def __init__(self, system: Any, base: str) -> None:
        self._system, self._base = system, base.rstrip("/")

    @classmethod
    def open(cls, url: str) -> "Objects":
        """What lies below a URL; nothing is looked for yet. Raises OSError or ValueError."""
        return cls(*file_system(url))

    def list(self, under: str = "", *, deep: bool = True) -> list[tuple[str, int, float]]:
        """(name, bytes, seconds of its time of change) of everything under a name; none if there is nothing."""
        import pyarrow.fs

        at = self._at(under) if under else self._base
        found = self._system.get_file_info(pyarrow.fs.FileSelector(at, recursive=deep, allow_not_found=True))
        return [(info.path[len(self._base) + 1 :], info.size, (info.mtime_ns or 0) / 1e9) for info in found if info.is_file]

    def get(self, name: str) -> bytes:
        """The content of a small object."""
        with self._system.open_input_stream(self._at(name)) as source:
            return bytes(source.read())

    def bring(self, name: str, to: Path) -> None:
        """Copy an object to a file here."""
        with self._system.open_input_stream(self._at(name)) as source, open(to, "wb") as target:
            shutil.copyfileobj(source, target, _CHUNK)

    def put(self, name: str, data: bytes) -> None:
        """Make or replace an object."""
        with self._writing(name) as target:
            target.write(data)

    def send(self, source: Path, name: str) -> None:
        """Make or replace an object by a file from here."""
        with open(source, "rb") as file, self._writing(name) as target:
            shutil.copyfileobj(file, target, _CHUNK)

    def remove(self, name: str) -> None:
        """Remove an object; no error if it is gone."""
        with suppress(FileNotFoundError):
            self._system.delete_file(self._at(name))

    def remove_all(self, under: str) -> None:
        """Remove everything under a name; no error if there is nothing."""
        with suppress(FileNotFoundError):
            self._system.delete_dir(self._at(under))

    def try_out(self) -> None:
        """Raise OSError or ValueError if nothing can be written, read, listed or removed here. Nothing is left behind."""
        name = f".try-{uuid.uuid4().hex[:8]}"
        self.put(name, b"distprune")
        found = [there for there, _, _ in self.list(deep=False)]
        if self.get(name) != b"distprune" or name not in found:
            raise OSError("what is written there cannot be read again")
        self._system.delete_file(self._at(name))

    def _writing(self, name: str) -> Any:
        path = self._at(name)
        try:
            return self._system.open_output_stream(path)
        except FileNotFoundError:  # a file system that has folders
            self._system.create_dir(path.rpartition("/")[0], recursive=True)
            return self._system.open_output_stream(path)

    def _at(self, name: str) -> str:
        if {"", ".", ".."} & set(name.split("/")):
            raise ValueError(f"a name must lead to something below {self._base}, got {name!r}")
        return f"{self._base}/{name}"
