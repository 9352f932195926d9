"""The manual is built without a warning, leads nowhere that is not there, and loads nothing from elsewhere."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from toys import REPOSITORY


def _build(to: Path, config: Path = REPOSITORY / "mkdocs.yml") -> subprocess.CompletedProcess[str]:
    # Not --quiet, which hides warnings from --strict, too.
    program = [sys.executable, "-m", "mkdocs", "build", "--strict", "--config-file", str(config), "--site-dir", str(to)]
    return subprocess.run(program, capture_output=True, text=True, check=False, cwd=config.parent)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built manual; links and anchors are checked by mkdocs, which ends with an error where one leads nowhere."""
    folder = tmp_path_factory.mktemp("site")
    done = _build(folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_every_page_is_in_the_manual(site: Path) -> None:
    pages = {path.relative_to(site).with_suffix("").as_posix() for path in site.rglob("*.html")}
    sources = {path.relative_to(REPOSITORY / "docs").with_suffix("").as_posix() for path in (REPOSITORY / "docs").rglob("*.md")}
    assert sources | {"cluster", "benchmarks", "architecture", "contributing", "changelog"} <= pages
    menu = (site / "index.html").read_text()
    assert all(f'href="{page}.html"' in menu for page in sources - {"index"})


def test_nothing_is_loaded_from_elsewhere(site: Path) -> None:
    loads = re.compile(r"""<(?:script|img|link|iframe|source|video)\b[^>]*?\b(?:src|href)=["']?((?:https?:)?//[^"'\s>]+)""")
    for page in site.rglob("*.html"):
        text = page.read_text()
        assert not loads.findall(text), page
        assert "mermaid" not in text, f"{page}: its program would come from elsewhere"
    for style in site.rglob("*.css"):
        assert not re.search(r"""(?:url\(["']?|@import ["'])(?:https?:)?//""", style.read_text()), style


def test_links_to_files_of_the_repository_lead_to_some(site: Path) -> None:
    found = {
        link
        for page in site.rglob("*.html")
        for link in re.findall(r'href="https://github.com/distprune/distprune/\w+/main/([^"#]+)', page.read_text())
    }
    assert found and [link for link in found if not (REPOSITORY / link).exists()] == []


def test_no_list_is_swallowed_by_the_paragraph_before_it(site: Path) -> None:
    """Markdown of the repository's host begins a list anywhere, that of the manual after an empty line."""
    for page in site.rglob("*.html"):
        for paragraph in re.findall(r"<p>(.*?)</p>", page.read_text(), re.DOTALL):
            assert not re.search(r"\n(?:- |\d\. |\| )", paragraph), (page, paragraph[:200])


def test_links_that_lead_nowhere_are_errors(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "index.md").write_text("# Here\n\n[a](nowhere.md) [b](index.md#nothing) [c](../no.py) [d](index.md#here)\n")
    validation = re.search(r"^validation:\n(?:  .*\n)+", (REPOSITORY / "mkdocs.yml").read_text(), re.MULTILINE)
    assert validation
    (tmp_path / "mkdocs.yml").write_text(f"site_name: x\ntheme: mkdocs\nplugins: []\n{validation[0]}")
    done = _build(tmp_path / "site", tmp_path / "mkdocs.yml")
    said = done.stdout + done.stderr
    assert done.returncode != 0 and all(target in said for target in ("nowhere.md", "#nothing", "../no.py")) and "#here" not in said
