"""The README's own model, own data and YAML work as they are printed."""

import re
from pathlib import Path

import pytest
import yaml
from torch import nn
from toys import REPOSITORY

import distprune as dp

TEXT = (REPOSITORY / "README.md").read_text()


def _block(language: str, first_line: str) -> str:
    found = re.search(rf"```{language}\n({re.escape(first_line)}.*?)```", TEXT, re.DOTALL)
    assert found, first_line
    return found[1]


def test_prune_in_a_few_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 10))
    exec(_block("python", "import distprune as dp\n\nmasks"), {"model": model})
    masks = dp.Masks.load("masks.safetensors")
    assert masks.kept == 90 and sum(int(p.count_nonzero()) for n, p in model.named_parameters() if n in masks) == 90


def test_own_model_and_data_make_a_valid_search_of_at_most_15_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    Path("mine.py").write_text(_block("python", "# mine.py"))
    text = _block("yaml", "# mine.yaml")
    assert len(text.strip().splitlines()) <= 15
    Path("mine.yaml").write_text(text)
    assert dp.check("mine.yaml")[-1] == "It is valid."
    value = yaml.safe_load(text)
    outcome = dp.run({**value["recipe"], "paradigm": "at_init", "sparsity": 0.8, "allocator": "erk"})
    assert outcome.reports[-1].metrics["accuracy"] > 0.9, "stripes are easy"


def test_files_that_the_readme_names_exist() -> None:
    for name in re.findall(r"`((?:configs|benchmarks|cluster|distprune)/[\w/.]*|[A-Z]+\.md)`", TEXT):
        assert (REPOSITORY / name).exists(), name


def test_commands_that_the_readme_shows_exist() -> None:
    import typer

    from distprune.cli.commands import app

    known = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    shown = set(re.findall(r"distprune (\w+) (?:configs|runs|mine|JOB|check)", TEXT))
    assert shown and shown <= set(known)
