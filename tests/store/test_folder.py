"""Laws of the run folder: one driver, whole files, and no way out of it."""

import os
from pathlib import Path

import pytest

from distprune.errors import UserError
from distprune.store import files
from distprune.store.folder import RunFolder
from distprune.store.trials import SCHEMA, read_trials, write_trials


def begun(path: Path) -> RunFolder:
    folder = RunFolder(path).create()
    files.publish(folder.search_yaml, b"search: {}\n")
    return folder


def test_a_begun_run_is_resumed_not_overwritten(tmp_path: Path) -> None:
    folder = begun(tmp_path / "x")
    with pytest.raises(UserError, match=r"exists already\. Go on with it: distprune resume .*x; or choose another name"):
        RunFolder(tmp_path / "x").create()
    assert RunFolder.existing(tmp_path / "x") == folder


def test_a_folder_without_a_search_is_not_called_resumable(tmp_path: Path) -> None:
    RunFolder(tmp_path / "x").create()  # and killed before search.yaml
    with pytest.raises(UserError, match=r"holds no search\. Remove it, or choose another name"):
        RunFolder(tmp_path / "x").check_new()


def test_what_is_no_run_folder_is_refused_with_those_that_are(tmp_path: Path) -> None:
    begun(tmp_path / "digits")
    with pytest.raises(UserError, match=r"digts is not a run folder: it has no search\.yaml\. There are: .*digits\."):
        RunFolder.existing(tmp_path / "digts")


def test_every_path_lies_in_the_folder(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "x")
    found = [getattr(folder, name) for name, value in vars(RunFolder).items() if isinstance(value, property)]
    plain = [path for path in found if isinstance(path, Path)]
    assert len(plain) > 8
    for path in [*plain, folder.masks_file(3), folder.checkpoint(3, "a1b2", 7)]:
        assert folder.path in path.resolve().parents
    assert folder.checkpoint(3, "a1b2", 7).relative_to(folder.path) == Path("checkpoints/3/a1b2/7")


@pytest.mark.parametrize("attempt", ["", ".", "..", "../..", "a/b", "/tmp", "a\0b"])
def test_an_attempt_cannot_leave_the_folder(tmp_path: Path, attempt: str) -> None:
    with pytest.raises(ValueError, match="letters and digits"):
        RunFolder(tmp_path).checkpoint(0, attempt, 0)


def test_a_trial_is_a_number(tmp_path: Path) -> None:
    with pytest.raises(ValueError):
        RunFolder(tmp_path).masks_file("../x")  # type: ignore[arg-type]


def test_a_second_driver_is_refused(tmp_path: Path) -> None:
    with files.lock(tmp_path), pytest.raises(UserError, match=f"in use by process {os.getpid()}") as error, files.lock(tmp_path):
        pass
    assert "\n" not in str(error.value)
    with files.lock(tmp_path):
        pass


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_dead_driver_holds_no_lock(tmp_path: Path) -> None:
    if (child := os.fork()) == 0:
        held = files.lock(tmp_path)
        held.__enter__()
        os._exit(0)
    os.waitpid(child, 0)
    with files.lock(tmp_path):
        pass


def test_a_write_cut_short_by_the_system_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_write", lambda descriptor, data: os.write(descriptor, data[:3]))
    files.append(tmp_path / "a", b"0123456789")
    files.append(tmp_path / "a", b"ab")
    files.publish(tmp_path / "b", b"0123456789")
    assert (tmp_path / "a").read_bytes() == b"0123456789ab"
    assert (tmp_path / "b").read_bytes() == b"0123456789"


def test_a_failed_publication_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int, data: bytes) -> int:
        raise OSError("no space left on device")

    files.publish(tmp_path / "a", b"old")
    monkeypatch.setattr(files, "_write", full)
    with pytest.raises(OSError, match="no space"):
        files.publish(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_bytes() == b"old"


def test_the_trials_table_is_replaced_whole(tmp_path: Path) -> None:
    path = RunFolder(tmp_path).trials
    write_trials(path, [{"number": 0, "ended": "running"}, {"number": 1}])
    write_trials(path, [{"number": 0, "ended": "finished", "objective": 0.9, "kept": 100, "pareto": True}])
    table = read_trials(path)
    assert table.schema.equals(SCHEMA)
    (row,) = table.to_pylist()
    assert (row["number"], row["ended"], row["objective"], row["test"]) == (0, "finished", 0.9, None)
