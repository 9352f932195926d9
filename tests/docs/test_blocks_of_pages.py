"""Programs and files that pages show work as they are printed, from the top of a page to its end, in a folder of their own."""

import dataclasses
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pages
import pytest
import torch
import yaml
from PIL import Image
from torch import nn
from toys import REPOSITORY

import distprune as dp
from distprune.core.recipe import Recipe
from distprune.search import driver
from distprune.search.config import Limits, Search, Workers
from distprune.search.simulate import Simulator
from distprune.search.trial import run_trial

BLOCKS = {page: list(pages.blocks(page)) for page in pages.pages() if page != "CONTRIBUTING.md"}  # whose example has tests of its own
PROGRAMS = [page for page, found in BLOCKS.items() if any(block.language == "python" and not block.skipped for block in found)]
FILES = [block for found in BLOCKS.values() for block in found if block.language == "yaml"]
RECIPE = {"model": "lenet5", "data": "digits", "paradigm": "finetune", "sparsity": 0.5, "allocator": "uniform", "train": {"length": "2ep"}}
SHARED = {key: RECIPE[key] for key in ("model", "data", "train")}


def digits() -> dict[str, Any]:
    """The search of configs/digits.yaml, small enough for a test."""
    value: dict[str, Any] = yaml.safe_load((REPOSITORY / "configs" / "digits.yaml").read_text())
    value["recipe"] |= {"model": {"name": "lenet5", "width": 0.2}, "train": {"length": "2ep", "batch_size": 64}}
    value["space"] = {"paradigm": ["at_init", "finetune"], "criterion": ["magnitude"], "allocator": ["erk"], "sparsity": [0.9, 0.97]}
    return {**value, "report_every": "1ep", "limits": {"trials": 3}}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished search."""
    storage = tmp_path_factory.mktemp("searches")
    torch.set_num_threads(1)
    return driver.start(Search.load(digits(), storage=str(storage)), engine=without_ray(), listen=lambda event, facts: None).path


def without_ray(*_: Any) -> Simulator:
    """Trials are trained one after another in this process."""
    return Simulator(run_trial, workers=1)


@pytest.fixture
def folder(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """What a reader has at hand, small: a search's file and a recipe, a search that has run, and photos."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr("distprune.search.runner.Ray", without_ray)
    shutil.copytree(run, tmp_path / "runs" / "digits")
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "digits.yaml").write_text(yaml.safe_dump({**digits(), "name": "again"}))
    recipe = yaml.safe_load((REPOSITORY / "configs" / "recipe.yaml").read_text())
    (tmp_path / "configs" / "recipe.yaml").write_text(yaml.safe_dump({**recipe, "train": {**recipe["train"], "length": "1ep"}}))
    for kind, shade in (("cats", 60), ("dogs", 190)):
        (tmp_path / "photos" / kind).mkdir(parents=True)
        for number in range(10):
            Image.new("RGB", (16, 16), (shade, number, 0)).save(tmp_path / "photos" / kind / f"{number}.png")
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if Path(getattr(sys.modules[name], "__file__", None) or "/").is_relative_to(tmp_path):
            del sys.modules[name]


def _lay_out(page: str) -> None:
    """Write the files that a page shows."""
    for block in BLOCKS[page]:
        if block.file:
            Path(block.file).write_text(block.text)


def stand_ins() -> dict[str, Any]:
    """What pages call a network and data that a reader has: two channels of 12x12, ten classes."""
    torch.manual_seed(0)
    layers = (nn.Conv2d(2, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(512, 10))
    batches = [(torch.randn(16, 2, 12, 12), torch.randint(10, (16,))) for _ in range(2)]
    return {"model": nn.Sequential(*layers), "batches": batches}


@pytest.mark.parametrize("page", PROGRAMS)
def test_programs_run(page: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _lay_out(page)
    namespace = stand_ins()
    for block in BLOCKS[page]:
        if block.language == "python" and not block.skipped and not block.file:
            exec(compile(block.text, str(block), "exec"), namespace)


@pytest.mark.parametrize("block", [pytest.param(block, id=str(block)) for block in FILES if not block.skipped])
def test_searches_and_recipes_are_valid(block: pages.Block, folder: Path) -> None:
    _lay_out(block.page)
    value = yaml.safe_load(block.text)
    if {"name", "recipe", "space"} <= set(value) or {"model", "data", "paradigm"} <= set(value):
        Path("shown.yaml").write_text(block.text)
        assert dp.check("shown.yaml")[-1].endswith("It is valid.")
    elif set(value) <= {item.name for item in dataclasses.fields(Recipe)}:
        Recipe.read({**RECIPE, **value})
    else:  # some keys of a search
        Search.read({"name": "shown", **value, "recipe": {**SHARED, **value.get("recipe", {})}})


def test_what_is_not_run_says_why_and_is_the_exception() -> None:
    found = [block for blocks in BLOCKS.values() for block in blocks]
    assert sum(bool(block.skipped) for block in found) <= 6


def test_masks_of_the_first_page_keep_what_they_promise(folder: Path) -> None:
    block = next(block for block in BLOCKS["docs/index.md"] if block.language == "python")
    model = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 10))
    exec(block.text, {"model": model})
    masks = dp.Masks.load("masks.safetensors")
    assert masks.kept == 90 and sum(int(p.count_nonzero()) for n, p in model.named_parameters() if n in masks) == 90


def test_own_model_and_data_make_a_search_of_at_most_15_lines_that_learns(folder: Path) -> None:
    _lay_out("docs/recipes.md")
    text = Path("stripes.yaml").read_text()
    assert len(text.strip().splitlines()) <= 15
    outcome = dp.run({**yaml.safe_load(text)["recipe"], "paradigm": "at_init", "sparsity": 0.8, "allocator": "erk"})
    assert outcome.reports[-1].metrics["accuracy"] > 0.9, "stripes are easy"


@pytest.mark.parametrize("page", BLOCKS)
def test_files_that_a_page_names_exist(page: str) -> None:
    import re

    for name in re.findall(r"`((?:configs|benchmarks|cluster|distprune|docs|examples|tests)/[\w/.]*|[A-Z]+\.md)`", pages.read(page)):
        near = REPOSITORY / Path(page).parent / name
        assert (REPOSITORY / name).exists() or near.exists() or name == "RESULTS.md", name


@pytest.mark.parametrize("kind", [Search, Recipe])
def test_every_key_is_shown_on_the_page_of_the_search_engine(kind: type) -> None:
    shown = [set(yaml.safe_load(block.text)) for block in BLOCKS["docs/search.md"] if block.language == "yaml"]
    text = pages.read("docs/search.md")
    keys = {item.name for item in dataclasses.fields(kind)}
    missing = keys - max(shown, key=lambda found: len(found & keys))
    assert [key for key in missing if f"`{key}:" not in text and f" {key}: " not in text] == []


@pytest.mark.parametrize(("kind", "key"), [(Limits, "limits"), (Workers, "workers")])
def test_every_limit_and_share_of_a_worker_is_shown(kind: type, key: str) -> None:
    shown = [yaml.safe_load(block.text) for block in FILES if block.page in ("docs/search.md", "cluster/README.md")]
    found = {name for value in shown for name in value.get(key, {})}
    assert {item.name for item in dataclasses.fields(kind)} <= found
