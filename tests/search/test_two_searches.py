"""Two searches at once on one cache, and on one cluster: each comes to what it comes to alone, and together they run less."""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from laws import COLUMNS, front, masks, told
from searches import reports, resume, search, start
from victims import Driver, Nodes

from distprune.search.config import Search
from distprune.search.trial import run_trial
from distprune.store.folder import RunFolder
from distprune.store.reports import read
from distprune.store.trials import read_trials

pytestmark = pytest.mark.usefixtures("elsewhere")
SPACE: dict[str, Any] = {
    "paradigm": ["finetune", "dense"],
    "criterion": ["magnitude"],
    "allocator": ["erk", "uniform"],
    "regularizer": ["none", {"name": "l2", "strength": 1e-3}, {"name": "l2", "strength": 1e-2}],
}


def _searches(storage: Path) -> list[Search]:
    """Two that prune to different sparsities what they train alike, without stopping, one trial after the other."""
    changes: dict[str, Any] = {"trials": 5, "scheduler": "none", "workers": {"most": 1}}
    return [search(storage, name=name, space={**SPACE, "sparsity": sparsity}, **changes) for name, sparsity in (("a", 0.8), ("b", 0.9))]


def _result(folder: RunFolder) -> tuple[Any, ...]:
    """All that a search comes to: parameters are in `told`, which names recipes' duplicates too."""
    work = {number: [[row[name] for name in COLUMNS] for row in rows] for number, rows in reports(folder).items()}
    return told(folder), work, front(folder), masks(folder)


def _spent(*folders: RunFolder) -> float:
    return sum(sum(read_trials(folder.trials)["spent"].to_pylist()) for folder in folders)


def _alone(tmp_path: Path) -> list[RunFolder]:
    """Each with a cache of its own."""
    return [start(_searches(tmp_path / f"alone {place}")[place], workers=1, using=run_trial) for place in range(2)]


def _forked(value: Search) -> int:
    child = os.fork()
    if child == 0:
        try:
            start(value, workers=1, using=run_trial)
        finally:
            os._exit(0)
    return child


def test_two_drivers_on_one_cache(tmp_path: Path) -> None:
    alone, together = _alone(tmp_path), _searches(tmp_path / "together")
    for child in [_forked(value) for value in together]:
        os.waitpid(child, 0)
    folders = [RunFolder(value.folder) for value in together]
    assert [_result(folder) for folder in folders] == [_result(folder) for folder in alone]
    assert _spent(*folders) < _spent(*alone), "what one has trained, the other need not train"
    assert [path for path in (tmp_path / "together" / ".cache" / "leases").iterdir()] == []


def test_a_driver_that_is_killed_does_not_hold_up_the_other(tmp_path: Path) -> None:
    """Killed after its seventh report, maybe with a lease in its hands."""
    alone, together = _alone(tmp_path), _searches(tmp_path / "together")
    killed, other = (RunFolder(value.folder) for value in together)
    children = [_forked(value) for value in together]
    end = time.monotonic() + 200
    while len(read(killed.reports)) < 7:
        assert time.monotonic() < end
        time.sleep(0.02)
    os.kill(children[0], signal.SIGKILL)
    for child in children:
        os.waitpid(child, 0)
    assert _result(other) == _result(alone[1])
    assert _result(resume(killed.path, workers=1, using=run_trial)) == _result(alone[0])


@pytest.fixture
def nodes() -> Iterator[Nodes]:
    found = Nodes()
    yield found
    found.close()


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_two_drivers_on_one_cluster_and_one_cache(tmp_path: Path, nodes: Nodes) -> None:
    alone, together, drivers = _alone(tmp_path), _searches(tmp_path / "together"), []
    for value in together:
        config = tmp_path / f"{value.name}.yaml"
        config.write_text(yaml.safe_dump(value.plain()))
        drivers.append(Driver(nodes.address, "search", str(config), log=config.with_suffix(".log")))
    for driver in drivers:
        driver.check()
    folders = [RunFolder(value.folder) for value in together]
    assert [_result(folder) for folder in folders] == [_result(folder) for folder in alone]
    assert _spent(*folders) < _spent(*alone)
