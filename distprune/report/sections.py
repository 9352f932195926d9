"""The sections of a page: figures with their tables, and the environment. What comes from files is escaped here."""

from collections.abc import Callable, Sequence
from html import escape
from typing import Any

from distprune.errors import command
from distprune.report.data import Data, Row
from distprune.report.drawn import Drawn, number, share, thinned
from distprune.report.figures.failures import reasons
from distprune.report.said import choice, of_trial, short_recipe

MOST_ROWS, MOST_FRONT = 50, 25  # of a table, and of the front's
_MOST_YAML = 100_000  # characters
_UNTABLED = ("curves", "failures")  # a row a report says nothing; failures have a table of their own


def figure(data: Data, drawn: Drawn) -> str:
    """A figure with its finding, what must be known to read it, and its numbers."""
    plot = ""
    if drawn.figure is not None:
        height = drawn.figure.layout.height
        plot = f'<div class="plot" id="plot-{drawn.name}" style="height:{height}px" role="img" aria-label="{escape(drawn.caption)}"></div>'
    note = f'<p class="note">{escape(drawn.note)}</p>' if drawn.note else ""
    body = _TABLES.get(drawn.name, _numbers)(data, drawn)
    return (
        f'<section id="{drawn.name}"><h2>{escape(drawn.title)}</h2><p class="lead">{escape(drawn.caption)}</p>{plot}{note}{body}</section>'
    )


def _numbers(data: Data, drawn: Drawn) -> str:
    if not drawn.rows or drawn.name in _UNTABLED:
        return ""
    shown = thinned(drawn.rows, MOST_ROWS)
    cut = f"{len(shown)} of {len(drawn.rows):,} rows; all with: {command(f'report {data.folder.quoted} --to FOLDER')}"
    numeric = [all(isinstance(row[place], int | float | None) for row in shown) for place in range(len(drawn.columns))]
    lines = [[_cell(value) for value in row] for row in shown]
    inner = table(drawn.columns, lines, numeric, caption=cut if len(shown) < len(drawn.rows) else "")
    return f"<details><summary>Numbers</summary>{inner}</details>"


def _cell(value: Any) -> str:
    if value is None:
        return "—"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return escape(
        f"{value:.4g}" if isinstance(value, float) and abs(value) < 1e5 else f"{value:,.0f}" if isinstance(value, float) else str(value)
    )


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], numeric: Sequence[bool], *, caption: str = "") -> str:
    """A table of cells that are HTML already."""
    kinds = [' class="n"' if is_number else "" for is_number in numeric]
    head = "".join(f'<th scope="col"{kind}>{escape(name)}</th>' for name, kind in zip(columns, kinds, strict=True))
    body = "".join("<tr>" + "".join(f"<td{kind}>{cell}</td>" for cell, kind in zip(row, kinds, strict=True)) + "</tr>" for row in rows)
    told = f"<caption>{escape(caption)}</caption>" if caption else ""
    return f'<div class="scroll"><table>{told}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _front(data: Data, drawn: Drawn) -> str:
    if not data.front:
        return ""
    shown = thinned(data.front, MOST_FRONT)
    costs = [name for name in data.costs if name != "params"]
    seeds = any(row["seeds"] for row in shown)
    columns = ["trial", "recipe and commands", "validation", "test", "kept", "weights", *costs, *(["over seeds"] if seeds else [])]
    rows = []
    for row in shown:
        cells = [number(row["objective"]), number(row["test"]), share(1 - row["sparsity"]), f"{row['kept']:,}"]
        cells += [share(data.cost(row, name)) for name in costs]
        cells += [_over_seeds(row)] if seeds else []
        rows.append([str(row["number"]), _recipe_cell(data, row), *map(escape, cells)])
    cut = (
        f"{len(shown)} of the front's {len(data.front):,} trials, evenly from the most accurate on." if len(shown) < len(data.front) else ""
    )
    return table(columns, rows, [False, False, *(True for _ in columns[2:])], caption=cut)


def _over_seeds(row: Row) -> str:
    if not row["seeds"]:
        return "—"
    spread = "" if row["spread"] is None else f" ± {number(row['spread'])}"
    return f"{number(row['mean'])}{spread} ({row['seeds']})"


def _recipe_cell(data: Data, row: Row) -> str:
    lines = short_recipe(row, data.long(row["number"], "recipe") or {})
    inner = "".join(f"<div>{escape(line)}</div>" for line in lines)
    inner += "".join(f"<div><code>{escape(line)}</code></div>" for line in of_trial(data, row["number"]))
    return f"<details><summary>{escape(_name(row))}</summary>{inner}</details>"


def _name(row: Row) -> str:
    """What a recipe is known by: its paradigm, criterion and allocator."""
    return ", ".join(str(row[axis]) for axis in ("paradigm", "criterion", "allocator") if row[axis])


def _failures(data: Data, drawn: Drawn) -> str:
    found = reasons(data)
    if not found:
        return ""
    rows = [[escape(end), escape(reason) or "—", f"{count:,}", str(first)] for end, reason, count, first in found]
    kinds = len({(row["ended"], row["reason"]) for row in data.failed})
    cut = f"The {len(found)} most frequent of {kinds:,} reasons." if len(found) < kinds else ""
    told = table(("class", "reason", "trials", "first"), rows, (False, False, True, True), caption=cut)
    if data.simulated is None:
        told += f'<p class="note">To see one fail again: <code>{escape(command(f"replay {data.folder.quoted} {found[0][3]}"))}</code></p>'
    return told


def environment(data: Data) -> str:
    """What the search was run with, and the search itself."""
    facts, search = data.facts.get("environment"), data.search
    found = dict(facts) if isinstance(facts, dict) else {}
    workers = search.get("workers")
    given = ", ".join(f"{name} {value}" for name, value in workers.items() if value) if isinstance(workers, dict) else ""
    lines = [
        *((name, str(found.pop(name))) for name in ("commit", "machine", "python") if name in found),
        *((name, str(value)) for name, value in found.items()),
        ("seed", str(search.get("seed", "—"))),
        ("sampler", choice(search.get("sampler", "—"))),
        ("scheduler", choice(search.get("scheduler", "—"))),
        ("each trial gets", given or "—"),
        ("files", f"{data.folder.path}/trials.parquet, reports.parquet, study.journal, masks/"),
    ]
    body = "".join(f'<tr><th scope="row">{escape(name)}</th><td>{escape(value)}</td></tr>' for name, value in lines)
    text = data.folder.search_yaml.read_text(errors="replace")[:_MOST_YAML]
    return (
        f'<section id="environment"><h2>Environment</h2><div class="scroll"><table class="facts"><tbody>{body}</tbody></table></div>'
        f"<details><summary>search.yaml</summary><pre>{escape(text)}</pre></details></section>"
    )


def footer(data: Data) -> str:
    """How the page was made."""
    again = command(f"report {data.folder.quoted}")
    return f"<footer><p>Made by <code>{escape(again)}</code>. The file holds all it shows and fetches nothing.</p></footer>"


_TABLES: dict[str, Callable[[Data, Drawn], str]] = {"front": _front, "failures": _failures}
