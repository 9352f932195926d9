"""What the sanity checks of a mask say: means and differences over seeds, a verdict by one rule, and the table."""

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distprune.core.sanity import Retrained, Variant
from distprune.errors import UserError

if TYPE_CHECKING:
    from rich.table import Table

# 97.5 % quantiles of Student's t for 2, 3, ... seeds: what two standard errors of many seeds are, from few.
_STUDENT = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)


@dataclass(frozen=True, kw_only=True)
class Row:
    """A variant over seeds. `difference` is to `as found` with the same seed; None where it takes more seeds that did not diverge."""

    variant: Variant
    values: tuple[float, ...]  # NaN where training diverged
    overlap: float  # share of the kept weights that the mask as found keeps too
    mean: float | None
    std: float | None
    difference: float | None
    error: float | None  # standard error of the difference


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What a mask knows; None where it cannot be said."""

    weights: bool | None  # which weights to keep, beyond how many in each layer
    values: bool | None  # the values that it was found with matter
    text: str


@dataclass(frozen=True, kw_only=True)
class Sanity:
    """The outcome of the checks."""

    protocol: str  # what was retrained, in one line
    notes: tuple[str, ...]  # what else must be known to read the numbers
    objective: str
    maximize: bool
    results: Sequence[Retrained] = field(repr=False)

    @property
    def rows(self) -> list[Row]:
        """A row a variant, in the order in which they were trained."""
        found: dict[Variant, list[Retrained]] = {}
        for result in self.results:
            found.setdefault(result.variant, []).append(result)
        values = {variant: [r.metrics.get(self.objective, math.nan) for r in results] for variant, results in found.items()}
        return [_row(variant, values, statistics.fmean(r.overlap for r in results)) for variant, results in found.items()]

    @property
    def verdict(self) -> Verdict:
        """What the rows say."""
        return verdict({row.variant: row.values for row in self.rows}, self.untrained, maximize=self.maximize)

    @property
    def untrained(self) -> list[float]:
        """What networks that learned nothing have: those with new values, before training."""
        return [result.before[self.objective] for result in self.results if result.variant in ("reinitialised", "random")]

    @property
    def seeds(self) -> list[int]:
        """Those that every variant was trained with."""
        return list(dict.fromkeys(result.seed for result in self.results))

    def plain(self) -> dict[str, Any]:
        """For JSON: every number, and what it was made from."""
        return {
            "format": "distprune.sanity/1",
            "protocol": self.protocol,
            "notes": list(self.notes),
            "objective": self.objective,
            "maximize": self.maximize,
            "seeds": self.seeds,
            "rows": [_finite(asdict(row)) for row in self.rows],
            "results": [_finite(asdict(result)) for result in self.results],
            "rule": rule(len(self.seeds)),
            "verdict": asdict(self.verdict),
        }

    def write(self, path: str | Path, **facts: Any) -> None:
        """Write `plain` and `facts` to the new JSON file `path`."""
        check_target(path)
        Path(path).write_text(json.dumps({**self.plain(), **facts}, indent=2, allow_nan=False) + "\n")


def _finite(value: Any) -> Any:
    """Plain data with None for numbers that JSON has not."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def check_target(path: str | Path | None) -> None:
    """Raise UserError if `path` is not a new file in an existing folder."""
    if path is not None and (Path(path).exists() or not Path(path).parent.is_dir()):
        why = "exists already" if Path(path).exists() else "is in a folder that does not exist"
        raise UserError(f"--to must be a new file in an existing folder, {path} {why}. Choose another.")


def _row(variant: Variant, values: Mapping[Variant, Sequence[float]], overlap: float) -> Row:
    finite = [value for value in values[variant] if math.isfinite(value)]
    difference, error = (None, None) if variant == "as found" else differ(values[variant], values["as found"])
    return Row(
        variant=variant,
        values=tuple(values[variant]),
        overlap=overlap,
        mean=statistics.fmean(finite) if finite else None,
        std=statistics.stdev(finite) if len(finite) > 1 else None,
        difference=difference,
        error=error,
    )


def differ(a: Sequence[float], b: Sequence[float]) -> tuple[float | None, float | None]:
    """Mean of a - b over seeds, paired, and its standard error; seeds where one of them diverged are left out."""
    pairs = _pairs(a, b)
    error = statistics.stdev(pairs) / math.sqrt(len(pairs)) if len(pairs) > 1 else None
    return (statistics.fmean(pairs) if pairs else None), error


def _pairs(a: Sequence[float], b: Sequence[float]) -> list[float]:
    return [x - y for x, y in zip(a, b, strict=True) if math.isfinite(x - y)]


def factor(seeds: int) -> float:
    """How many standard errors a difference must have to count: two, widened by Student's t for few seeds."""
    return _STUDENT[min(seeds, len(_STUDENT) + 1) - 2]


def rule(seeds: int) -> str:
    """The rule of the verdict, in one line."""
    if seeds < 2:
        return "A difference has no standard error with one seed."
    return f"A difference counts above {factor(seeds):.2f} standard errors: two, widened by Student's t for {seeds} seeds."


def beats(a: Sequence[float], b: Sequence[float], *, maximize: bool) -> bool | None:
    """Whether `a` is better than `b` by more than `factor` standard errors of the difference; None with fewer than two seeds."""
    difference, error = differ(a, b)
    if difference is None or error is None:
        return None
    return (difference if maximize else -difference) > factor(len(_pairs(a, b))) * error


def learned(values: Sequence[float], untrained: Sequence[float], *, maximize: bool) -> bool:
    """Whether the mean of `values` is better than every untrained network by more than these differ among each other."""
    sign = 1 if maximize else -1
    level = [sign * value for value in untrained if math.isfinite(value)]
    finite = [sign * value for value in values if math.isfinite(value)]
    return not level or (bool(finite) and statistics.fmean(finite) > 2 * max(level) - min(level))


def verdict(values: Mapping[Variant, Sequence[float]], untrained: Sequence[float], *, maximize: bool) -> Verdict:
    """The mask knows weights if it beats `shuffled`, which has its layer budgets and its values; values matter if it beats `reinitialised`.

    It beats a variant if it is better by more than `factor` standard errors of the difference over seeds. Where it learned no more than
    `untrained` networks, nothing can be said; where a variant did not, training may only have been too short for it.
    """
    found = values["as found"]
    wins: dict[Variant, bool | None] = {
        variant: beats(found, other, maximize=maximize) for variant, other in values.items() if variant != "as found"
    }
    weights, own_values = wins["shuffled"], wins["reinitialised"]
    if weights is None or own_values is None:
        few = "One seed is" if len(found) == 1 else "Trainings diverged, and what is left is"
        return Verdict(weights=None, values=None, text=f"{few} not enough for a verdict. Take more seeds.")
    if not learned(found, untrained, maximize=maximize):
        text = "No verdict: retrained as found, the network is no better than an untrained one. Train longer, or keep more weights."
        return Verdict(weights=None, values=None, text=text)

    def gap(variant: Variant) -> str:
        difference, error = differ(found, values[variant])
        return f"{variant} ({difference:+.4f} ± {error:.4f})"

    if weights:
        text = f"The mask knows which weights to keep, not only how many in each layer: it beats {gap('shuffled')}."
    elif beats(values["shuffled"], found, maximize=maximize):
        text = f"The mask is worse than its own layer budgets: {gap('shuffled')} beats it."
    else:
        text = f"Only layer budgets show: the mask does not beat {gap('shuffled')}."
    text += f" Its values count: it beats {gap('reinitialised')}." if own_values else f" New values do as well: {gap('reinitialised')}."
    if not weights and not own_values and wins["random"]:
        text += f" Mask and values count together only: it beats {gap('random')}."
    beaten: tuple[Variant, ...] = ("shuffled", "reinitialised")
    if idle := [variant for variant in beaten if wins[variant] and not learned(values[variant], untrained, maximize=maximize)]:
        text += f" But {' and '.join(idle)} learned nothing: in a longer training the gap may close."
    return Verdict(weights=weights, values=own_values, text=text)


def sanity_table(sanity: Sanity) -> "Table":
    """A row a variant; `shared` is the share of its kept weights that the mask as found keeps too."""
    from rich.table import Table

    seeds = len(sanity.seeds)
    table = Table(title=f"{sanity.objective} on validation, {seeds} seed{'s' * (seeds > 1)}", title_justify="left")
    for name in ("variant", "mean", "std", "to as found", "std. error", "shared"):
        table.add_column(name, justify="left" if name == "variant" else "right")
    for row in sanity.rows:
        diverged = sum(not math.isfinite(value) for value in row.values)
        mean = "diverged" if row.mean is None else f"{row.mean:.4f}" + (f" ({diverged} diverged)" if diverged else "")
        table.add_row(
            row.variant, mean, _number(row.std, ".4f"), _number(row.difference, "+.4f"), _number(row.error, ".4f"), f"{row.overlap:.1%}"
        )
    if seeds and not any(row.variant == "inverted" for row in sanity.rows):
        table.add_row("inverted", *["—"] * 5)
    return table


def _number(value: float | None, form: str) -> str:
    return "—" if value is None else format(value, form)


def hear(event: str, facts: dict[str, Any]) -> None:
    """Print what is being done, a line a retraining."""
    if event == "rerunning":
        print(f"{facts['name']}: running the recipe up to its masks", flush=True)
    elif event == "subject":
        print("\n".join([*facts["notes"], facts["protocol"]]), flush=True)
    else:
        result = facts["result"]
        metrics = ", ".join(f"{name} {value:.4f}" for name, value in result.metrics.items()) or "diverged"
        print(f"{facts['share']:4.0%}  seed {result.seed}  {result.variant:<13}  {metrics}", flush=True)


def show_sanity(sanity: Sanity) -> None:
    """The table, the rule and the verdict."""
    from distprune.report.tables import show

    show(sanity_table(sanity))
    print(rule(len(sanity.seeds)))
    print(sanity.verdict.text)
