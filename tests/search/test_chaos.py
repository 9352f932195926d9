"""Worker, node and driver killed under a real Ray, at moments that the report stream gives. `benchmarks/chaos.py` kills more."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from laws import NONE, broken, masks
from searches import reports, search, start
from toys import BASE
from victims import Kill, Nodes, seeded, torment

from distprune.search.trial import run_trial
from distprune.store.folder import RunFolder

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]
TRIALS = 4
RECIPE = {**BASE, "train": {**BASE["train"], "length": "30ep"}}


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    found = Nodes()
    yield found
    found.close()


def _torment(tmp_path: Path, nodes: Nodes, kills: list[Kill], seed: str, **changes: Any) -> RunFolder:
    value = search(tmp_path / "runs", trials=TRIALS, recipe=RECIPE, **changes)
    config = tmp_path / "search.yaml"
    config.write_text(yaml.safe_dump(value.plain()))
    done = torment(config, RunFolder(value.folder), nodes, kills, seed=seed)
    assert [kill.kind for kill in done] == [kill.kind for kill in kills], "the search was over before all kills were done"
    return RunFolder(value.folder)


def test_without_stopping_all_is_as_if_nobody_had_been_killed(tmp_path: Path, nodes: Nodes) -> None:
    kills = seeded("all", ("worker", "node", "driver"), rows=90)
    folder = _torment(tmp_path, nodes, kills, "all", scheduler="none")
    undisturbed = start(search(tmp_path / "whole", trials=TRIALS, recipe=RECIPE, scheduler="none"), using=run_trial)
    found = broken(folder, most=TRIALS, reference=reports(undisturbed), aside=tmp_path / "aside", undisturbed=undisturbed)
    assert found == NONE
    attempts = {(row["trial"], row["attempt"]) for rows in reports(folder).values() for row in rows}
    assert len(attempts) > TRIALS, "a trial was begun again"
    assert masks(folder) == masks(undisturbed)
