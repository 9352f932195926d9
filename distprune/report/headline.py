"""The head of a page: what it is about, how far the search is, and its findings in four numbers. What comes from files is escaped here."""

import math
import time
from collections import Counter
from collections.abc import Sequence
from html import escape

from distprune.errors import command
from distprune.report.data import Data, Row
from distprune.report.drawn import Drawn, many, number, samples, share
from distprune.report.findings import best, best_dense, own, smallest_near_best, total
from distprune.report.said import choice

_QUIET_S = 120.0  # after which a driver that cannot be asked is not said to run


def header(data: Data, drawn: Sequence[Drawn], now: float, *, live: bool) -> str:
    """What the page is about, how far the search is, and where to go on it."""
    state, told = _state(data)
    recipe = data.search.get("recipe")
    subject = " on ".join(choice(recipe[axis]) for axis in ("model", "data") if isinstance(recipe, dict) and axis in recipe)
    links = "".join(f'<a href="#{one.name}">{escape(one.title)}</a>' for one in drawn)
    hold = '<button id="hold" class="off">Hold</button>' if live else ""
    return (
        f'<header><div><div class="title"><h1>{escape(data.name)}</h1><span class="state {state}" id="state">{escape(told)}</span></div>'
        f'<p class="about">{escape(subject)}{" · " if subject else ""}{escape(str(data.folder))} · as of '
        f"{time.strftime('%Y-%m-%d %H:%M:%S UTC', time.gmtime(now))}</p>{_warnings(data)}"
        f'<nav>{links}<a href="#environment">Environment</a><span class="tools">{hold}'
        '<button id="theme" class="off">Light</button></span></nav>'
        "<noscript><p class='about'>Figures need JavaScript; all tables are here without it.</p></noscript></div></header>"
    )


def _state(data: Data) -> tuple[str, str]:
    ended = sum(row["ended"] != "running" for row in own(data))
    limits = data.search.get("limits")
    most = limits.get("trials") if isinstance(limits, dict) else None
    done = f"{ended:,} of {most:,} trials" if isinstance(most, int) and most > ended else many(ended, "trial")
    if data.silent is not None and (not data.running or data.silent > _QUIET_S):
        return "silent", f"{_heard(data.silent)}, {done}"
    if data.running:
        return "running", f"running, {done}"
    if any(row["ended"] == "running" for row in data.rows) or not data.folder.reports_parquet.exists():
        return "interrupted", f"interrupted, {done}"
    return "finished", f"finished, {done}"


def _heard(silent: float) -> str:
    if math.isinf(silent):
        return "nothing heard yet"
    minutes = silent / 60
    units = ((1440, "days"), (60, "hours"), (1, "min"))
    size, unit = next((size, unit) for size, unit in units if minutes >= 2 * size or size == 1)
    return f"last heard {minutes / size:,.0f} {unit} ago"


def _warnings(data: Data) -> str:
    lines = []
    if (facts := data.simulated) is not None:
        source = f"{facts.get('usable', '?')} finished ones of {facts.get('run', '?')}"
        lines.append(f"Simulated: trials were looked up among {source}; nothing was trained.")
    if _state(data)[0] == "interrupted":
        lines.append(f"The search was interrupted; nothing is lost. Go on with: {command(f'resume {data.folder.quoted}')}")
    if data.silent is not None and not data.running:
        again = command(f"resume {data.folder.quoted}")
        lines.append(f"Its driver cannot be asked from here. If it is not at work on another machine, go on with: {again}")
    if data.folder.url:
        lines.append("This page is of a copy of the run, as it was when it was read.")
    return "".join(f'<p class="warning">{escape(line)}</p>' for line in lines)


def cards(data: Data) -> str:
    """The headline."""
    found = [_best_card(data), _small_card(data), _trials_card(data), _compute_card(data)]
    return '<div class="cards">' + "".join(_card(*card) for card in found if card is not None) + "</div>"


def _card(label: str, value: str, more: str) -> str:
    parts = (("label", label), ("value", value), ("more", more))
    return '<div class="card">' + "".join(f'<p class="{kind}">{escape(text)}</p>' for kind, text in parts) + "</div>"


def _best_card(data: Data) -> tuple[str, str, str]:
    if (top := best(data)) is None:
        return f"Best {data.objective}", "—", "No trial is on the front yet." if data.running else "No trial is on the front."
    test = "" if top["test"] is None else f", {number(top['test'])} on test"
    return f"Best {data.objective} on validation", number(top["objective"]), f"Trial {top['number']}, {top['paradigm']}{test}; {_kept(top)}"


def _small_card(data: Data) -> tuple[str, str, str] | None:
    if (small := smallest_near_best(data)) is None:
        return None
    dense = best_dense(data)
    against = f"; the best dense one has {number(dense['objective'])}" if dense is not None and small["sparsity"] else ""
    return (
        "Weights kept within 1% of the best",
        share(1 - small["sparsity"]),
        (f"Trial {small['number']}, {small['paradigm']}: {number(small['objective'])}{against}"),
    )


def _kept(row: Row) -> str:
    return "dense" if row["sparsity"] == 0 else f"keeps {share(1 - row['sparsity'])} of the weights"


def _trials_card(data: Data) -> tuple[str, str, str]:
    ends = Counter(row["ended"] for row in data.rows)
    failed = len(data.failed)
    rounds = len(data.rows) - len(own(data))
    parts = [f"{ends[end]:,} {end}" for end in ("finished", "stopped", "running", "duplicate") if ends[end]]
    told = ", ".join([*parts, *([f"{failed:,} failed"] if failed else [])]) or "none has begun"
    return "Trials", f"{len(data.rows):,}", told + (f"; {rounds:,} are rounds of others" if rounds else "")


def _compute_card(data: Data) -> tuple[str, str, str]:
    billed, run = total(own(data), lambda row: row["cost"]), total(data.rows, lambda row: row["spent"])
    if data.simulated is not None:
        return "Samples looked up", samples(run), f"{samples(billed)} billed; nothing was run"
    saved = total(own(data), lambda row: row["saved"])
    hours = total(data.rows, lambda row: row["wall_s"]) / 3600
    time_ = f"; {hours:.1f} hours of workers" if hours >= 1 else f"; {60 * hours:.0f} minutes of workers" if hours else ""
    if time_ and any((row["attempts"] or 1) > 1 for row in data.rows):
        time_ += " in the last attempt of each trial"  # the table has no other
    spared = f", {share(saved / billed)} of them shared between trials" if saved and billed else ""
    return "Samples run", samples(run), f"{samples(billed)} billed{spared}{time_}"
