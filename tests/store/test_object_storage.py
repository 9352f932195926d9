"""A storage at a URL, on a real S3 server on loopback: what is written there, and what is said where it cannot be."""

import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.fs
import pytest

from distprune.errors import UserError
from distprune.store import place
from distprune.store.cache import Cache
from distprune.store.checkpoints import Checkpoint, Checkpoints, Held, checkpoints_at
from distprune.store.place import Objects, check_url, is_refusal, join, split

CLOSED = "s3://bucket/runs?endpoint_override=127.0.0.1:1&scheme=http"


def test_objects_are_there_whole_and_go(s3: str, tmp_path: Path) -> None:
    objects, other = Objects.open(join(s3, "a?b#c")), Objects.open(join(s3, "a"))
    assert objects.list() == [] and objects.list("none") == []
    objects.put("x/one", b"1")
    (tmp_path / "large").write_bytes(large := bytes(range(256)) * 50_000)  # in several parts
    objects.send(tmp_path / "large", "x/y/large")
    objects.put("top", b"")
    objects.put("x/one", b"one")
    other.put("x/one", b"another's")
    assert sorted((name, size) for name, size, _ in objects.list()) == [("top", 0), ("x/one", 3), ("x/y/large", len(large))]
    assert [name for name, _, _ in objects.list(deep=False)] == ["top"] and [name for name, _, _ in objects.list("x", deep=False)] == [
        "x/one"
    ]
    objects.bring("x/y/large", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == large and objects.get("x/one") == b"one"
    objects.remove("x/one")
    objects.remove("x/one")
    with pytest.raises(FileNotFoundError):
        objects.get("x/one")
    objects.remove_all("x")
    objects.remove_all("x")
    assert [name for name, _, _ in objects.list()] == ["top"] and other.get("x/one") == b"another's"
    objects.try_out()
    assert [name for name, _, _ in objects.list()] == ["top"], "nothing is left of trying"


@pytest.mark.parametrize("name", ["", "..", "../x", "x/../../y", "x//y", "./x", "x/"])
def test_no_name_leads_out_of_a_url(name: str) -> None:
    with pytest.raises(ValueError, match="a name must lead to something below bucket/base, got "):
        Objects(pyarrow.fs.LocalFileSystem(), "bucket/base").get(name)


@pytest.fixture(params=["folder", "url"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Checkpoints:
    return checkpoints_at(str(tmp_path / "run") if request.param == "folder" else join(request.getfixturevalue("s3"), "run"))


def _write(store: Checkpoints, trial: int, report: int, attempt: str, content: bytes) -> int:
    return store.write(trial, Checkpoint(report, attempt), lambda path: path.write_bytes(content) and None)


def test_checkpoints_are_the_same_in_a_folder_and_at_a_url(store: Checkpoints) -> None:
    assert store.held(3) == Held() and dict(store.all()) == {}
    sizes = [_write(store, 3, report, attempt, b"x" * (10 * report + 1)) for report, attempt in ((2, "b"), (10, "a"), (10, "b"), (9, "c"))]
    assert sizes == [21, 101, 101, 91]
    _write(store, 30, 0, "a", b"thirty")
    held = store.held(3)
    assert held.farthest_first() == [(10, "a"), (10, "b"), (9, "c"), (2, "b")], "numbers, not texts"
    assert held.sizes[Checkpoint(9, "c")] == 91 and not held.dropped
    assert dict(store.all()) == {3: held, 30: Held({Checkpoint(0, "a"): 6})}
    with store.reading(30, Checkpoint(0, "a")) as path:
        assert path.read_bytes() == b"thirty"
    store.remove(3, Checkpoint(10, "a"))
    store.remove(3, Checkpoint(10, "a"))
    store.tidy(3)
    assert store.held(3).farthest_first() == [(10, "b"), (9, "c"), (2, "b")]
    store.drop(3)
    assert store.held(3) == Held({}, dropped=True) and store.all()[3].dropped
    store.remove(30)
    store.remove(30)
    assert list(store.all()) == [3]


def test_a_checkpoint_that_fails_is_not_there(store: Checkpoints) -> None:
    def fails(path: Path) -> None:
        path.write_bytes(b"half")
        raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError):
        store.write(3, Checkpoint(1, "a"), fails)
    assert store.held(3) == Held()


@pytest.mark.parametrize("attempt", ["", "..", "a/b", "/tmp"])
def test_no_attempt_leads_out(attempt: str, store: Checkpoints) -> None:
    with pytest.raises(ValueError, match="letters and digits"):
        _write(store, 3, 1, attempt, b"x")


def test_a_store_that_does_not_answer_is_waited_for(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By workers: an upload goes on where it was; one that is refused fails at once."""
    waits, send = [0], Objects.send

    def away(self: Objects, source: Path, name: str) -> None:
        if waits[0] < 3:
            raise OSError(
                "When uploading: AWS Error NETWORK_CONNECTION during PutObject operation: curlCode: 7, Could not connect to server"
            )
        send(self, source, name)

    monkeypatch.setattr(Objects, "send", away)
    monkeypatch.setattr(place, "_sleep", lambda seconds: waits.__setitem__(0, waits[0] + 1))
    store = checkpoints_at(join(s3, "run"), patient=True)
    assert _write(store, 0, 1, "a", b"state") == 5 and waits == [3] and list(store.all()) == [0]
    with pytest.raises(OSError, match="NO_SUCH_BUCKET"):
        _write(checkpoints_at(join(s3.replace("s3://b-", "s3://none-"), "run"), patient=True), 0, 1, "a", b"state")
    assert waits == [3]


def test_a_cache_at_a_url(s3: str) -> None:
    key, cache = "a" * 64, Cache.open(join(s3, ".cache"))
    assert cache.have([key]) == set() and cache.lease(key) is None
    assert cache.publish(key, lambda path: path.write_bytes(b"state") and None)
    with Cache.open(join(s3, ".cache")).reading(key) as path:
        assert path is not None and path.read_bytes() == b"state"


# URLs.


@pytest.mark.parametrize(
    ("url", "message"),
    [
        (
            "s3://AKIA:verysecret@bucket/runs",
            "storage must hold no credentials, as it is written into run folders, got some in a URL of s3://",
        ),
        ("s3://AKIA@bucket/runs", "must hold no credentials"),
        ("abfs://:verysecret@account.blob.core.windows.net/c", "must hold no credentials"),
        (
            "s3://bucket/runs?secret_key=verysecret",
            "got secret_key in a URL of s3://. Set them in the environment of every node, such as AWS_",
        ),
        ("gs://bucket/runs?json_credentials=verysecret", "must hold no credentials"),
        ("s3://bucket/a/../../other", "storage must not hold '.' or '..' as a part of its path"),
        ("s3://bucket/a/%2e%2e/other", "storage must not hold '.' or '..'"),
        ("s3:///runs", "storage must be a folder or a URL such as s3://bucket/path, got 's3:///runs'"),
        ("s3://bucket/runs?regoin=x", "must have no options but endpoint_override, region, scheme, got 'regoin'"),
        ("s3://bucket/runs#x", "storage must be a folder or a URL such as s3://bucket/path"),
        ("file:///tmp/runs", "storage must be a folder or the URL of an object store, got 'file:///tmp/runs'. Write /tmp/runs."),
        ("s3://[::1/runs", "storage must be a folder or a URL"),
    ],
)
def test_urls_that_will_not_do_are_said_in_a_line(url: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        check_url(url, "storage")
    assert message in str(caught.value) and "\n" not in str(caught.value) and "verysecret" not in str(caught.value)


@pytest.mark.parametrize("name", ["digits", "a b", "50%", "what?", "a#b", "ä"])
def test_what_is_joined_is_split_again(name: str) -> None:
    for storage in ("s3://bucket", "s3://bucket/my%20runs", "s3://bucket/runs?endpoint_override=127.0.0.1:1&scheme=http"):
        assert split(join(storage, name)) == (storage, name)


class _Refusing(http.server.BaseHTTPRequestHandler):
    """A store that lets nobody in."""

    def _refuse(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        content = b"<?xml version='1.0'?><Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"
        self.send_response(403)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = _refuse

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def refusing() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Refusing)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


def _tried(url: str) -> OSError:
    with pytest.raises(OSError) as caught:
        Objects.open(url).try_out()
    return caught.value


def test_what_is_wrong_with_a_store_is_known(s3: str, refusing: str) -> None:
    denied = _tried(f"s3://bucket/runs?endpoint_override={refusing}&scheme=http")
    assert place.why(denied) == "access is denied with the credentials of this machine, or without any" and is_refusal(denied)
    absent = _tried(s3.replace("s3://b-", "s3://none-"))
    assert place.why(absent) == "there is no such bucket" and is_refusal(absent)
    silent = _tried(CLOSED)
    assert place.why(silent) == "no store answers there" and not is_refusal(silent)
    assert json.dumps(place.why(OSError("a\nb." + "c" * 1000))).count("\\n") == 0
