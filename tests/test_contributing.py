"""The example of CONTRIBUTING.md: one file, and the criterion is listed, configurable, kept to its contract and searched."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from toys import REPOSITORY


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the repository with the example's file in it."""
    folder = tmp_path_factory.mktemp("copy")
    shutil.copytree(REPOSITORY / "distprune", folder / "distprune", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(REPOSITORY / "tests", folder / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    text = (REPOSITORY / "CONTRIBUTING.md").read_text()
    found = re.search(r"<!-- example: (\S+) -->\n```python\n(.*?)```", text, re.DOTALL)
    assert found
    assert not (folder / found[1]).exists()
    (folder / found[1]).write_text(found[2])
    return folder


def _run(copy: Path, *arguments: str) -> str:
    environment = {**os.environ, "PYTHONPATH": f"{copy}{os.pathsep}{copy / 'tests'}", "RAY_AUTH_MODE": "disabled"}
    done = subprocess.run([sys.executable, *arguments], cwd=copy, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_is_listed(copy: Path) -> None:
    output = _run(copy, "-m", "distprune", "list", "criterion")
    assert "gradient" in output and "Absolute gradient |dL/dw|" in output and "batches = 1 (searched over" in output


def test_is_configurable_and_searched(copy: Path) -> None:
    program = """
from toys import BASE
from distprune.core.recipe import Recipe
from distprune.search.covering import covering
from distprune.search.space import Space
recipe = Recipe.read({**BASE, "paradigm": "at_init", "sparsity": 0.5, "criterion": {"name": "gradient", "batches": 3}})
space = Space(BASE, {}, seed=0)
print(recipe.criterion.plain(), any("gradient" in first.values() for first in covering(space)))
"""
    assert "{'name': 'gradient', 'batches': 3} True" in _run(copy, "-c", program)


def test_keeps_the_contract_of_criteria(copy: Path) -> None:
    contract = ("scoring_changes_nothing", "same_seed_same_masks_exact_count_and_nested", "bill_is_what_is_drawn")
    tests = [f"tests/core/test_criteria.py::test_{name}[gradient]" for name in contract]
    assert "3 passed" in _run(copy, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests)


@pytest.mark.ray
@pytest.mark.slow
def test_is_in_a_real_search(copy: Path, tmp_path: Path) -> None:
    from toys import BASE

    value = {
        "name": "s",
        "recipe": {**BASE, "train": {"length": "1ep", "batch_size": 32}},
        "space": {"paradigm": ["at_init"], "allocator": ["erk"], "regularizer": ["none"]},
        "limits": {"trials": 6},
        "storage": str(tmp_path),
    }
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(value))
    _run(copy, "-m", "distprune", "search", str(tmp_path / "s.yaml"))
    program = f"import distprune as dp; print(dp.Result({str(tmp_path / 's')!r}).trials['criterion'].to_pylist())"
    assert "'gradient'" in _run(copy, "-c", program)
