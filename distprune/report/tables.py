"""Tables for the terminal, from the store or from a plan."""

from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from distprune.core.config import read_yaml
from distprune.core.stages import Prune
from distprune.core.state import TRAINING
from distprune.errors import command
from distprune.store.trials import FAILED

if TYPE_CHECKING:
    from distprune.core.run import Run
    from distprune.result import Result


_NUMBERS = ("trial", "validation", "test", "kept", "weights", "FLOPs")
_AXES = ("paradigm", "granularity", "criterion", "allocator", "regularizer")


def show(table: Any) -> None:
    """Print to the terminal; wide enough for a file where there is none."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=160)
    console.print(table)


def front_table(result: "Result") -> Table:
    """The Pareto front: the most accurate first."""
    table = Table(title=f"Pareto front of {result.folder}", title_justify="left")
    front = result.pareto()
    axes = [axis for axis in _AXES if axis != "granularity" or {trial.row[axis] for trial in front} - {"weight", None}]
    for name in _NUMBERS:
        table.add_column(name, justify="right")
    repeated = any(trial.row.get("seeds") for trial in front)
    if repeated:
        table.add_column("over seeds", justify="right")  # of the repeats alone: a finalist was chosen for its own value
    for name in axes:
        table.add_column(name)
    for trial in front:
        row = trial.row
        table.add_row(
            str(row["number"]),
            f"{row['objective']:.4f}",
            "" if row["test"] is None else f"{row['test']:.4f}",
            f"{1 - row['sparsity']:.2%}",
            f"{row['kept']:,}",
            "" if row["flops"] is None else f"{row['flops']:,.0f}",
            *([_over_seeds(row)] if repeated else []),
            *(row[axis] for axis in axes),
        )
    return table


def _over_seeds(row: Mapping[str, Any]) -> str:
    if not row.get("seeds"):
        return ""
    return f"{row['mean']:.4f}" + (f" ± {row['spread']:.4f}" if row["spread"] is not None else "") + f" ({row['seeds']})"


def ends_line(result: "Result") -> str:
    """How the trials ended, in one line."""
    rows = result.trials.to_pylist()
    ends = Counter(row["ended"] for row in rows)
    text = ", ".join(f"{count} {end}" for end, count in ends.most_common())
    own = [row for row in rows if row["round_of"] is None]  # others were billed as rounds of their trials
    billed, spent = sum(row["cost"] or 0 for row in own), sum(row["spent"] or 0 for row in rows)
    saved = sum(row["saved"] or 0 for row in own)
    shared = f" Shared work saved {saved:,.0f}." if saved else ""
    rounds = f" {len(rows) - len(own)} of them are rounds of others." if len(own) < len(rows) else ""
    return f"{len(rows)} trials: {text}.{rounds} {billed:,.0f} samples billed, {spent:,.0f} run (scoring at rungs included).{shared}"


def infeasible(result: "Result") -> list[str]:
    """How many finished trials are kept from the front, and by what."""
    found = [row["violated"] for row in result.trials.to_pylist() if row["violated"]]
    names = Counter(name for violated in found for name in violated)
    why = ", ".join(f"{name} ({count})" for name, count in names.most_common())
    return [f"{len(found)} finished trials cannot be on the front: {why}."] if found else []


def failures(result: "Result", most: int = 5) -> list[str]:
    """Why trials failed, the most frequent reasons first."""
    reasons = Counter(row["reason"] for row in result.trials.to_pylist() if row["ended"] in FAILED)
    return [f"{count} failed: {reason}" for reason, count in reasons.most_common(most)]


def simulated_lines(result: "Result") -> list[str]:
    """What a simulated search was, its virtual time and its hypervolume; empty for a real one."""
    facts = result.folder.simulated()
    if facts is None:
        return []
    time = f"{facts['time']:,.0f} {'seconds' if facts['clock'] == 'wall_s' else 'samples a worker'}" if "time" in facts else "unfinished"
    return [
        f"Simulated: trials were looked up among {facts['usable']} finished ones of {facts['run']}; nothing was trained.",
        f"Virtual time on {facts['workers']} workers: {time}. Hypervolume: {result.hypervolume():.4f}.",
    ]


def _study(result: "Result") -> str:
    """Where the trials' study is."""
    facts = read_yaml(result.folder.search_yaml)
    if "study" not in facts:
        return str(result.folder.journal)
    return f"study '{facts['study']['name']}' in {facts['search']['study']}"


def show_result(result: "Result") -> None:
    """The front, how trials ended, where the results lie, and the commands that come next."""
    show(front_table(result))
    folder, path = result.folder, result.folder.path
    print(ends_line(result))
    for line in [*infeasible(result), *failures(result), *(simulated := simulated_lines(result))]:
        print(line)
    results = f"The run is at {folder}. Its copy here" if folder.url else "Results"
    if simulated:
        print(f"{results}: {path}/trials.parquet, {path}/study.journal (opens in optuna-dashboard)")
        return
    print(f"{results}: {path}/trials.parquet, {path}/masks/, {_study(result)} (opens in optuna-dashboard)")
    print("Next:")
    if result.pareto():
        print(f"  {command(f'export {folder.quoted} --to exported/{path.name}')}")
    rows = result.trials.to_pylist()
    proposed = sum(row["repeat_of"] is None and row["round_of"] is None for row in rows)  # the others are beyond the limit
    print(f"  {command(f'resume {folder.quoted} --trials {2 * max(proposed, 1)}')}")


def plan_table(run: "Run") -> Table:
    """The stages of a recipe."""
    plan = run.plan
    flops = TRAINING * plan.cost * sum(run.env.flops.values())
    title = f"{run.recipe.paradigm.name}: {plan.cost:,} samples at most" + (f", {flops:.3g} FLOPs on dense hardware" if flops else "")
    table = Table(title=title, title_justify="left")
    for name in ("stage", "", "sparsity", "samples"):
        table.add_column(name, justify="right" if name in ("sparsity", "samples") else "left")
    sparsity = 0.0
    for stage, cost in zip(plan.stages, plan.costs(), strict=True):
        if isinstance(stage, Prune):
            sparsity = stage.sparsity
        sparsity = max([sparsity, *(getattr(hook, "sparsity", 0.0) for hook in getattr(stage, "hooks", ()))])
        table.add_row(type(stage).__name__, stage.describe(), f"{sparsity:.4f}", f"{cost:,}")
    return table
