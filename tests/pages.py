"""The pages that people read, and what their code blocks hold: commands, programs and files.

A block is fenced, or indented by four spaces. One that cannot run or be read here says why in a comment in the line above it, which only
the source shows: `<!-- not run: it needs a cluster -->`. A block that begins with `# name.py` or `# name.yaml` is that file.
"""

import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import typer
from toys import REPOSITORY

from distprune.cli.commands import app

_FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
_INDENTED = re.compile(r"(?:^|(?<=\n\n))((?:    \S.*\n|    \n)+)", re.MULTILINE)
_MARK = re.compile(r"<!-- not run: (.+) -->\n\Z")
_SCRIPT = "cluster/local_two_nodes.sh"


@dataclass(frozen=True)
class Block:
    """A block of code on a page."""

    page: str
    language: str  # "" for an indented one
    text: str
    skipped: str  # why it is not run, "" if it is

    @property
    def file(self) -> str:
        """The file that it is, "" for none."""
        found = re.match(r"# (\w+\.(?:py|yaml))\n", self.text)
        return found[1] if found else ""

    def __str__(self) -> str:
        return f"{self.page}: {' '.join(self.text.split())[:60]}"


def pages() -> list[str]:
    """All pages, from the root of the repository."""
    docs = sorted(path.relative_to(REPOSITORY).as_posix() for path in (REPOSITORY / "docs").rglob("*.md"))
    return ["README.md", "CONTRIBUTING.md", "ARCHITECTURE.md", "cluster/README.md", *docs]


def read(page: str) -> str:
    """A page's text."""
    return (REPOSITORY / page).read_text()


def blocks(page: str, text: str | None = None) -> Iterator[Block]:
    """The code blocks of a page, fenced ones first."""
    text = read(page) if text is None else text
    for found in _FENCE.finditer(text):
        mark = _MARK.search(text[: found.start()])
        body = re.sub(rf"^{found[1]}", "", found[3], flags=re.MULTILINE)
        yield Block(page, found[2], body, mark[1] if mark else "")
    for found in _INDENTED.finditer(_FENCE.sub("", text)):
        yield Block(page, "", re.sub(r"^    ", "", found[1], flags=re.MULTILINE), "")


def commands(page: str, text: str | None = None) -> Iterator[list[str]]:
    """Commands of a page's blocks in words; those that are to be run elsewhere are commands, too."""
    for block in blocks(page, text):
        if block.language not in ("bash", ""):
            continue
        for line in block.text.replace("\\\n", " ").splitlines():
            for part in line.split(" && "):
                if not block.language and not re.match(r"(uv|pip|distprune|python|ray|git|cluster/|\$)\b", part.strip()):
                    continue  # indented prose and formulas
                if words := shlex.split(part, comments=True):
                    yield words
                    if words[:2] == [_SCRIPT, "on"]:
                        yield words[3:]
                    if words[:2] == ["ray", "exec"]:
                        yield shlex.split(words[3])


def mentions(page: str) -> set[str]:
    """Commands of distprune in running text, where arguments may be left out."""
    return set(re.findall(r"`(?:uv run )?distprune ([a-z][^`]*)`", _FENCE.sub("", read(page))))


def check(words: Sequence[str]) -> None:
    """Raise, or exit, unless these are words that their program understands, about files that are there."""
    if words[:2] == ["uv", "run"]:
        words = list(words[2:])
        while words[0] == "--extra":
            assert words[1] in _extras(), words
            words = words[2:]
    if words[:3] == ["python", "-m", "distprune"]:
        words = words[2:]
    if words[0] == "distprune":
        _parse(typer.main.get_command(app), words[1:])
    elif words[0] == "ray":
        from ray.scripts.scripts import cli

        _parse(cli, words[1:])
    elif words[0] == _SCRIPT:
        known = re.findall(r"^#   local_two_nodes.sh (\w+)", (REPOSITORY / _SCRIPT).read_text(), re.MULTILINE)
        assert words[1] in known, words
    elif words[0] == "pip":
        for extras in re.findall(r"(?:distprune|\.)\[([\w,]+)\]", " ".join(words)):
            assert set(extras.split(",")) <= _extras(), words
    for word in words:
        if re.match(r"(cluster|configs|benchmarks|examples)/", word):
            assert (REPOSITORY / word).exists(), word


def check_mention(text: str) -> None:
    """Raise unless a command of running text has a known name and known options."""
    name, *words = text.split()
    known = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    assert name in known, text
    options = {option for parameter in known[name].params for option in (*parameter.opts, *parameter.secondary_opts)} | {"--help"}
    assert {word.partition("=")[0] for word in words if word.startswith("--")} <= options, text


def _extras() -> set[str]:
    import tomllib

    return set(tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["optional-dependencies"])


def _parse(command: Any, words: Sequence[str]) -> None:
    if hasattr(command, "commands"):
        if words and words[0] == "--help":
            return
        assert words[0] in command.commands, words
        _parse(command.commands[words[0]], words[1:])
    else:
        command.make_context(command.name, list(words))
