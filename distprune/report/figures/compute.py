"""Where the compute went: samples that were run, for what, and samples that were billed or planned and not run."""

import statistics
from collections.abc import Mapping
from typing import Any

import plotly.graph_objects as go

from distprune.report.data import Data
from distprune.report.drawn import LIGHT, Drawn, figure, samples, share
from distprune.report.findings import own
from distprune.store.trials import FAILED

_PARTS = {  # part: (what it is called, colour)
    "useful": ("in trials that finished", "accent"),
    "stopped": ("in trials stopped early", "middle"),
    "running": ("in trials still running", "lower"),
    "scoring": ("scoring at rungs", "faint"),
    "again": ("run again after a worker died", "second"),
    "failed": ("in trials that failed", "second"),
    "shared": ("spared: another trial had run it", "third"),
    "stopping": ("spared by stopping, estimated", "third"),
}
_RUN = ("useful", "stopped", "running", "scoring", "again", "failed")
_WASTED = ("again", "failed")


def parts(data: Data) -> dict[str, float]:
    """Samples of each part. What was run sums up to `spent` of all trials."""
    found = dict.fromkeys(_PARTS, 0.0)
    for row in data.rows:
        spent, saved = row["spent"] or 0.0, row["saved"] or 0.0
        if row["round_of"] is not None or row["ended"] == "duplicate":  # billed in another trial
            found["useful"] += spent
            continue
        # What is neither billed nor shared: copies that were scored at rungs, and what was lost with a worker.
        beside = min(max(spent + saved - (row["cost"] or 0.0), 0.0), spent)
        if row["ended"] in FAILED:
            found["failed"] += spent
            continue
        found["again" if row["number"] in data.died else "scoring"] += beside
        found[row["ended"] if row["ended"] in ("stopped", "running") else "useful"] += spent - beside
        found["shared"] += saved
    found["stopping"] = _stopping(data)
    return found


def _stopping(data: Data) -> float:
    """What stopped trials would have billed besides: as the finished ones of their paradigm on average, else as the middle one of all."""
    bills: dict[str, list[float]] = {}
    for row in own(data):
        if row["ended"] == "finished" and row["cost"]:
            bills.setdefault(row["paradigm"], []).append(row["cost"])
    if not bills:
        return 0.0
    every = statistics.median(cost for costs in bills.values() for cost in costs)
    means = {name: statistics.fmean(costs) for name, costs in bills.items()}
    return float(sum(max(means.get(row["paradigm"], every) - (row["cost"] or 0.0), 0.0) for row in data.stopped if row["round_of"] is None))


def compute(data: Data) -> Drawn:
    """A bar a part."""
    found = {name: value for name, value in parts(data).items() if value > 0}
    run = sum(found.get(name, 0.0) for name in _RUN)
    columns = ("part", "what", "samples", "was run")
    rows = [[name, _PARTS[name][0], value, name in _RUN and data.simulated is None] for name, value in found.items()]
    drawn: dict[str, Any] = {"name": "compute", "title": "Where the compute went", "columns": columns, "rows": rows}
    if data.simulated is not None or not run:
        return Drawn(**drawn, caption="Nothing was run yet." if data.simulated is None else "The search is simulated: nothing was run.")
    names = list(reversed(found))
    chart = figure(
        [
            go.Bar(
                x=[found[name] for name in names],
                y=[_PARTS[name][0] for name in names],
                orientation="h",
                marker={
                    "color": [LIGHT[_PARTS[name][1]] for name in names],
                    "opacity": [1.0 if name in _RUN else 0.45 for name in names],
                    "line": {"width": [0.0 if name in _RUN else 1.5 for name in names], "color": LIGHT["third"]},
                },
                text=[f"{samples(found[name])}" + (f" · {share(found[name] / run)}" if name in _RUN else "") for name in names],
                textposition="outside",
                cliponaxis=False,
                hovertemplate="%{y}: %{x:,.0f} samples<extra></extra>",
            )
        ],
        showlegend=False,
        height=80 + 38 * len(names),
        bargap=0.35,
        xaxis={"title": {"text": "samples"}, "range": [0, 1.28 * max(found.values())], "nticks": 5},
        yaxis={"showgrid": False},
    )
    note = "Percentages are of what was run."
    if rounds := sum(row["round_of"] is not None for row in data.rows):
        note += f" {rounds} of the trials are rounds of others and cost nothing."
    if found.get("again"):
        note += " What was run again includes the scoring of those trials."
    return Drawn(**drawn, caption=_caption(found, run), figure=chart, note=note)


def _caption(found: Mapping[str, float], run: float) -> str:
    wasted = sum(found.get(name, 0.0) for name in _WASTED)
    spared = [(found.get("shared", 0.0), "sharing work between trials spared {}"), (found.get("stopping", 0.0), "stopping spared about {}")]
    text = (
        f"Of {samples(run)} samples run, {share(found.get('useful', 0.0) / run)} went into trials that finished and "
        f"{share(wasted / run) if wasted else 'none'} {'was' if wasted else 'were'} lost to failures"
    )
    told = [words.format(f"{samples(value)} more") for value, words in spared if value]
    return f"{text}; {' and '.join(told)}." if told else f"{text}."
