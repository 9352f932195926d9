"""A page says what is in the run folder, for every state that a search can be in, and nothing in it can run or be fetched."""

import base64
import fcntl
import hashlib
import json
import os
import platform
import re
import time
from contextlib import nullcontext
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from made_runs import Row, dense, failed, fronted, reports, run_folder, stopped, trial, usual
from plotly.offline import get_plotlyjs

from distprune.report import page
from distprune.report.data import Data
from distprune.report.drawn import Drawn, thinned
from distprune.result import Result
from distprune.store import files
from distprune.store.folder import RunFolder
from distprune.store.trials import write_trials

EVIL = "<script>alert('x')</script><img src=x onerror=alert(1)> <b>&amp; %{x}"
FACTS = 1  # which of the scripts is none, but the data of the figures
VOID = {"meta", "img", "br", "input", "link", "hr"}


class Elements(HTMLParser):
    """The elements of a page, with their attributes, and the text outside of scripts and styles."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.inside: list[str] = []
        self.text = ""
        self.scripts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in VOID:
            self.inside.append(tag)
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.inside.pop() == tag, f"</{tag}> closes another element"

    def handle_data(self, data: str) -> None:
        if self.inside and self.inside[-1] == "script":
            self.scripts[-1] += data
        elif not self.inside or self.inside[-1] != "style":
            self.text += data


@pytest.fixture(autouse=True)
def light(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Most pages here are without the library that draws: it is 5 MB."""
    if request.function not in (test_only_the_scripts_of_the_page_can_run, test_ten_thousand_trials_are_thinned_and_the_page_says_so):
        monkeypatch.setattr(page, "get_plotlyjs", lambda: "/* plotly */")


def _page(folder: RunFolder) -> tuple[str, dict[str, Drawn]]:
    data = Data.read(folder)
    drawn = page.draw(data)
    return page.page(data, drawn), {one.name: one for one in drawn}


def test_the_front_table_is_the_front(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run", usual())
    text, drawn = _page(folder)
    section = text[text.index('<section id="front">') : text.index('<section id="curves">')]
    rows = [
        [re.sub("<[^>]*>", "", cell) for cell in re.findall("<td[^>]*>(.*?)</td>", row)]
        for row in re.findall("<tr>(.*?)</tr>", section)[1:]
    ]
    front = Result(folder).pareto()
    assert [[row[0], *row[2:4]] for row in rows] == [[str(t.number), f"{t.row['objective']:.4f}", f"{t.row['test']:.4f}"] for t in front]
    assert all(f"export {folder} --trial {t.number} --to exported/run-{t.number}" in row[1] for t, row in zip(front, rows, strict=True))
    assert all(f"replay {folder} {t.number}" in row[1] for t, row in zip(front, rows, strict=True))
    chart = drawn["front"].figure
    assert chart is not None
    points = next(trace for trace in chart.data if trace.name == "front, on validation")
    assert list(points.x) == [pytest.approx(1 - t.row["sparsity"]) for t in reversed(front)] == sorted(points.x)
    assert list(points.y) == [t.row["objective"] for t in reversed(front)] == sorted(points.y), "of two, the larger is the better"


def test_whatever_comes_from_files_is_text(tmp_path: Path) -> None:
    rows = [
        trial(0, paradigm=EVIL, recipe=json.dumps({"paradigm": {"import": EVIL}, "criterion": EVIL})),
        *(trial(n) for n in range(1, 24)),
    ]
    rows = fronted([*rows, failed(24, EVIL, paradigm=EVIL), stopped(25, reason=EVIL)])
    rows[0] |= {"pareto": True, "layers": json.dumps({EVIL: 5, "b": 7}), "parameters": json.dumps({EVIL: EVIL})}
    folder = run_folder(
        tmp_path / "run", rows, name=EVIL, seed=EVIL, recipe={"model": EVIL, "data": EVIL}, facts={"environment": {EVIL: EVIL}}
    )
    sanity = {"format": "distprune.sanity/1", "name": EVIL, "objective": EVIL, "rule": EVIL, "seeds": [0], "verdict": {"text": EVIL}}
    (folder.path / "checks.json").write_text(json.dumps({**sanity, "rows": [{"variant": EVIL, "values": [0.5], "mean": 0.5}]}))
    text, _ = _page(folder)
    found = Elements(text)
    tags = [tag for tag, _ in found.found]
    assert tags.count("script") == 5 and not {"img", "iframe", "link", "b", "object", "form"} & set(tags)
    assert all(not name.startswith("on") for _, attributes in found.found for name in attributes)
    assert all((attributes.get("href") or "#").startswith("#") and "src" not in attributes for _, attributes in found.found)
    assert found.text.count(EVIL) >= 6, "and it is shown letter by letter"
    figures = json.loads(found.scripts[FACTS])["figures"]
    assert "<script>" not in json.dumps(figures) and "<img" not in json.dumps(figures) and "&lt;script&gt;" in json.dumps(figures)


def test_only_the_scripts_of_the_page_can_run(tmp_path: Path) -> None:
    found = Elements(_page(run_folder(tmp_path / "run", usual()))[0])
    policy = next(attributes["content"] or "" for _, attributes in found.found if attributes.get("http-equiv") == "Content-Security-Policy")
    hashes = [
        base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for place, script in enumerate(found.scripts) if place != FACTS
    ]
    allowed = dict(part.strip().split(" ", 1) for part in policy.split(";"))
    assert allowed["default-src"] == "'none'" and allowed["script-src"].split() == [f"'sha256-{one}'" for one in hashes]
    assert sum(script == get_plotlyjs() for script in found.scripts) == 1


def _violated(number: int) -> Row:
    return trial(number, violated=["budget"])


SIMULATED = {"simulated": {"run": "runs/x", "usable": 12, "workers": 4, "clock": "cost", "time": 5.0}}
SOME, MOST = {"front", "curves", "paradigms", "compute"}, {"front", "curves", "paradigms", "importance", "layers", "compute", "failures"}
LIMITED = {"minimize": ["params", "flops"], "budget": [{"cost": "params", "most": 0.4}], "floor": 0.5}
# rows, whether the search has ended, search, facts; which figures are drawn, and what the captions of those that are not say.
STATES: dict[str, tuple[list[Row], bool, dict[str, Any], dict[str, Any], set[str], dict[str, str]]] = {
    "nothing": ([], False, {}, {}, set(), {"front": "No trial has finished yet", "curves": "No trial has reported yet."}),
    "one": (fronted([trial(0)]), True, {}, {}, {*SOME, "layers"}, {"importance": "there is one: too few"}),
    "running": ([stopped(0), trial(1, ended="running", objective=None)], False, {}, {}, SOME - {"front"}, {}),
    "all failed": (
        [failed(0, "x"), failed(1, "y", ended="nan")], True, {}, {}, {"compute", "failures"},
        {"front": "No trial finished", "paradigms": "nothing to compare", "layers": "No trial is on the front"},
    ),
    "dense only": (
        fronted([dense(0), dense(1, objective=0.94)]), True, {}, {}, {"front", "curves", "layers", "compute"},
        {"paradigms": "No pruned trial has been scored", "failures": "No trial failed."},
    ),
    "no front": ([_violated(0), _violated(1)], True, {"budget": {"cost": "params", "most": 0.1}}, {}, SOME, {}),
    "simulated": (
        usual(), True, {}, SIMULATED, MOST - {"compute"},
        {"sanity": "no masks to check", "compute": "The search is simulated: nothing was run."},
    ),
    "one objective": (usual(), True, {"minimize": []}, {}, MOST, {}),
    "several": (usual(), True, LIMITED, {}, MOST, {"sanity": "No mask was checked"}),
    "no rungs": (usual(), True, {"scheduler": "none"}, {"rungs": []}, MOST, {}),
}  # fmt: skip


@pytest.mark.parametrize("state", STATES)
def test_every_state_of_a_search_has_its_page(state: str, tmp_path: Path) -> None:
    rows, ended, search, facts, drawn_ones, captions = STATES[state]
    text, drawn = _page(run_folder(tmp_path / "run", rows, ended=ended, facts=facts, **search))
    assert {name for name, one in drawn.items() if one.figure is not None} == drawn_ones
    assert all(phrase in drawn[name].caption for name, phrase in captions.items())
    assert all(one.caption.endswith((".", "sanity.json")) and "nan" not in one.caption.split() for one in drawn.values())
    found = Elements(text)
    assert not found.inside, "every element is closed"
    assert ("Simulated: trials were looked up" in found.text) == bool(facts.get("simulated"))
    assert ("Samples run" in found.text) != ("Samples looked up" in found.text) == bool(facts.get("simulated"))
    assert ("distprune export" in found.text) == (state not in ("nothing", "running", "all failed", "no front", "simulated"))


def test_a_caption_says_the_numbers_of_its_figure(tmp_path: Path) -> None:
    _, drawn = _page(run_folder(tmp_path / "run", rows := usual(objective=0.94)))
    front = [row for row in rows if row["pareto"]]
    top = max(front, key=lambda row: row["objective"])
    near = min((row for row in front if row["objective"] >= 0.99 * top["objective"]), key=lambda row: row["kept"])
    assert near is not top
    assert f"Trial {near['number']} ({near['paradigm']}) keeps {1 - near['sparsity']:.1%}" in drawn["front"].caption
    count = sum(row["ended"] == "stopped" for row in rows)
    assert drawn["curves"].caption.startswith(f"{count} trials of 40 were stopped: {count} at rung 1 (1 k samples).")
    assert "billed 25.0% of what a finished one did" in drawn["curves"].caption
    bad = sum(row["ended"] == "error" for row in rows)
    assert drawn["failures"].caption.startswith(f"{bad} trials of 40 failed, {bad / 40:.1%}; the most frequent class is error")


def test_ten_thousand_trials_are_thinned_and_the_page_says_so(tmp_path: Path) -> None:
    rows = usual(10_000)
    for place, row in enumerate(rows):
        row["pareto"] = row["ended"] == "finished" and place % 25 == 0
    text, drawn = _page(run_folder(tmp_path / "run", rows, curve=lambda row: reports_of_every(row, 20)))
    assert len(text.encode()) < len(get_plotlyjs().encode()) + 8_000_000
    on = sum(row["pareto"] for row in rows)
    others = sum(row["ended"] == "finished" for row in rows) - on
    assert f"1,500 of {others:,} finished trials beside the front are drawn, evenly by objective" in drawn["front"].note
    assert re.search(r"\d+ of [\d,]+ curves are drawn", drawn["curves"].note)
    assert f"40 of the front's {on:,} trials are shown." in drawn["layers"].note
    assert "400 of " in drawn["importance"].note and f"25 of the front's {on:,} trials, evenly" in Elements(text).text
    assert len(drawn["front"].rows) == on + others, "tables have them all"
    for one in drawn.values():
        points = sum(len(trace.x) for trace in one.figure.data if trace.x is not None) if one.figure else 0  # type: ignore[union-attr]
        assert points <= 6000, one.name


def reports_of_every(row: Row, nth: int) -> list[Row]:
    """Reports of a part of the trials, so that thousands are made in a moment."""
    return reports(row) if row["number"] % nth == 0 else []


@pytest.mark.parametrize("most", [1, 2, 5, 10, 11])
def test_thinning_keeps_order_ends_and_number(most: int) -> None:
    found = thinned(range(10), most)
    assert len(found) == min(most, 10) and found == sorted(set(found)) and found[0] == 0
    assert most == 1 or found[-1] == 9


def test_a_live_page_says_when_it_was_written_and_another_does_not(tmp_path: Path) -> None:
    data = Data.read(run_folder(tmp_path / "run", usual()))
    for live, expected in ((True, {"every": page.EVERY_S, "written": 7.0}), (False, None)):
        found = Elements(page.page(data, page.draw(data)[:1], live=live, now=7.0))
        assert json.loads(found.scripts[FACTS])["live"] == expected


def _aged(folder: RunFolder, ages: dict[str, float]) -> Data:
    for path in folder.path.iterdir():
        os.utime(path, (0, 0))
    for name, age in ages.items():
        os.utime(folder.path / name, (time.time() - age,) * 2)
    return Data.read(folder)


HERE, ELSEWHERE = "here", "1 on another.invalid"  # processes that live, and drive nothing
CLOSED, RESUMED = {"reports.arrows": 5000.0, "reports.parquet": 4000.0}, {"reports.arrows": 4.0, "reports.parquet": 5.0}


@pytest.mark.parametrize(
    ("ages", "lock", "running", "told"),
    [
        (CLOSED, None, False, "finished, 40 trials"),
        (CLOSED, HERE, False, "finished, 40 trials"),
        (CLOSED, "held", True, "running, 40 trials"),  # resumed, and nothing has reported yet
        (RESUMED, "held", True, "running, 40 trials"),
        (RESUMED, ELSEWHERE, True, "running, 40 trials"),
        ({"reports.arrows": 5.0}, HERE, False, "interrupted, 40 trials"),  # its driver is gone, whatever lives under its number
        ({"reports.arrows": 5.0}, "held", True, "running, 40 trials"),
        ({"reports.arrows": 5.0}, ELSEWHERE, True, "running, 40 trials"),
        ({"reports.arrows": 301.0}, ELSEWHERE, True, "last heard 5 min ago, 40 trials"),  # between two reports
        ({"reports.arrows": 301.0}, None, True, "last heard 5 min ago, 40 trials"),
        ({"reports.arrows": 3 * 3600.0}, ELSEWHERE, False, "last heard 3 hours ago, 40 trials"),
    ],
)
def test_a_search_runs_while_its_driver_holds_it(
    ages: dict[str, float], lock: str | None, running: bool, told: str, tmp_path: Path
) -> None:
    folder = run_folder(tmp_path / "run", usual(), ended="reports.parquet" in ages)
    if lock not in (None, "held"):
        (folder.path / ".lock").write_text(f"{os.getpid()} on {platform.node()}" if lock == HERE else str(lock))
    with files.lock(folder.path) if lock == "held" else nullcontext():
        data = _aged(folder, ages)
    assert data.running is running
    text = page.page(data, [])
    assert f'id="state">{told}</span>' in text
    assert ("If it is not at work on another machine, go on with: " in text) == (told.startswith("last") and not running)


def test_a_search_at_a_url_is_waited_for(tmp_path: Path) -> None:
    here = RunFolder(run_folder(tmp_path / "run", usual(), ended=False).path, "s3://bucket/runs/run")
    for age, running, told in ((5, True, "running"), (600, True, "last heard 10 min ago"), (1000, False, "last heard 17 min ago")):
        data = _aged(here, {"trials.parquet": age})
        assert data.running is running and f'id="state">{told}, ' in page.page(data, [])


def test_to_ask_after_a_driver_does_not_keep_one_from_starting(tmp_path: Path) -> None:
    with open(tmp_path / ".lock", "w") as asking:
        fcntl.flock(asking, fcntl.LOCK_SH)
        naps: list[float] = []

        def nap(seconds: float) -> None:
            naps.append(seconds)
            fcntl.flock(asking, fcntl.LOCK_UN)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(files, "_sleep", nap)
            with files.lock(tmp_path):
                assert files.is_locked(tmp_path) is True and len(naps) == 1
    assert files.is_locked(tmp_path) is False


def test_a_table_that_is_replaced_while_it_is_read_is_read_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = run_folder(tmp_path / "run", rows := usual(30))
    read_schema = pq.read_schema

    def replaced(source: Any) -> Any:
        found = read_schema(source)
        write_trials(folder.trials, [trial(0)])  # what a driver does at any time
        return found

    monkeypatch.setattr(pq, "read_schema", replaced)
    assert [row["number"] for row in Data.read(folder).rows] == [row["number"] for row in rows]
    monkeypatch.undo()
    assert len(Data.read(folder).rows) == 1
