"""The cache: what is read is what was published, whatever happens to files and processes; and it keeps to its size."""

import errno
import hashlib
import json
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pyarrow.fs
import pytest

from distprune.errors import UserError
from distprune.store import cache as store
from distprune.store.cache import Bucket, Cache, Folder
from distprune.store.place import Objects


def key(text: object) -> str:
    """A key."""
    return hashlib.sha256(str(text).encode()).hexdigest()


def content(text: object, size: int = 1000) -> bytes:
    """What belongs to a key."""
    return random.Random(str(text)).randbytes(size)


def put(cache: Cache, text: object, size: int = 1000) -> bool:
    """Publish it."""
    return cache.publish(key(text), lambda path: path.write_bytes(content(text, size)) and None)


def got(cache: Cache, text: object) -> bytes | None:
    """Read it."""
    with cache.reading(key(text)) as path:
        return None if path is None else path.read_bytes()


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 1e9

    def __call__(self) -> float:
        self.now += 10
        return self.now


def _bucket(folder: Path) -> Any:
    (folder / "c").mkdir(parents=True, exist_ok=True)
    return pyarrow.fs.SubTreeFileSystem(str(folder), pyarrow.fs.LocalFileSystem())


@pytest.fixture(params=["folder", "bucket"])
def cache(request: pytest.FixtureRequest, tmp_path: Path) -> Cache:
    return Cache(Folder(tmp_path / "c") if request.param == "folder" else Bucket(Objects(_bucket(tmp_path), "c")))


def test_what_is_read_is_what_was_published(cache: Cache, tmp_path: Path) -> None:
    assert got(cache, "a") is None and cache.have([key("a"), key("b")]) == set()
    assert put(cache, "a") and not put(cache, "a"), "there already"
    assert got(cache, "a") == content("a") and cache.have([key("a"), key("b")]) == {key("a")}
    assert sorted(path.suffix for path in (tmp_path / "c").iterdir() if path.is_file()) == [".json", ".safetensors"], "nothing else is left"


@pytest.mark.parametrize("damage", ["flipped", "cut", "empty", "gone", "manifest", "foreign"])
def test_damage_is_a_miss_and_is_removed(damage: str, cache: Cache, tmp_path: Path) -> None:
    put(cache, "a")
    put(cache, "b")
    (data,) = (tmp_path / "c").glob(f"{key('a')}.*.safetensors")
    manifest = tmp_path / "c" / f"{key('a')}.json"
    whole = data.read_bytes()
    if damage == "gone":
        data.unlink()
    elif damage == "manifest":
        manifest.write_text("{")
    elif damage == "foreign":
        manifest.write_text(json.dumps({"sha256": "../../etc/passwd", "size": 3}))
    else:
        data.write_bytes({"flipped": bytes([*whole[:-1], whole[-1] ^ 1]), "cut": whole[:-1], "empty": b""}[damage])
    assert got(cache, "a") is None
    assert not list((tmp_path / "c").glob(f"{key('a')}*")) and got(cache, "b") == content("b")
    assert put(cache, "a") and got(cache, "a") == content("a"), "produced again"


@pytest.mark.parametrize("bad", ["../x", "a" * 63, "A" * 64, "a" * 64 + "\n", "", "/" + "a" * 63])
def test_no_name_leaves_the_folder(bad: str, cache: Cache, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match="64 hexadecimal digits"):
        cache.publish(bad, lambda path: path.write_bytes(b"x") and None)
    with pytest.raises(ValueError, match="64 hexadecimal digits"), cache.reading(bad):
        pass
    for ask in (cache.discard, cache.lease, lambda bad: cache.have([bad])):
        with pytest.raises(ValueError, match="64 hexadecimal digits"):
            ask(bad)
    assert sorted(tmp_path.rglob("*")) == before


def test_what_fails_while_it_is_written_leaves_nothing(cache: Cache, tmp_path: Path) -> None:
    def fails(path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError("the disk is full")

    with pytest.raises(OSError, match="the disk is full"):
        cache.publish(key("a"), fails)
    assert cache.have([key("a")]) == set() and not [path for path in (tmp_path / "c").iterdir() if path.is_file()]


def test_the_longest_unused_goes_first(tmp_path: Path) -> None:
    cache = Cache(Folder(tmp_path), limit=3500, clock=Clock())
    for name in "abc":
        put(cache, name)
    assert got(cache, "a") == content("a"), "a use"
    put(cache, "d")
    assert cache.have(map(key, "abcd")) == set(map(key, "acd"))
    assert not put(cache, "large", 4000) and cache.have(map(key, "acd")) == set(map(key, "acd")), "above the limit by itself"
    assert got(cache, "c") is not None and put(cache, "e")
    assert cache.have(map(key, "acde")) == set(map(key, "cde"))


def test_a_bucket_keeps_to_the_limit(tmp_path: Path) -> None:
    cache = Cache(Bucket(Objects(_bucket(tmp_path), "c")), limit=3500)
    for number in range(8):
        put(cache, number)
        assert sum(path.stat().st_size for path in (tmp_path / "c").iterdir()) <= 3500
    assert len(cache.have(map(key, range(8)))) == 3


def test_a_mock_file_system_will_do() -> None:
    from datetime import UTC, datetime

    cache = Cache(Bucket(Objects(pyarrow.fs._MockFileSystem(datetime.now(UTC)), "some/where")))
    assert put(cache, "a") and got(cache, "a") == content("a") and cache.lease(key("a")) is None


def test_what_is_being_read_stays_until_it_is_read(tmp_path: Path) -> None:
    cache = Cache(Folder(tmp_path))
    put(cache, "a")
    with cache.reading(key("a")) as path:
        cache.discard(key("a"))
        assert path is not None and path.read_bytes() == content("a") and cache.have([key("a")]) == set()
    assert [path.name for path in tmp_path.iterdir()] == ["leases"]


def test_what_killed_processes_left_is_forgotten(tmp_path: Path) -> None:
    cache = Cache(Folder(tmp_path))
    names = [".abc", f"{key('x')}.{'0' * 16}.safetensors", f"leases/{key('y')}", f"leases/.{key('y')}.abc"]
    for name in [*names, "notes.txt"]:
        (tmp_path / name).write_bytes(b"half")
    cache.sweep()
    assert all((tmp_path / name).exists() for name in names), "it may be a producer's that lives"
    later = Cache(Folder(tmp_path), clock=lambda: time.time() + store._FORGOTTEN_S + 1)
    later.sweep()
    assert not any((tmp_path / name).exists() for name in names) and (tmp_path / "notes.txt").exists(), "what is not its own stays"


def test_what_is_being_read_outlives_the_sweeps_of_others_however_old_it_is(tmp_path: Path) -> None:
    """A link is as old as its file by what both say of their content, and as young as it is by the time of its making."""
    cache = Cache(Folder(tmp_path))
    put(cache, "a")
    for path in tmp_path.glob("*.safetensors"):
        os.utime(path, (time.time() - 2 * store._FORGOTTEN_S,) * 2)
    with cache.reading(key("a")) as path:
        Cache(Folder(tmp_path), limit=1).sweep()
        assert path is not None and path.read_bytes() == content("a") and cache.have([key("a")]) == set()


def test_what_is_being_read_does_not_count_twice(tmp_path: Path) -> None:
    cache = Cache(Folder(tmp_path), limit=2500)
    put(cache, "a")
    put(cache, "b")
    with cache.reading(key("a")):
        cache.sweep()
        assert cache.have(map(key, "ab")) == set(map(key, "ab"))


@pytest.mark.parametrize("error", [OSError(errno.EIO, "I/O error"), TimeoutError("no answer"), OSError(errno.ESTALE, "stale handle")])
@pytest.mark.parametrize("damaged", [False, True])
def test_what_could_not_be_verified_is_a_miss_and_stays(
    error: OSError, damaged: bool, cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Never served, as it may be damaged; never removed, as it may be whole."""

    def fails(path: Path) -> str:
        raise error

    put(cache, "a")
    (data,) = (tmp_path / "c").glob("*.safetensors")
    whole = data.read_bytes()
    if damaged:
        data.write_bytes(bytes([*whole[:-1], whole[-1] ^ 1]))
    with monkeypatch.context() as patch:
        patch.setattr(store, "_hash", fails)
        assert got(cache, "a") is None and data.exists() and cache.have([key("a")]) == {key("a")}
    assert got(cache, "a") == (None if damaged else content("a")) and data.exists() != damaged


def test_a_user_without_room_reads_and_evicts_nothing(cache: Cache) -> None:
    for name in "abc":
        put(cache, name)
    bytes_of_all = cache._total()
    for room, fits in ((0, False), (1000, False), (bytes_of_all + 999, False), (bytes_of_all + 1000, True)):
        small = Cache(cache._shelf, limit=10**6, room=room)
        assert got(small, "a") == content("a") and put(small, "d") == fits
        assert cache.have(map(key, "abcd")) == set(map(key, "abcd" if fits else "abc"))


@pytest.mark.parametrize("where", ["nowhere://x/y", "/dev/null/cache"])
def test_what_cannot_be_used_is_said_in_a_line(where: str) -> None:
    with pytest.raises(UserError, match=r"^cache.path '.*' cannot be used: [^\n]* Give a folder, or write cache: false.$"):
        Cache.open(where)


def test_a_file_url_is_a_folder(tmp_path: Path) -> None:
    cache = Cache.open(f"file://{tmp_path}/c")
    assert put(cache, "a") and got(Cache.open(tmp_path / "c"), "a") == content("a") and cache.lease(key("a")) is not None


def _busy(folder: Path, seed: int, limit: int, times: int | None) -> None:
    """Read and publish at random, for ever or so often; dies with a wrong answer."""
    cache, choose, count = Cache(Folder(folder), limit=limit), random.Random(seed), 0
    while times is None or count < times:
        name = choose.randrange(12)
        found = got(cache, name)
        if found is not None and found != content(name):
            os._exit(1)
        if found is None:
            put(cache, name)
        count += 1


def test_many_processes_at_once_and_killed_ones_leave_it_right(tmp_path: Path) -> None:
    children = []
    for seed in range(4):
        children.append(os.fork())
        if children[-1] == 0:
            try:
                _busy(tmp_path, seed, 5500, None if seed < 2 else 60)
                os._exit(0)
            finally:
                os._exit(2)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children[2:]] == [0, 0]
    for child in children[:2]:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    _busy(tmp_path, 9, 5500, 20)
    cache = Cache(Folder(tmp_path), limit=5500, clock=lambda: time.time() + 2 * store._FORGOTTEN_S)
    cache.sweep()
    files = [path for path in tmp_path.iterdir() if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 5500
    assert not [path for path in files if path.name.startswith(".")]
    for name in range(12):
        assert got(cache, name) in (None, content(name))
    assert cache.have(map(key, range(12)))
