"""Leases: one of many takes it, a dead or frozen holder's passes on, and nothing is left behind."""

import errno
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from distprune.store import lease as leases
from distprune.store.lease import Lease, Watch, is_own


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "key"


def _take(path: Path) -> Lease:
    lease = Lease.take(path, beat_every=None)
    assert lease is not None
    return lease


def test_one_of_many_takes_it(path: Path) -> None:
    first = _take(path)
    assert Lease.take(path, beat_every=None) is None and first.is_held
    first.release()
    first.release()
    assert list(path.parent.iterdir()) == []
    _take(path).release()


def test_the_count_of_links_is_believed_and_not_the_answer(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server may make the link and lose the answer, or say yes to what it did not do."""
    link = os.link

    def lost(source: Any, target: Any) -> None:
        link(source, target)
        raise OSError("no answer")

    monkeypatch.setattr(os, "link", lost)
    _take(path).release()
    monkeypatch.setattr(os, "link", lambda source, target: None)
    assert Lease.take(path, beat_every=None) is None
    assert list(path.parent.iterdir()) == []


@pytest.mark.parametrize("number", [errno.EPERM, errno.EOPNOTSUPP])
def test_where_there_are_no_links_it_says_so(number: int, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """None would mean that somebody has it, for whom one would wait for ever."""

    def refused(source: Any, target: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "link", refused)
    with pytest.raises(OSError, match=os.strerror(number)):
        Lease.take(path, beat_every=None)
    assert list(path.parent.iterdir()) == []


def test_a_beat_changes_the_content_and_keeps_it_alive(path: Path) -> None:
    clock, lease = Clock(), _take(path)
    watch = Watch(path, stale=10, clock=clock)
    contents = set()
    for _ in range(5):
        contents.add(path.read_bytes())
        assert watch.look() is not None and lease.beat()
        clock.now += 9
    assert len(contents) == 5 and lease.is_held
    lease.note = {"pace": 0.5}
    assert lease.beat() and json.loads(path.read_bytes())["pace"] == 0.5


def test_without_a_beat_it_is_stolen_by_the_watchers_own_clock(path: Path) -> None:
    clock, dead = Clock(), _take(path)
    os.utime(path, (0, 0))  # what another machine's clock says does not matter
    watch = Watch(path, stale=10, clock=clock)
    assert watch.look() is not None
    clock.now = 9.9
    assert watch.look() is not None and Lease.take(path, beat_every=None) is None
    clock.now = 10.0
    assert watch.look() is None and not path.exists()
    new = _take(path)
    assert not dead.beat() and not dead.is_held, "a holder that slept finds out before it writes"
    dead.release()
    assert new.is_held and new.beat(), "and does not take away what is another's"
    new.release()
    assert list(path.parent.iterdir()) == []


def test_a_steal_that_comes_too_late_puts_the_new_lease_back(path: Path) -> None:
    clock, dead = Clock(), _take(path)
    late = Watch(path, stale=10, clock=clock)
    late.look()
    clock.now = 20
    read = Path.read_bytes

    def between(self: Path) -> bytes:
        """Another watcher steals after this one has looked and before it renames."""
        content = read(self)
        if self == path:
            path.unlink()
            assert Lease.take(path, beat_every=None) is not None
        return content

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "read_bytes", between)
        late.look()
    owner = json.loads(path.read_bytes())["owner"]
    assert owner != dead.owner and [item.name for item in path.parent.iterdir()] == ["key"]


def test_a_process_knows_its_own_and_a_fork_is_another(path: Path) -> None:
    _take(path)
    content = Watch(path).look()
    assert content is not None and is_own(content) and not is_own({**content, "process": "1-a"}) and not is_own({})
    child = os.fork()
    if child == 0:
        os._exit(int(is_own(content)))
    assert os.waitpid(child, 0)[1] == 0


def test_the_thread_beats(path: Path) -> None:
    lease = Lease.take(path, beat_every=0.01)
    assert lease is not None
    first = path.read_bytes()
    while path.read_bytes() == first:
        time.sleep(0.01)
    lease.release()
    assert list(path.parent.iterdir()) == []


@pytest.mark.parametrize("seen", [True, False])
def test_a_death_is_seen_at_once_on_the_same_machine_alone(seen: bool, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that stands still; the dead process has not even been waited for."""
    child = os.fork()
    if child == 0:
        Lease.take(path, beat_every=None)
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
    if not seen:
        monkeypatch.setattr(leases, "_machine", lambda: "another")
    assert (Watch(path, clock=lambda: 0.0).look() is None) == seen == (not path.exists())
    os.waitpid(child, 0)


def test_another_process_of_the_same_number_is_not_the_holder(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    born = leases._birth(os.getpid())
    assert born is not None
    lease = _take(path)
    assert Watch(path, clock=lambda: 0.0).look() is not None
    monkeypatch.setattr(leases, "_birth", lambda pid: born + 1)
    assert Watch(path, clock=lambda: 0.0).look() is None and not lease.is_held


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_killed_or_frozen_holder_passes_it_on(how: signal.Signals, path: Path) -> None:
    child = os.fork()
    if child == 0:
        Lease.take(path, beat_every=0.05)
        while True:
            signal.pause()
    try:
        while list(path.parent.iterdir()) != [path]:
            time.sleep(0.01)
        watch = Watch(path, stale=0.5)
        assert watch.look() is not None
        os.kill(child, how)
        while watch.look() is not None:
            assert Lease.take(path, beat_every=None) is None, "held as long as nobody knows"
            time.sleep(0.05)
        mine = _take(path)
        if how == signal.SIGSTOP:
            os.kill(child, signal.SIGCONT)
            time.sleep(0.2)  # it wakes and would beat
        assert mine.is_held and mine.beat()
        mine.release()
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert list(path.parent.iterdir()) == []


def test_defaults_leave_room_for_many_beats() -> None:
    assert leases.STALE_S >= 5 * leases.BEAT_EVERY_S
