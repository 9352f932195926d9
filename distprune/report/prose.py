"""Docstrings as Markdown, for the pages of the manual that are generated."""

import inspect
import re
from collections.abc import Iterator
from typing import Any

FORMULA = "Formula:"


def parts(thing: Any) -> tuple[str, str, list[str]]:
    """(first line, formula, paragraphs) of a docstring; the formula is the indented block below a line `Formula:`, "" if there is none."""
    first, _, rest = (inspect.getdoc(thing) or "").partition("\n")
    formula, paragraphs = "", []
    for paragraph in re.split(r"\n\s*\n", rest.strip("\n")):
        if paragraph.startswith(f"{FORMULA}\n"):
            formula = inspect.cleandoc(paragraph.removeprefix(FORMULA))
        elif paragraph.strip():
            paragraphs.append(paragraph)
    return first, formula, paragraphs


def markdown(thing: Any) -> Iterator[str]:
    """The docstring in blocks of Markdown: first line, formula, paragraphs."""
    first, formula, paragraphs = parts(thing)
    yield text(first)
    if formula:
        yield f"```text\n{formula}\n```"
    for paragraph in paragraphs:
        lines = paragraph.splitlines()
        if lines[0].startswith(">>>"):
            yield f"```pycon\n{paragraph}\n```"
        elif all(line.startswith("    ") for line in lines):
            yield f"```text\n{inspect.cleandoc(paragraph)}\n```"
        else:
            yield text(" ".join(line.strip() for line in lines))


def text(plain: str) -> str:
    """Plain text as Markdown: what would be markup is escaped, `code` stays, arXiv numbers become links."""
    pieces = re.split(r"(`[^`]*`)", plain)
    for index in range(0, len(pieces), 2):
        piece = re.sub(r"([*<])|(?<!\w)(_)|(_)(?!\w)", lambda found: f"\\{found[0]}", pieces[index])
        pieces[index] = re.sub(r"arXiv:(\d{4}\.\d{4,5})", r"[arXiv:\1](https://arxiv.org/abs/\1)", piece)
    return "".join(pieces)


def row(cells: list[str]) -> str:
    """A row of a table."""
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def table(head: list[str], rows: list[list[str]]) -> str:
    """A table."""
    return "\n".join([row(head), "|---" * len(head) + "|", *map(row, rows)])
