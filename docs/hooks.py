"""What mkdocs is told besides mkdocs.yml: pages of the repository that are pages of the manual too, and links to the repository's files."""

import os
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent
REPOSITORY = "https://github.com/distprune/distprune"
# File of the repository -> page of the manual: one source, which reads where it lies as well.
PAGES = {
    "cluster/README.md": "cluster.md",
    "benchmarks/RESULTS.md": "benchmarks.md",
    "ARCHITECTURE.md": "architecture.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}
_SOURCES = {page: source for source, page in PAGES.items()}
_FENCED = re.compile(r"(^```.*?^```$)", re.MULTILINE | re.DOTALL)
_LIST = re.compile(r"^(?![-|#>\s])(.+)\n(?=- )", re.MULTILINE)
_LINK = re.compile(r"(\]\()([^)#\s:]+)((?:#[^)\s]*)?\))")


def on_files(files: Any, config: Any) -> Any:
    for source, page in PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Links are written relative to the file that they stand in, as a reader of the repository follows them."""
    name = page.file.src_uri
    source = _SOURCES.get(name, f"docs/{name}")

    def replaced(found: re.Match[str]) -> str:
        return f"{found[1]}{target(found[2], source, name)}{found[3]}"

    return _apart(_LINK.sub(replaced, markdown))


def _apart(markdown: str) -> str:
    """With an empty line before each list: elsewhere one begins without, here it would go on with the paragraph."""
    pieces = _FENCED.split(markdown)
    return "".join(piece if index % 2 else _LIST.sub(r"\1\n\n", piece) for index, piece in enumerate(pieces))


def target(link: str, source: str, page: str) -> str:
    """A link of the repository's file `source` on the page that it becomes; one that leads nowhere stays, and mkdocs says so."""
    path = os.path.normpath(os.path.join(os.path.dirname(source), link))
    inside = PAGES.get(path, path.removeprefix("docs/") if path.startswith("docs/") else None)
    if inside is not None:
        return os.path.relpath(inside, os.path.dirname(page) or ".")
    if path.startswith("..") or not (ROOT / path).exists():
        return link
    return f"{REPOSITORY}/{'tree' if (ROOT / path).is_dir() else 'blob'}/main/{path}"
