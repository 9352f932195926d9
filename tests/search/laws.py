"""What must hold of a search however often its driver, workers and nodes were killed, read from its run folder alone.

Two engines see to it that nothing is compared with itself. `alone` runs each trial by itself, undisturbed, and lets nobody hear of it.
`replayed` has the reports read by a driver that knows nothing but which trials were born.
"""

import itertools
import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from optuna.storages.journal._storage import JournalOperation
from optuna.trial import TrialState
from safetensors.torch import load_file
from searches import reports, trials

from distprune.search import driver
from distprune.search.finale import close_tables
from distprune.search.simulate import Curve
from distprune.store.folder import RunFolder
from distprune.store.trials import read_trials

LAWS = ("lost", "doubled", "gaps", "wrong", "decisions", "parameters", "results")
NONE = dict.fromkeys(LAWS, 0)
COLUMNS = ("index", "final", "ended", "step", "cost", "sparsity", "kept", "objective", "score", "rung")  # what a trial's work comes to
_BIRTHS = (JournalOperation.CREATE_STUDY, JournalOperation.CREATE_TRIAL)
Row = dict[str, Any]


class _Alone:
    """Runs every trial that waits, one after the other, each to its end."""

    def __init__(self, curve: Curve) -> None:
        self._curve = curve
        self.rows: dict[int, list[Row]] = {}

    def open(self, search: Any) -> None:
        pass

    def largest(self) -> None:
        pass

    def run(self, search: Any, book: Any, job: Callable[[Any], Any], ended: Any, draw: Any) -> None:
        for _ in [entry for entry in book.entries if not entry.decided]:
            assignment = book.next()
            self.rows[assignment.number] = list(self._curve(job(assignment)))


class _Nothing:
    """Runs no trial."""

    def open(self, search: Any) -> None:
        pass

    def largest(self) -> None:
        pass

    def run(self, search: Any, book: Any, job: Any, ended: Any, draw: Any) -> None:
        pass


def _born(folder: RunFolder, to: Path, **changes: Any) -> RunFolder:
    """A run folder in which the trials of `folder` were born, and nothing else has happened."""
    new = RunFolder(to)
    new.checkpoints.mkdir(parents=True)
    facts = yaml.safe_load(folder.search_yaml.read_text())
    new.search_yaml.write_text(yaml.safe_dump({**facts, "search": {**facts["search"], **changes}}))
    lines = folder.journal.read_text().splitlines(keepends=True)
    new.journal.write_text("".join(line for line in lines if json.loads(line)["op_code"] in _BIRTHS))
    return new


def _driven(folder: RunFolder, engine: Any, finale: Any = close_tables) -> RunFolder:
    """Let a driver reconcile `folder` with that engine; there are no networks to measure in the end."""
    original, driver.finalize = driver.finalize, finale
    try:
        return driver.resume(folder.path, limits={}, engine=engine, listen=lambda event, facts: None)
    finally:
        driver.finalize = original


def alone(folder: RunFolder, curve: Curve, aside: Path, **changes: Any) -> dict[int, list[Row]]:
    """The reports of each trial that was born in `folder`, run by itself and undisturbed, with the same rungs. `aside` must be new."""
    engine = _Alone(curve)
    _driven(_born(folder, aside / folder.path.name, **changes), engine, finale=lambda *ignored: None)
    shutil.rmtree(aside)
    return engine.rows


def replayed(folder: RunFolder, aside: Path) -> RunFolder:
    """What a driver decides that is shown the reports of `folder`, in the order in which they stand, and no more. `aside` must be new."""
    new = _born(folder, aside / folder.path.name)
    shutil.copy(folder.reports, new.reports)
    return _driven(new, _Nothing(), finale=lambda *ignored: None)


def told(folder: RunFolder) -> list[tuple[Any, ...]]:
    """All that is told of the end of each trial but what depends on how often it was begun."""
    same = ("ended", "reason", "rung", "cost", "duplicate_of")
    ends = [trial.user_attrs.get("end", {}) for trial in trials(folder)]
    return [
        (t.number, t.state.name, t.values, sorted(t.constraints.items()), *(end.get(name) for name in same))
        for t, end in zip(trials(folder), ends, strict=True)
    ]


def broken(
    folder: RunFolder, *, most: int, reference: dict[int, list[Row]], aside: Path, undisturbed: RunFolder | None = None
) -> dict[str, int]:
    """How many trials break each law.

    lost: not ended. doubled: told twice, or born beyond `most`. gaps: reports missing. wrong: a report or a value that is not that of the
    undisturbed trial. decisions: ends that do not follow from the reports. With random sampling `undisturbed` is the search that nobody
    killed; parameters: unlike its. Without stopping, results: ends, values or front unlike its.
    """
    found = dict(NONE)
    ended, stream = trials(folder), reports(folder)
    found["lost"] = sum(not trial.state.is_finished() for trial in ended) + max(most - len(ended), 0)
    found["doubled"] = max(len(ended) - most, 0) + sum(times > 1 for times in _tellings(folder).values())
    for number, rows in stream.items():
        found["gaps"] += [row["index"] for row in rows] != list(range(len(rows)))
        found["wrong"] += not _is_prefix(rows, reference.get(number, [])) or not _is_told_as_reported(ended[number], rows)
    found["wrong"] += sum(t.user_attrs.get("end", {}).get("ended") == "finished" and t.number not in stream for t in ended)
    found["decisions"] = _differing(told(folder), told(replayed(folder, aside)))
    shutil.rmtree(aside)
    if undisturbed is not None:
        params = [sorted(trial.params.items()) for trial in ended]
        found["parameters"] = _differing(params, [sorted(trial.params.items()) for trial in trials(undisturbed)])
        if yaml.safe_load(folder.search_yaml.read_text())["rungs"] == []:
            found["results"] = _differing(told(folder), told(undisturbed)) + _differing(front(folder), front(undisturbed))
    return found


def front(folder: RunFolder) -> list[tuple[Any, ...]]:
    """The front as its table gives it; empty where no table was written."""
    rows = read_trials(folder.trials).to_pylist() if folder.trials.exists() else []
    return [tuple(row[name] for name in ("number", "objective", "kept", "test", "layers")) for row in rows if row["pareto"]]


def masks(folder: RunFolder) -> dict[str, dict[str, Any]]:
    """The masks that were written, by file and weight; the files themselves order their metadata as they like."""
    return {path.name: {name: mask.tolist() for name, mask in load_file(path).items()} for path in sorted(folder.masks.iterdir())}


def _tellings(folder: RunFolder) -> Counter[int]:
    """How often each trial was told as ended, by the journal's own ids."""
    records = map(json.loads, folder.journal.read_text().splitlines())
    ends = (r for r in records if r["op_code"] == JournalOperation.SET_TRIAL_STATE_VALUES and TrialState(r["state"]).is_finished())
    return Counter(record["trial_id"] for record in ends)


def _is_prefix(rows: list[Row], whole: list[Row]) -> bool:
    return len(rows) <= len(whole) and all(
        all(row[name] == other[name] for name in COLUMNS) for row, other in zip(rows, whole, strict=False)
    )


def _is_told_as_reported(trial: Any, rows: list[Row]) -> bool:
    """A trial is told as finished exactly if it has made its last report, with the objective of that."""
    finished = trial.state.is_finished() and trial.user_attrs["end"]["ended"] == "finished"
    if finished != (rows[-1]["final"] and rows[-1]["ended"] == "finished"):
        return not trial.state.is_finished()  # which is another law's
    return not finished or trial.values[0] == rows[-1]["objective"]


def _differing(some: list[Any], others: list[Any]) -> int:
    return sum(a != b for a, b in itertools.zip_longest(some, others))
