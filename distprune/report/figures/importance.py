"""Importance of every searched choice: how much it decides whether a trial comes near the front."""

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import optuna
import plotly.graph_objects as go
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution

from distprune.report.data import Data, Row
from distprune.report.drawn import LIGHT, Drawn, figure, many, plain, share, thinned
from distprune.report.reading import Floats

FEWEST, MOST = 16, 400  # finished trials that it takes, and that are looked at
_TOP = 5  # trials at least that count as the best, as the method asks for
_SHUFFLES = 16
_BARS = 15
_FEWEST_OF_ONE = 5  # trials that must have had a choice,
_SHARE_OF_ONE = 0.1  # and of all,
_FEWEST_BEST = 3  # and of the best: the method is not stable on fewer
_AXES = ("paradigm", "criterion", "allocator", "granularity", "regularizer", "optimizer")
_WHAT = "Conditional PED-ANOVA (Watanabe et al. 2023, arXiv:2304.10255)"

Params = Mapping[str, Any]


def importance(data: Data) -> Drawn:
    """A bar a choice, the most important first, beside what chance alone would give."""
    rows = [row for row in data.finished if row["round_of"] is None and row["repeat_of"] is None]
    columns = ("choice", "trials", "importance", "by chance", "above chance")
    drawn: dict[str, Any] = {"name": "importance", "title": "What decided", "columns": columns}
    if len(rows) < FEWEST:
        return Drawn(**drawn, caption=f"Importance takes at least {FEWEST} finished trials, and there {_are(len(rows))}: too few to say.")
    looked = thinned(rows, MOST)
    params = [_merged(data.long(row["number"], "parameters") or {}) for row in looked]
    least = max(_FEWEST_OF_ONE, math.ceil(_SHARE_OF_ONE * len(looked)))
    values = gaps(np.array([row["objective"] for row in looked]), _costs(data, looked))
    quantile = max(0.1, _TOP / len(looked))
    good = np.quantile(values, 1 - quantile, method="higher")
    bests = [trial for trial, value in zip(params, values, strict=True) if value >= good]
    distributions = _distributions(params, least)
    distributions = {name: kind for name, kind in distributions.items() if sum(name in trial for trial in bests) >= _FEWEST_BEST}
    if not distributions or np.ptp(values) == 0:
        return Drawn(**drawn, caption="Nothing was searched in which the finished trials differ and count for it.")
    found, chance = importances(params, distributions, values, quantile)
    counts = {name: sum(name in trial for trial in params) for name in found}
    drawn["rows"] = [[name, counts[name], found[name], chance[name], found[name] > chance[name]] for name in found]
    shown = [name for name in found if found[name] > 0]
    if not shown:
        return Drawn(**drawn, caption="No choice sets the best trials apart from the others.")
    notes = [
        f"{_WHAT} over {many(len(looked), 'finished trial')}: how a choice is spread among the best {share(quantile)} of them, by how far "
        "each is behind the best one that is as small or smaller, against all. Bars add up to 100%. Marks are chance: what "
        f"{_SHUFFLES} shuffles of the results give, mean and three standard deviations.",
        f"Choices that fewer than {least} of them, or {_FEWEST_BEST} of the best, had are left out.",
    ]
    if len(looked) < len(rows):
        notes.append(f"{len(looked)} of {len(rows):,} finished trials were looked at.")
    if len(shown) > _BARS:
        rest = sum(found[name] for name in shown[_BARS:])
        notes.append(
            f"{many(len(shown) - _BARS, 'more choice')} with {share(rest)} together {'has' if len(shown) == _BARS + 1 else 'have'} no bar."
        )
    return Drawn(**drawn, caption=_caption(found, chance), figure=_chart(shown[:_BARS], found, chance), note=" ".join(notes))


def gaps(objectives: Floats, costs: Floats) -> Floats:
    """How far each trial is behind the best whose costs [trials, costs] are all as low or lower: 0 on the front, else below 0."""
    behind = np.zeros(len(objectives))
    for place in range(len(objectives)):
        rivals = (costs <= costs[place]).all(axis=1)
        behind[place] = objectives[place] - objectives[rivals].max()
    return behind


def _are(count: int) -> str:
    return {0: "is none", 1: "is one"}.get(count, f"are {count}")


def _costs(data: Data, rows: Sequence[Row]) -> Floats:
    found = [[data.cost(row, name) for name in data.costs] for row in rows]
    return np.array([[1.0 if cost is None else cost for cost in costs] for costs in found], dtype=float).reshape(len(rows), -1)


def _merged(params: Params) -> dict[str, Any]:
    """Parameters under the names that a reader knows: an axis is one choice, whichever branch of the space it was drawn in."""
    return {name.split("/")[0] if name.split("/")[0] in _AXES else name: value for name, value in params.items()}


def _distributions(params: Sequence[Params], least: int) -> dict[str, BaseDistribution]:
    """What each choice was drawn from, as far as the trials show; those that never differ are left out."""
    seen: dict[str, list[Any]] = {}
    for trial in params:
        for name, value in trial.items():
            seen.setdefault(name, []).append(value)
    found: dict[str, BaseDistribution] = {}
    for name, values in seen.items():
        if len(values) < least or len(set(map(str, values))) < 2:
            continue
        if all(_is_number(value) for value in values):
            low, high = float(min(values)), float(max(values))
            found[name] = FloatDistribution(low, high, log=low > 0 and high / low >= 10)
        else:
            found[name] = CategoricalDistribution(sorted(set(map(str, values))))
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def importances(
    params: Sequence[Params], distributions: Mapping[str, BaseDistribution], values: Floats, quantile: float
) -> tuple[dict[str, float], dict[str, float]]:
    """Shares of the importance of having one of the best `values`, the largest first, and those that chance gives each choice."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(direction="maximize")
    for trial in params:
        own = {name: distributions[name] for name in trial if name in distributions}
        cast = {name: float(trial[name]) if isinstance(kind, FloatDistribution) else str(trial[name]) for name, kind in own.items()}
        study.add_trial(optuna.create_trial(params=cast, distributions=own, value=0.0))
    from optuna.importance import PedAnovaImportanceEvaluator  # scikit-learn comes with it, for seconds: only where there is a figure

    evaluator = PedAnovaImportanceEvaluator(target_quantile=quantile)

    def evaluate(results: Floats) -> dict[str, float]:
        return evaluator.evaluate(study, target=lambda trial: -float(results[trial.number]))  # it looks for low targets

    random = np.random.default_rng(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it looks for low ones, and that a choice was met in few trials
        found = evaluate(values)
        shuffled = [evaluate(random.permutation(values)) for _ in range(_SHUFFLES)]
    whole = sum(found.values()) or 1.0
    shares = {name: value / whole for name, value in sorted(found.items(), key=lambda item: -item[1])}
    given = {name: np.array([one[name] for one in shuffled]) / whole for name in shares}
    return shares, {name: float(one.mean() + 3 * one.std(ddof=1)) for name, one in given.items()}


def _chart(shown: Sequence[str], found: Mapping[str, float], chance: Mapping[str, float]) -> go.Figure:
    """Drawn here: Optuna's own plot copies every trial once a bar."""
    names = list(reversed(shown))
    labels = [plain(_label(name)) for name in names]
    most = 1.05 * min(max(*(found[name] for name in shown), *(chance[name] for name in shown)), 1.0)
    return figure(
        [
            go.Bar(
                x=[found[name] for name in names],
                y=labels,
                orientation="h",
                name="importance",
                marker={"color": [LIGHT["accent"] if found[name] > chance[name] else LIGHT["faint"] for name in names]},
                hovertemplate="%{y}: %{x:.1%}<extra></extra>",
            ),
            go.Scatter(
                x=[min(chance[name], 1.0) for name in names],
                y=labels,
                mode="markers",
                name="chance",
                marker={"symbol": "line-ns", "size": 13, "line": {"width": 2, "color": LIGHT["second"]}},
                hovertemplate="%{y}: %{x:.1%} by chance<extra></extra>",
            ),
        ],
        height=110 + 26 * len(names),
        bargap=0.35,
        xaxis={"title": {"text": "share of the importance"}, "tickformat": ".0%", "range": [0, most]},
        yaxis={"showgrid": False, "type": "category"},
    )


def _label(name: str) -> str:
    return name.replace("/", ": ", 1)


def _caption(found: Mapping[str, float], chance: Mapping[str, float]) -> str:
    sure = [name for name in found if found[name] > chance[name]]
    if not sure:
        return "No choice decides more than chance would have it: with more trials there may be one."
    first = f"{_label(sure[0])} decided the most among those above chance, with {share(found[sure[0]])} of the importance"
    others = [f"{_label(name)} ({share(found[name])})" for name in sure[1:3]]
    below = len(found) - len(sure)
    text = f"{first}, then {' and '.join(others)}" if others else first
    return f"{text}; {many(below, 'choice does', 'choices do')} not rise above chance." if below else f"{text}."
