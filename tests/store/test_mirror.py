"""A run that goes up to a URL: numbered parts, one driver that counts, deletions that wait, and stores that do not answer."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from object_stores import Store

from distprune.errors import TakenOver, UserError
from distprune.store import copies, files, mirror, parts
from distprune.store.folder import RunFolder
from distprune.store.mirror import Mirror, mirrored
from distprune.store.parts import Part
from distprune.store.place import Objects

URL = "s3://bucket/runs/x"


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """A store, and a mirror that takes up what is new when it is told to."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "machine"))
    monkeypatch.setattr(Mirror, "_start", lambda self: None)
    monkeypatch.setattr(mirror, "_AGAIN_S", 0.0)
    return Store(tmp_path / "store", monkeypatch)


def begun(said: list[str] | None = None) -> tuple[RunFolder, Mirror]:
    """A new run and its mirror."""
    folder = RunFolder(copies.here(URL, "runs"), URL).create()
    files.publish(folder.search_yaml, b"search: {}\n")
    made = Mirror(folder, lambda event, facts: None if said is None else said.append(facts["message"]))
    made.begin()
    return folder, made


def write(folder: RunFolder, text: str) -> None:
    """Have both streams grow; reports come first."""
    files.append(folder.reports, f"r{text};".encode())
    files.append(folder.journal, f"j{text};".encode())


def streams() -> dict[str, bytes]:
    """What counts at the URL."""
    return dict(parts.read(Objects.open(URL)).streams)


def names() -> list[str]:
    return [part.name.removeprefix("tables/") for part in parts.listed(Objects.open(URL))]


def as_here(folder: RunFolder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() if path.exists() else b"" for path in (folder.journal, folder.reports)}


def test_what_is_read_is_what_was_written(store: Store) -> None:
    folder, made = begun()
    for number in range(5):
        write(folder, str(number))
        made.upload()
        assert streams() == as_here(folder)
    made.upload()
    assert len(names()) == 6 and names()[0].endswith("-00000000-whole"), "a part each time, and none for nothing"
    files.publish(folder.trials, b"table")
    folder.masks.mkdir()
    files.publish(folder.masks_file(3), b"three")
    files.publish(folder.masks_file(4), b"four")
    made.upload()
    folder.masks_file(3).unlink()
    made.upload()
    copy = RunFolder.existing(URL)
    assert copy.path != folder.path and as_here(copy) == as_here(folder) and copy.trials.read_bytes() == b"table"
    assert [path.name for path in copy.masks.iterdir()] == ["4.safetensors"], "what was deleted is deleted there"
    files.publish(folder.masks_file(4), b"FOUR")
    files.publish(folder.trials, b"TABLE")
    made.upload()
    again = RunFolder.existing(URL)
    assert again.trials.read_bytes() == b"TABLE" and again.masks_file(4).read_bytes() == b"FOUR"


def test_parts_are_put_together(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mirror, "MOST_PARTS", 3)
    folder, made = begun()
    for number in range(12):
        write(folder, str(number))
        made.upload()
        assert streams() == as_here(folder)
    made.upload()
    assert len(names()) <= 2 * 3 + 1 and sum(name.endswith("-whole") for name in names()) == 1


def test_a_part_goes_while_it_is_read(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its driver has put the parts together: the list is read anew."""
    monkeypatch.setattr(mirror, "MOST_PARTS", 2)
    folder, made = begun()
    for number in range(2):
        write(folder, str(number))
        made.upload()
    left = [3]

    def compacting(what: str, name: str) -> None:
        if what == "get" and left[0]:
            left[0] -= 1
            store.hook = lambda what, name: None
            for _ in range(3):
                write(folder, "more")
                made.upload()
            store.hook = compacting

    store.hook = compacting
    assert streams() == as_here(folder) and not left[0]


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "torn": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "empty": lambda path: path.write_bytes(b""),
    "gone": lambda path: path.unlink(),
    "flipped": lambda path: path.write_bytes(path.read_bytes()[:-1] + b"\x00"),
    "other": lambda path: path.write_bytes(parts.pack({"study.journal": (999, b"x"), "reports.arrows": (0, b"")})),
    "no head": lambda path: path.write_bytes(b"hello\nworld"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_the_stream_ends_at_a_part_that_is_not_whole(damage: str, store: Store) -> None:
    folder, made = begun()
    for number in range(6):
        write(folder, str(number))
        made.upload()
    DAMAGE[damage](store.folder / "bucket/runs/x" / "tables" / names()[4])
    assert streams() == {"study.journal": b"j0;j1;j2;", "reports.arrows": b"r0;r1;r2;"}


def test_a_torn_first_part_leaves_the_driver_before(store: Store) -> None:
    folder, made = begun()
    write(folder, "0")
    made.upload()
    later = Mirror(folder, lambda event, facts: None)
    later.begin()
    first = store.folder / "bucket/runs/x/tables" / names()[-1]
    first.write_bytes(first.read_bytes()[:-1])
    assert streams() == as_here(folder)


@pytest.mark.parametrize("name", ["../../x", "/etc/passwd", "search.yaml", ".lock"])
def test_no_name_leads_out_of_the_streams(name: str, store: Store, tmp_path: Path) -> None:
    """Nor do names of objects: what is no file of a run is never brought."""
    folder, made = begun()
    write(folder, "0")
    made.upload()
    content = parts.pack({name: (0, b"evil"), "study.journal": (3, b"j1;"), "reports.arrows": (3, b"")})
    made._objects.put(made._last._replace(number=2).name, content)
    for strange in ("masks/../../evil", "masks/x.safetensors", "evil.py", "masks/1.safetensors/x"):
        path = store.folder / "bucket/runs/x" / strange
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"evil")
    assert streams() == {"study.journal": b"j0;j1;", "reports.arrows": b"r0;"}
    copy = RunFolder.existing(URL)
    assert not [path for path in (tmp_path / "machine").rglob("*") if path.is_file() and b"evil" in path.read_bytes()]
    assert copy.search_yaml.read_bytes() == b"search: {}\n"


# Drivers.


def taken_over(folder: RunFolder, monkeypatch: pytest.MonkeyPatch, machine: Path) -> tuple[RunFolder, Mirror]:
    """Another driver, on another machine."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(machine))
    with RunFolder.driven(URL) as other:
        made = Mirror(other, lambda event, facts: None)
        made.begin()
    return other, made


def test_who_is_superseded_ends_and_counts_no_more(store: Store, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder, zombie = begun()
    write(folder, "0")
    zombie.upload()
    other, living = taken_over(folder, monkeypatch, tmp_path / "other")
    assert as_here(other) == as_here(folder)
    write(other, "new")
    living.upload()
    deleted: list[str] = []
    late = zombie._last._replace(number=zombie._last.number + 1)
    zombie._objects.put(late.name, parts.pack({"study.journal": (3, b"late"), "reports.arrows": (3, b"late")}))  # was on its way
    whole = late._replace(number=99, whole=True)
    zombie._objects.put(whole.name, parts.pack({"study.journal": (0, b"late"), "reports.arrows": (0, b"late")}))
    write(folder, "late")
    zombie.later(lambda: deleted.append("by a zombie"))
    zombie.check()
    zombie.upload()
    with pytest.raises(
        TakenOver, match=r"s3://bucket/runs/x is gone on with by another driver, generation 2: this one, of generation 1, ends"
    ):
        zombie.check()
    with pytest.raises(TakenOver):
        zombie.close(patience=0)
    assert streams() == as_here(other) == {"study.journal": b"j0;jnew;", "reports.arrows": b"r0;rnew;"} and not deleted
    living.upload()
    assert all(name.startswith("00000002-") for name in names()), "what it left is removed"


def test_two_that_begin_at_once_are_never_both_right(store: Store, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder, first = begun()
    write(folder, "0")
    first.upload()
    one, two = (Mirror(folder, lambda event, facts: None) for _ in range(2))
    began: list[str] = []

    def meanwhile(what: str, name: str) -> None:
        if what == "put":  # the first has seen no other, and its part is not there yet
            store.hook = lambda what, name: None
            two.begin()
            began.append("two")

    store.hook = meanwhile
    with pytest.raises(UserError, match="gone on with by another driver since just now"):
        one.begin()
    write(folder, "1")
    two.upload()
    two.check()
    assert began and streams() == as_here(folder)


def test_the_machine_that_was_ahead_goes_on_from_what_it_has(store: Store, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder, made = begun()
    write(folder, "0")
    made.upload()
    write(folder, "1")  # and is killed
    with RunFolder.driven(URL) as again:
        assert as_here(again) == {"study.journal": b"j0;j1;", "reports.arrows": b"r0;r1;"}
    with RunFolder.driven(URL) as again:  # a driver that dies before it can send a thing changes nothing of that
        copies.owned(again.path, "deadbeef")
    with RunFolder.driven(URL) as again:
        assert as_here(again)["study.journal"] == b"j0;j1;"
    other, living = taken_over(folder, monkeypatch, tmp_path / "other")
    assert as_here(other)["study.journal"] == b"j0;", "elsewhere, what did not go up is lost"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "machine"))
    with RunFolder.driven(URL) as again:
        assert as_here(again)["study.journal"] == b"j0;", "and here too, since another has gone on with it"
    write(other, "2")
    living.upload()
    with RunFolder.driven(URL) as again:
        assert as_here(again)["study.journal"] == b"j0;j2;"


def test_a_machine_with_other_content_is_not_ahead(store: Store) -> None:
    folder, made = begun()
    write(folder, "0")
    made.upload()
    files.publish(folder.journal, b"something longer that does not begin alike")
    with RunFolder.driven(URL) as again:
        assert as_here(again)["study.journal"] == b"j0;"


def test_a_new_run_takes_nothing_from_one_that_is_gone(store: Store) -> None:
    folder, made = begun()
    write(folder, "0")
    made.upload()
    with pytest.raises(UserError, match=r"s3://bucket/runs/x exists already\. Go on with it: distprune resume s3://bucket/runs/x; or"):
        folder.check_new()
    made._objects.remove_all("tables")
    made._objects.remove("search.yaml")
    assert as_here(begun()[0]) == {"study.journal": b"", "reports.arrows": b""}
    with pytest.raises(UserError, match=r"s3://bucket/runs/y is not a run folder: it has no search.yaml. Start one with: "):
        RunFolder.existing("s3://bucket/runs/y")


def test_a_second_driver_of_this_machine_is_refused(store: Store) -> None:
    begun()
    with RunFolder.driven(URL), pytest.raises(UserError, match="in use by process"), RunFolder.driven(URL):
        pass


# Stores that fail.


def test_deletions_wait_for_the_tables_that_say_why(store: Store) -> None:
    """A store fails at each moment of an upload: what is deleted, the tables at the URL know."""
    folder, made = begun()
    done: list[int] = []
    count, at = [0], 0

    def failing(what: str, name: str) -> None:
        count[0] += 1
        if count[0] == at:
            raise OSError("AWS Error NETWORK_CONNECTION during PutObject operation: curlCode: 7")

    store.hook = failing
    for number in range(40):
        files.append(folder.reports, b"r;")
        files.append(folder.journal, f"{number};".encode())
        made.later(lambda number=number: done.append(number))  # type: ignore[misc]
        count[0], at = 0, number % 9
        made._try()
        store.hook = lambda what, name: None
        told = streams()["study.journal"].decode().split(";")[:-1]
        assert all(str(number) in told for number in done)
        assert list(map(int, told)) == list(range(len(told)))
        store.hook = failing
    store.hook = lambda what, name: None
    made.close(patience=0)
    assert sorted(set(done)) == list(range(40)) and streams() == as_here(folder)


def test_a_store_that_is_away_is_said_once_and_caught_up_with(store: Store) -> None:
    said: list[str] = []
    folder, made = begun(said)

    def away(what: str, name: str) -> None:
        raise OSError("AWS Error NETWORK_CONNECTION during ListObjectsV2 operation: curlCode: 7, Could not connect to server")

    store.hook = away
    for number in range(3):
        write(folder, str(number))
        assert not made._try()
    assert (
        made.waits
        and len(said) == 1
        and said[0].startswith("s3://bucket/runs/x does not take what is new: no store answers there. The search goes on")
    )
    with pytest.raises(UserError, match=r"has not taken all of the run, which lies in .*machine.*: distprune resume s3://bucket/runs/x"):
        made.close(patience=0)
    left = [3]

    def comes_back(what: str, name: str) -> None:
        left[0] -= 1
        if left[0] > 0:
            away(what, name)

    store.hook = comes_back
    made.close(patience=60)
    assert (
        not made.waits
        and said[-1] == "s3://bucket/runs/x is up to date again."
        and any("Waiting for s3://bucket/runs/x" in line for line in said)
    )
    assert streams() == as_here(folder)


def test_an_upload_that_arrived_without_a_word_is_sent_again(store: Store) -> None:
    folder, made = begun()
    write(folder, "0")

    def mute(what: str, name: str) -> None:
        if what == "put done":
            raise OSError("AWS Error NETWORK_CONNECTION during PutObject operation: curlCode: 28, Timeout was reached")

    store.hook = mute
    assert not made._try()
    store.hook = lambda what, name: None
    write(folder, "1")
    made.upload()
    write(folder, "2")
    made.upload()
    assert streams() == as_here(folder)


def test_a_write_that_was_given_up_is_not_left_up_there(store: Store) -> None:
    """A part of a record may go up before a full disk has it taken back, after which another comes in its place."""
    folder, made = begun()
    write(folder, "0")
    files.append(folder.journal, b"jhal")
    made.upload()
    files.cut(folder.journal, len(b"j0;"))
    made.upload()
    assert streams() == as_here(folder)
    files.append(folder.journal, b"jother;")
    made.upload()
    assert streams() == as_here(folder) and streams()["study.journal"] == b"j0;jother;"


def test_the_thread_takes_it_up_by_itself_and_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "machine"))
    monkeypatch.setattr(mirror, "EVERY_S", 0.01)
    Store(tmp_path / "store", monkeypatch)
    folder = RunFolder(copies.here(URL, "runs"), URL).create()
    files.publish(folder.search_yaml, b"search: {}\n")
    with pytest.raises(KeyboardInterrupt), mirrored(folder, lambda event, facts: None) as made:
        made.begin()
        done: list[int] = []
        write(folder, "0")
        made.later(lambda: done.append(1))
        while not done:
            made.check()
        assert streams() == as_here(folder)
        write(folder, "1")
        raise KeyboardInterrupt
    assert streams() == as_here(folder) and isinstance(made, Mirror) and not made._thread.is_alive()


def test_names_of_parts_sort_as_they_count() -> None:
    some = [Part(1, "b" * 8, 9, False), Part(1, "b" * 8, 10, True), Part(2, "a" * 8, 0, True), Part(10, "a" * 8, 0, True)]
    assert sorted(some) == some == sorted(some, key=lambda part: part.name)
    assert json.loads(parts.pack({"study.journal": (0, b"x")}).split(b"\n")[1]) == [["study.journal", 0, 1]]
