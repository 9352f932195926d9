"""Sanity checks: what a mask knows besides its layer budgets, where the checks were run."""

import math
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go

from distprune.errors import command
from distprune.report.data import Data
from distprune.report.drawn import LIGHT, Drawn, figure, many, number, plain

COLUMNS = ("variant", "mean", "std", "difference", "error", "overlap")


def sanity(data: Data) -> Drawn:
    """The newest checks: each retraining, and the mean of every variant."""
    drawn: dict[str, Any] = {"name": "sanity", "title": "Sanity checks", "columns": COLUMNS}
    if data.simulated is not None:
        return Drawn(**drawn, caption="The search is simulated: it has no masks to check.")
    target = data.folder.path / "sanity.json"
    how = command(f"sanity {data.folder.quoted} --to {shlex.quote(str(target))}")
    if not data.sanity:
        return Drawn(
            **drawn, caption=f"No mask was checked. To see whether the best one knows which weights matter, or only how many: {how}"
        )
    file, found = data.sanity[0]
    rows = [row for row in _list(found.get("rows")) if isinstance(row, Mapping)]
    drawn["rows"] = [[row.get(name) for name in COLUMNS] for row in rows]
    traces = _traces(rows)
    if not traces:
        return Drawn(**drawn, caption=f"{file} holds no numbers. Check again: {how}")
    chart = figure(
        traces,
        height=80 + 34 * len(rows),
        showlegend=False,
        xaxis_title_text=f"{plain(found.get('objective', data.objective))} on validation, retrained",
        yaxis={"showgrid": False, "autorange": "reversed", "type": "category"},
    )
    seeds = _list(found.get("seeds"))
    note = (
        f"{found.get('name', file)}; {many(len(seeds), 'seed')}. Points are retrainings, the diamond is their mean. {found.get('rule', '')}"
    )
    others = "".join(f" {other}: {_verdict(facts)}" for other, facts in data.sanity[1:4])
    return Drawn(**drawn, caption=_verdict(found) or f"{file} has no verdict.", figure=chart, note=note + others)


def _list(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list) else []


def _verdict(found: Mapping[str, Any]) -> str:
    verdict = found.get("verdict")
    return str(verdict.get("text", "")) if isinstance(verdict, Mapping) else ""


def _numbers(row: Mapping[str, Any]) -> list[float]:
    return [float(value) for value in _list(row.get("values")) if isinstance(value, int | float) and math.isfinite(value)]


def _traces(rows: Sequence[Mapping[str, Any]]) -> list[go.Scatter]:
    points = [(value, plain(row.get("variant", ""))) for row in rows for value in _numbers(row)]
    if not points:
        return []
    means = [(sum(found) / len(found), plain(row.get("variant", ""))) for row in rows if (found := _numbers(row))]
    return [
        go.Scatter(
            x=[value for value, _ in points],
            y=[name for _, name in points],
            mode="markers",
            marker={"size": 8, "color": LIGHT["middle"], "opacity": 0.8},
            hovertemplate="%{y}: %{x:.4f}<extra></extra>",
        ),
        go.Scatter(
            x=[value for value, _ in means],
            y=[name for _, name in means],
            text=[f"{name}: mean {number(value)}" for value, name in means],
            mode="markers",
            marker={"symbol": "diamond", "size": 11, "color": LIGHT["second"]},
            hovertemplate="%{text}<extra></extra>",
        ),
    ]
