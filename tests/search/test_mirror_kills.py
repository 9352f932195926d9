"""A search whose storage is a URL, killed at any write and any upload, and gone on with on another machine.

As in `test_kill.py`, a forked child drives a whole search on made-up curves and dies at one moment. What it had taken up to the URL is all
that the next machine has: of that nothing is lost and nothing is doubled, and of the rest the laws of a search hold as ever.
"""

import dataclasses
import functools
import itertools
import json
import math
import os
import random
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from laws import NONE, alone, broken, front, told
from object_stores import Store
from searches import curve, resume, search, start, trials

from distprune.errors import UserError
from distprune.search import driver
from distprune.search.config import Search
from distprune.search.finale import close_tables
from distprune.search.trial import Job
from distprune.store import files, parts
from distprune.store.checkpoints import Checkpoint, checkpoints_at
from distprune.store.folder import RunFolder
from distprune.store.mirror import Mirror
from distprune.store.place import Objects
from distprune.store.reports import ReportWriter

pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")

TRIALS = 4
STORAGE = "s3://bucket/runs"
URL = f"{STORAGE}/s"
OFTEN = 4  # events between two uploads
SOME = 16  # moments of a case
UPLOADS = ("put", "send", "remove", "remove_all")


@pytest.fixture(autouse=True)
def quick_and_the_same_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Uploads come at every fourth event, in the driver's own thread; the rest is as in `test_kill.py`."""
    known: dict[str, Any] = {}
    original, look, ticks, events = driver.set_up, Mirror.check, itertools.count(), itertools.count(1)

    def set_up(value: Search, **given: Any) -> Any:
        key = json.dumps({**value.plain(), "name": "", "storage": ""})
        if key not in known:
            known[key] = original(value, **given)
        return dataclasses.replace(known[key], search=value)

    def check(self: Mirror) -> None:
        if next(events) % OFTEN == 0 and self._begun:
            self._try()
        look(self)

    monkeypatch.setattr(driver, "set_up", set_up)
    monkeypatch.setattr(driver, "finalize", close_tables)
    monkeypatch.setattr(files, "_sync", lambda descriptor: None)
    monkeypatch.setattr(driver, "ReportWriter", functools.partial(ReportWriter, clock=lambda: 0.12 * next(ticks)))
    monkeypatch.setattr(driver, "TABLE_EVERY_S", math.inf)
    monkeypatch.setattr(Mirror, "_start", lambda self: None)
    monkeypatch.setattr(Mirror, "check", check)


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "machine 0"))
    return Store(tmp_path / "store", monkeypatch)


def far(job: Job) -> Iterator[dict[str, Any]]:
    """`searches.curve`, with its checkpoints where the job says."""
    checkpoints = checkpoints_at(job.folder)
    with tempfile.TemporaryDirectory() as scratch:
        own = Path(scratch) / "checkpoints" / str(job.number)
        own.mkdir(parents=True)
        for at in checkpoints.held(job.number).farthest_first()[:1]:
            with checkpoints.reading(job.number, at) as path:
                (own / f"{at.report}.json").write_bytes(path.read_bytes())
        for row in curve(dataclasses.replace(job, folder=scratch)):
            if (made := own / f"{row['index']}.json").exists():
                checkpoints.write(
                    job.number, Checkpoint(row["index"], row["attempt"]), lambda path, made=made: path.write_bytes(made.read_bytes())
                )
            yield row


def _moments(store: Store, value: Search, monkeypatch: pytest.MonkeyPatch) -> tuple[int, int]:
    """(writes, uploads) of an undisturbed search."""
    counts, original = [0, 0], files._write

    def counting(descriptor: int, data: Any) -> int:
        counts[0] += 1
        return original(descriptor, data)

    def hook(what: str, name: str) -> None:
        counts[1] += what in UPLOADS

    monkeypatch.setattr(files, "_write", counting)
    store.hook = hook
    start(value, using=far)
    monkeypatch.setattr(files, "_write", original)
    store.hook = lambda what, name: None
    return counts[0], counts[1]


def _killed(store: Store, value: Search, *, write: int = 0, upload: int = 0, mode: str, again: bool = False) -> bool:
    """Whether a child was killed at that write or upload, before, in the middle of or after it. An upload has no middle."""
    child = os.fork()
    if child == 0:
        counts, original = [0, 0], files._write

        def die() -> None:
            os.kill(os.getpid(), signal.SIGKILL)

        def dying(descriptor: int, data: Any) -> int:
            counts[0] += 1
            if counts[0] == write:
                original(descriptor, bytes(data)[: {"before": 0, "half": len(data) // 2, "after": len(data)}[mode]])
                die()
            return original(descriptor, data)

        def hook(what: str, name: str) -> None:
            done, kind = what.endswith(" done"), what.removesuffix(" done")
            counts[1] += kind in UPLOADS and not done
            if kind in UPLOADS and counts[1] == upload and done == (mode == "after"):
                die()

        files._write, store.hook = dying, hook
        try:
            driver_of(value, again)
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)


def driver_of(value: Search, again: bool) -> RunFolder:
    """Begin a search, or go on with what is at its URL."""
    if not again:
        return start(value, using=far)
    return resume(URL, using=far)


def _elsewhere(monkeypatch: pytest.MonkeyPatch, machine: Path) -> RunFolder | None:
    """Go on with the search on a machine that has nothing of it; None if nothing had begun."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(machine))
    try:
        return driver_of(search(STORAGE, trials=TRIALS), again=True)
    except UserError as error:
        assert "is not a run folder" in str(error)
        return None


def _whole(data: bytes) -> bytes:
    return data[: data.rfind(b"\n") + 1]


CASES: dict[str, dict[str, Any]] = {"stopping": {}, "without stopping": {"scheduler": "none"}}


@pytest.mark.parametrize("name", CASES)
def test_killed_anywhere_and_gone_on_with_on_another_machine(
    name: str, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    value = search(STORAGE, trials=TRIALS, **CASES[name])
    writes, uploads = _moments(store, value, monkeypatch)
    assert uploads > 2 * OFTEN and writes > 20
    whole = RunFolder(value.folder)
    reference, undisturbed = alone(whole, far, tmp_path / "alone"), RunFolder(whole.path.rename(tmp_path / "s"))
    moments: list[dict[str, Any]] = [{"upload": at, "mode": mode} for at in range(1, uploads + 1) for mode in ("before", "after")]
    chance = random.Random(name)
    moments = chance.sample(moments, SOME) + [
        {"write": at, "mode": chance.choice(("before", "half", "after"))} for at in chance.sample(range(1, writes + 1), SOME // 2)
    ]
    counted = 0
    for number, moment in enumerate(moments):
        Objects.open(STORAGE).remove_all("s")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / f"{number}a"))
        value = search(STORAGE, trials=TRIALS, **CASES[name])
        assert _killed(store, value, **moment)
        up = parts.read(Objects.open(URL)).streams
        folder = _elsewhere(monkeypatch, tmp_path / f"{number}b")
        if folder is None:
            assert not any(up.values()), "before search.yaml there is nothing to lose"
            continue
        counted += bool(up["study.journal"])
        assert folder.journal.read_bytes().startswith(_whole(up["study.journal"])), "what was told there stays told, once"
        found = broken(folder, most=TRIALS, reference=reference, aside=tmp_path / "replayed", undisturbed=undisturbed)
        assert found == NONE, moment
        if CASES[name]:
            assert told(folder) == told(undisturbed) and front(folder) == front(undisturbed), moment
        at_url = parts.read(Objects.open(URL)).streams
        assert at_url == {path.name: path.read_bytes() for path in (folder.journal, folder.reports)}, "all is up in the end"
        kept = {int(Path(name).parts[4]) for name in store.names() if "/checkpoints/" in name}
        assert kept == {row[0] for row in front(folder)}, "and nothing more"
    assert counted > SOME // 2


def test_the_same_machine_loses_nothing_that_it_wrote(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What had not gone up is gone on from too, however often the driver is killed."""
    value = search(STORAGE, trials=TRIALS)
    writes, _ = _moments(store, value, monkeypatch)
    reference = alone(RunFolder(value.folder), far, tmp_path / "alone")
    for at in random.Random(0).sample(range(writes // 3, writes), 8):
        Objects.open(STORAGE).remove_all("s")
        assert _killed(store, value, write=at, mode="half")
        before = _whole(RunFolder(value.folder).journal.read_bytes())
        if len(parts.read(Objects.open(URL)).streams["study.journal"]) < len(before):
            _killed(store, value, upload=2, mode="before", again=True)  # search.yaml is up, and the tables are not
        folder = driver_of(value, again=True)
        assert folder.journal.read_bytes().startswith(before)
        assert broken(folder, most=TRIALS, reference=reference, aside=tmp_path / "replayed") == NONE, at


def test_from_machine_to_machine(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    value = search(STORAGE, trials=TRIALS, scheduler="none")
    assert _killed(store, value, write=25, mode="half")
    for machine, at in enumerate((6, 7, 5, 6)):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / f"machine {machine % 2 + 1}"))
        assert _killed(store, value, upload=at, mode="after", again=True)
    folder = driver_of(value, again=True)
    reference = alone(folder, far, tmp_path / "alone")
    assert broken(folder, most=TRIALS, reference=reference, aside=tmp_path / "replayed") == NONE
    assert len(trials(folder)) == TRIALS


def test_a_zombie_ends_with_a_line_and_changes_nothing(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its machine was cut off; meanwhile the search was gone on with elsewhere, to its end."""
    value, others = search(STORAGE, trials=TRIALS), list[RunFolder]()
    left = [3]

    def meanwhile(what: str, name: str) -> None:
        left[0] -= what == "put" and name.startswith("tables/")
        if not left[0] and not others:
            others.append(RunFolder(tmp_path))  # what follows is not to come here again
            folder = _elsewhere(monkeypatch, tmp_path / "elsewhere")
            assert folder is not None
            others[:] = [folder]
            monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "machine 0"))

    store.hook = meanwhile
    with pytest.raises(
        UserError, match=r"s3://bucket/runs/s is gone on with by another driver, generation 2: this one, of generation 1, ends"
    ):
        start(value, using=far)
    store.hook = lambda what, name: None
    (folder,) = others
    reference = alone(folder, far, tmp_path / "alone")
    assert broken(folder, most=TRIALS, reference=reference, aside=tmp_path / "replayed") == NONE
    at_url = parts.read(Objects.open(URL)).streams
    assert at_url == {path.name: path.read_bytes() for path in (folder.journal, folder.reports)}
    assert RunFolder.existing(URL).trials.read_bytes() == folder.trials.read_bytes()
    assert {int(name.split("/")[4]) for name in store.names() if "/checkpoints/" in name} >= {row[0] for row in front(folder)}
