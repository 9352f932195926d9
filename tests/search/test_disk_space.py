"""A disk that fills up: what limits are, what is removed first, and what is never."""

import itertools
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from books import book_of
from disks import Held, checkpoint_of, on_disk
from searches import outcome, resume, search, start
from toys import BASE

from distprune.errors import UserError
from distprune.search.config import Limits, Search
from distprune.search.disk import Disk
from distprune.search.entry import Entry
from distprune.search.finale import load_trial
from distprune.search.retention import Retention
from distprune.search.trial import Job, run_trial
from distprune.search.volume import contributions, hypervolume
from distprune.store.folder import RunFolder
from distprune.store.trials import read_trials

pytestmark = pytest.mark.usefixtures("elsewhere")


@pytest.mark.parametrize(("value", "size"), [("20GB", 20 * 10**9), ("1.5 MB", 1_500_000), (7, 7), ("900", 900), ("2e3KB", 2_000_000)])
def test_sizes_are_read(value: Any, size: int) -> None:
    assert Limits.read({"disk": value, "free": value}, "limits") == Limits(disk=size, free=size)


@pytest.mark.parametrize("value", ["many", "20 XB", "GB", "1.2.3GB", -1, 0])
def test_sizes_that_are_none_are_refused(value: Any) -> None:
    with pytest.raises(UserError, match=r"limits\.disk must be"):
        Limits.read({"disk": value}, "limits")


def test_limits_survive_writing(tmp_path: Path) -> None:
    value = search(tmp_path, limits={"trials": 3, "disk": "2GB", "free": "1MB", "silence": 60, "trial_wall": 3600})
    assert Search.read(value.plain()) == value


def test_no_trial_is_begun_on_a_full_disk_and_it_is_said_once(tmp_path: Path) -> None:
    said: list[str] = []
    held, free = Held(), [5 * 10**9]
    disk = Disk(RunFolder(tmp_path), 10**9, held, lambda event, facts: said.append(facts["message"]), free=lambda folder: free[0])  # type: ignore[arg-type]
    assert disk.holds() == "" and said == []
    free[0] = 10**8
    assert disk.holds() == disk.holds() == "full" and len(said) == 1 and "100 MB are free" in said[0] and "limits.free: 1 GB" in said[0]
    free[0] = 10**9
    assert disk.holds() == disk.holds() == "" and said[1:] == ["There is room on the disk again."]
    held.crowded = True
    assert disk.holds() == "crowded" and "5 GB of checkpoints" in said[2]


def test_hypervolume_by_hand_and_by_counting_cells() -> None:
    assert hypervolume([(2, 1), (1, 3)], (0, 0)) == 2 + 3 - 1 and hypervolume([(3, -1)], (0, 0)) == 0
    draw = random.Random(0)
    for objectives in (1, 2, 3):
        points = [tuple(draw.randint(1, 5) for _ in range(objectives)) for _ in range(6)]
        cells = itertools.product(range(5), repeat=objectives)
        inside = sum(any(all(c < v for c, v in zip(cell, point, strict=True)) for point in points) for cell in cells)
        assert hypervolume(points, (0,) * objectives) == inside


def test_what_adds_least_to_a_front() -> None:
    worth = contributions({4: (0.9, -1000.0), 5: (0.89, -990.0), 6: (0.5, -100.0), 7: (0.7, -500.0)})
    assert min(worth, key=lambda n: worth[n]) == 5, "beside a better one"
    assert contributions({1: (0.5, -3.0)})[1] > 0 and contributions({}) == {}


@pytest.fixture
def masks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of the trials whose masks were written, in order."""
    written: list[int] = []
    monkeypatch.setattr("distprune.search.retention.write_masks", lambda folder, entry: written.append(entry.number))
    return written


def test_what_is_needed_least_goes_first_and_no_more_than_must(tmp_path: Path, masks: list[int]) -> None:
    folder, book, said = RunFolder(tmp_path / "x").create(), book_of(tmp_path, entries=5), list[str]()
    retention = Retention(folder, book, limit=700, listen=lambda event, facts: said.append(facts["message"]))
    for number, vector in ((0, (0.9, -1000.0)), (1, (0.89, -990.0)), (2, (0.5, -100.0))):
        retention.heard(checkpoint_of(folder, number, "a", 9))
        book.front[number], book.entries[number].told = vector, True
        retention.sweep(number)
    for number, index in ((3, 0), (3, 1), (4, 0), (4, 1)):
        retention.heard(checkpoint_of(folder, number, "a", index))
    assert retention.total == 700 and said == [], "the limit is not exceeded"
    retention.heard(checkpoint_of(folder, 4, "b", 2))  # a second attempt
    assert on_disk(folder) == {"0/a/9", "1/a/9", "2/a/9", "3/a/1", "4/a/0", "4/a/1", "4/b/2"}, "the older one of one running trial"
    assert masks == [] and "1 superseded checkpoints" in said[0]
    retention.heard(checkpoint_of(folder, 3, "a", 5, size=400))
    assert on_disk(folder) == {"0/a/9", "2/a/9", "3/a/5", "4/b/2"} and masks == [1], "then the least of the front, masks first"
    assert retention.total == 700 and folder.dropped(1).exists() and "weights of trials 1, whose masks are kept" in said[-1]
    retention.heard(checkpoint_of(folder, 4, "b", 7, size=900))
    assert on_disk(folder) == {"3/a/5", "4/b/7"} and set(masks) == {0, 1, 2}, "the newest of what runs stays, come what may"
    assert not retention.crowded, "should both wait at a rung, nobody else would make room"
    book._busy |= {3, 4}
    assert retention.crowded
    book.entries[4].told = True
    retention.sweep(4)
    assert on_disk(folder) == {"3/a/5"} and not retention.crowded


def test_weights_stay_where_masks_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(folder: RunFolder, entry: Entry) -> None:
        raise UserError("the data is gone")

    monkeypatch.setattr("distprune.search.retention.write_masks", broken)
    folder, book = RunFolder(tmp_path / "x").create(), book_of(tmp_path)
    book.front[0], book.entries[0].told = (0.9, -1.0), True
    Retention(folder, book, limit=50).heard(checkpoint_of(folder, 0, "a", 9))
    assert on_disk(folder) == {"0/a/9"}


def test_sizes_are_those_on_the_disk_without_looking_at_it(tmp_path: Path) -> None:
    folder, book = RunFolder(tmp_path / "x").create(), book_of(tmp_path, entries=3)
    retention = Retention(folder, book)
    for number, index in itertools.product(range(3), range(5)):
        retention.heard(checkpoint_of(folder, number, "a", index, size=10 * index + 1))
        for old in range(index - 1):  # as the worker does
            path = folder.checkpoint(number, "a", old)
            if path.exists():
                (path / "state.safetensors").unlink()
                path.rmdir()
    assert retention.total == sum(path.stat().st_size for path in folder.checkpoints.rglob("*.safetensors")) == 3 * (31 + 41)
    again = Retention(folder, book)
    again.sweep()
    assert again.total == retention.total


def test_the_cache_has_the_room_that_checkpoints_leave(tmp_path: Path) -> None:
    folder, book = RunFolder(tmp_path / "x").create(), book_of(tmp_path)
    retention = Retention(folder, book, limit=1000)
    assert retention.room == 1000
    retention.heard(checkpoint_of(folder, 0, "a", 1, size=800))
    assert retention.room == 200
    retention.heard(checkpoint_of(folder, 0, "b", 2, size=1100))
    assert retention.room == 0
    assert Retention(folder, book).room is None, "without a limit there is no bound"


def test_late_files_of_workers_thought_dead_are_swept(tmp_path: Path, masks: list[int]) -> None:
    folder, book = RunFolder(tmp_path / "x").create(), book_of(tmp_path, entries=4)
    for number in (0, 1, 2):
        book.entries[number].told = True
    book.front |= {1: (0.9, -9.0), 2: (0.8, -8.0)}
    checkpoint_of(folder, 0, "zombie", 3)  # ended, not on the front
    checkpoint_of(folder, 1, "a", 9)  # on the front
    checkpoint_of(folder, 1, "zombie", 3)
    folder.dropped(2).parent.mkdir()
    folder.dropped(2).touch()  # on the front, weights given up
    checkpoint_of(folder, 2, "zombie", 3)
    checkpoint_of(folder, 3, "a", 4)  # runs
    unfinished = folder.checkpoint(3, "zombie", 5).with_name(".5.abcdef")
    unfinished.mkdir(parents=True)
    Retention(folder, book).sweep()
    assert on_disk(folder) == {"1/a/9", "3/a/4"} and not unfinished.exists() and folder.dropped(2).exists()


def test_a_search_keeps_to_its_limit_and_exports_say_why(tmp_path: Path) -> None:
    """On the toys, with real checkpoints: at every report, no more than the limit and what each worker has just written."""
    free = start(search(tmp_path, name="free", trials=8, report_every="2ep"), using=run_trial)
    files = [path.stat().st_size for path in free.checkpoints.rglob("*.safetensors")]
    largest = max(files)
    front = {row["number"] for row in read_trials(free.trials).to_pylist() if row["pareto"]}
    assert len(front) >= 3 and len(files) == len(front), "superseded checkpoints of the front go anyway"

    limit, most = 2 * largest, [0]
    value = search(tmp_path, name="bound", trials=8, report_every="2ep", limits={"trials": 8, "disk": limit})

    def watched(job: Job) -> Iterator[dict[str, Any]]:
        for row in run_trial(job):
            most[0] = max(most[0], sum(path.stat().st_size for path in (value.folder / "checkpoints").rglob("*.safetensors")))
            yield row

    folder = start(value, using=watched)
    assert outcome(folder) == outcome(free), "what is kept changes no decision"
    assert most[0] <= limit + 2 * largest
    left = {int(path.parts[-4]) for path in folder.checkpoints.rglob("*.safetensors")}
    assert sum(path.stat().st_size for path in folder.checkpoints.rglob("*.safetensors")) <= limit and left < front
    assert {int(path.stem) for path in folder.masks.glob("*.safetensors")} == front
    columns = ("number", "pareto", "test")
    tables = [[[row[name] for name in columns] for row in read_trials(run.trials).to_pylist()] for run in (free, folder)]
    assert tables[0] == tables[1], "what was measured early is what would have been measured in the end"
    gone = min(front - left)
    with pytest.raises(UserError, match=rf"Trial {gone} has kept its masks, .*, but no weights: .* limits\.disk"):
        load_trial(folder, gone, {"paradigm": "dense", **BASE})
    resume(value.folder, using=run_trial)
    assert {int(path.parts[-4]) for path in folder.checkpoints.rglob("*.safetensors")} == left
