"""Random pruning, memorising and generalising (Yang et al. 2023, arXiv:2301.00335): configs/papers/generalisation.yaml under many seeds.

    python benchmarks/generalisation.py    # 10 seeds a cell; goes on from benchmarks/generalisation.json if there is one
    python benchmarks/generalisation.py --figure docs/figures/generalisation.svg --check

`--figure` draws the figure, which needs matplotlib; `--check` ends with exit code 1 where one of the paper's four claims does not hold.

Three studies: random masks at each sparsity of the file, for two ratios of signal to noise; high sparsities with half and twice the
filters; the highest with masks by other criteria. A seed draws points, weights and masks anew, and is shared by all cells, so that cells
are compared in pairs; the cells that tell filters and density apart have twice as many seeds. A run ends when its weights have stood still
between two reports: the gradient is zero, and nothing changes any more.
"""

import argparse
import json
import math
import multiprocessing
import statistics
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from distprune.core.config import read_yaml
from distprune.core.executor import execute
from distprune.core.recipe import Recipe
from distprune.core.run import prepare
from distprune.environment import environment

CONFIG = Path(__file__).parents[1] / "configs/papers/generalisation.yaml"
FILE = Path(__file__).with_suffix(".json")
RATIOS = (1.5, 3.0)
FILTERS = (10, 20, 40)
CRITERIA = ("random", "synflow", "snip", "grasp")
HIGH, HEAVY = 0.8, 0.95  # from where on widths are compared, and criteria
HARDWARE = "2 shared CPU cores, one thread a run"
CELL = ("ratio", "filters", "criterion", "sparsity")
METRICS = ("train_loss", "test_err", "signal_strength", "noise_memorisation", "live_signal_weights")
FITTED = 0.01  # a training loss below it counts as zero
Rows = list[dict[str, Any]]


def cells(sparsities: Sequence[float]) -> Iterator[dict[str, Any]]:
    """Every cell of the studies once."""
    for ratio in RATIOS:
        yield from ({"ratio": ratio, "filters": 20, "criterion": "random", "sparsity": at} for at in (0.0, *sparsities))
    for filters in FILTERS:
        if filters != 20:
            yield from ({"ratio": 1.5, "filters": filters, "criterion": "random", "sparsity": at} for at in sparsities if at >= HIGH)
    for criterion in CRITERIA[1:]:
        yield from ({"ratio": 1.5, "filters": 20, "criterion": criterion, "sparsity": at} for at in sparsities if at >= HEAVY)


def steps(grow: int) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Pairs of cells below the sparsities where all is lost: the second keeps half of the share, and has `grow` times the filters."""
    for filters in FILTERS[:-1]:
        for before, after in ((0.8, 0.9), (0.9, 0.95)):
            fixed = {"ratio": 1.5, "criterion": "random"}
            yield {**fixed, "filters": filters, "sparsity": before}, {**fixed, "filters": grow * filters, "sparsity": after}


def jobs(config: dict[str, Any], seeds: int) -> list[tuple[dict[str, Any], dict[str, Any], int]]:
    """All runs: recipe of the file, cell, seed."""
    twice = {tuple(cell.values()): cell for grow in (1, 2) for pair in steps(grow) for cell in pair}.values()
    found = [(cell, seed) for seed in range(seeds) for cell in cells(config["space"]["sparsity"])]
    found += [(cell, seed) for seed in range(seeds, 2 * seeds) for cell in twice]
    return [(config["recipe"], cell, seed) for cell, seed in found]


def recipe(base: dict[str, Any], cell: dict[str, Any], seed: int) -> Recipe:
    """The recipe of the file with the values of a cell."""
    pruning = {"paradigm": "dense"} if not cell["sparsity"] else {"paradigm": "at_init", "allocator": "uniform"}
    pruning |= {"sparsity": cell["sparsity"], "criterion": cell["criterion"]}
    model, data = {**base["model"], "filters": cell["filters"]}, {**base["data"], "ratio": cell["ratio"], "seed": seed}
    return Recipe.read({**base, **pruning, "model": model, "data": data, "seed": seed})


def measure(job: tuple[dict[str, Any], dict[str, Any], int]) -> dict[str, Any]:
    """One run, measured on the test split."""
    base, cell, seed = job
    torch.set_num_threads(1)
    run = prepare(recipe(base, cell, seed), report_every="50it")
    (weight,) = run.state.weights.values()
    fitted, before = None, weight.detach().clone()
    for report in execute(run.plan, run.state, run.env):
        if fitted is None and report.metrics["train_loss"] < FITTED:
            fitted = report.clock
        if torch.equal(weight, before):
            break
        before.copy_(weight.detach())
    task, model = run.env.task, run.state.model
    found = task.metrics(model, "test")
    live = [int(filters[:, label].count_nonzero()) for label, filters in enumerate(model.filters)]  # type: ignore[arg-type]
    ends = {"steps": run.state.clock, "fitted": fitted, "train_err": task.metrics(model, "train")["test_err"], "fewest_live": min(live)}
    return {**cell, "seed": seed, **ends, "test_loss": found["loss"], **{name: found[name] for name in METRICS}}


def pick(rows: Rows, **wanted: Any) -> Rows:
    """The rows that have these values."""
    return [row for row in rows if all(row[key] == value for key, value in wanted.items())]


def common(rows: Rows) -> Rows:
    """The rows of the seeds that every cell has."""
    seeds = {row["seed"] for row in pick(rows, sparsity=0.0)}
    return [row for row in rows if row["seed"] in seeds]


def spread(values: Iterable[float]) -> str:
    """Mean and standard deviation."""
    found = list(values)
    return f"{statistics.mean(found):.3f} ± {statistics.stdev(found):.3f}" if len(found) > 1 else f"{found[0]:.3f}"


def markdown(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A table."""
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *lines))


def shares(rows: Rows) -> list[float]:
    """The sparsities of rows, in order."""
    return sorted({row["sparsity"] for row in rows})


def gain_over_dense(rows: Rows, sparsity: float) -> tuple[float, float]:
    """By how much the test error is lower than that of the dense network under the same seed, and the standard error of that."""
    dense = {row["seed"]: row["test_err"] for row in pick(rows, sparsity=0.0)}
    gains = [dense[row["seed"]] - row["test_err"] for row in pick(rows, sparsity=sparsity) if row["seed"] in dense]
    return statistics.mean(gains), statistics.stdev(gains) / math.sqrt(len(gains)) if len(gains) > 1 else math.inf


def main_table(rows: Rows, ratio: float) -> str:
    """A line a sparsity: test error and what explains it."""
    own = pick(rows, ratio=ratio, filters=20, criterion="random")

    def line(at: float) -> list[str]:
        cell = pick(own, sparsity=at)
        gain, error = gain_over_dense(own, at)
        return [
            f"{at:.0%}",
            spread(row["test_err"] for row in cell),
            f"{gain:+.3f} ± {error:.3f}" if at else "",
            f"{max(row['train_err'] for row in cell):.3f}",
            f"{max(row['train_loss'] for row in cell):.0e}",
            f"{statistics.mean(row['live_signal_weights'] for row in cell):.2f}",
            f"{statistics.mean(row['fewest_live'] > 0 for row in cell):.2f}",
            spread(row["signal_strength"] for row in cell),
            spread(row["noise_memorisation"] for row in cell),
            str(len(cell)),
        ]

    head = ["pruned", "test error", "better than dense by (s.e.)", "most train error", "most train loss", "live signal weights"]
    head += ["share of seeds with all classes live", "signal strength", "noise memorisation", "n"]
    return markdown(head, [line(at) for at in shares(own)])


def error_table(rows: Rows, axis: str, values: Sequence[Any]) -> str:
    """Test error, and in brackets the mean number of live signal weights: a line a value of `axis`, a column a sparsity."""
    columns = sorted(set.intersection(*({row["sparsity"] for row in pick(rows, **{axis: value})} for value in values)))

    def cell(value: Any, at: float) -> str:
        found = pick(rows, **{axis: value, "sparsity": at})
        return f"{spread(row['test_err'] for row in found)} ({statistics.mean(row['live_signal_weights'] for row in found):.1f})"

    head = [axis, *(f"{at:.0%}" for at in columns)]
    return markdown(head, [[str(value), *(cell(value, at) for at in columns)] for value in values])


def report(rows: Rows) -> str:
    """All tables."""
    rows = common(rows)
    easy = pick(rows, ratio=1.5)
    parts = [f"Random masks, ratio {ratio}:\n\n{main_table(rows, ratio)}" for ratio in RATIOS]
    parts.append(f"Filters a class:\n\n{error_table(pick(easy, criterion='random'), 'filters', FILTERS)}")
    parts.append(f"Criteria:\n\n{error_table(pick(easy, filters=20), 'criterion', CRITERIA)}")
    return "\n\n".join(parts)


def claims(everything: Rows) -> list[tuple[bool, str]]:
    """The paper's claims: whether each holds on the rows, and the numbers."""
    rows = common(everything)
    random = pick(rows, criterion="random", filters=20)
    hard = pick(random, ratio=1.5)
    last, inner = shares(hard)[-1], shares(hard)[1:-1]
    missed = [row for row in random if row["train_err"]]
    slow = [f"{row['train_loss']:.2f} at {row['sparsity']:.0%}" for row in random if row["train_loss"] >= FITTED]
    best = max(inner, key=lambda at: gain_over_dense(hard, at)[0])
    gain, error = gain_over_dense(hard, best)
    over = [row["test_err"] for row in pick(random, sparsity=last)]
    blind = [row["test_err"] for row in pick(random, live_signal_weights=0.0)]
    same, spread_same = rise(everything, grow=1)
    wider, spread_wider = rise(everything, grow=2)
    return [
        (
            not missed and len(slow) <= len(random) / 100,
            f"The training loss is zero: {len(missed)} of {len(random)} runs miss a training point, {len(slow)} have a loss of {FITTED} or "
            f"more ({', '.join(slow) or 'none'}).",
        ),
        (gain > 3 * error, f"Mild pruning generalises better: {best:.0%} pruned has {gain:.3f} ± {error:.3f} (s.e.) less test error."),
        (
            statistics.mean(over) > 0.4 and abs(statistics.mean(blind) - 0.5) < 0.02,
            f"Over-pruning memorises: test error {spread(over)} at {last:.0%}, and {spread(blind)} in all {len(blind)} runs without live "
            "signal weights.",
        ),
        (
            same > 2 * spread_same and abs(wider) < same / 2,
            f"The rise follows the live signal weights, not the density: half of the kept weights less is {same:+.3f} ± {spread_same:.3f} "
            f"(s.e.) test error, and {wider:+.3f} ± {spread_wider:.3f} with twice the filters, which leaves as many live.",
        ),
    ]


def rise(rows: Rows, grow: int) -> tuple[float, float]:
    """How much test error halving the kept share adds while the filters grow `grow`-fold: the mean over steps, and its standard error."""
    added: dict[int, list[float]] = {}
    for first, second in steps(grow):
        before = {row["seed"]: row["test_err"] for row in pick(rows, **first)}
        for row in pick(rows, **second):
            added.setdefault(row["seed"], []).append(row["test_err"] - before[row["seed"]])
    means = [statistics.mean(values) for values in added.values()]
    return statistics.mean(means), statistics.stdev(means) / math.sqrt(len(means))


def draw(rows: Rows, path: Path) -> None:
    """The figure: errors against the pruned share, what the filters have learnt, and errors against the number of live signal weights."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.rcParams |= {
        "font.size": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "svg.hashsalt": "distprune",
        "axes.grid": True,
    }
    pyplot.rcParams |= {"grid.color": "#e6e6e6", "grid.linewidth": 0.8, "axes.axisbelow": True, "legend.frameon": False}
    figure, panels = pyplot.subplots(2, 2, figsize=(10, 6.4), height_ratios=(3, 1.6), layout="constrained")
    rows = common(rows)
    random = pick(rows, criterion="random", filters=20)
    ticks = shares(random)

    def curve(panel: Any, cells: Sequence[Rows], at: Sequence[float], name: str, colour: str, label: str, marker: str = "o") -> None:
        means = [statistics.mean(row[name] for row in cell) for cell in cells]
        errors = [statistics.stdev(row[name] for row in cell) / math.sqrt(len(cell)) for cell in cells]
        low, high = ([m + sign * e for m, e in zip(means, errors, strict=True)] for sign in (-1, 1))
        panel.fill_between(at, low, high, color=colour, alpha=0.18, linewidth=0)
        panel.plot(at, means, marker=marker, markersize=5, color=colour, label=label, linewidth=1.8)

    def by_share(panel: Any, own: Rows, name: str, colour: str, label: str, marker: str = "o") -> None:
        curve(panel, [pick(own, sparsity=at) for at in ticks], [1 - at for at in ticks], name, colour, label, marker)

    for ratio, colour, marker in zip(RATIOS, ("#D55E00", "#0072B2"), ("o", "s"), strict=True):
        own = pick(random, ratio=ratio)
        by_share(panels[0, 0], own, "test_err", colour, f"n SNR² / K = {ratio:g}", marker)
        by_share(panels[1, 0], own, "train_err", colour, "", marker)
    hard = pick(random, ratio=1.5)
    by_share(panels[0, 1], hard, "signal_strength", "#009E73", "signal: strongest filter of a class on its signal", "^")
    by_share(panels[0, 1], hard, "noise_memorisation", "#7A5195", "noise: strongest filter on a training point's noise", "v")
    for filters, colour, marker in zip(FILTERS, ("#56B4E9", "#D55E00", "#332288"), ("D", "o", "X"), strict=True):
        own = pick(rows, ratio=1.5, criterion="random", filters=filters)
        high = [at for at in shares(own) if at >= HIGH]
        cells = [pick(own, sparsity=at) for at in high]
        curve(panels[1, 1], cells, [filters * (1 - at) for at in high], "test_err", colour, f"{filters} filters a class", marker)

    for panel in (panels[0, 0], panels[1, 0], panels[0, 1]):
        panel.set_xscale("log")
        panel.set_xlim(1.12, 0.009)
        panel.set_xticks([1 - at for at in ticks], [f"{100 * at:.0f}" for at in ticks])
        panel.minorticks_off()
        panel.set_xlabel("weights pruned at random before training (%)")
    for panel in (panels[0, 0], panels[1, 0], panels[1, 1]):
        panel.set_ylim(-0.02, 0.56)
        panel.axhline(0.5, color="#888888", linestyle="--", linewidth=1)
    panels[0, 0].text(1.05, 0.51, "guessing", color="#666666")
    most = max(row["train_loss"] for row in random)
    panels[1, 0].text(1.05, 0.05, f"largest training loss of {len(random)} runs: {most:.0e}", color="#666666", fontsize=9)
    panels[1, 1].set_xscale("log")
    panels[1, 1].set_xlim(9, 0.09)
    panels[1, 1].set_xticks([8, 4, 2, 1, 0.5, 0.2, 0.1], ["8", "4", "2", "1", "0.5", "0.2", "0.1"])
    panels[1, 1].minorticks_off()
    panels[1, 1].set_xlabel("filters of a class that see its signal (expected)")
    panels[0, 0].set_ylabel("test error")
    panels[1, 0].set_ylabel("training error")
    panels[1, 1].set_ylabel("test error")
    panels[0, 1].set_ylabel("inner product, n SNR² / K = 1.5")
    panels[0, 0].set_title("Mild pruning generalises better, over-pruning guesses", loc="left", fontsize=11)
    panels[1, 0].set_title("Every training point is fitted all the same", loc="left", fontsize=11)
    panels[0, 1].set_title("From learning the signal to memorising the noise", loc="left", fontsize=11)
    panels[1, 1].set_title("The rise starts where filters that see the signal run out", loc="left", fontsize=11)
    for panel in (panels[0, 1], panels[1, 1]):
        panel.legend(loc="lower right" if panel is panels[1, 1] else "upper left", fontsize=9)
    panels[0, 0].legend(loc="upper center", bbox_to_anchor=(0.45, 0.85), fontsize=9)
    seeds = len({row["seed"] for row in hard})
    figure.supxlabel(
        f"Mean and standard error over {seeds} seeds. RePU network, 50 points of 1,000 dimensions.", fontsize=9, color="#666666"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--figure", type=Path)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    config = read_yaml(CONFIG)
    found = json.loads(FILE.read_text()) if FILE.exists() else {"rows": []}
    rows: Rows = found["rows"]
    done = {(*(row[key] for key in CELL), row["seed"]) for row in rows}
    every = jobs(config, options.seeds)
    left = [job for job in every if (*(job[1][key] for key in CELL), job[2]) not in done]
    with multiprocessing.get_context("spawn").Pool(options.workers) as pool:
        for row in pool.imap(measure, left):
            rows.append(row)
            FILE.write_text(json.dumps({"environment": environment(), "hardware": HARDWARE, "rows": rows}, indent=1) + "\n")
            print(f"{len(rows)}/{len(every)} {[row[key] for key in CELL]} seed {row['seed']}: {row['test_err']:.3f}", flush=True)
    found_claims = claims(rows)
    print(report(rows), *(f"{'holds' if holds else 'DOES NOT HOLD'}: {line}" for holds, line in found_claims), sep="\n\n")
    if options.figure is not None:
        draw(rows, options.figure)
    if options.check and not all(holds for holds, _ in found_claims):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
