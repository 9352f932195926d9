"""Laws of shared data sets: read once a node, the same bits as alone, nobody can change another's, and no data set is ever lacking."""

import dataclasses
import json
import os
import signal
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from toys import BASE, blobs

from distprune.core import registry, run
from distprune.core.data.dataset import Dataset, Split
from distprune.core.executor import execute
from distprune.core.recipe import Recipe
from distprune.core.registry import Choice
from distprune.core.run import load_data, prepare
from distprune.errors import UserError
from distprune.search.config import Search
from distprune.search.setup import set_up
from distprune.search.trial import Job, run_trial
from distprune.store import datasets, mapped
from distprune.store.datasets import SharedData

pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")


@pytest.fixture(autouse=True)
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A node whose folder is empty."""
    monkeypatch.setenv(datasets.FOLDER, str(tmp_path))
    monkeypatch.setattr(run, "_LOADED", {})
    monkeypatch.setattr(mapped, "SPARE", 0)
    return tmp_path / f"distprune-{os.getuid()}"


def choice() -> Choice:
    return registry.data.choose("import:toys:blobs")


class Counted:
    """Reads the data set and counts how often, also over processes."""

    def __init__(self, tmp_path: Path, before: Callable[[], None] = lambda: None, made: Callable[[], Dataset] = blobs) -> None:
        self._log, self._before, self._made = tmp_path / "log", before, made

    def __call__(self) -> Dataset:
        with open(self._log, "a") as file:
            file.write("x")
        self._before()
        return self._made()

    @property
    def times(self) -> int:
        return self._log.stat().st_size if self._log.exists() else 0


def entries(node: Path) -> list[Path]:
    return sorted(path.parent for path in node.glob("*/manifest.json"))


def same(one: Dataset, other: Dataset) -> bool:
    tensors = [
        (getattr(getattr(d, split), part))
        for d in (one, other)
        for split in ("train", "validation", "test")
        for part in ("inputs", "labels")
    ]
    pairs = list(zip(tensors[:6], tensors[6:], strict=True))
    rest = [(d.name, d.classes, d.mean, d.std, d.augment) for d in (one, other)]
    return rest[0] == rest[1] and all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)


def test_it_is_read_once_and_is_the_same(node: Path, tmp_path: Path) -> None:
    make, share = Counted(tmp_path), SharedData("d")
    found = [share(choice(), make) for _ in range(3)]
    assert make.times == 1 and all(same(each, blobs()) for each in found)
    assert all(each.train.inputs.data_ptr() % 64 == 0 for each in found), "as torch's own memory, on which vector instructions depend"
    assert stat.S_IMODE(node.stat().st_mode) == 0o700 and stat.S_IMODE((entries(node)[0] / "0.bin").stat().st_mode) == 0o600


KINDS = {
    "floats": lambda: registry.data.choose("signal_noise", dimension=8, train=4, test=3)(),
    "one split for all": lambda: registry.data.choose("gaussian_signal", n=5)(),
    "none to validate on": lambda: dataclasses.replace(
        blobs(), validation=Split(torch.empty(0, 1, 8, 8, dtype=torch.uint8), torch.empty(0).long())
    ),
    "strided": lambda: dataclasses.replace(blobs(), train=Split(blobs().train.inputs.transpose(2, 3)[::2], blobs().train.labels[::2])),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_the_same(kind: str, tmp_path: Path) -> None:
    make = Counted(tmp_path, made=KINDS[kind])
    found = [SharedData("d")(choice(), make) for _ in range(2)]
    assert make.times == 1 and all(same(each, KINDS[kind]()) for each in found)
    if kind == "one split for all":
        assert found[0].train.inputs.data_ptr() == found[0].test.inputs.data_ptr()


@pytest.mark.parametrize("name", ["toys:photos", "toys:blobs"])
def test_results_have_the_same_bits_with_it_and_without(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Trained weights and metrics, from what another process has written too."""
    recipe = Recipe.read({**BASE, "data": {"import": name}, "paradigm": "at_init", "allocator": "erk", "sparsity": 0.5})
    outcomes = []
    for share in (None, SharedData("d"), SharedData("d")):
        run._LOADED.clear()
        ready = prepare(recipe, share=share)
        reports = [report.metrics for report in execute(ready.plan, ready.state, ready.env)]
        outcomes.append((reports, {key: value.clone() for key, value in ready.state.model.state_dict().items()}))
    for reports, weights in outcomes[1:]:
        assert reports == outcomes[0][0] and all(torch.equal(weights[key], value) for key, value in outcomes[0][1].items())


def in_child(work: Callable[[], Any]) -> Any:
    """The pid of a process that does `work`."""
    if (child := os.fork()) == 0:
        code = 70
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return child


def ended(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_write_of_one_process_changes_nothing_for_another(node: Path, tmp_path: Path) -> None:
    make, share = Counted(tmp_path), SharedData("d")
    mine = share(choice(), make)

    def spoil() -> None:
        for _ in range(2):
            dataset = share(choice(), make)
            for split in (dataset.train, dataset.validation, dataset.test):
                split.inputs.zero_()
                split.labels.fill_(7)
            assert int(dataset.train.inputs.sum()) == 0, "its own is changed"

    assert ended(in_child(spoil)) == 0
    assert same(mine, blobs()) and same(share(choice(), make), blobs()) and make.times == 1


def test_many_that_begin_at_once_read_once(tmp_path: Path) -> None:
    make = Counted(tmp_path, before=lambda: time.sleep(0.3))

    def work() -> None:
        assert same(SharedData("d")(choice(), make), blobs())

    children = [in_child(work) for _ in range(4)]
    assert [ended(child) for child in children] == [0] * 4
    assert make.times == 1


def test_the_turn_of_a_dead_producer_passes_on(node: Path, tmp_path: Path) -> None:
    """Killed while it reads and killed while it writes; what it left half done is cleared away."""
    for place in ("reads", "writes"):
        log = tmp_path / place
        log.mkdir()
        reading, blocked = Counted(log, before=lambda: time.sleep(60)), Counted(log)

        def die(place: str = place, reading: Counted = reading, blocked: Counted = blocked) -> None:
            if place == "writes":
                mapped._write = lambda path, parts: (path.write_bytes(b"half"), time.sleep(60))  # type: ignore[assignment]
            SharedData(place)(choice(), reading if place == "reads" else blocked)

        child = in_child(die)
        until = time.monotonic() + 30
        while time.monotonic() < until and not (list(node.glob(".*/0.bin")) if place == "writes" else reading.times):
            time.sleep(0.01)
        waiting = in_child(lambda place=place, blocked=blocked: SharedData(place)(choice(), blocked))
        os.kill(child, signal.SIGKILL)
        assert ended(child) == -signal.SIGKILL and ended(waiting) == 0
        assert blocked.times == 2 and not list(node.glob(".*")), "once by the dead one"
    assert len(entries(node)) == 2


def test_a_producer_that_cannot_share_lets_all_others_read_at_once(node: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else they would read one after the other: here each waits for all others while it reads."""
    share, waiting = SharedData("d"), tmp_path / "waiting"
    make = Counted(tmp_path, before=lambda: _until(lambda: make.times == 3))
    folder, key = datasets.node_folder(), share._key(choice())
    assert folder is not None and key is not None
    turn = datasets._Turn.take(folder, key)
    assert turn is not None

    def work() -> None:
        monkeypatch.setattr(datasets, "_sleep", lambda seconds: (waiting.with_name(f"waiting{os.getpid()}").touch(), time.sleep(0.01)))
        assert same(share(choice(), make), blobs())

    children = [in_child(work) for _ in range(3)]
    _until(lambda: len(list(tmp_path.glob("waiting*"))) == 3)
    turn.fail()
    turn.release()
    assert [ended(child) for child in children] == [0] * 3 and make.times == 3


def _until(done: Callable[[], bool]) -> None:
    until = time.monotonic() + 30
    while not done():
        assert time.monotonic() < until
        time.sleep(0.01)


def unusable(node: Path, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if how == "off":
        monkeypatch.setenv(datasets.FOLDER, "off")
    elif how == "a file":
        node.write_text("")
    elif how == "a link":
        (node.parent / "elsewhere").mkdir(mode=0o700)
        node.symlink_to(node.parent / "elsewhere")
    elif how == "open to others":
        node.mkdir(mode=0o700)
        node.chmod(0o755)
    elif how == "of somebody else":
        monkeypatch.setattr(os, "getuid", lambda: 12345678)
        node.with_name("distprune-12345678").mkdir(mode=0o700)
    elif how == "read-only":
        monkeypatch.setattr(os, "open", _refusing(OSError(30, "Read-only file system")))
    elif how == "full":
        monkeypatch.setattr(mapped, "_write", _refusing(OSError(28, "No space left on device")))


def _refusing(error: OSError) -> Callable[..., Any]:
    def refuse(*arguments: Any, **options: Any) -> Any:
        raise error

    return refuse


@pytest.mark.parametrize("how", ["off", "a file", "a link", "open to others", "of somebody else", "read-only", "full"])
def test_where_nothing_can_be_shared_each_reads_for_itself(how: str, node: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make = Counted(tmp_path)
    with monkeypatch.context() as patched:
        unusable(node, how, patched)
        assert all(same(SharedData("d")(choice(), make), blobs()) for _ in range(2))
    assert make.times == 2 and not list(tmp_path.glob("**/*.bin"))


@pytest.mark.parametrize("kind", ["more than a Dataset", "a tensor of a kind of its own"])
def test_what_is_more_than_tensors_is_not_shared(kind: str, tmp_path: Path, node: Path) -> None:
    class More(Dataset):
        pass

    plain = blobs()
    if kind == "more than a Dataset":
        made: Dataset = More(**{field.name: getattr(plain, field.name) for field in dataclasses.fields(plain)})
    else:
        made = dataclasses.replace(plain, train=Split(torch.nn.Parameter(plain.train.inputs.float()), plain.train.labels))
    make = Counted(tmp_path, made=lambda: made)
    assert SharedData("d")(choice(), make) is made and SharedData("d")(choice(), make) is made
    assert make.times == 2 and not entries(node)


def test_an_error_is_the_readers_own(tmp_path: Path, node: Path) -> None:
    def fail() -> None:
        raise UserError("no such file")

    for _ in range(2):
        with pytest.raises(UserError, match="no such file"):
            SharedData("d")(choice(), Counted(tmp_path, before=fail))
    assert not entries(node)


# What is under a key


def idx(folder: Path, *, value: int) -> None:
    import gzip

    folder.mkdir(exist_ok=True)
    for part, n in (("train", 20), ("t10k", 10)):
        images = bytes([0, 0, 8, 3, 0, 0, 0, n, 0, 0, 0, 8, 0, 0, 0, 8]) + bytes([value]) * (n * 64)
        labels = bytes([0, 0, 8, 1, 0, 0, 0, n]) + bytes(i % 10 for i in range(n))
        (folder / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(images))
        (folder / f"{part}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(labels))


def test_changed_sources_and_options_are_read_anew(tmp_path: Path, node: Path) -> None:
    """And no search needs to say who it is, as the files are known."""
    folder = tmp_path / "mnist"
    found = []
    for value, options in ((1, {}), (1, {}), (2, {}), (2, {"limit": 5}), (2, {})):
        if not found or value != int(found[-1].train.inputs[0, 0, 0, 0]):
            idx(folder, value=value)
        run._LOADED.clear()
        found.append(load_data(registry.data.choose("mnist", folder=str(folder), **options), SharedData()))
    assert [int(each.train.inputs[0, 0, 0, 0]) for each in found] == [1, 1, 2, 2, 2] and [len(each.train) for each in found] == [
        18,
        18,
        18,
        5,
        18,
    ]
    assert len(entries(node)) == 3


def test_sources_that_change_while_they_are_read_are_not_shared(tmp_path: Path, node: Path) -> None:
    folder = tmp_path / "mnist"
    idx(folder, value=1)
    data = registry.data.choose("mnist", folder=str(folder))
    SharedData()(data, lambda: (idx(folder, value=2), data())[1])
    assert not entries(node)


def test_what_only_a_users_function_knows_is_shared_within_one_search(tmp_path: Path, node: Path) -> None:
    make = Counted(tmp_path)
    for driver, times in (("", 1), ("", 2), ("a", 3), ("a", 3), ("b", 4)):
        SharedData(driver)(choice(), make)
        assert make.times == times


@pytest.mark.parametrize("how", ["a bit", "shorter", "manifest", "gone", "longer"])
def test_what_was_damaged_is_found_and_read_anew(how: str, tmp_path: Path, node: Path) -> None:
    make = Counted(tmp_path)
    assert ended(in_child(lambda: SharedData("d")(choice(), make))) == 0
    file = entries(node)[0] / "0.bin"
    content = bytearray(file.read_bytes())
    if how == "gone":
        file.unlink()
    elif how == "manifest":
        (file.parent / "manifest.json").write_text("{")
    else:
        content[100] ^= 1
        file.write_bytes(content if how == "a bit" else content[:-1] if how == "shorter" else content + b"x")
    assert same(SharedData("d")(choice(), make), blobs()) and make.times == 2
    assert same(SharedData("d")(choice(), make), blobs()) and make.times == 2, "and is whole again"


def test_a_file_that_was_only_touched_is_compared_and_kept(tmp_path: Path, node: Path) -> None:
    make = Counted(tmp_path)
    SharedData("d")(choice(), make)
    os.utime(entries(node)[0] / "0.bin")
    assert same(SharedData("d")(choice(), make), blobs()) and make.times == 1


def test_what_is_old_and_unused_is_removed(tmp_path: Path, node: Path) -> None:
    """What a process has mapped stays, and what is there for all stays longer than what is one search's."""
    share = {name: SharedData(name) for name in ("used", "old", "new")}
    for each in ("old", "used"):  # this process has mapped the latter
        share[each](choice(), Counted(tmp_path))
    ((node / ".0123.dead").mkdir())
    files = {json.loads((entry / "manifest.json").read_text())["own"] for entry in entries(node)}
    assert files == {True}
    ages = [entry / "manifest.json" for entry in entries(node)] + [node / ".0123.dead"]
    for path in ages:
        os.utime(path, (time.time() - 10 * mapped.OLD_S,) * 2)
    share["new"](choice(), Counted(tmp_path))
    assert len(entries(node)) == 2 and not list(node.glob(".*"))


def test_a_worker_of_a_search_maps_what_its_driver_has_read(tmp_path: Path, node: Path) -> None:
    """The walk of a search asks for it: its own process, and jobs."""
    idx(tmp_path / "mnist", value=1)
    data = {"name": "mnist", "folder": str(tmp_path / "mnist")}
    space = {"paradigm": ["at_init"], "criterion": ["magnitude"], "allocator": ["erk"], "regularizer": ["none"]}
    value = Search.read({"name": "s", "recipe": {**BASE, "data": data}, "space": space, "storage": str(tmp_path / "runs")})
    set_up(value)
    (entry,) = entries(node)
    run._LOADED.clear()
    recipe = Recipe.read({**value.recipe, "paradigm": "at_init", "allocator": "erk", "sparsity": 0.5})
    job = Job(
        number=0, recipe=recipe.plain(), folder=str(tmp_path / "runs/s"), rungs=[], report_every="1ep", recovery=None, known=0, threads=1,
        device="cpu", working_dir=os.getcwd(), driver="d",
    )  # fmt: skip
    assert next(run_trial(job))["ended"] == ""
    maps = Path("/proc/self/maps").read_text()
    assert str(entry) in maps, "its tensors are the files"
