"""The page about the framework is the tables as they are, and the list leaves nothing out."""

from pathlib import Path

import pytest
from toys import REPOSITORY

from distprune.cli import main
from distprune.core import registry
from distprune.report.framework import PAGE, page, tables


def test_the_page_is_generated_from_the_tables() -> None:
    assert (REPOSITORY / PAGE).read_text() == page(), "run: python -m distprune.report.framework"


def test_every_entry_is_on_the_page_in_the_picture_and_in_its_branch() -> None:
    text = page()
    picture = text.split("```mermaid")[1].split("```")[0]
    for entry in registry.paradigm:
        assert f"| `{entry.name}` |" in text
        assert entry.name == "dense" or entry.name in picture
    for axis in ("criterion", "granularity", "allocator", "regularizer"):
        assert all(f"| `{entry.name}` |" in text for entry in registry.TABLES[axis])


def test_the_list_shows_names_options_ranges_paper_and_file_of_every_entry(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list"]) == 0
    text = capsys.readouterr().out
    for table in tables().values():
        for entry in table:
            assert f"  {entry.name} " in text and entry.paper in text and Path(entry.file).name in text
            assert all(f"{name}" in text for name in entry.options)
    assert "share = 0.2 (searched in [0.2, 0.8])" in text and "weights = 'rewind' (searched: rewind | inherit" in text
