"""Progress of a search on the terminal: one live line where there is a terminal, a line every few seconds elsewhere."""

import signal
import sys
import threading
import time
from types import TracebackType
from typing import Any

import typer

from distprune.core.costs import label
from distprune.errors import Terminated, command

_PLAIN_EVERY_S = 5.0

PLURAL = {"criterion": "criteria", "granularity": "granularities"}


def _terminate(number: int, frame: Any) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # once is enough: tables are being closed
    raise Terminated


class Display:
    """Hears the events of `search.driver` and shows them."""

    def __init__(self) -> None:
        self._live = sys.stdout.isatty()
        self._started = self._shown = time.monotonic()
        self._folder: Any = None
        self._costs: list[str] = []  # that are minimized
        self._held = 0  # trials that had ended before this driver began
        self._before: Any = signal.SIG_DFL  # what SIGTERM did

    def __enter__(self) -> "Display":
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, _terminate) or signal.SIG_DFL
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._live:
            print("\r\033[K", end="", flush=True)
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._before)
        if kind in (KeyboardInterrupt, Terminated) and self._folder is not None:
            print(f"Interrupted; nothing is lost. Go on with: {command(f'resume {self._folder.quoted}')}", flush=True)
        if kind is Terminated:
            raise typer.Exit(143) from None  # what a shell says of a process that SIGTERM has ended

    def __call__(self, event: str, facts: dict[str, Any]) -> None:
        getattr(self, f"_on_{event}")(**facts)

    def _on_checking(self, search: Any) -> None:
        print(f"{search.name}: reading the data and building the network", flush=True)

    def _on_recorded(self, run: str, trials: int, usable: int, scored: int) -> None:
        print(f"simulated from {run}: {usable} of its {trials} trials are finished and answer, {scored} of them were scored at rungs")

    def _on_damaged(self, message: str) -> None:
        print(message, flush=True)

    def _on_disk(self, message: str) -> None:
        print(f"\r\033[K{message}" if self._live else message, flush=True)

    _on_nodes = _on_disk

    _on_report = _on_disk

    _on_database = _on_disk

    _on_storage = _on_disk

    _on_logger = _on_disk

    def _on_gave_up(self, reason: str, folder: Any) -> None:
        print(f"\r\033[KStopped early: {reason}" if self._live else f"Stopped early: {reason}")
        print(f"Nothing is lost. When it is put right, go on with: {command(f'resume {folder.quoted}')}", flush=True)

    def _on_running(self, setup: Any, found: dict[str, int], folder: Any) -> None:
        search = setup.search
        self._folder, self._held = folder, found["ended"] + found["told now"]
        self._costs = [label(cost) for cost in search.minimize]
        sizes = ", ".join(f"{len(candidates)} {PLURAL.get(axis, axis + 's')}" for axis, candidates in setup.space.axes.items())
        print(f"space: {sizes}; {setup.total:,} prunable weights")
        print(f"{search.limits.trials} trials of about {setup.mean_cost:,} samples, less what is stopped")
        if any(found.values()):
            print("found: " + ", ".join(f"{count} {kind}" for kind, count in found.items()))
        print(f"results go to {folder}", flush=True)

    def _on_finalists(self, repeats: int) -> None:
        print(f"\r\033[K{repeats} repeats of finalists" if self._live else f"{repeats} repeats of finalists", flush=True)

    def _on_starting(self, address: str | None) -> None:
        print(f"joining Ray at {address}" if address else "starting Ray", flush=True)

    def _on_slots(self, slots: int, resources: dict[str, float]) -> None:
        print(f"{slots} trials at once on {resources.get('CPU', 0):g} CPUs and {resources.get('GPU', 0):g} GPUs", flush=True)
        self._started = time.monotonic()

    def _on_progress(self, **summary: Any) -> None:
        every = 0.3 if self._live else _PLAIN_EVERY_S
        if time.monotonic() - self._shown < every:
            return
        self._shown = time.monotonic()
        line = self._line(summary)
        print(f"\r\033[K{line}" if self._live else line, end="" if self._live else "\n", flush=True)

    def _line(self, summary: dict[str, Any]) -> str:
        from distprune.store.trials import FAILED

        ends = summary["ends"]
        running = ends["running"]
        ended = summary["born"] - running
        most = max(summary["most"], summary["born"])  # a resume may lower the limit below what was begun
        parts = [f"{ended}/{most} trials done", f"{running} running", f"{ends['stopped']} stopped"]
        failed = sum(ends[end] for end in FAILED)
        if failed:
            parts.append(f"{failed} failed")
        if summary["best"]:
            score, *shares = summary["best"]
            of = ", ".join(f"{-share:.1%} of {name}" for share, name in zip(shares, self._costs, strict=True))
            parts.append(f"best {score:.4f} with {of}" if of else f"best {score:.4f}")
        parts.append(f"front {summary['front']}")
        done = ended - self._held
        if done > 0:
            left = (time.monotonic() - self._started) / done * (most - ended)
            parts.append(f"about {_duration(left)} left")
        return " | ".join(parts)

    def _on_finishing(self, front: list[int]) -> None:
        if self._live:
            print("\r\033[K", end="")
        print(f"measuring {len(front)} networks of the front on the test split", flush=True)

    def _on_finished(self, summary: dict[str, Any]) -> None:
        print(f"done in {_duration(time.monotonic() - self._started)}", flush=True)

    def close_with(self, result: Any) -> None:
        """Print the Pareto table and what comes next."""
        from distprune.report.tables import show_result

        show_result(result)
        if result.folder.report_html.is_file():
            print(f"Page: {result.folder.report_html}")


def replayed(event: str, facts: dict[str, Any]) -> None:
    """A line a report of a trial that is replayed."""
    if facts["row"]["objective"] is not None:
        print(f"{facts['share']:4.0%}  report {facts['row']['index']}  objective {facts['row']['objective']:.4f}", flush=True)


def exporting(event: str, facts: dict[str, Any]) -> None:
    """What an export does before it writes: a trial without weights is run again."""
    if event == "replaying":
        what = f"was {facts['ended']} and" if facts["ended"] == "stopped" else "is not on the front and"
        print(f"trial {facts['trial']} {what} has kept no weights: running it again, {facts['cost']:,.0f} samples", flush=True)
    elif event == "rebuilt":
        print("\n".join(facts["lines"]), flush=True)
    else:
        replayed(event, facts)


class Lines:
    """A line a report, for a single recipe."""

    def __call__(self, run: Any, report: Any) -> None:
        metrics = ", ".join(f"{name} {value:.4f}" for name, value in report.metrics.items())
        share = report.cost / max(run.plan.cost, 1)
        print(f"{share:4.0%}  stage {report.stage}  step {report.clock}  sparsity {report.sparsity:.4f}  {metrics}", flush=True)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d} min" if minutes else f"{rest} s"
