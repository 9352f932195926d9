"""Failures by class: how trials ended that have no result, and why."""

from collections import Counter
from typing import Any

import plotly.graph_objects as go

from distprune.report.data import Data
from distprune.report.drawn import LIGHT, Drawn, figure, many, share

WORDS = {
    "error": "an error in the trial's own code or data",
    "nan": "a loss that was not finite",
    "oom": "memory ran out",
    "timeout": "out of time",
    "lost": "workers died again and again",
}
_CUT = 160  # characters of a reason on the page


def failures(data: Data) -> Drawn:
    """A bar a class."""
    counts = Counter(str(row["ended"]) for row in data.failed)
    rows = [[row["number"], row["ended"], row["paradigm"], row["reason"]] for row in data.failed]
    drawn: dict[str, Any] = {"name": "failures", "title": "Failures", "columns": ("trial", "class", "paradigm", "reason"), "rows": rows}
    died = len(data.died)
    retried = f" Workers of {many(died, 'trial')} died, and the trials went on or were ended." if died else ""
    if not counts:
        return Drawn(**drawn, caption=("No trial failed." if data.rows else "No trial has begun yet.") + retried)
    names = sorted(counts, key=lambda name: counts[name])
    chart = figure(
        [
            go.Bar(
                x=[counts[name] for name in names],
                y=names,
                orientation="h",
                marker={"color": LIGHT["second"]},
                text=[f"{counts[name]:,}" for name in names],
                textposition="outside",
                cliponaxis=False,
                customdata=[WORDS[name] for name in names],
                hovertemplate="%{customdata}: %{x:,}<extra></extra>",
            )
        ],
        showlegend=False,
        height=80 + 38 * len(names),
        bargap=0.35,
        xaxis={"title": {"text": "trials"}, "range": [0, 1.2 * max(counts.values())], "tickformat": ",d", "nticks": 6},
        yaxis={"showgrid": False},
    )
    most = counts.most_common(1)[0]
    caption = (
        f"{many(len(data.failed), 'trial')} of {len(data.rows):,} failed, {share(len(data.failed) / len(data.rows))}; "
        f"the most frequent class is {most[0]} ({WORDS[most[0]]}) with {most[1]:,}.{retried}"
    )
    return Drawn(**drawn, caption=caption, figure=chart)


def reasons(data: Data, most: int = 8) -> list[tuple[str, str, int, int]]:
    """(class, reason, how many trials, the first of them), the most frequent first."""
    found: dict[tuple[str, str], list[int]] = {}
    for row in data.failed:
        found.setdefault((str(row["ended"]), str(row["reason"] or "")), []).append(row["number"])
    ordered = sorted(found.items(), key=lambda item: (-len(item[1]), item[1][0]))
    return [
        (end, reason if len(reason) <= _CUT else f"{reason[:_CUT]}…", len(trials), trials[0]) for (end, reason), trials in ordered[:most]
    ]
