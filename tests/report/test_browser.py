"""The page in a browser, at the width of a desk and of a hand, light and dark."""

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from made_runs import failed, fronted, run_folder, trial, usual

from distprune.report import page
from distprune.report.data import Data
from distprune.store.folder import RunFolder

EVIL = "<img src=https://example.invalid/x onerror=alert(1)><script>alert(1)</script><a href='https://example.invalid'>x</a>"
DESK, HAND = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
BROWSER = shutil.which("chromium") or shutil.which("google-chrome")

pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chrome or Chromium on this machine")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with api.sync_playwright() as player:
        found = player.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A run with all that a page can show, and with names and messages that want to be more than text."""
    rows = usual(40)
    rows[3] |= {"paradigm": EVIL, "recipe": json.dumps({"paradigm": EVIL}), "layers": json.dumps({EVIL: 7, "fc1.weight": 900})}
    rows[3]["pareto"] = True
    made = run_folder(tmp_path_factory.mktemp("runs") / "run", [*rows, failed(40, EVIL)], name=EVIL, minimize=["params"])
    checks = [{"variant": name, "values": [0.9, 0.8], "mean": 0.85} for name in ("as found", EVIL)]
    facts = {"format": "distprune.sanity/1", "rows": checks, "seeds": [0, 1], "verdict": {"text": EVIL}, "objective": EVIL}
    (made.path / "sanity.json").write_text(json.dumps(facts))
    data = Data.read(made)
    page.write(data, page.draw(data))
    return made


class Seen:
    """A page that was opened, and what it said and asked for."""

    def __init__(self, browser: Any, path: Path, *, size: dict[str, int], theme: str) -> None:
        hand = size is HAND
        self.context = browser.new_context(viewport=size, color_scheme=theme, is_mobile=hand, has_touch=hand)
        self.page = self.context.new_page()
        self.said: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", lambda message: self.said.append(f"{message.type}: {message.text}"))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("dialog", lambda dialog: (self.said.append(dialog.message), dialog.dismiss()))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(path.as_uri())
        self.until("[...document.querySelectorAll('.plot')].every((plot) => plot.querySelector('.main-svg'))")

    def until(self, condition: str) -> None:
        """Wait for a condition. The browser may not: the page allows no code from text, and is read again meanwhile, or is half read."""
        last: object = "false"
        for _ in range(600):
            try:
                if self.page.evaluate(condition):
                    return
            except Exception as error:
                last = error
            time.sleep(0.05)
        raise AssertionError(f"{condition}: {last}")

    def points(self) -> dict[str, list[int]]:
        """Of each plot: how many elements each of its traces was drawn with."""
        return dict(
            self.page.evaluate(
                "[...document.querySelectorAll('.plot')].map((plot) => [plot.id, plot._fullData.map((trace) => "
                "(trace.z ? trace.z.flat() : [...(trace.x || [])]).filter((value) => value !== null).length)])"
            )
        )


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("size", [DESK, HAND], ids=["desk", "hand"])
def test_every_plot_has_data_nothing_is_wrong_and_nothing_is_fetched(
    browser: Any, folder: RunFolder, size: dict[str, int], theme: str
) -> None:
    seen = Seen(browser, folder.report_html, size=size, theme=theme)
    assert not seen.said, seen.said
    assert seen.asked == [folder.report_html.as_uri()]
    points = seen.points()
    names = ("front", "curves", "paradigms", "importance", "layers", "compute", "failures", "sanity")
    assert points.keys() == {f"plot-{name}" for name in names} and all(all(counts) for counts in points.values())
    drawn = seen.page.evaluate(
        "[...document.querySelectorAll('.plot')].map((p) => p.querySelectorAll('.point, .points path, .hm image, .lines path').length)"
    )
    assert all(drawn)
    assert seen.page.evaluate("document.documentElement.scrollWidth") <= size["width"], "nothing is wider than the screen"
    ink, paper = seen.page.evaluate(
        "[getComputedStyle(document.body).color, getComputedStyle(document.querySelector('.plot .main-svg')).backgroundColor]"
    )
    bright = [sum(map(int, colour[colour.index("(") + 1 : -1].split(",")[:3])) for colour in (ink, paper)]
    assert (bright[0] < bright[1]) == (theme == "light"), "the plots follow the page"
    seen.context.close()


def test_names_and_messages_are_letters_in_the_plots_too(browser: Any, folder: RunFolder) -> None:
    seen = Seen(browser, folder.report_html, size=DESK, theme="light")
    assert seen.page.evaluate("document.querySelectorAll('script').length") == 5
    assert seen.page.evaluate("document.querySelectorAll('main img, main iframe, .plot a').length") == 0
    assert EVIL in seen.page.evaluate("document.querySelector('h1').textContent")
    labels = seen.page.evaluate("[...document.querySelectorAll('#plot-paradigms .ytick')].map((tick) => tick.textContent)")
    assert any(label.startswith("<img src=https://example.invalid") for label in labels), labels
    hover = seen.page.evaluate(
        "(() => { const plot = document.getElementById('plot-front'); const trace = plot.data.findIndex((t) => t.customdata); "
        "Plotly.Fx.hover(plot, plot.data[trace].x.map((_, point) => ({ curveNumber: trace, pointNumber: point })).slice(0, 40)); "
        "return [...plot.querySelectorAll('.hovertext')].map((one) => one.textContent).join(' '); })()"
    )
    assert "keeps" in hover and "export" in hover
    assert not seen.said and seen.asked == [folder.report_html.as_uri()]
    seen.context.close()


def test_the_theme_is_the_readers_choice_and_stays(browser: Any, folder: RunFolder) -> None:
    seen = Seen(browser, folder.report_html, size=DESK, theme="light")
    paper = "getComputedStyle(document.querySelector('.plot .main-svg')).backgroundColor"
    before = seen.page.evaluate(paper)
    seen.page.click("#theme")
    after = seen.page.evaluate(paper)
    assert before != after and seen.page.evaluate("document.documentElement.dataset.theme") == "dark"
    seen.page.reload()
    assert seen.page.evaluate(paper) == after
    seen.context.close()


def test_a_page_without_scripts_has_its_tables(browser: Any, folder: RunFolder) -> None:
    context = browser.new_context(java_script_enabled=False, viewport=HAND)
    still = context.new_page()
    still.goto(folder.report_html.as_uri())
    front = sum(row["pareto"] for row in Data.read(folder).rows)
    assert still.locator("#front tbody tr").count() == front
    assert still.locator("noscript").inner_text().startswith("Figures need JavaScript")
    context.close()


def test_a_live_page_reads_itself_again_at_the_same_place_and_ends_with_the_search(
    browser: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page, "EVERY_S", 0.5)
    made = run_folder(tmp_path / "run", usual(40), ended=False)

    def write(live: bool, name: str) -> None:
        data = Data.read(made)
        text = page.page(data, page.draw(data)[:2], live=live).replace("<h1>run</h1>", f"<h1>{name}</h1>")
        page.files.publish(made.report_html, text.encode())

    write(True, "first")
    seen = Seen(browser, made.report_html, size=DESK, theme="light")
    seen.until("(document.querySelector('#front details').open = true, scrollTo(0, 500), scrollY === 500)")
    write(True, "second")
    seen.until("document.querySelector('h1').textContent === 'second'")
    seen.until("scrollY === 500 && document.querySelector('#front details').open")
    write(False, "third")
    seen.until("document.querySelector('h1').textContent === 'third'")
    seen.until("scrollY === 500")
    asked = len(seen.asked)
    time.sleep(1.2)
    assert len(seen.asked) == asked >= 3, "a search that has ended is read no more"
    assert not seen.said
    seen.context.close()


def test_a_held_page_waits(browser: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "EVERY_S", 0.3)
    made = run_folder(tmp_path / "run", fronted([trial(number) for number in range(4)]), ended=False)
    data = Data.read(made)
    page.write(data, page.draw(data)[:1], live=True)
    seen = Seen(browser, made.report_html, size=DESK, theme="light")
    held = "document.getElementById('hold').textContent === 'Go on'"
    seen.until(f"{held} || (document.getElementById('hold').click(), {held})")
    asked = len(seen.asked)
    time.sleep(0.8)
    assert len(seen.asked) == asked and seen.page.evaluate(held)
    seen.context.close()


def test_a_live_page_is_given_up_for_its_age_when_it_is_read_and_not_for_how_long_it_was_open(
    browser: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page, "EVERY_S", 0.5)
    made = run_folder(tmp_path / "run", fronted([trial(number) for number in range(4)]), ended=False)
    data = Data.read(made)
    page.write(data, page.draw(data)[:1], live=True)
    seen = Seen(browser, made.report_html, size=DESK, theme="light")
    seen.until("(window.first = true, Date.now = () => 9e15, true)")  # it was held, hidden or selected for an age
    seen.until("window.first === undefined && document.getElementById('state')?.textContent === 'running, 4 trials'")
    seen.context.close()
    made.report_html.write_text(page.page(data, page.draw(data)[:1], live=True, now=time.time() - 120))
    seen = Seen(browser, made.report_html, size=DESK, theme="light")
    asked = len(seen.asked)
    assert seen.page.inner_text("#state").endswith(", no longer followed")
    time.sleep(0.7)
    assert len(seen.asked) == asked
    seen.context.close()
