"""Learning curves: what trials reached at which bill, with the rungs and where they were stopped."""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go

from distprune.report.data import Data, Row
from distprune.report.drawn import LIGHT, Cell, Drawn, figure, log_line, log_ticks, many, plain, samples, share, thinned

MOST_FRONT, MOST_OTHERS, MOST_POINTS = 20, 60, 60  # curves drawn, and points of each
_KINDS = {  # of curves: (colour, width, opacity)
    "stopped": ("faint", 1.0, 0.75),
    "finished": ("middle", 1.2, 0.75),
    "failed": ("second", 1.5, 0.9),
    "running": ("third", 1.5, 0.9),
    "on the front": ("accent", 2.2, 1.0),
}


def curves(data: Data) -> Drawn:
    """The objective of each trial over its bill."""
    drawn: dict[str, Any] = {
        "name": "curves",
        "title": "Learning curves",
        "columns": ("trial", "kind", "samples", "objective", "score", "rung"),
        "rows": list(_rows(data)),
    }
    if not data.curves:
        return Drawn(**drawn, caption="No trial has reported yet.")
    chosen, all_of_them = _chosen(data)
    traces = [trace for kind in _KINDS if chosen[kind] for trace in _traces(data, kind, chosen[kind])]
    chart = figure(
        traces,
        height=440,
        xaxis_title_text="billed samples",
        yaxis_title_text=f"{plain(data.objective)} on validation",
    )
    bills = [cost for trace in traces for cost in trace.x if cost]
    if bills:
        chart.update_xaxes(**log_ticks(min(bills), max(bills), samples))
    for place, cost in enumerate(data.rungs):
        log_line(chart, cost, f"rung {place + 1}")
    shown, count = sum(map(len, chosen.values())), sum(map(len, all_of_them.values()))
    note = f"{shown} of {count:,} curves are drawn: the front's first, the others evenly over their numbers." if shown < count else ""
    return Drawn(**drawn, caption=_caption(data), figure=chart, note=note)


def _kind(row: Row) -> str:
    if row["pareto"]:
        return "on the front"
    return str(row["ended"]) if row["ended"] in ("finished", "stopped", "running") else "failed"


def _chosen(data: Data) -> tuple[dict[str, list[Row]], dict[str, list[Row]]]:
    """The trials whose curves are drawn, and all that have one. Rounds of others have theirs in the trial that they are of."""
    found: dict[str, list[Row]] = {kind: [] for kind in _KINDS}
    for row in data.rows:
        if row["number"] in data.curves and (row["round_of"] is None or row["pareto"]):
            found[_kind(row)].append(row)
    others = sum(len(rows) for kind, rows in found.items() if kind != "on the front")
    chosen = {}
    for kind, rows in found.items():
        most = MOST_FRONT if kind == "on the front" else max(1, round(MOST_OTHERS * len(rows) / max(others, MOST_OTHERS)))
        chosen[kind] = thinned(rows, most)
    return chosen, found


def _traces(data: Data, kind: str, rows: Sequence[Row]) -> Iterator[go.Scatter]:
    """All curves of a kind as one line with gaps, and a mark where each ends if it did not come to its own end."""
    colour, width, opacity = _KINDS[kind]
    x: list[float | None] = []
    y: list[float | None] = []
    text: list[str] = []
    ends: list[tuple[float, float, str]] = []
    for row in rows:
        curve = data.curves[row["number"]]
        label = f"trial {row['number']}: {plain(row['paradigm'])}, {_end(row)}"
        seen = np.flatnonzero(np.isfinite(curve.objective) & (curve.cost > 0))
        if not len(seen):
            continue
        for place in thinned(list(seen), MOST_POINTS):
            x.append(float(curve.cost[place]))
            y.append(float(curve.objective[place]))
            text.append(label)
        ends.append((x[-1] or 0.0, y[-1] or 0.0, label))
        x.append(None)
        y.append(None)
        text.append("")
    if not ends:
        return
    yield go.Scatter(
        x=x,
        y=y,
        text=text,
        mode="lines" if any(len(data.curves[row["number"]].cost) > 1 for row in rows) else "markers",
        name=kind,
        legendgroup=kind,
        line={"color": LIGHT[colour], "width": width},
        marker={"color": LIGHT[colour], "size": 5},
        opacity=opacity,
        hovertemplate="%{text}<br>%{y:.4f} after %{x:,} samples<extra></extra>",
    )
    if kind in ("stopped", "failed"):
        yield go.Scatter(
            x=[end[0] for end in ends],
            y=[end[1] for end in ends],
            text=[end[2] for end in ends],
            mode="markers",
            name=kind,
            legendgroup=kind,
            showlegend=False,
            marker={"symbol": "x-thin", "size": 7, "line": {"color": LIGHT["muted" if kind == "stopped" else colour], "width": 1.5}},
            hovertemplate="%{text}<br>%{y:.4f} after %{x:,} samples<extra></extra>",
        )


def _end(row: Row) -> str:
    if row["ended"] == "stopped":
        return f"stopped ({plain(row['reason'])})" if row["reason"] != "rung" else f"stopped at rung {row['rung'] + 1}"
    return plain(row["ended"])


def _caption(data: Data) -> str:
    stops = Counter(row["rung"] for row in data.stopped if row["reason"] == "rung")
    if not stops:
        judged = "No trial was stopped at a rung" if data.rungs else "The search has no rungs"
        return f"{judged}; {many(len(data.finished), 'trial')} finished."
    at = [f"{count:,} at rung {rung + 1} ({samples(_cost(data, rung))} samples)" for rung, count in sorted(stops.items())]
    ended = [row for row in data.finished if row["round_of"] is None and row["cost"]]
    count = sum(stops.values())
    text = f"{many(count, 'trial')} of {len(data.rows):,} {'was' if count == 1 else 'were'} stopped: {_listed(at)}."
    if ended:
        mean = sum(row["cost"] for row in ended) / len(ended)
        billed = sum(row["cost"] or 0.0 for row in data.stopped) / len(data.stopped)
        text += f" A stopped trial billed {share(billed / mean)} of what a finished one did, on average."
    return text


def _cost(data: Data, rung: int) -> float:
    return data.rungs[rung] if 0 <= rung < len(data.rungs) else 0.0


def _listed(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def _rows(data: Data) -> Iterator[list[Cell]]:
    for row in data.rows:
        curve = data.curves.get(row["number"])
        if curve is not None:
            columns: list[Any] = [curve.cost.tolist(), curve.objective.tolist(), curve.score.tolist(), curve.rung.tolist()]
            for cost, objective, score, rung in zip(*columns, strict=True):
                yield [row["number"], _kind(row), cost, objective, score, rung]
