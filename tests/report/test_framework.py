"""The list of what is registered leaves nothing out; the pages of it are compared in tests/docs."""

from pathlib import Path

import pytest

from distprune.cli import main
from distprune.report.framework import tables


def test_the_list_shows_names_options_ranges_paper_and_file_of_every_entry(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list"]) == 0
    text = capsys.readouterr().out
    for table in tables().values():
        for entry in table:
            assert f"  {entry.name} " in text and entry.paper in text and Path(entry.file).name in text
            assert all(f"{name}" in text for name in entry.options)
    assert "share = 0.2 (searched over [0.2, 0.8])" in text and "weights = 'rewind' (searched over rewind, inherit" in text
