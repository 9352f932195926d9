"""What all figures share: their shape, their colours, and how numbers and names are written on them."""

import html
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import plotly.graph_objects as go

# Colours by what they mean: on a light page, on a dark one. Each pair can be told apart by the colour-blind; no light one is used twice, as
# the page finds its dark counterpart by it.
PALETTE = {
    "paper": ("#ffffff", "#15181c"),
    "ink": ("#1c2127", "#e6e9ed"),
    "muted": ("#5a6470", "#9aa5b1"),
    "grid": ("#e7eaee", "#2a3037"),
    "faint": ("#b4bcc6", "#59636f"),  # what is not the point of a figure
    "accent": ("#0b63a9", "#62b5f5"),
    "second": ("#c4500c", "#f59a5c"),  # what went wrong, or is to be set against the accent
    "third": ("#0d7d62", "#4fcaa5"),
    "low": ("#edf4fa", "#1b2530"),  # of a sequence, to `high`
    "lower": ("#bdd7ee", "#24486c"),
    "middle": ("#74abda", "#2f75b0"),
    "higher": ("#2c7bba", "#69b3ea"),
    "high": ("#073f74", "#d6ebff"),
}
LIGHT = {name: light for name, (light, _) in PALETTE.items()}
SEQUENCE = ("low", "lower", "middle", "higher", "high")
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"

Cell = str | int | float | bool | None


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """A figure, the sentence that says what it shows, and its numbers."""

    name: str  # of its files, and its place on the page
    title: str
    caption: str  # the finding, plain text; without a figure, why there is none
    figure: go.Figure | None = None
    note: str = ""  # what else must be known to read it
    columns: Sequence[str] = ()
    rows: Sequence[Sequence[Cell]] = field(default=(), repr=False)  # all of its numbers, also those that were not drawn


def figure(traces: Iterable[Any], *, height: int = 380, **layout: Any) -> go.Figure:
    """A figure in the page's dress; `layout` goes over it."""
    axis = {
        "color": LIGHT["muted"],
        "gridcolor": LIGHT["grid"],
        "linecolor": LIGHT["grid"],
        "zeroline": False,
        "automargin": True,
        "title": {"standoff": 8},
    }
    found = go.Figure(list(traces))
    found.update_layout(
        template="none",
        height=height,
        autosize=True,
        paper_bgcolor=LIGHT["paper"],
        plot_bgcolor=LIGHT["paper"],
        font={"family": FONT, "size": 13, "color": LIGHT["ink"]},
        margin={"l": 8, "r": 12, "t": 36 if layout.get("showlegend", True) else 8, "b": 8},
        hoverlabel={"bgcolor": LIGHT["paper"], "bordercolor": LIGHT["faint"], "font": {"color": LIGHT["ink"], "size": 12}, "align": "left"},
        legend={"orientation": "h", "x": 0, "xanchor": "left", "y": 1.0, "yanchor": "bottom", "font": {"color": LIGHT["muted"]}},
        hovermode="closest",
        dragmode="zoom",
        xaxis=axis,
        yaxis=axis,
    )
    found.update_layout(**layout)
    return found


def plain(text: object) -> str:
    """Text as plotly is to show it, letter by letter: it takes part of HTML for markup."""
    return html.escape(str(text), quote=False)


def number(value: float | None) -> str:
    """A measured value, four digits after the point where it is of the size of one."""
    if value is None or not math.isfinite(value):
        return "—"
    return f"{value:.4f}" if abs(value) < 100 else f"{value:,.1f}"


def share(value: float | None) -> str:
    """A share as a percentage, with as many digits as it needs."""
    if value is None or not math.isfinite(value):
        return "—"
    digits = 0 if value == 0 or value >= 0.9995 else 1 if value >= 0.1 else 2 if value >= 0.001 else 3
    return f"{value:.{digits}%}"


def samples(value: float) -> str:
    """A count of samples, in words that are short: 5.02 M."""
    for size, name in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g} {name}"
    return f"{value:.0f}"


def log_ticks(low: float, high: float, told: Callable[[float], str]) -> dict[str, Any]:
    """Ticks of a logarithmic axis around two values: few enough to be read on a narrow screen."""
    decades = math.log10(high / low)
    steps = (1, 2, 5) if decades <= 2 else (1, 3) if decades <= 4 else (1,)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [tick for power in powers for step in steps if low / 2 <= (tick := step * 10.0**power) <= high * 2]
    return {"type": "log", "tickvals": ticks, "ticktext": [told(tick) for tick in ticks], "tickangle": 0}


def log_line(chart: go.Figure, x: float, text: str, *, angle: int = -90) -> None:
    """A vertical line at a value of a logarithmic axis, with its name at its foot."""
    chart.add_vline(x, line={"color": LIGHT["muted"], "width": 1, "dash": "dot"})
    chart.add_annotation(
        x=math.log10(x),  # as plotly wants it on such an axis
        y=0,
        yref="paper",
        text=text,
        showarrow=False,
        textangle=angle,
        xanchor="right",
        yanchor="bottom",
        font={"size": 11, "color": LIGHT["muted"]},
    )


def many(count: int, one: str, several: str = "") -> str:
    """A count with its noun."""
    return f"{count:,} {one if count == 1 else several or one + 's'}"


def thinned(items: Sequence[Any], most: int) -> list[Any]:
    """At most `most` of the items, evenly over their order, the first and the last among them."""
    if len(items) <= most:
        return list(items)
    if most == 1:
        return [items[0]]
    return [items[round(place * (len(items) - 1) / (most - 1))] for place in range(most)]
