"""The front: how good networks are at what they cost."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go

from distprune.report.data import Data, Row, label_of
from distprune.report.drawn import LIGHT, SEQUENCE, Cell, Drawn, figure, log_line, log_ticks, many, number, plain, share, thinned
from distprune.report.findings import best, smallest_near_best
from distprune.report.said import hover

MOST_OTHERS, MOST_FRONT = 1500, 400  # points drawn
_LABELLED = 14  # numbers of trials that have room beside the points of a front,
_NARROW = 2.0  # or of one as wide as this, of natural logarithms of its cost


def front(data: Data) -> Drawn:
    """Finished trials by the first cost that is minimized and their objective, the front among them."""
    on, others = data.front, [row for row in data.finished if not row["pareto"]]
    axis = data.costs[0] if data.costs else "params"
    shown: dict[str, Any] = {
        "name": "front",
        "title": "The front",
        "columns": _columns(data),
        "rows": [_row(data, row) for row in [*on, *others]],
    }
    if not data.finished:
        unfinished = "No trial has finished yet" if data.running or not data.rows else "No trial finished"
        return Drawn(**shown, caption=f"{unfinished}, so there is no front to show.")
    drawn_others, drawn_front = thinned(sorted(others, key=lambda row: -row["objective"]), MOST_OTHERS), thinned(on, MOST_FRONT)
    traces = [_others(data, drawn_others, axis), *_front(data, drawn_front, axis), *_tests(data, drawn_front, axis)]
    shares = [x for row in [*drawn_front, *drawn_others] if (x := data.cost(row, axis))]
    chart = figure(
        [trace for trace in traces if trace is not None],
        height=460,
        xaxis_title_text=_axis_title(axis),
        yaxis_title_text=f"{plain(data.objective)} on validation",
    )
    if shares and min(shares) < max(shares):
        chart.update_xaxes(**log_ticks(min(shares), max(shares), lambda value: f"{100 * value:g}%"))
    else:
        chart.update_xaxes(tickformat="~p")
    below = _frame(chart, drawn_front, others)
    _limits(chart, data, axis)
    note = _note(data, len(drawn_others), len(others), len(drawn_front), below)
    return Drawn(**shown, caption=_caption(data), figure=chart, note=note)


def _frame(chart: go.Figure, rows: Sequence[Row], others: Sequence[Row]) -> int:
    """Frame the front rather than what is far below it; returns how many of the others that leaves out."""
    values = [row[name] for row in rows for name in ("objective", "test") if row[name] is not None]
    if not values:
        return 0
    top = max([*values, *(row["objective"] for row in others)])
    span = max(top - min(values), 0.02 * abs(top)) or 1.0
    least = min(values) - 0.15 * span
    below = sum(bool(row["objective"] < least) for row in others)
    if below:
        chart.update_yaxes(range=[least, top + 0.12 * span])
    return below


def _axis_title(axis: str) -> str:
    return "weights that are kept" if axis == "params" else f"{plain(axis)}, as a share of the dense network's"


def _others(data: Data, rows: Sequence[Row], axis: str) -> go.Scatter | None:
    if not rows:
        return None
    return go.Scatter(
        x=[data.cost(row, axis) for row in rows],
        y=[row["objective"] for row in rows],
        text=[f"trial {row['number']}: {plain(row['paradigm'])}" + _kept_away(row) for row in rows],
        mode="markers",
        name="finished",
        marker={"size": 6, "color": LIGHT["faint"], "opacity": 0.7},
        hovertemplate="%{text}<br>%{y:.4f} at %{x:.2%}<extra></extra>",
    )


def _kept_away(row: Row) -> str:
    return f"<br>not on the front: {plain(', '.join(row['violated']))}" if row["violated"] else ""


def _front(data: Data, rows: Sequence[Row], axis: str) -> list[go.Scatter]:
    """The front; a line of steps where one cost is minimized, colours by the second where there are more."""
    if not rows:
        return []
    ordered = sorted(rows, key=lambda row: (data.cost(row, axis) or 0.0, row["objective"]))
    marker: dict[str, Any] = {"size": 11, "color": LIGHT["accent"], "line": {"width": 1.5, "color": LIGHT["paper"]}}
    if len(data.costs) > 1:
        second = data.costs[1]
        marker |= {
            "color": [data.cost(row, second) for row in ordered],
            "colorscale": [[place / 3, LIGHT[name]] for place, name in enumerate(SEQUENCE[1:])],
            "colorbar": {"title": {"text": plain(second), "side": "right"}, "thickness": 10, "tickformat": "~p", "outlinewidth": 0},
        }
    labels = _labels([data.cost(row, axis) or 0.0 for row in ordered])
    return [
        go.Scatter(
            x=[data.cost(row, axis) for row in ordered],
            y=[row["objective"] for row in ordered],
            text=[f"{row['number']}" if labelled else "" for row, labelled in zip(ordered, labels, strict=True)],
            customdata=[hover(data, row) for row in ordered],
            mode=("lines+" if len(data.costs) < 2 else "") + "markers+text",
            name="front, on validation",
            line={"shape": "hv", "width": 1.5, "color": LIGHT["accent"]},
            marker=marker,
            textposition="top center",
            textfont={"size": 11, "color": LIGHT["muted"]},
            cliponaxis=False,
            hovertemplate="%{customdata}<extra></extra>",
        )
    ]


def _labels(xs: Sequence[float]) -> list[bool]:
    """Which points of a line have their number beside them: as many as stay readable."""
    widest = math.log(max(xs) / xs[0]) if xs[0] > 0 else 0.0
    found: list[bool] = []
    last = -math.inf
    for x in xs:
        place = math.log(x / xs[0]) if xs[0] > 0 and x > 0 else 0.0
        found.append(place - last >= max(widest, _NARROW) / _LABELLED)
        last = place if found[-1] else last
    return found


def _tests(data: Data, rows: Sequence[Row], axis: str) -> list[go.Scatter]:
    measured = [row for row in rows if row["test"] is not None]
    if not measured:
        return []
    return [
        go.Scatter(
            x=[data.cost(row, axis) for row in measured],
            y=[row["test"] for row in measured],
            text=[f"trial {row['number']}" for row in measured],
            mode="markers",
            name="the same, on test",
            marker={"size": 9, "symbol": "circle-open", "color": LIGHT["second"], "line": {"width": 1.8}},
            hovertemplate="%{text}: %{y:.4f} on test<extra></extra>",
        )
    ]


def _limits(chart: go.Figure, data: Data, axis: str) -> None:
    """Lines where the search's floor and its budget for this cost are."""
    if isinstance(floor := data.search.get("floor"), int | float):
        font = {"size": 11, "color": LIGHT["muted"]}
        chart.add_hline(
            floor,
            line={"color": LIGHT["muted"], "width": 1, "dash": "dot"},
            annotation={"text": f"floor {number(floor)}", "font": font},
            annotation_position="bottom right",
        )
    budgets = data.search.get("budget") or []
    for budget in [budgets] if isinstance(budgets, Mapping) else budgets:
        if isinstance(budget, Mapping) and isinstance(most := budget.get("most"), int | float):
            if label_of(budget.get("cost", "params")) == axis and chart.layout.xaxis.type == "log":
                log_line(chart, most, f"budget {share(most)}")


def _caption(data: Data) -> str:
    top, small = best(data), smallest_near_best(data)
    if top is None or small is None:
        violated = [row for row in data.finished if row["violated"]]
        why = f": {len(violated)} of {len(data.finished)} finished trials break a constraint" if violated else ""
        return f"No finished trial is on the front{why}."
    only = f"Trial {top['number']} ({top['paradigm']}) has {number(top['objective'])} and keeps {share(1 - top['sparsity'])} of the weights"
    if len(data.front) == 1:
        return f"{only}; no other finished trial is better in anything that counts."
    if small is top:
        return f"{only}; every smaller network of the front is worse by more than 1%."
    kept = f"keeps {share(1 - small['sparsity'])} of the weights and has {number(small['objective'])}"
    against = f"within 1% of the best, which has {number(top['objective'])} with {share(1 - top['sparsity'])}"
    return f"Trial {small['number']} ({small['paradigm']}) {kept}, {against}."


def _note(data: Data, others: int, all_others: int, front_points: int, below: int) -> str:
    notes = []
    if others < all_others or front_points < len(data.front):
        kept = f"{others:,} of {all_others:,} finished trials beside the front are drawn, evenly by objective"
        notes.append(kept + (f", and {front_points:,} of the front's {len(data.front):,}." if front_points < len(data.front) else "."))
    if below:
        notes.append(
            f"{many(below, 'trial')} far below the front {'is' if below == 1 else 'are'} outside of the frame; a double click shows all."
        )
    if data.front and all(row["test"] is None for row in data.front) and not data.simulated:
        notes.append("The test split is read once, when the search ends.")
    return " ".join(notes)


def _columns(data: Data) -> list[str]:
    fixed = ["trial", "front", "objective", "test", "kept", "density", "paradigm", "criterion", "allocator", "granularity", "regularizer"]
    return [*fixed, *(name for name in data.costs if name != "params")]


def _row(data: Data, row: Row) -> list[Cell]:
    density = None if row["sparsity"] is None else round(1 - row["sparsity"], 12)
    axes = [row[axis] for axis in ("paradigm", "criterion", "allocator", "granularity", "regularizer")]
    costs = [data.cost(row, name) for name in data.costs if name != "params"]
    return [row["number"], row["pareto"], row["objective"], row["test"], row["kept"], density, *axes, *costs]
