"""`distprune report`: the page, a page that follows a search, and files of each figure; a search leaves its page behind."""

import csv
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from made_runs import fronted, reports, run_folder, trial, usual

from distprune import api
from distprune.cli import main
from distprune.errors import UserError
from distprune.report import page, watch
from distprune.result import Result
from distprune.search import driver
from distprune.store import files
from distprune.store.folder import RunFolder
from distprune.store.reports import to_parquet
from distprune.store.trials import write_trials

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.fixture(autouse=True)
def light(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages without the library that draws: it is 5 MB."""
    monkeypatch.setattr(page, "get_plotlyjs", lambda: "/* plotly */")


def test_it_prints_the_table_writes_the_page_and_says_where(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run_folder(tmp_path / "run", usual())
    assert main(["report", str(folder)]) == 0
    output = capsys.readouterr().out
    assert f"Pareto front of {folder}"[:40] in output and f"Page: {folder.report_html}" in output
    assert "<title>run · distprune</title>" in folder.report_html.read_text()
    assert not [path for path in folder.path.iterdir() if path.name.startswith(".report")], "nothing is left beside it"
    assert Result(folder.path).report() == folder.report_html


def test_each_figure_is_a_table_whether_or_not_images_can_be_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run_folder(tmp_path / "run", rows := usual())
    monkeypatch.setitem(sys.modules, "kaleido", None)
    assert main(["report", str(folder), "--to", str(tmp_path / "out")]) == 0
    assert 'No images: they take kaleido. Install it: pip install "distprune[images]"' in capsys.readouterr().out
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {f"{name}.csv" for name in ("front", "curves", "paradigms", "importance", "layers", "compute", "failures")}
    with open(tmp_path / "out" / "front.csv", newline="") as file:
        found = {int(row["trial"]): row for row in csv.DictReader(file)}
    finished = [row for row in rows if row["ended"] == "finished"]
    assert {number: (float(row["objective"]), row["front"] == "True") for number, row in found.items()} == {
        row["number"]: (row["objective"], row["pareto"]) for row in finished
    }
    with open(tmp_path / "out" / "curves.csv", newline="") as file:
        assert len(list(csv.DictReader(file))) == sum(len(reports(row)) for row in rows)


@pytest.mark.skipif(BROWSER is None, reason="no Chrome or Chromium on this machine")
def test_each_figure_is_an_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("kaleido")
    monkeypatch.setenv("BROWSER_PATH", str(BROWSER))
    folder = run_folder(tmp_path / "run", fronted([trial(number) for number in range(4)]))
    Result(folder.path).report(to=tmp_path / "out")
    images = {path.stem: path.read_bytes() for path in (tmp_path / "out").glob("*.png")}
    assert images.keys() == {"front", "curves", "paradigms", "layers", "compute"}
    assert all(image.startswith(b"\x89PNG") and len(image) > 5000 for image in images.values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{run}", "--to", "{full}"], "--to must be a new or empty folder, {full} exists already"),
        (["{run}", "--to", "{full}", "--watch"], "--to is for a search as it is now: leave --watch out"),
        (["{full}", "--watch"], "{full} is not a run folder: it has no search.yaml"),
        (["{empty}"], "{empty} has no trials yet"),
    ],
)
def test_mistakes_are_one_line_and_nothing_is_written(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    places = {
        "run": run_folder(tmp_path / "run", usual()).path,
        "full": tmp_path / "full",
        "empty": run_folder(tmp_path / "empty", []).path,
    }
    assert main(["report", *(argument.format(**places) for argument in arguments)]) == 2
    output = capsys.readouterr()
    assert message.format(**places) in output.err and output.err.count("\n") == 1
    assert not list(tmp_path.rglob("report.html")) and [path.name for path in (tmp_path / "full").iterdir()] == ["x"]


def test_a_page_that_cannot_be_written_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run_folder(tmp_path / "run", usual())

    def full(descriptor: int, data: Any) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "_write", full)
    assert main(["report", str(folder)]) == 0
    output = capsys.readouterr().out
    assert f"Pareto front of {folder}"[:40] in output
    assert output.splitlines()[-1].startswith(f"No page: {folder.report_html} cannot be written: No space left on device.")


def test_a_folder_that_cannot_be_written_has_its_figures_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run_folder(tmp_path / "run", usual())
    monkeypatch.setitem(sys.modules, "kaleido", None)
    _unwritable(monkeypatch)
    assert main(["report", str(folder), "--to", str(tmp_path / "command")]) == 0
    assert "7 tables: " in (output := capsys.readouterr().out) and "No page: " in output
    with pytest.raises(UserError, match="cannot be written: Read-only file system"):
        Result(folder).report(to=tmp_path / "python")
    names = [{path.name for path in (tmp_path / to).iterdir()} for to in ("command", "python")]
    assert names[0] == names[1] and "front.csv" in names[0]


def _unwritable(monkeypatch: pytest.MonkeyPatch, fails: Callable[[], bool] = lambda: True) -> None:
    """Pages cannot be written while `fails`."""
    publish = files.publish

    def refuse(path: Path, data: bytes, **options: Any) -> None:
        if Path(path).name == "report.html" and fails():
            raise OSError(30, "Read-only file system")
        publish(path, data, **options)

    monkeypatch.setattr(files, "publish", refuse)


def test_following_goes_on_after_a_page_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = run_folder(tmp_path / "run", usual(), ended=False)
    naps: list[float] = []
    monkeypatch.setattr(watch.time, "sleep", naps.append)
    _unwritable(monkeypatch, lambda: len(naps) in (1, 2, 4))
    warned: list[str] = []
    heard: list[int] = []

    def listen(path: Path, live: bool) -> None:
        heard.append(len(naps))
        if len(heard) == 3:
            to_parquet(folder.reports, folder.reports_parquet)

    assert watch.watch(folder.path, listen=listen, warn=warned.append) == folder.report_html
    assert heard == [0, 3, 5, 6] and len(warned) == 2, "once for each time that it stopped being possible"
    naps[:] = [0.0]
    with pytest.raises(UserError, match="cannot be written"):
        watch.watch(folder.path, listen=listen)


def test_a_watched_page_is_written_anew_until_the_search_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = usual(30)
    folder = run_folder(tmp_path / "run", [{**row, "ended": "running"} if row["number"] == 29 else row for row in rows], ended=False)
    driver = ExitStack()
    driver.enter_context(files.lock(folder.path))
    seen: list[tuple[bool, int]] = []

    def sleep(seconds: float) -> None:
        """What happens between two pages: trials end, then the search."""
        text = folder.report_html.read_text()
        assert text.endswith("</html>\n") and seconds > 0
        seen.append(('"live":null' not in text, int(re.findall(r"running, (\d+) ", text)[0])))
        if len(seen) == 1:
            write_trials(folder.trials, rows)
        else:
            to_parquet(folder.reports, folder.reports_parquet)
            driver.close()

    monkeypatch.setattr(watch.time, "sleep", sleep)
    assert main(["report", str(folder), "--watch"]) == 0
    assert seen == [(True, 29), (True, 30)]
    text = folder.report_html.read_text()
    assert '"live":null' in text and "finished, 30 trials" in text
    output = capsys.readouterr().out
    assert output.count("Live page:") == 1 and f"Page: {folder.report_html}" in output


def test_ctrl_c_ends_the_following_and_the_last_page_reads_itself_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = run_folder(tmp_path / "run", usual(), ended=False)

    def interrupt(seconds: float) -> Iterator[None]:
        raise KeyboardInterrupt

    monkeypatch.setattr(watch.time, "sleep", interrupt)
    assert watch.watch(folder.path, listen=lambda path, live: None) == folder.report_html
    assert '"live":null' in folder.report_html.read_text()


def test_a_search_that_ends_has_its_page_and_one_without_a_page_has_ended_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = run_folder(tmp_path / "run", usual())
    monkeypatch.setattr("distprune.search.recorded.Recorded", lambda path: path)
    monkeypatch.setattr(driver, "simulate", lambda search, **_: folder)
    value = {"name": "x", "recipe": {"model": "mlp", "data": "digits"}}
    heard: list[tuple[str, dict[str, Any]]] = []
    result = api.search(value, simulate="anything", listen=lambda event, facts: heard.append((event, facts)))
    assert not heard and result.folder == folder and folder.report_html.is_file()
    folder.report_html.unlink()

    def fails(self: Result) -> Path:
        raise RuntimeError("no page today")

    monkeypatch.setattr(Result, "report", fails)
    result = api.search(value, simulate="anything", listen=lambda event, facts: heard.append((event, facts)))
    assert len(result.pareto()) == sum(row["pareto"] for row in usual())
    assert heard == [("report", {"message": "The search is done, but its page was not made: RuntimeError: no page today"})]


def test_the_page_of_a_copy_says_so(tmp_path: Path) -> None:
    made = run_folder(tmp_path / "run", usual())
    here = RunFolder(made.path, "s3://bucket/runs/run")
    assert Result(here).report() == made.report_html
    text = made.report_html.read_text()
    assert "This page is of a copy of the run" in text and "export s3://bucket/runs/run --trial" in text
