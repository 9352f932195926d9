"""Shared work: a trial that is served from the cache ends with the same bits and the same reports, and runs less."""

import errno
import json
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from searches import checkpoints, reports, search, start
from toys import PARADIGMS, SETTINGS, recipe

from distprune.core import run as core_run
from distprune.core.prefix import shared_keys
from distprune.core.stages import Train
from distprune.core.state import State
from distprune.errors import UserError
from distprune.search import driver, sharing, trial
from distprune.search.config import Search
from distprune.search.entry import Assignment
from distprune.search.sharing import Sharing
from distprune.search.trial import Job, run_trial
from distprune.store.cache import Cache
from distprune.store.folder import RunFolder
from distprune.store.lease import Lease, Watch
from distprune.store.trials import read_trials

EPOCH = 320
TRAINING = 4 * EPOCH
PROJECTION = 3 * 32 + 5 * 32  # recovery and calibration of a rung's score


@pytest.fixture(autouse=True)
def nothing_is_known_of_paces(elsewhere: None) -> Iterator[None]:
    sharing._PACES.clear()
    yield
    sharing._PACES.clear()


def _job(folder: Path, paradigm: Any = "dense", sparsity: float | None = None, *, cache: Path | None = None, **changes: Any) -> Job:
    job = {name: changes.pop(name) for name in ("rungs", "report_every", "number") if name in changes}
    fixed = {"number": 0, "rungs": [2 * EPOCH, 6 * EPOCH], "report_every": "1ep", "recovery": "3it", "known": 0, "threads": 1}
    where = {"folder": str(folder), "device": "cpu", "working_dir": os.getcwd(), "cache": cache and str(cache)}
    return Job(recipe=recipe(paradigm, sparsity, **changes).plain(), **{**fixed, **where, **job})


def _run(job: Job) -> list[dict[str, Any]]:
    rows = list(run_trial(job))
    assert rows[-1]["ended"] == "finished", rows[-1]
    return rows


def _plain(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """All that must not depend on a cache: everything but who ran it, when, and how much of it."""
    found = []
    for row in rows:
        extra = {name: value for name, value in json.loads(row["extra"]).items() if name not in ("saved", "checkpoint", "pid")}
        found.append({name: value for name, value in row.items() if name not in ("attempt", "wall_s", "spent", "extra", "crc")} | extra)
    return found


def _bits(job: Job) -> dict[str, torch.Tensor]:
    """The tensors of its last checkpoint, but for snapshots: those that nobody reads any more are not loaded."""
    found = load_file(checkpoints(Path(job.folder), job.number)[0] / "state.safetensors")
    return {name: tensor for name, tensor in found.items() if not name.startswith("snapshots/")}


def _same_end(a: Job, b: Job) -> bool:
    x, y = _bits(a), _bits(b)
    return x.keys() == y.keys() and all(torch.equal(value, y[name]) for name, value in x.items())


def _stages_of(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def _other_target(paradigm: str) -> float | None:
    sparsity = SETTINGS.get(paradigm, {}).get("sparsity", 0.9)
    return sparsity * 0.9 if sparsity else None


@pytest.mark.parametrize("paradigm", PARADIGMS)
def test_served_by_another_target_and_by_itself(paradigm: str, tmp_path: Path) -> None:
    """The first fills the cache at another target, the second takes what is the same, the third finds all of it."""
    changes: dict[str, Any] = {"regularizer": "l2", "train": {"length": "2ep"}, "rungs": [EPOCH, 3 * EPOCH]}
    alone, cache = _job(tmp_path / "alone", paradigm, **changes), tmp_path / "cache"
    expected = _run(alone)
    _run(_job(tmp_path / "first", paradigm, _other_target(paradigm), cache=cache, **changes))
    for name in ("second", "third"):
        served = _job(tmp_path / name, paradigm, cache=cache, **changes)
        rows = _run(served)
        assert _plain(rows) == _plain(expected) and _same_end(alone, served)
    plan = recipe(paradigm, regularizer="l2", train=changes["train"]).plan(10)
    assert rows[-1]["spent"] < expected[-1]["spent"]
    if not any(isinstance(stage, Train) and stage.may_end_early for stage in plan.stages):
        observed = json.loads(rows[-1]["extra"])["ledger"]["observing"]
        assert rows[-1]["spent"] - observed < 3 * EPOCH, "its scores, and before each rung and the end what is too short to be kept"
    assert list((cache / "leases").iterdir()) == []


@pytest.mark.parametrize("paradigm", ["finetune", "lth", "scratch", "posterior", "movement", "slimming", "fusion", "greg"])
def test_served_by_another_plan(paradigm: str, tmp_path: Path) -> None:
    """The dense training is a prefix of all that prune after it, with the same network and regularizer."""
    settings = {name: value for name, value in SETTINGS.get(paradigm, {}).items() if name == "model"}
    alone, cache = _job(tmp_path / "alone", paradigm), tmp_path / "cache"
    expected = _run(alone)
    dense = _run(_job(tmp_path / "dense", "dense", cache=cache, **settings))
    shares = paradigm != "slimming"  # trains under a penalty of its own
    assert dense[-1]["cost"] == TRAINING
    served = _job(tmp_path / "served", paradigm, cache=cache)
    rows = _run(served)
    assert _plain(rows) == _plain(expected) and _same_end(alone, served)
    # A rewind to a step needs the weights of that step, which a dense training does not keep: those steps are run again.
    again = 4 * 32 if paradigm == "lth" else 0
    assert expected[-1]["spent"] - rows[-1]["spent"] == (TRAINING - again if shares else 0)


def test_rounds_of_lth_are_run_once_as_the_keys_say(tmp_path: Path) -> None:
    cache, paradigm = tmp_path / "cache", {"name": "lth", "share": 0.5, "rewind_to": "10%"}
    common: dict[str, Any] = {"device": "cpu", "threads": 1, "report_every": "1ep", "rungs": [2 * EPOCH, 6 * EPOCH]}
    keys = [[key for key, _ in shared_keys(recipe(paradigm, sparsity), 10, **common)] for sparsity in (0.9, 0.8)]
    rounds = (TRAINING - 4 * 32) * 2
    assert len(set(keys[0]) & set(keys[1])) > 3
    first = _run(_job(tmp_path / "a", paradigm, 0.9, cache=cache))
    alone = _run(_job(tmp_path / "alone", paradigm, 0.8))
    second = _run(_job(tmp_path / "b", paradigm, 0.8, cache=cache))
    assert alone[-1]["spent"] - second[-1]["spent"] == TRAINING + rounds, "the dense training, and the rounds at 0.5 and 0.75"
    assert second[-1]["cost"] == alone[-1]["cost"] and first[-1]["spent"] > second[-1]["spent"], "hits bill in full"
    assert Cache.open(cache).have(set(keys[0]) | set(keys[1])) == set(keys[0]) | set(keys[1]), "what is kept is what was said beforehand"


@pytest.mark.parametrize(
    "changes",
    [
        {"train": {"optimizer": {"name": "sgd", "lr": 0.06}}},
        {"train": {"batch_size": 31}},
        {"train": {"decay": "constant"}},
        {"regularizer": "l2"},
        {"seed": 1},
        {"model": {"import": "toys:network", "hidden": 33}},
        {"data": {"import": "toys:blobs", "train": 352}},
        {"include": ["6.*", "8.*"]},
        {"precision": "bf16"},
        {"report_every": "5it"},
    ],
    ids=lambda changes: min(changes),
)
def test_whatever_the_bits_depend_on_misses(changes: dict[str, Any], tmp_path: Path) -> None:
    short: dict[str, Any] = {"length": "1ep"}
    _run(_job(tmp_path / "a", cache=tmp_path / "c", train=short, rungs=[]))
    before = _stages_of(tmp_path / "c")
    rows = _run(_job(tmp_path / "b", cache=tmp_path / "c", rungs=[], **{**changes, "train": {**short, **changes.get("train", {})}}))
    assert rows[-1]["spent"] == rows[-1]["cost"] and len(_stages_of(tmp_path / "c")) > len(before) == 1


def test_other_threads_and_another_torch_miss(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _run(_job(tmp_path / "a", cache=tmp_path / "c", rungs=[]))
    assert _run(replace(_job(tmp_path / "b", cache=tmp_path / "c", rungs=[]), threads=2))[-1]["spent"] == TRAINING
    monkeypatch.setattr(torch, "__version__", "9.9.9")
    assert _run(_job(tmp_path / "d", cache=tmp_path / "c", rungs=[]))[-1]["spent"] == TRAINING


def test_lth_rewound_to_0_and_to_a_step_do_not_meet(tmp_path: Path) -> None:
    for step in ("0%", "10%", "0%"):
        paradigm = {"name": "lth", "share": 0.7, "rewind_to": step}
        alone, served = (
            _job(tmp_path / f"{name}{time.monotonic_ns()}", paradigm, cache=c) for name, c in (("a", None), ("s", tmp_path / "c"))
        )
        assert _plain(_run(served)) == _plain(_run(alone)) and _same_end(alone, served)


@pytest.mark.parametrize("stop", [1, 3, 6, 9, 12])
def test_a_served_trial_that_is_cut_goes_on(stop: int, tmp_path: Path) -> None:
    paradigm, cache = {"name": "lth", "share": 0.6, "rewind_to": "10%"}, tmp_path / "cache"
    whole = _run(_job(tmp_path / "whole", paradigm, 0.8, cache=cache))
    work = run_trial(_job(tmp_path / "cut", paradigm, 0.8, cache=cache))
    heard = [next(work) for _ in range(stop)]
    work.close()
    for name in ("rung", "cost", "spent"):
        assert all(row[name] is not None for row in heard)
    for checkpoint in checkpoints(tmp_path / "cut", 0):
        outbox = State.facts(checkpoint / "state.safetensors")["outbox"]
        assert outbox[-1]["index"] == int(checkpoint.name) < stop, "never ahead of its reports"
    again = list(run_trial(replace(_job(tmp_path / "cut", paradigm, 0.8, cache=cache), known=stop)))
    assert _plain(heard + [row for row in again if row["index"] >= stop]) == _plain(whole)


@pytest.mark.parametrize("damage", ["torn", "flipped", "gone", "foreign"])
def test_a_damaged_stage_is_a_miss_and_is_made_again(damage: str, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    first = _run(_job(tmp_path / "a", cache=cache))
    for path in _stages_of(cache):
        data = path.read_bytes()
        if damage == "foreign":  # whole as a file, and not the state that its name says
            key = path.name[:64]
            Cache.open(cache).discard(key)
            foreign = data.replace(b"key", b"kez")
            Cache.open(cache).publish(key, lambda path, foreign=foreign: path.write_bytes(foreign) and None)
        else:
            path.write_bytes({"torn": data[:-9], "flipped": data[:-1] + bytes([data[-1] ^ 1]), "gone": b""}[damage])
            if damage == "gone":
                path.unlink()
    again = _run(_job(tmp_path / "b", cache=cache))
    assert _plain(again) == _plain(first) and again[-1]["spent"] == first[-1]["spent"], "nothing was served"
    assert _run(_job(tmp_path / "c", cache=cache))[-1]["spent"] == PROJECTION, "and all is there again"


def test_a_cache_that_cannot_be_written_costs_nothing_but_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fails(*args: Any) -> None:
        raise OSError("no space left on device")

    alone = _run(_job(tmp_path / "a"))
    for name in ("publish", "have"):
        with monkeypatch.context() as patch:
            patch.setattr(Cache, name, fails)
            assert _plain(_run(_job(tmp_path / name, cache=tmp_path / "c"))) == _plain(alone)
    assert _plain(_run(_job(tmp_path / "d", cache=Path("/dev/null/x")))) == _plain(alone)


def test_a_trial_in_parts_of_batches_neither_takes_nor_gives(tmp_path: Path) -> None:
    run = trial.prepare(recipe("dense"))
    job = _job(tmp_path, cache=tmp_path / "c")
    assert trial._sharing(job, run, trial.Memory()) is not None
    assert trial._sharing(job, run, trial.Memory(micro_batch=16, retries=1)) is None, "its bits are its own"


def test_another_processor_misses(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its bits are others: what it needs is neither served by the first one's states nor kept under their keys."""
    here = _run(_job(tmp_path / "a", cache=tmp_path / "c", rungs=[]))
    common: dict[str, Any] = {"device": "cpu", "threads": 1, "report_every": "1ep"}
    keys = [shared_keys(recipe("dense"), 10, **common)]
    monkeypatch.setattr(core_run, "_processor", lambda: "another one")
    keys.append(shared_keys(recipe("dense"), 10, **common))
    assert not {key for key, _ in keys[0]} & {key for key, _ in keys[1]}
    assert _run(_job(tmp_path / "b", cache=tmp_path / "c", rungs=[]))[-1]["spent"] == here[-1]["spent"] == TRAINING
    assert Cache.open(tmp_path / "c").have(key for both in keys for key, _ in both) == {key for both in keys for key, _ in both}


def test_a_processor_is_known_by_its_model() -> None:
    """Not by its family alone, where Linux says more."""
    found = core_run._processor()
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    models = {line.partition(":")[2].strip() for line in lines if line.startswith(("model name", "CPU part"))}
    assert found and all(model in found for model in models)


# One producer.


@contextmanager
def _producer(job: Job, until: int) -> Iterator[int]:
    """A process that has sent `until` reports of a trial and then sleeps, holding what it holds."""
    inbox, outbox = os.pipe()
    child = os.fork()
    if child == 0:
        work = run_trial(job)
        for _ in range(until):
            next(work)
        os.write(outbox, b"!")
        while True:
            signal.pause()
    try:
        assert os.read(inbox, 1) == b"!"
        yield child
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(inbox), os.close(outbox)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_killed_or_frozen_producer_is_succeeded(how: signal.Signals, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sharing, "STALE_S", 0.5)
    cache = tmp_path / "cache"
    alone = _run(_job(tmp_path / "alone"))
    with _producer(_job(tmp_path / "a", cache=cache), 1) as child:
        assert len(list((cache / "leases").iterdir())) == 1, "it makes what comes next"
        os.kill(child, how)
        rows = _run(_job(tmp_path / "b", cache=cache))
        assert _plain(rows) == _plain(alone) and rows[-1]["spent"] == TRAINING + PROJECTION
        assert list((cache / "leases").iterdir()) == []


def test_many_at_once_agree_whoever_dies(tmp_path: Path) -> None:
    """Five trials with one dense training: one is killed and one is frozen while they run; the rest end as they would alone."""
    cache, children = tmp_path / "cache", []
    alone = _run(_job(tmp_path / "alone", "finetune"))
    for number in range(5):
        child = os.fork()
        children.append(child)
        if child == 0:
            sharing.STALE_S = 1.0
            done = _plain(list(run_trial(_job(tmp_path / str(number), "finetune", cache=cache)))) == _plain(alone)
            os._exit(0 if done else 1)
    while not list((cache / "leases").glob("*")) and not _stages_of(cache):
        time.sleep(0.005)
    os.kill(children[0], signal.SIGKILL)
    os.kill(children[1], signal.SIGSTOP)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children[2:]] == [0, 0, 0]
    for child in children[:2]:
        try:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        except ProcessLookupError:
            pass
    rows = _run(_job(tmp_path / "late", "finetune", cache=cache))
    assert _plain(rows) == _plain(alone) and rows[-1]["spent"] in (PROJECTION, 2 * PROJECTION)
    left = [path for path in (cache / "leases").iterdir() if not path.name.startswith(".")]  # taken for what was just published
    assert [Watch(path).look() for path in left] == [None] * len(left), "nobody waits for the dead"


class Seconds:
    """A clock that moves when it is slept by."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.mark.parametrize(("pace", "own", "waits"), [(None, None, sharing.UNKNOWN_S), (0.01, None, 6.4), (0.01, 0.002, 1.28)])
def test_a_waiter_waits_as_long_as_producing_would_take(pace: float | None, own: float | None, waits: float, tmp_path: Path) -> None:
    """Two epochs to the first rung, at the pace that it has itself, or else at the producer's."""
    run, clock = trial.prepare(recipe("dense"), report_every="1ep"), Seconds()
    shared = Sharing(Cache.open(tmp_path), run, [2 * EPOCH], clock=clock, sleep=clock.sleep)
    path = Cache.open(tmp_path).lease(shared_keys(run.recipe, 10, device="cpu", threads=1, report_every="1ep", rungs=[2 * EPOCH])[0][0])
    assert path is not None
    if own is not None:
        sharing._PACES[shared._root] = own
    holder = Lease.take(path, beat_every=None)
    assert holder is not None
    holder.note = {"pace": pace} if pace else {}

    def beat(seconds: float) -> None:
        clock.sleep(seconds)
        content = json.loads(path.read_bytes())
        path.write_text(json.dumps({**content, "beat": clock.now, "process": "another"}))

    shared._sleep = beat
    holder.beat()
    path.write_text(json.dumps({**json.loads(path.read_bytes()), "process": "another"}))
    assert shared._take(0, 2 * EPOCH) is None and waits <= clock.now <= waits + 2 * sharing._POLL_S
    assert shared._lease is None and path.exists(), "it produces without the lease"


def _waiting(tmp_path: Path, **changes: Any) -> tuple[Sharing, Seconds, Path]:
    """A trial that would wait for another process, its clock, and the other's lease."""
    run, clock = trial.prepare(recipe("dense"), report_every="1ep"), Seconds()
    shared = Sharing(Cache.open(tmp_path), run, [2 * EPOCH], clock=clock, sleep=clock.sleep, **changes)
    path = Cache.open(tmp_path).lease(shared_keys(run.recipe, 10, device="cpu", threads=1, report_every="1ep", rungs=[2 * EPOCH])[0][0])
    assert path is not None
    return shared, clock, path


@pytest.mark.parametrize(("silence", "waits"), [(None, sharing.UNKNOWN_S), (1000.0, sharing.UNKNOWN_S), (40.0, 10.0)])
def test_a_waiter_is_silent_for_a_quarter_of_what_is_taken_for_death(silence: float | None, waits: float, tmp_path: Path) -> None:
    """Between two reports, however often it waits; after a report it may wait again."""
    shared, clock, path = _waiting(tmp_path, silence=silence)

    def beat(seconds: float) -> None:
        clock.sleep(seconds)
        path.write_text(json.dumps({"process": "another", "beat": clock.now}))

    shared._sleep = beat
    beat(0)
    assert shared._take(0, 2 * EPOCH) is None and waits <= clock.now <= waits + 2 * sharing._POLL_S
    before = clock.now
    if silence == 40.0:
        assert shared._take(0, 2 * EPOCH) is None and clock.now == before, "nothing was said since"
        shared._heard = clock.now
        assert shared._take(0, 2 * EPOCH) is None and clock.now >= before + waits


def test_a_worker_is_told_how_long_it_may_wait_and_whether_it_may_give(tmp_path: Path) -> None:
    value, run = search(tmp_path, limits={"trials": 1, "silence": 40}), trial.prepare(recipe("dense"))
    job = driver.job_of(value, RunFolder(tmp_path), [], Assignment(0, run.recipe, 0))
    shared = trial._sharing(job, run, trial.Memory())
    assert shared is not None and shared._most_wait == 10
    for room, keeps in ((0, False), (10**9, True)):
        _run(replace(_job(tmp_path / str(room), cache=tmp_path / "c", rungs=[]), cache_room=room))
        assert bool(_stages_of(tmp_path / "c")) == keeps


@pytest.mark.parametrize("number", [errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK])
def test_where_there_are_no_links_everybody_computes_at_once(number: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refused(source: Any, target: Any) -> None:
        raise OSError(number, os.strerror(number))

    alone = _run(_job(tmp_path / "alone"))
    monkeypatch.setattr(os, "link", refused)
    shared, clock, path = _waiting(tmp_path / "c")
    assert shared._take(0, 2 * EPOCH) is None and clock.now == 0.0 and not path.exists()
    rows = _run(_job(tmp_path / "a", cache=tmp_path / "c"))
    assert _plain(rows) == _plain(alone) and rows[-1]["spent"] == TRAINING + PROJECTION
    assert _run(_job(tmp_path / "b", cache=tmp_path / "c"))[-1]["spent"] == PROJECTION, "states are shared all the same"


def test_where_links_are_not_what_a_server_says_nobody_waits_for_ever(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(os, "link", lambda source, target: None)
    shared, clock, _ = _waiting(tmp_path)
    assert shared._take(0, 2 * EPOCH) is None and sharing.UNKNOWN_S <= clock.now <= sharing.UNKNOWN_S + 2 * sharing._POLL_S


def test_nobody_waits_for_itself(tmp_path: Path) -> None:
    """Simulated workers live in one process: the holder would never come to run."""
    cache = tmp_path / "cache"
    work = run_trial(_job(tmp_path / "a", cache=cache))
    next(work)
    rows = _run(_job(tmp_path / "b", cache=cache))
    assert rows[-1]["spent"] == TRAINING + PROJECTION
    work.close()
    assert list((cache / "leases").iterdir()) == []


# Searches.


def test_a_search_with_a_cache_decides_as_one_without_and_a_second_runs_next_to_nothing(tmp_path: Path) -> None:
    space = {"paradigm": ["dense", "finetune"], "criterion": ["magnitude"], "allocator": ["erk"], "regularizer": ["none"]}
    space |= {"granularity": ["weight"], "sparsity": [0.5, 0.8]}
    common: dict[str, Any] = {"trials": 4, "space": space, "scheduler": "none"}
    without = reports(start(search(tmp_path / "a", cache=False, **common), using=run_trial))
    first = reports(start(search(tmp_path / "b", **common), using=run_trial))
    second = reports(start(search(tmp_path / "b", name="t", **common), using=run_trial))
    assert {number: _plain(rows) for number, rows in first.items()} == {number: _plain(rows) for number, rows in without.items()}
    assert {number: _plain(rows) for number, rows in second.items()} == {number: _plain(rows) for number, rows in without.items()}
    spent = [sum(rows[-1]["spent"] for rows in found.values()) for found in (without, first, second)]
    assert spent[0] > spent[1] > spent[2] == 0, "no rungs, so nothing is observed"
    assert not (tmp_path / "a" / ".cache").exists()


def test_what_is_saved_is_what_was_billed_and_not_run(tmp_path: Path) -> None:
    """Samples, not bytes: without rungs nothing is observed, so that the difference of bill and work is what the cache has served."""
    space = {"paradigm": [{"name": "lth", "share": 0.7, "rewind_to": "0ep"}], "criterion": ["magnitude"], "allocator": ["erk"]}
    space |= {"regularizer": ["none"], "sparsity": [0.7, 0.9, 0.95]}
    folder = start(search(tmp_path, trials=3, scheduler="none", space=space), using=run_trial, workers=1)
    rows = read_trials(folder.trials).to_pylist()
    assert [row["saved"] for row in rows] == [row["cost"] - row["spent"] for row in rows]
    assert rows[0]["saved"] == 0 and rows[1]["saved"] >= TRAINING <= rows[2]["saved"]
    for found in reports(folder).values():
        extras = [json.loads(row["extra"]) for row in found]
        assert [extra.get("saved", 0) for extra in extras] == sorted(extra.get("saved", 0) for extra in extras)
        written = [extra["checkpoint"] for extra in extras if "checkpoint" in extra]
        assert len(written) == 1 and written[0] > 10 * TRAINING, "bytes of the only checkpoint, that of the end"


@pytest.mark.parametrize(
    ("value", "path", "size"),
    [
        (True, "{storage}/.cache", 20 * 10**9),
        ({"size": "500MB"}, "{storage}/.cache", 500 * 10**6),
        ({"path": "/shared/c", "size": 1000}, "/shared/c", 1000),
        ({"path": "s3://bucket/c"}, "s3://bucket/c", 20 * 10**9),
        (False, None, None),
    ],
)
def test_where_a_search_keeps_it(value: Any, path: str | None, size: int | None, tmp_path: Path) -> None:
    found = search(tmp_path, cache=value)
    for one in (found, Search.load(found.plain())):
        assert one.cache_at == (path and path.format(storage=tmp_path)) and (one.cache and one.cache.size) == size


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("yes", "search.cache must be true, false or a mapping, got 'yes'. Write search.cache: {path: /shared/cache, size: 20GB}."),
        ({"size": "big"}, "search.cache.size must be a size in bytes, got 'big'. Write 20GB or 500MB."),
        ({"size": 0}, "search.cache.size must be above 0, got 0. Write 20GB, or search.cache: false for no cache."),
        ({"path": ""}, "search.cache.path must be a folder or a URL, got ''. Leave it out for one in the storage."),
        ({"pth": "x"}, "unknown key in search.cache: 'pth'"),
    ],
)
def test_what_makes_no_sense_is_said_in_a_line(value: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        search(tmp_path, cache=value)
    assert message.lower() in str(caught.value).lower() and "\n" not in str(caught.value)


def test_a_cache_that_cannot_be_used_is_said_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cache.path '/dev/null/c' cannot be used"):
        start(search(tmp_path / "runs", cache={"path": "/dev/null/c"}))
    assert not (tmp_path / "runs").exists()
