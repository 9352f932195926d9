"""A store of files by content key, shared by trials, workers, nodes and searches: a folder, or a bucket through pyarrow's file systems.

A file is there when its manifest is, which is written last and holds the file's size and SHA-256. What does not fit its manifest when it
is read is removed, and is a miss. Beyond the size limit, what was used longest ago goes first; the manifest's time of change says when
that was, as it is set at each use.

    <key>.json                      the manifest
    <key>.<16 digits>.safetensors   the file; the digits are of its hash, so that two producers who differ do not mix
    leases/<key>                    who produces it now (`lease.py`), in folders only
"""

import hashlib
import json
import os
import re
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Protocol

from distprune.errors import UserError
from distprune.store.place import Objects, local_path, why

_KEY = re.compile(r"[0-9a-f]{64}")
_FORGOTTEN_S = 3600.0  # after which what a killed process left half-written is removed


class Shelf(Protocol):
    """Where the files of a cache lie. Names are made by the cache alone."""

    leases: Path | None  # a folder of leases; None where there can be none, as a bucket knows no link and no rename

    def have(self, names: Iterable[str]) -> set[str]:
        """Those of `names` that are there."""

    def list(self) -> list[tuple[str, int, float]]:
        """(name, bytes, seconds of its time of change) of everything."""

    def aside(self) -> AbstractContextManager[Path]:
        """A path for a file that is being written."""

    def put(self, aside: Path, name: str) -> None:
        """Publish a file at once."""

    def get(self, name: str) -> bytes:
        """The content of a small file."""

    def held(self, name: str) -> AbstractContextManager[Path]:
        """A path at which the file stays while it is read, whoever removes it."""

    def touch(self, name: str, now: float) -> None:
        """Set the time of change."""

    def remove(self, name: str) -> None:
        """Remove a file; no error if it is gone."""


class Folder:
    """A folder, on this machine or shared."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.leases: Path | None = path / "leases"
        self.leases.mkdir(parents=True, exist_ok=True)

    def have(self, names: Iterable[str]) -> set[str]:
        return {name for name in names if os.path.exists(self._path / name)}

    def list(self) -> list[tuple[str, int, float]]:
        found = []
        for folder in (self._path, self._path / "leases"):
            for entry in os.scandir(folder):
                with suppress(FileNotFoundError):
                    facts = entry.stat()
                    if entry.is_file():
                        name = os.path.relpath(entry.path, self._path)
                        changed = facts.st_mtime if _key_of(name) else facts.st_ctime  # a link has its file's mtime, and is a change of it
                        found.append((name, facts.st_size, changed))
        return found

    @contextmanager
    def aside(self) -> Iterator[Path]:
        path = self._path / f".{uuid.uuid4().hex}"
        try:
            yield path
        finally:
            path.unlink(missing_ok=True)

    def put(self, aside: Path, name: str) -> None:
        os.replace(aside, self._path / name)

    def get(self, name: str) -> bytes:
        return (self._path / name).read_bytes()

    @contextmanager
    def held(self, name: str) -> Iterator[Path]:
        with self.aside() as path:
            try:
                os.link(self._path / name, path)
            except FileNotFoundError:
                raise
            except OSError:  # a file system without links: a reader may find it gone, which is a miss
                yield self._path / name
            else:
                yield path

    def touch(self, name: str, now: float) -> None:
        with suppress(FileNotFoundError):
            os.utime(self._path / name, (now, now))

    def remove(self, name: str) -> None:
        (self._path / name).unlink(missing_ok=True)


class Bucket:
    """Objects below a URL. Nothing is renamed: a file appears when its upload is complete."""

    def __init__(self, objects: Objects) -> None:
        self._objects = objects
        self.leases: Path | None = None

    def have(self, names: Iterable[str]) -> set[str]:
        return {name for name, _, _ in self.list()} & set(names)  # one request for all of them

    def list(self) -> list[tuple[str, int, float]]:
        return self._objects.list(deep=False)

    @contextmanager
    def aside(self) -> Iterator[Path]:
        with tempfile.TemporaryDirectory(prefix="distprune-cache-") as folder:
            yield Path(folder) / "file"

    def put(self, aside: Path, name: str) -> None:
        self._objects.send(aside, name)

    def get(self, name: str) -> bytes:
        return self._objects.get(name)

    @contextmanager
    def held(self, name: str) -> Iterator[Path]:
        with self.aside() as path:
            self._objects.bring(name, path)
            yield path

    def touch(self, name: str, now: float) -> None:
        with suppress(FileNotFoundError):
            self._objects.put(name, self.get(name))  # written anew: the file system sets the time, the same for all who use it

    def remove(self, name: str) -> None:
        self._objects.remove(name)


class Cache:
    """Files by key. Beyond `limit` (bytes) files go, beyond `room` (bytes) this user adds none; None is without bound.

    `clock` says the seconds that uses are stamped with.
    """

    def __init__(self, shelf: Shelf, *, limit: int | None = None, room: int | None = None, clock: Callable[[], float] = time.time) -> None:
        self._shelf, self._limit, self._room, self._clock = shelf, limit, room, clock

    @classmethod
    def open(cls, where: str | Path, *, limit: int | None = None, room: int | None = None) -> "Cache":
        """The cache in a folder or at a URL such as s3://bucket/path. Raises UserError if it cannot be used."""
        try:
            folder = local_path(str(where))
            return cls(Bucket(Objects.open(str(where))) if folder is None else Folder(folder), limit=limit, room=room)
        except (OSError, ValueError, NotImplementedError) as error:  # pyarrow raises all of them
            raise UserError(f"cache.path '{where}' cannot be used: {why(error)}. Give a folder, or write cache: false.") from error

    def lease(self, key: str) -> Path | None:
        """Where the lease of a key lies; None where there are none, and keys may be produced twice."""
        name = _checked(key)
        return None if self._shelf.leases is None else self._shelf.leases / name

    def have(self, keys: Iterable[str]) -> set[str]:
        """Those of `keys` that are there."""
        return {name.removesuffix(".json") for name in self._shelf.have(f"{_checked(key)}.json" for key in keys)}

    def publish(self, key: str, fill: Callable[[Path], None]) -> bool:
        """Keep what `fill` writes to the path that it is given; False if it is there already, or there is no room for it."""
        if self.have([key]):
            return False
        with self._shelf.aside() as aside:
            fill(aside)
            digest, size = _hash(aside), aside.stat().st_size
            if (self._limit is not None and size > self._limit) or (self._room is not None and self._total() + size > self._room):
                return False
            self._shelf.put(aside, _name(key, digest))
        with self._shelf.aside() as aside:
            aside.write_text(json.dumps({"sha256": digest, "size": size}))
            self._shelf.put(aside, f"{key}.json")
        self._shelf.touch(f"{key}.json", self._clock())
        self.sweep()
        return True

    @contextmanager
    def reading(self, key: str) -> Iterator[Path | None]:
        """A path to read the file of a key at, verified; None if it is not there or was damaged."""
        manifest = self._manifest(_checked(key))
        with ExitStack() as stack:
            yield None if manifest is None else self._verified(key, *manifest, stack)

    def _verified(self, key: str, digest: str, size: int, stack: ExitStack) -> Path | None:
        """Where the file of a key can be read until `stack` is closed. What is gone or damaged is discarded, what fails may come back."""
        try:
            path = stack.enter_context(self._shelf.held(_name(key, digest)))
            whole = path.stat().st_size == size and _hash(path) == digest
        except FileNotFoundError:
            whole = False
        except OSError:
            return None
        if not whole:
            self.discard(key)
            return None
        self._shelf.touch(f"{key}.json", self._clock())
        return path

    def _manifest(self, key: str) -> tuple[str, int] | None:
        """(SHA-256, bytes) of the file of a key."""
        try:
            found = json.loads(self._shelf.get(f"{key}.json"))
            return _checked(found["sha256"]), int(found["size"])
        except OSError:
            return None
        except (ValueError, KeyError, TypeError):
            self.discard(key)
            return None

    def _total(self) -> int:
        """Bytes of all that is kept; what is being written or read is not counted."""
        return sum(size for name, size, _ in self._shelf.list() if _key_of(name))

    def discard(self, key: str) -> None:
        """Remove what is there of a key, the manifest first."""
        key = _checked(key)
        for name in sorted((name for name, _, _ in self._shelf.list() if _key_of(name) == key), key=_manifest_first):
            self._shelf.remove(name)

    def sweep(self) -> None:
        """Remove what was used longest ago until the limit is kept, and what killed processes left behind."""
        groups: dict[str, list[tuple[str, int, float]]] = {}
        total, now = 0, self._clock()
        for name, size, changed in self._shelf.list():
            key = _key_of(name)
            if key is not None:
                total += size
                groups.setdefault(key, []).append((name, size, changed))
            elif now - changed > _FORGOTTEN_S and (name.startswith((".", "leases/"))):
                self._shelf.remove(name)
        used = {key: _used(key, group) for key, group in groups.items()}
        for key in sorted(groups, key=lambda key: (used[key], key)):
            whole = f"{key}.json" in {name for name, _, _ in groups[key]}
            above = self._limit is not None and total > self._limit
            if above or (not whole and now - used[key] > _FORGOTTEN_S):
                total -= sum(size for _, size, _ in groups[key])
                for name, _, _ in sorted(groups[key], key=lambda item: _manifest_first(item[0])):
                    self._shelf.remove(name)


def _checked(key: str) -> str:
    """A key, which becomes a part of a path."""
    if not isinstance(key, str) or not _KEY.fullmatch(key):
        raise ValueError(f"a key must be 64 hexadecimal digits, got {key!r}")
    return key


def _name(key: str, digest: str) -> str:
    return f"{_checked(key)}.{digest[:16]}.safetensors"


def _key_of(name: str) -> str | None:
    """The key whose file or manifest it is."""
    return name[:64] if re.fullmatch(r"[0-9a-f]{64}(\.json|\.[0-9a-f]{16}\.safetensors)", name) else None


def _manifest_first(name: str) -> bool:
    return not name.endswith(".json")


def _used(key: str, group: list[tuple[str, int, float]]) -> float:
    times = {name: changed for name, _, changed in group}
    return times.get(f"{key}.json", max(times.values()))


def _hash(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
