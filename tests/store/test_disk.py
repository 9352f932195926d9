"""A full disk: whoever writes waits, says so once, and what is written in the end is what an empty disk would hold."""

import errno
import os
import re
from pathlib import Path
from typing import Any

import pytest
from test_kills import WRITES, drive, outcome

from distprune.store import files
from distprune.store.folder import RunFolder


class Full:
    """A disk that is full at the `at`-th write, `times` in a row, having taken a share of it."""

    def __init__(self, at: int, times: int = 3, share: float = 0.0, number: int = errno.ENOSPC) -> None:
        self.at, self.times, self.share, self.number = at, times, share, number
        self.count, self.waits, self.told = 0, 0, list[tuple[str, int]]()

    def write(self, descriptor: int, data: Any) -> int:
        if self.count == self.at and self.times:
            self.times -= 1
            if self.share:  # part of a record is on the disk: it must not stay there
                os.write(descriptor, bytes(data)[: max(1, int(len(data) * self.share))])
            raise OSError(self.number, os.strerror(self.number))
        self.count += 1
        return os.write(descriptor, data)

    def sleep(self, seconds: float) -> None:
        self.waits += 1

    def hear(self, path: Path, failed: int) -> None:
        self.told.append((path.name, failed))


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Any:
    def set_up(disk: Full) -> Full:
        monkeypatch.setattr(files, "_write", disk.write)
        monkeypatch.setattr(files, "_sleep", disk.sleep)
        return disk

    return set_up


def undated(folder: RunFolder) -> tuple[str, bytes, bytes]:
    """Journal without times of day, stream, table."""
    journal = re.sub(r"\d{4}-\d\d-\d\d[T ][\d:.+]+", "", folder.journal.read_text())
    return re.sub(r'"worker_id":"[^"]*"', "", journal), folder.reports.read_bytes(), folder.trials.read_bytes()


@pytest.mark.parametrize("share", [0.0, 0.5], ids=["before", "half"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_full_at_any_write_ends_with_the_same_bytes(tmp_path: Path, install: Any, share: float, number: int) -> None:
    undisturbed = RunFolder(tmp_path / "undisturbed").create()
    drive(undisturbed)
    for at in range(WRITES) if number == errno.ENOSPC else range(0, WRITES, 5):
        folder = RunFolder(tmp_path / str(at)).create()
        disk = install(Full(at, share=share, number=number))
        with files.telling(disk.hear):
            drive(folder)
        assert disk.waits == 3 and disk.times == 0
        assert [failed for _, failed in disk.told] == [1, 2, 3, 0] and len({name for name, _ in disk.told}) == 1
        assert undated(folder) == undated(undisturbed), f"full at write {at}"
        assert outcome(folder) == outcome(undisturbed)
        assert not [path for path in folder.path.iterdir() if path.name.startswith(".study") or path.name.startswith(".trials")]


def test_readers_see_no_part_of_a_record_while_it_waits_and_a_kill_then_tears_nothing(tmp_path: Path, install: Any) -> None:
    path = tmp_path / "x"
    files.append(path, b"first\n")
    disk = install(Full(0, share=0.5))

    def interrupted(seconds: float) -> None:
        assert path.read_bytes() == b"first\n"
        raise KeyboardInterrupt

    disk.sleep = interrupted  # type: ignore[method-assign]
    files._sleep = interrupted
    with pytest.raises(KeyboardInterrupt):
        files.append(path, b"second\n")
    assert path.read_bytes() == b"first\n"


def test_a_disk_that_is_found_full_when_data_is_made_durable(tmp_path: Path, install: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Network file systems say so late, and then nothing of the record is known to be there: it is written again."""
    install(Full(-1))
    left = [2]

    def sync(descriptor: int) -> None:
        if left[0]:
            left[0] -= 1
            raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(files, "_sync", sync)
    files.append(tmp_path / "x", b"record\n", sync=True)
    files.publish(tmp_path / "y", b"table\n")
    assert (tmp_path / "x").read_bytes() == b"record\n" and (tmp_path / "y").read_bytes() == b"table\n"
    assert {path.name for path in tmp_path.iterdir()} == {"x", "y"}


def test_other_errors_are_raised_at_once_and_leave_no_part(tmp_path: Path, install: Any) -> None:
    for work in (lambda: files.append(tmp_path / "x", b"record\n"), lambda: files.publish(tmp_path / "y", b"table\n")):
        disk = install(Full(0, share=0.5, number=errno.EIO))
        with pytest.raises(OSError, match=os.strerror(errno.EIO)):
            work()
        assert disk.waits == 0
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"x": b""}


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "full"), RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")]
)
def test_a_folder_is_there_whole_or_not_at_all(error: Exception, tmp_path: Path, install: Any) -> None:
    disk, target, tries = install(Full(-1)), tmp_path / "3" / "a1" / "7", [0]

    def fill(aside: Path) -> None:
        (aside / "state").write_bytes(b"half")
        tries[0] += 1
        if tries[0] < 4:
            raise error
        (aside / "state").write_bytes(b"whole")

    files.publish_folder(target, fill)
    assert tries == [4] and disk.waits == 3
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")] == ["3", "3/a1", "3/a1/7", "3/a1/7/state"]
    assert (target / "state").read_bytes() == b"whole"


def test_a_folder_that_cannot_be_made_leaves_nothing(tmp_path: Path) -> None:
    def fill(aside: Path) -> None:
        (aside / "state").write_bytes(b"half")
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        files.publish_folder(tmp_path / "7", fill)
    assert list(tmp_path.iterdir()) == []
