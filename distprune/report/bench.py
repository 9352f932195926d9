"""What `distprune bench` shows: a table, and what it says."""

import sys
import time
from typing import TYPE_CHECKING, Any

from rich.table import Table

if TYPE_CHECKING:
    from distprune.export.bench import Bench

_EVERY_S = 5.0
_COLUMNS = ("batch", "network", "ms", "of dense's time", "quartiles", "speed-up", "FLOPs run", "speed-up / FLOPs saved")


def bench_table(bench: "Bench") -> Table:
    """A row a network and batch size."""
    threads = f"{bench.threads} thread{'s' * (bench.threads > 1)}"
    where = bench.hardware + (f", {threads}" if bench.device == "cpu" else "")
    table = Table(title=f"{bench.export} on {where}: medians and quartiles of {bench.rounds} rounds in turn", title_justify="left")
    for name in _COLUMNS:
        table.add_column(name, justify="left" if name == "network" else "right")
    last = None
    for timing in bench.timings:
        if last not in (None, timing.batch):
            table.add_section()
        last = timing.batch
        dense = timing.network == "dense"
        table.add_row(
            str(timing.batch),
            timing.network,
            f"{timing.ms:.3g}" if timing.ms < 100 else f"{timing.ms:.0f}",
            "1" if dense else f"{timing.share:.3f}",
            "" if dense else f"{timing.low:.3f} to {timing.high:.3f}",
            "1" if dense else f"{timing.speedup:.2f}",
            "" if timing.flops is None else f"{timing.flops:.1%}",
            "" if dense or timing.kept_promise is None or timing.flops == 1 else f"{timing.kept_promise:.2f}",
        )
    return table


class Progress:
    """Hears what is being measured: one live line where there is a terminal, a line a batch size and every few seconds elsewhere."""

    def __init__(self) -> None:
        self._live = sys.stdout.isatty()
        self._shown = time.monotonic()

    def __call__(self, event: str, facts: dict[str, Any]) -> None:
        if event == "loading":
            self._say(f"loading {facts['network']}", passing=True)
        elif event == "round":
            self._say(f"batch {facts['batch']}: round {facts['done']} of {facts['rounds']}", passing=True)
        elif event == "measured":
            timings = facts["timings"]
            took = ", ".join(f"{timing.network} {timing.ms:.3g} ms" for timing in timings)
            self._say(f"batch {timings[0].batch}: {took}", passing=False)

    def _say(self, line: str, *, passing: bool) -> None:
        if self._live:
            print(f"\r\033[K{line}", end="" if passing else "\n", flush=True)
        elif not passing or time.monotonic() - self._shown > _EVERY_S:
            self._shown = time.monotonic()
            print(line, flush=True)


def show_bench(bench: "Bench") -> None:
    """The table and what it says."""
    from distprune.report.tables import show

    show(bench_table(bench))
    print("\n".join(bench.lines()))
