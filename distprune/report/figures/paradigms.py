"""Paradigms at equal cost: what trials of each had reached when all had billed the same."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import plotly.graph_objects as go

from distprune.report.data import Data, Row, label_of
from distprune.report.drawn import LIGHT, SEQUENCE, Cell, Drawn, figure, many, number, plain, samples, share, thinned
from distprune.report.findings import own

MOST_POINTS = 120  # of a paradigm
_FEWEST = 3  # trials of a paradigm from which its spread is shown
_GOLDEN = 0.618034
_LEAST = 1e-4  # density that is told apart by colour


@dataclass(frozen=True)
class _Seen:
    """A trial as it is compared."""

    paradigm: str
    number: int
    density: float  # that its recipe is for, where it says so in weights, else that it has
    value: float
    cost: float  # billed samples in the end


_Groups = Mapping[str, Sequence[_Seen]]


def paradigms(data: Data) -> Drawn:
    """A row a paradigm, the best median first: each trial, the median, and the middle half."""
    where, found = _compared(data)
    groups: dict[str, list[_Seen]] = {}
    for seen in found:
        groups.setdefault(seen.paradigm, []).append(seen)
    columns = ("paradigm", "trial", "density", "value", "compared at")
    cells: list[list[Cell]] = [[seen.paradigm, seen.number, seen.density, seen.value, where] for seen in found]
    drawn: dict[str, Any] = {"name": "paradigms", "title": "Paradigms at equal cost", "columns": columns, "rows": cells}
    if not groups:
        return Drawn(**drawn, caption="No pruned trial has been scored, so there is nothing to compare.")
    ordered = sorted(groups, key=lambda name: (len(groups[name]) >= _FEWEST, statistics.median(seen.value for seen in groups[name])))
    chart = figure(
        [trace for trace in (*_spreads(ordered, groups), _points(ordered, groups), _medians(ordered, groups)) if len(trace.x)],
        height=80 + 30 * len(ordered),
        showlegend=False,
        xaxis_title_text=f"{plain(data.objective)}, {where}",
    )
    labels = [f"{plain(name)} ({len(groups[name]):,})" for name in ordered]
    chart.update_yaxes(showgrid=False, tickvals=list(range(len(ordered))), ticktext=labels, range=[-0.7, len(ordered) - 0.3])
    notes = [
        "Points are trials, and the more one stands out, the fewer weights it keeps; the diamond is the median, the bar the middle half, "
        "the number how many."
    ]
    if few := sum(len(groups[name]) < _FEWEST for name in ordered):
        notes.append(f"{many(few, 'paradigm has', 'paradigms have')} fewer than {_FEWEST} trials: below, without a median.")
    if any(len(trials) > MOST_POINTS for trials in groups.values()):
        notes.append(f"At most {MOST_POINTS} points of each are drawn; medians are of all.")
    return Drawn(**drawn, caption=_caption(data, where, ordered, groups), figure=chart, note=" ".join(notes))


def _compared(data: Data) -> tuple[str, list[_Seen]]:
    """At which bill trials are compared, and those that came to it, networks that nothing is removed from left out.

    At the first rung, where nothing was stopped before: the score there, or how a trial ended that was cheaper. Without rungs, the end.
    """
    rows = [row for row in own(data) if row["repeat_of"] is None and row["ended"] != "duplicate" and row["granularity"] is not None]
    if data.rungs:
        least = data.rungs[0]
        most = data.rungs[1] if len(data.rungs) > 1 else 3 * least
        if scored := [_seen(data, row, value) for row in rows if (value := _at(data, row, least, most)) is not None]:
            return f"at {samples(least)} samples", scored
    ends = [_seen(data, row, float(row["objective"])) for row in rows if row["ended"] == "finished" and row["objective"] is not None]
    return "at the end", ends


def _seen(data: Data, row: Row, value: float) -> _Seen:
    recipe = data.long(row["number"], "recipe") or {}
    weights = label_of(recipe.get("sparsity_of", "params")) == "params"  # a share of FLOPs says nothing of how many weights are kept
    planned = recipe.get("sparsity") if weights else None  # a trial that is still dense is judged for what it will be
    density = 1 - float(planned if planned is not None else row["sparsity"] or 0.0)
    return _Seen(str(row["paradigm"]), int(row["number"]), density, value, float(row["cost"] or 0.0))


def _at(data: Data, row: Row, least: float, most: float) -> float | None:
    curve = data.curves.get(row["number"])
    if curve is None:
        return None
    crossed = np.flatnonzero((curve.rung >= 0) & np.isfinite(curve.score) & (curve.cost >= least) & (curve.cost < most))
    if len(crossed):
        return float(curve.score[crossed[0]])
    cheap = row["ended"] == "finished" and row["objective"] is not None and (row["cost"] or 0.0) <= least
    return float(row["objective"]) if cheap else None


def _quartiles(trials: Sequence[_Seen]) -> tuple[float, float, float]:
    low, middle, high = np.quantile([seen.value for seen in trials], [0.25, 0.5, 0.75])
    return float(low), float(middle), float(high)


def _points(ordered: Sequence[str], groups: _Groups) -> go.Scatter:
    x, y, text, colour = [], [], [], []
    for place, name in enumerate(ordered):
        for order, seen in enumerate(thinned(sorted(groups[name], key=lambda seen: seen.value), MOST_POINTS)):
            x.append(seen.value)
            y.append(place + 0.5 * ((order * _GOLDEN) % 1 - 0.5) * (len(groups[name]) > 1))  # points of equal value stay apart
            colour.append(-math.log10(max(seen.density, _LEAST)))
            text.append(f"trial {seen.number}: {plain(name)}, keeps {share(seen.density)}")
    scale = [[place / 3, LIGHT[name]] for place, name in enumerate(SEQUENCE[1:])]
    marker = {"size": 7, "color": colour, "colorscale": scale, "opacity": 0.85, "line": {"width": 0}}
    return go.Scatter(x=x, y=y, text=text, mode="markers", marker=marker, hovertemplate="%{text}<br>%{x:.4f}<extra></extra>")


def _spreads(ordered: Sequence[str], groups: _Groups) -> list[go.Scatter]:
    """The middle halves, as one broken line."""
    x: list[float | None] = []
    y: list[float | None] = []
    for place, name in enumerate(ordered):
        if len(groups[name]) >= _FEWEST:
            low, _, high = _quartiles(groups[name])
            x += [low, high, None]
            y += [place, place, None]
    line = {"color": LIGHT["faint"], "width": 9}
    return [go.Scatter(x=x, y=y, mode="lines", line=line, opacity=0.55, hoverinfo="skip")] if x else []


def _medians(ordered: Sequence[str], groups: _Groups) -> go.Scatter:
    enough = [(place, name) for place, name in enumerate(ordered) if len(groups[name]) >= _FEWEST]
    return go.Scatter(
        x=[statistics.median(seen.value for seen in groups[name]) for _, name in enough],
        y=[place for place, _ in enough],
        text=[f"{plain(name)}: median {_told(groups[name])}" for _, name in enough],
        mode="markers",
        marker={"symbol": "diamond", "size": 10, "color": LIGHT["second"], "line": {"width": 1, "color": LIGHT["paper"]}},
        hovertemplate="%{text}<extra></extra>",
    )


def _told(trials: Sequence[_Seen]) -> str:
    """Median, spread and number of trials."""
    low, middle, high = _quartiles(trials)
    spread = f", middle half {number(low)} to {number(high)}" if len(trials) >= _FEWEST else ""
    return f"{number(middle)}{spread}, {many(len(trials), 'trial')}"


def _caption(data: Data, where: str, ordered: Sequence[str], groups: _Groups) -> str:
    start = f"{where[0].upper()}{where[1:]}"
    sure = [name for name in reversed(ordered) if len(groups[name]) >= _FEWEST]
    if sure:
        found = f"the best median of the {many(len(sure), 'paradigm')} with {_FEWEST} trials or more: {_told(groups[sure[0]])}"
        text = f"{start}, {sure[0]} has {found}"
        text += f"; {sure[-1]} has the worst, {number(_quartiles(groups[sure[-1]])[1])}." if len(sure) > 1 else "."
    else:
        text = f"{start} no paradigm has {_FEWEST} trials, so that none can be said to be the best."
    bills = sorted(seen.cost for trials in groups.values() for seen in trials if seen.cost)
    if where == "at the end" and bills and bills[-1] > 1.1 * bills[0]:
        text += f" Bills were not equal: {samples(bills[0])} to {samples(bills[-1])} samples."
    late = {row["paradigm"] for row in own(data) if row["granularity"] is not None} - groups.keys()
    if late and where != "at the end":
        text += f" {many(len(late), 'paradigm is', 'paradigms are')} missing: judged later, or failed before."
    return text
