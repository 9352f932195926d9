"""The main test of the search room: a driver killed before, in the middle of and after every write loses nothing.

A forked child drives a whole search on made-up curves and dies at one write; the parent resumes. Laws 1, 2 and 3 of the search room:
every trial ends once under its number, reports are a gapless prefix of the undisturbed run, decisions are those of the stream.
"""

import os
import shutil
import signal
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from searches import STEPS, outcome, reports, resume, search, start, trials

from distprune.store import files

pytestmark = pytest.mark.usefixtures("no_finale")
TRIALS = 6


def _count_writes(value: Any, monkeypatch: pytest.MonkeyPatch) -> int:
    writes = [0]
    original = files._write

    def counting(descriptor: int, data: Any) -> int:
        writes[0] += 1
        return original(descriptor, data)

    monkeypatch.setattr(files, "_write", counting)
    start(value)
    monkeypatch.setattr(files, "_write", original)
    return writes[0]


def _killed_at(value: Any, at: int, mode: str, *, again: bool = False) -> bool:
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
            resume(value.folder) if again else start(value)
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)


def _check(folder: Any, undisturbed: dict[int, list[dict[str, Any]]]) -> None:
    ended = trials(folder)
    assert [trial.number for trial in ended] == list(range(TRIALS))
    assert all(trial.state.is_finished() for trial in ended)
    for number, rows in reports(folder).items():
        assert [row["index"] for row in rows] == list(range(len(rows))), "a gap"
        end, values = ended[number].user_attrs["end"], ended[number].values
        assert [row["objective"] for row in rows] == [row["objective"] for row in undisturbed[number]][: len(rows)]
        if end["ended"] == "finished":
            assert len(rows) == STEPS and rows[-1]["final"] and values == [rows[-1]["objective"], rows[-1]["kept"]]
    alone = optuna.load_study(study_name="s", storage=JournalStorage(JournalFileBackend(str(folder.journal))))
    assert len(alone.trials) == TRIALS and alone.best_trials


def test_killed_at_every_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    undisturbed = search(tmp_path / "whole", trials=TRIALS)
    writes = _count_writes(undisturbed, monkeypatch)
    expected = reports(start(search(tmp_path / "unstopped", trials=TRIALS, scheduler="none")))
    params = [row[3] for row in outcome(_folder(undisturbed))]
    assert writes > 30
    for at in range(1, writes + 1):
        for mode in ("before", "half", "after"):
            value = search(tmp_path / "killed", trials=TRIALS)
            assert _killed_at(value, at, mode)
            if not (value.folder / "search.yaml").exists():
                shutil.rmtree(tmp_path / "killed")
                assert at == 1, "only the first write comes before there is something to lose"
                continue
            folder = resume(value.folder)
            _check(folder, expected)
            assert [row[3] for row in outcome(folder)] == params, "a trial's parameters depend on seed and number alone"
            shutil.rmtree(tmp_path / "killed")


def test_killed_again_and_again(tmp_path: Path) -> None:
    whole = start(search(tmp_path / "whole", trials=TRIALS, scheduler="none"))
    value = search(tmp_path / "killed", trials=TRIALS)
    assert _killed_at(value, 12, "half")
    for at in (3, 5, 2, 7, 9, 4):
        assert _killed_at(value, at, "half", again=True)
    _check(resume(value.folder), reports(whole))


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


def _folder(value: Any) -> Any:
    from distprune.store.folder import RunFolder

    return RunFolder(value.folder)
