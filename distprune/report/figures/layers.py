"""Sparsity per layer: which layers the networks of the front keep."""

import math
import statistics
from typing import Any

import plotly.graph_objects as go

from distprune.report.data import Data
from distprune.report.drawn import LIGHT, SEQUENCE, Cell, Drawn, figure, many, plain, share, thinned

MOST_TRIALS, MOST_LAYERS = 40, 120
_LEAST = 1e-4  # density that is told apart by colour
_WRITTEN = 130  # cells up to which each has its number


def layers(data: Data) -> Drawn:
    """A column a trial of the front, the densest first; a row a layer, from the input to the output."""
    shown = thinned(sorted((row for row in data.front if row["kept"]), key=lambda row: -row["kept"]), MOST_TRIALS)
    kept = {row["number"]: data.layers(row["number"]) for row in shown}
    kept = {number: found for number, found in kept.items() if found}
    names = list(dict.fromkeys(name for found in kept.values() for name in found))
    rows: list[list[Cell]] = [
        [number, name, count, size, count / size if size else None]
        for number, found in kept.items()
        for name, (count, size) in found.items()
    ]
    drawn: dict[str, Any] = {
        "name": "layers",
        "title": "What the front keeps, by layer",
        "columns": ("trial", "layer", "kept", "weights", "density"),
        "rows": rows,
    }
    if not kept:
        why = "No trial is on the front yet." if not data.front else "The trials of the front say nothing of their layers."
        return Drawn(**drawn, caption=why)
    listed = thinned(names, MOST_LAYERS)
    density = [[_density(kept[number].get(name)) for number in kept] for name in listed]
    z = [[None if value is None else math.log10(max(value, _LEAST)) for value in line] for line in density]
    hover = [[f"trial {number}, {plain(name)}<br>{_told(kept[number].get(name))}" for number in kept] for name in listed]
    written = len(kept) * len(listed) <= _WRITTEN and len(kept) <= 10
    chart = figure(
        [
            go.Heatmap(
                z=z,
                x=[f"#{number}" for number in kept],
                y=[plain(name) for name in listed],
                text=[[share(value) if value is not None else "" for value in line] for line in density],
                texttemplate="%{text}" if written else None,
                textfont={"size": 11},
                customdata=hover,
                hovertemplate="%{customdata}<extra></extra>",
                hoverongaps=False,
                zmin=math.log10(_LEAST),
                zmax=0,
                colorscale=[[place / 4, LIGHT[name]] for place, name in enumerate(SEQUENCE)],
                colorbar={
                    "title": {"text": "kept", "side": "right"},
                    "thickness": 10,
                    "outlinewidth": 0,
                    "tickvals": [-4, -3, -2, -1, 0],
                    "ticktext": ["≤ 0.01%", "0.1%", "1%", "10%", "100%"],
                },
                xgap=2,
                ygap=2,
            )
        ],
        showlegend=False,
        height=100 + max(22 if len(listed) <= 40 else 13, 200 // len(listed)) * len(listed),
        xaxis={"type": "category", "showgrid": False, "title": {"text": "trials of the front, the densest first"}},
        yaxis={"type": "category", "autorange": "reversed", "showgrid": False},
    )
    notes = []
    if len(kept) < len(data.front):
        notes.append(f"{len(kept)} of the front's {len(data.front):,} trials are shown.")
    if len(listed) < len(names):
        notes.append(f"{len(listed)} of {len(names)} layers are shown.")
    if not data.sized:
        notes.append("How large each layer is shows when the search ends; until then shares are of the most that any trial kept there.")
    return Drawn(**drawn, caption=_caption(kept) if data.sized else _counted(kept), figure=chart, note=" ".join(notes))


def _density(found: tuple[int, int] | None) -> float | None:
    return found[0] / found[1] if found and found[1] else None


def _told(found: tuple[int, int] | None) -> str:
    return "it has no such layer" if found is None else f"keeps {found[0]:,} of {found[1]:,} weights, {share(_density(found))}"


def _counted(kept: dict[int, dict[str, tuple[int, int]]]) -> str:
    """What can be said without the sizes of layers."""
    held: dict[str, list[int]] = {}
    for found in kept.values():
        for name, (count, _) in found.items():
            held.setdefault(name, []).append(count)
    middles = {name: statistics.median(found) for name, found in held.items()}
    most = max(middles, key=lambda name: middles[name])
    return f"{most} keeps the most weights, {middles[most]:,.0f}: median over {many(len(kept), 'trial')} of the front."


def _caption(kept: dict[int, dict[str, tuple[int, int]]]) -> str:
    values: dict[str, list[float]] = {}
    for found in kept.values():
        for name, pair in found.items():
            if (value := _density(pair)) is not None:
                values.setdefault(name, []).append(value)
    middles = {name: statistics.median(found) for name, found in values.items()}
    over = f"over {many(len(kept), 'trial')} of the front"
    if len(middles) < 2:
        return f"{', '.join(middles)} keeps {share(next(iter(middles.values())))} of its weights, median {over}."
    most, least = max(middles, key=lambda name: middles[name]), min(middles, key=lambda name: middles[name])
    if middles[most] == middles[least]:
        return f"Every layer keeps {share(middles[most])} of its weights, median {over}."
    told = f"{share(middles[most])}, and {least} the smallest, {share(middles[least])}"
    return f"{most} keeps the largest part of its weights, {told}: medians {over}."
