"""The forms of exports against the dense network, as `distprune bench` measures them: several runs, exports in turn, a process each.

    distprune search configs/digits_filters.yaml
    distprune search configs/fashion_mnist_filters.yaml
    distprune export runs/digits_filters --to exported/digits --formats slim,onnx,pt2
    distprune export runs/fashion_mnist_filters --to exported/fashion_mnist --formats slim,onnx,pt2
    python benchmarks/bench.py exported/digits exported/fashion_mnist    # goes on from benchmarks/bench.json if there is one

Within a run, networks take turns and shares are taken round by round. The table has, over runs, the median and the smallest and largest
of the runs' medians. `--clock cpu` counts the process's own seconds in place of the wall's: on a machine that others use too, shares of one
thread hold still then.
"""

import argparse
import json
import multiprocessing
import statistics
import time
from pathlib import Path
from typing import Any

import distprune as dp
from distprune.environment import environment
from distprune.export.bench import bench

RUNS, BATCHES, THREADS, ROUNDS = 3, [1, 64, 256], 1, 15
KIND = ("export", "threads", "clock", "batch", "network")
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
FILE = Path(__file__).with_suffix(".json")


def measure(job: tuple[str, int, str, int]) -> list[dict[str, Any]]:
    """One run on one export: a row a batch size and network."""
    path, threads, clock, run = job
    export = dp.open_export(path)
    found = bench(export, batches=BATCHES, threads=threads, rounds=ROUNDS, clock=CLOCKS[clock])
    manifest = export.manifest
    head = {
        "export": Path(path).name,
        "model": manifest["recipe"]["model"],
        "test": manifest["metrics"]["test"]["accuracy"],
        "kept": found.density,
        "threads": threads,
        "clock": clock,
        "run": run,
        "rounds": found.rounds,
    }
    return [{**head, **timing} for timing in found.plain()["timings"]]


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: a row an export, number of threads, batch size and network."""
    columns = (*KIND, "n", "ms", "speed-up", "smallest to largest", "FLOPs of dense's", "speed-up / FLOPs saved")
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    kinds = dict.fromkeys(tuple(row[key] for key in KIND) for row in rows)
    for kind in sorted(kinds, key=lambda kind: kind[:-1]):
        some = [row for row in rows if tuple(row[key] for key in KIND) == kind]
        faster = sorted(1 / row["share"] for row in some)
        flops = some[0]["flops"]
        cells = [*map(str, kind), str(len(some)), f"{statistics.median(row['ms'] for row in some):.3g}"]
        if kind[-1] == "dense":
            cells += ["1", "", "1", ""]
        else:
            speedup = statistics.median(faster)
            cells += [f"{speedup:.2f}", f"{faster[0]:.2f} to {faster[-1]:.2f}"]
            cells += ["", ""] if flops is None else ["1", ""] if flops == 1 else [f"1/{1 / flops:.2f}", f"{speedup * flops:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("exports", nargs="*")
    parser.add_argument("--runs", type=int, default=RUNS)
    parser.add_argument("--threads", type=int, default=THREADS)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    options = parser.parse_args()
    found = json.loads(FILE.read_text()) if FILE.exists() else {"rows": []}
    rows = found["rows"]
    done = {(row["export"], row["threads"], row["clock"], row["run"]) for row in rows}
    jobs = [(path, options.threads, options.clock, run) for run in range(options.runs) for path in options.exports]
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        for some in pool.imap(measure, [job for job in jobs if (Path(job[0]).name, *job[1:]) not in done]):
            rows += some
            facts = {"hardware": "2 shared x86-64 cores", "environment": environment()}
            FILE.write_text(json.dumps({**facts, "rows": rows}, indent=1) + "\n")
            shown = ", ".join(f"{row['network']} {1 / row['share']:.2f}" for row in some if row["batch"] == BATCHES[-1])
            print(f"{some[0]['export']} run {some[0]['run']}: at batch {BATCHES[-1]} times as fast as dense: {shown}", flush=True)
    print(table(rows))


if __name__ == "__main__":
    main()
