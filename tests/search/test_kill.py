"""The main test of the search room: a driver killed before, in the middle of and after every write loses nothing.

A forked child drives a whole search on made-up curves and dies at one write; the parent resumes, and the laws are counted from what lies
in the run folder. On one worker the order of events is given, so that all must be as if nothing had happened, whatever the sampler.
"""

import dataclasses
import functools
import itertools
import json
import math
import os
import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
from laws import COLUMNS, LAWS, NONE, alone, broken, front, replayed, told
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.storages.journal._storage import JournalOperation
from searches import STEPS, curve, outcome, reports, resume, search, start, trials
from toys import BASE

from distprune.search import driver
from distprune.search.config import Search
from distprune.search.finale import close_tables
from distprune.search.simulate import Curve
from distprune.search.trial import run_trial
from distprune.store import files
from distprune.store.folder import RunFolder
from distprune.store.reports import ReportWriter, read
from distprune.store.trials import read_trials, write_trials

TRIALS = 6
SOME = 8  # moments of all cases but the first
MODES = ("before", "half", "after")

TPE = {"name": "tpe", "startup": 2}
FEW = {"paradigm": ["at_init"], "criterion": ["magnitude", "random"], "allocator": ["erk"], "regularizer": ["none"], "sparsity": 0.9}

# (workers, changes of the search). On one worker all must be the same; with a random sampler and no stopping, on any number.
CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "stopping": (2, {}),
    "without stopping": (2, {"scheduler": "none"}),
    "one worker": (1, {"sampler": TPE}),
    "promoting": (2, {"sampler": TPE, "scheduler": {"name": "pareto_halving", "variant": "promote"}}),
    "promoting, one worker": (1, {"scheduler": {"name": "pareto_halving", "variant": "promote"}}),
    "one objective": (1, {"sampler": TPE, "scheduler": "halving", "minimize": []}),
    "finalists": (2, {"scheduler": "none", "finalists": {"count": 2, "seeds": 2}}),
    "duplicates": (2, {"scheduler": "none", "space": FEW}),
    "duplicates with new seeds": (2, {"scheduler": "none", "space": FEW, "duplicates": "new_seed"}),
}


@pytest.fixture(autouse=True)
def only_tables_in_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Made-up curves leave no networks to measure on the test split."""
    monkeypatch.setattr(driver, "finalize", close_tables)


@pytest.fixture(autouse=True)
def quick_and_the_same_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A space is tried out once; a kill, unlike a power cut, loses nothing that was written; reports are written at every fifth."""
    known: dict[str, Any] = {}
    original, ticks = driver.set_up, itertools.count()

    def set_up(value: Search, **given: Any) -> Any:
        key = json.dumps({**value.plain(), "name": "", "storage": ""})
        if key not in known:
            known[key] = original(value, **given)
        return dataclasses.replace(known[key], search=value)

    monkeypatch.setattr(driver, "set_up", set_up)
    monkeypatch.setattr(files, "_sync", lambda descriptor: None)
    monkeypatch.setattr(driver, "ReportWriter", functools.partial(ReportWriter, clock=lambda: 0.12 * next(ticks)))
    monkeypatch.setattr(driver, "TABLE_EVERY_S", math.inf)


def _count_writes(value: Search, workers: int, monkeypatch: pytest.MonkeyPatch, using: Curve = curve) -> int:
    """Run a search and say how often it wrote."""
    writes = [0]
    original = files._write

    def counting(descriptor: int, data: Any) -> int:
        writes[0] += 1
        return original(descriptor, data)

    monkeypatch.setattr(files, "_write", counting)
    start(value, workers=workers, using=using)
    monkeypatch.setattr(files, "_write", original)
    return writes[0]


def _killed_at(value: Search, at: int, mode: str, *, workers: int = 2, again: bool = False, using: Curve = curve) -> bool:
    """Whether a child was killed at that write; it may have had fewer."""
    child = os.fork()
    if child == 0:
        count, original = [0], files._write

        def dying(descriptor: int, data: Any) -> int:
            count[0] += 1
            if count[0] < at:
                return original(descriptor, data)
            if mode == "half":
                original(descriptor, bytes(data)[: len(data) // 2])
            if mode == "after":
                original(descriptor, data)
            os.kill(os.getpid(), signal.SIGKILL)
            raise AssertionError

        files._write = dying
        try:
            resume(value.folder, workers=workers, using=using) if again else start(value, workers=workers, using=using)
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)


def _work(folder: RunFolder) -> dict[int, list[list[Any]]]:
    return {number: [[row[name] for name in COLUMNS] for row in rows] for number, rows in reports(folder).items()}


@pytest.mark.parametrize("name", CASES)
def test_killed_at_every_write(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At each write of the first case, at a seeded few of the writes of the others."""
    workers, changes = CASES[name]
    undisturbed = search(tmp_path / "whole", trials=TRIALS, **changes)
    writes = _count_writes(undisturbed, workers, monkeypatch)
    assert writes > 20
    whole, drawn = RunFolder(undisturbed.folder), undisturbed.sampler.name == "random"
    most, reference = len(trials(whole)), alone(whole, curve, tmp_path / "alone")
    moments = [(at, mode) for at in range(1, writes + 1) for mode in MODES]
    if name != next(iter(CASES)):
        moments = sorted(random.Random(name).sample(moments, SOME))
    for at, mode in moments:
        value = search(tmp_path / "killed", trials=TRIALS, **changes)
        assert _killed_at(value, at, mode, workers=workers)
        if not (value.folder / "search.yaml").exists():
            assert at == 1, "only the first write comes before there is something to lose"
        else:
            folder = resume(value.folder, workers=workers)
            own = reference if drawn else alone(folder, curve, tmp_path / "alone")
            against = whole if drawn else None
            assert broken(folder, most=most, reference=own, aside=tmp_path / "replayed", undisturbed=against) == NONE, (at, mode)
            if workers == 1:
                assert told(folder) == told(whole) and _work(folder) == _work(whole) and front(folder) == front(whole), (at, mode)
            by_optuna = optuna.load_study(study_name="s", storage=JournalStorage(JournalFileBackend(str(folder.journal))))
            assert len(by_optuna.trials) == most and by_optuna.best_trials
        shutil.rmtree(tmp_path / "killed")


def test_killed_with_networks_and_a_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Real trials: what a dead driver's trials left in the cache and in their checkpoints leads to the same bits."""
    recipe = {**BASE, "train": {**BASE["train"], "length": "2ep"}}
    changes: dict[str, Any] = {"trials": 3, "recipe": recipe, "space": {"paradigm": ["finetune", "dense"], "regularizer": ["none"]}}
    undisturbed = search(tmp_path / "whole", **changes)
    writes = _count_writes(undisturbed, 1, monkeypatch, run_trial)
    whole = RunFolder(undisturbed.folder)
    reference = alone(whole, run_trial, tmp_path / "alone", cache=False)
    for at, mode in ((writes // 3, "half"), (writes // 2, "after"), (2 * writes // 3, "before")):
        value = search(tmp_path / "killed", **changes)
        assert _killed_at(value, at, mode, workers=1, using=run_trial)
        folder = resume(value.folder, workers=1, using=run_trial)
        assert broken(folder, most=3, reference=reference, aside=tmp_path / "replayed", undisturbed=whole) == NONE, (at, mode)
        assert told(folder) == told(whole) and front(folder) == front(whole), (at, mode)
        assert not list((tmp_path / "killed" / ".cache" / "leases").iterdir())
        shutil.rmtree(tmp_path / "killed")


def _rewrite(folder: RunFolder, change: Callable[[list[dict[str, Any]]], list[dict[str, Any]]]) -> None:
    rows = change(read(folder.reports).to_pylist())
    folder.reports.unlink()
    with ReportWriter(folder.reports) as writer:
        for row in rows:
            writer.add(row)


def _forget_an_end(folder: RunFolder) -> None:
    lines = folder.journal.read_text().splitlines(keepends=True)
    ends = [place for place, line in enumerate(lines) if json.loads(line)["op_code"] == JournalOperation.SET_TRIAL_STATE_VALUES]
    folder.journal.write_text("".join(lines[: ends[-1]]))


def _tell_twice(folder: RunFolder) -> None:
    lines = folder.journal.read_text().splitlines(keepends=True)
    folder.journal.write_text("".join([*lines, lines[-1]]))


def _lose_a_report(folder: RunFolder) -> None:
    _rewrite(folder, lambda rows: [row for row in rows if (row["trial"], row["index"]) != (0, 1)])


def _change_a_value(folder: RunFolder) -> None:
    _rewrite(folder, lambda rows: [{**row, "objective": 0.123} if (row["trial"], row["index"]) == (0, 1) else row for row in rows])


def _tell_another_value(folder: RunFolder) -> None:
    lines = [json.loads(line) for line in folder.journal.read_text().splitlines()]
    end = max(place for place, line in enumerate(lines) if line["op_code"] == JournalOperation.SET_TRIAL_STATE_VALUES)
    lines[end]["values"][1] += 1.0
    folder.journal.write_text("".join(json.dumps(line) + "\n" for line in lines))


def _draw_otherwise(folder: RunFolder) -> None:
    lines = [json.loads(line) for line in folder.journal.read_text().splitlines()]
    births = [line for line in lines if line["op_code"] == JournalOperation.CREATE_TRIAL]
    births[0]["params"], births[1]["params"] = births[1]["params"], births[0]["params"]
    births[0]["distributions"], births[1]["distributions"] = births[1]["distributions"], births[0]["distributions"]
    folder.journal.write_text("".join(json.dumps(line) + "\n" for line in lines))


def _empty_the_front(folder: RunFolder) -> None:
    write_trials(folder.trials, [{**row, "pareto": False} for row in read_trials(folder.trials).to_pylist()])


LOOK_ALIKES = {
    "lost": _forget_an_end,
    "doubled": _tell_twice,
    "gaps": _lose_a_report,
    "wrong": _change_a_value,
    "decisions": _tell_another_value,
    "parameters": _draw_otherwise,
    "results": _empty_the_front,
}


@pytest.mark.parametrize("law", LAWS)
def test_a_look_alike_breaks_the_law(law: str, tmp_path: Path) -> None:
    whole = start(search(tmp_path / "whole", trials=3, scheduler="none"))
    spoiled = start(search(tmp_path / "spoiled", trials=3, scheduler="none"))
    given: dict[str, Any] = {"most": 3, "reference": alone(whole, curve, tmp_path / "alone"), "undisturbed": whole}
    assert broken(spoiled, aside=tmp_path / "aside", **given) == NONE
    LOOK_ALIKES[law](spoiled)
    assert broken(spoiled, aside=tmp_path / "aside", **given)[law] > 0


def test_killed_again_and_again(tmp_path: Path) -> None:
    whole = start(search(tmp_path / "whole", trials=TRIALS, scheduler="none"))
    value = search(tmp_path / "killed", trials=TRIALS, scheduler="none")
    assert _killed_at(value, 12, "half")
    for at in (3, 5, 2, 7, 9, 4):
        assert _killed_at(value, at, "half", again=True)
    folder = resume(value.folder)
    reference = alone(whole, curve, tmp_path / "alone")
    assert broken(folder, most=TRIALS, reference=reference, aside=tmp_path / "replayed", undisturbed=whole) == NONE
    assert all(len(rows) == STEPS for rows in reports(folder).values())


def test_a_second_replay_changes_nothing(tmp_path: Path) -> None:
    folder = start(search(tmp_path, trials=TRIALS))
    once = replayed(folder, tmp_path / "once")
    journal, stream = once.journal.read_bytes(), once.reports.read_bytes()
    assert told(once) == told(folder) and {end for _, _, _, _, end, *_ in told(once)} == {"finished", "stopped"}
    resume(once.path)
    assert once.journal.read_bytes() == journal and once.reports.read_bytes() == stream


def test_a_second_resume_changes_nothing(tmp_path: Path) -> None:
    folder = start(search(tmp_path, trials=TRIALS))
    before, stream = outcome(folder), folder.reports.read_bytes()
    resume(folder.path)
    assert outcome(folder) == before and folder.reports.read_bytes() == stream


def test_extend_goes_on_where_it_ended(tmp_path: Path) -> None:
    short = start(search(tmp_path / "a", trials=4), workers=1)
    resume(short.path, workers=1, trials=TRIALS)
    long = start(search(tmp_path / "b", trials=TRIALS), workers=1)
    assert outcome(short) == outcome(long)
