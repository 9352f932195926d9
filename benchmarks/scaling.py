"""How many trials an hour do 1 to 1,000 GPUs run, and where does the driver become the limit?

    python benchmarks/scaling.py                                       # the tables
    python benchmarks/scaling.py --figure docs/figures/scaling.svg
    python benchmarks/scaling.py --quality                             # what several searches lose against one; adds to scaling.json

Nobody here has 1,000 GPUs, so the parts are measured and the whole is simulated. Measured, by `engine.py` on real Ray: the driver's CPU a
report, starts and ends of trials included. Simulated, on a virtual clock: workers that train for a while, report, and wait until the driver
has answered; the driver answers one after the other. Times vary by a fifth. The measured share of time that 16 workers were busy is printed
beside the simulated one.

What comes after one driver: several searches, each with a driver, a seed and a part of the trials, on one cluster and one stage cache. What
that costs in quality is asked of the objective of `suggestions.py`: one search of all trials against the joint front of several.
"""

import argparse
import heapq
import json
import math
import random
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from distprune.environment import environment

FILE = Path(__file__).with_suffix(".json")
ENGINE = Path(__file__).with_name("engine.json")
GPUS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1000)
TRIAL_S = (30, 120, 600, 3600)
REPORTS = 20
SPREAD = 0.2  # standard deviation of the time between two reports, as a share of it
SEARCHES, TRIALS, SEEDS = (1, 2, 4, 8), 1024, range(5)


def simulate(gpus: int, trial_s: float, answer_s: float, *, reports: int = REPORTS, drivers: int = 1, seed: int = 0) -> dict[str, float]:
    """Trials an hour, the share of time that GPUs train, and the share that each driver is at work."""
    generator, pause = random.Random(seed), trial_s / reports
    free = [0.0] * drivers  # when a driver has answered all that came so far
    until = max(40 * trial_s, 4000 * answer_s * reports / drivers)  # many trials a worker, many answers a driver
    waiting = [(generator.uniform(0, pause), worker) for worker in range(gpus)]  # (when it reports, who)
    heapq.heapify(waiting)
    answered, trained, worked = 0, 0.0, 0.0
    while waiting and waiting[0][0] < until:
        now, worker = heapq.heappop(waiting)
        driver = worker % drivers
        free[driver] = max(now, free[driver]) + answer_s
        length = max(generator.gauss(pause, SPREAD * pause), 0.0)
        answered, trained, worked = answered + 1, trained + length, worked + answer_s
        heapq.heappush(waiting, (free[driver] + length, worker))
    return {
        "trials_h": answered / reports / until * 3600,
        "busy": min(trained / gpus / until, 1.0),
        "driver": min(worked / drivers / until, 1.0),
    }


def answers() -> dict[str, dict[str, Any]]:
    """The latest measurement on real Ray of each side."""
    return {row["side"]: row for row in json.loads(ENGINE.read_text()) if row["side"] in ("distprune", "plain")}


def table(answer_s: float) -> str:
    """Markdown: trials an hour, by number of GPUs and length of a trial."""
    lines = ["| GPUs | " + " | ".join(f"trials of {length:,} s" for length in TRIAL_S) + " |", "|---" * (len(TRIAL_S) + 1) + "|"]
    for gpus in GPUS:
        cells = []
        for length in TRIAL_S:
            found = simulate(gpus, length, answer_s)
            cells.append(f"{found['trials_h']:,.0f} ({found['busy']:.0%})")
        lines.append(f"| {gpus:,} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def drivers(answer_s: float, *, gpus: int = 1000, trial_s: float = 30) -> str:
    """Markdown: what several searches on one cluster do for short trials."""
    lines = [f"| searches on {gpus:,} GPUs, trials of {trial_s:.0f} s | trials an hour | GPUs train | a driver works |", "|---" * 4 + "|"]
    for count in SEARCHES:
        found = simulate(gpus, trial_s, answer_s, drivers=count)
        lines.append(f"| {count} | {found['trials_h']:,.0f} | {found['busy']:.0%} | {found['driver']:.0%} |")
    return "\n".join(lines)


def quality() -> list[dict[str, Any]]:
    """Hypervolume of the joint front of several searches that share the trials among them."""
    from suggestions import BASE, SOME, points_of

    from distprune.search.space import Space
    from distprune.search.volume import hypervolume

    rows = []
    space = Space(BASE, SOME, seed=0)
    for seed in SEEDS:
        for count in SEARCHES:
            points = [point for one in range(count) for point in points_of(space, seed * 100 + one, TRIALS // count)]
            best = [p for p in set(points) if not any(q[0] >= p[0] and q[1] >= p[1] and q != p for q in points)]
            rows.append({"searches": count, "seed": seed, "hypervolume": hypervolume(best, (0.0, 0.0)), "environment": environment()})
            print(rows[-1]["searches"], seed, round(rows[-1]["hypervolume"], 4), flush=True)
    return rows


def quality_table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: several searches against one."""
    lines = [f"| searches sharing {TRIALS:,} trials | hypervolume | against one | n |", "|---" * 4 + "|"]
    one = {row["seed"]: row["hypervolume"] for row in rows if row["searches"] == 1}
    for count in SEARCHES:
        own = [row for row in rows if row["searches"] == count]
        if len(own) > 1:
            volumes, ratios = [row["hypervolume"] for row in own], [row["hypervolume"] / one[row["seed"]] for row in own]
            spread = f"{statistics.mean(ratios):.1%} ± {statistics.stdev(ratios):.1%}" if count > 1 else ""
            lines.append(f"| {count} | {statistics.mean(volumes):.4f} ± {statistics.stdev(volumes):.4f} | {spread} | {len(own)} |")
    return "\n".join(lines)


def draw(answer_s: float, path: Path) -> None:
    """Trials an hour over GPUs, both in logarithms, a line for each length of a trial; where the driver is the limit, it is flat."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.rcParams.update({"svg.hashsalt": "distprune", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    figure, axes = pyplot.subplots(figsize=(7.2, 4.2))
    for length, colour in zip(TRIAL_S, ("#b2182b", "#ef8a62", "#67a9cf", "#2166ac"), strict=True):
        label = f"trials of {length:,} s, driver full at {length / REPORTS / answer_s:,.0f} GPUs"
        axes.plot(GPUS, [simulate(gpus, length, answer_s)["trials_h"] for gpus in GPUS], "o-", color=colour, markersize=3, label=label)
        axes.plot(GPUS, [gpus * 3600 / length for gpus in GPUS], ":", color=colour, linewidth=1)
    axes.set(xscale="log", yscale="log", xlabel="GPUs, one trial each", ylabel="trials an hour")
    axes.set_xticks(GPUS, [f"{gpus:,}" for gpus in GPUS])
    axes.minorticks_off()
    axes.legend(frameon=False, title="dotted: if the driver cost nothing", alignment="left")
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--figure", type=Path)
    parser.add_argument("--quality", action="store_true")
    options = parser.parse_args()
    found = answers()["distprune"]
    answer_s = found["cpu_s"] / found["reports"]
    check = simulate(found["slots"], found["seconds"], answer_s, reports=found["count"])
    counts = f"{found['reports']} reports of {found['trials']} trials, commit {found['environment']['commit']}"
    print(f"{1000 * answer_s:.1f} ms of CPU a report ({counts}).")
    print(f"{found['slots']} workers: busy {found['busy']:.1%} as measured, {check['busy']:.1%} as simulated.", "", sep="\n")
    print(table(answer_s), "", drivers(answer_s), "", sep="\n")
    for length in TRIAL_S:
        print(f"Trials of {length:,} s with {REPORTS} reports fill the driver at {math.floor(length / REPORTS / answer_s):,} GPUs.")
    if options.quality:
        FILE.write_text(json.dumps(quality(), indent=1) + "\n")
    if FILE.exists():
        print("", quality_table(json.loads(FILE.read_text())), sep="\n")
    if options.figure:
        draw(answer_s, options.figure)


if __name__ == "__main__":
    main()
