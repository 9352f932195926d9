"""What loggers are told of a search: every report of every trial, each logger in a thread of its own, so that none can fail or delay it.

A logger is a callback of Ray Tune's. Tune itself does not call it: reports come in parcels, and a resumed search goes on with trials that
began under another driver. It is told here what Tune would tell it, from the stream of reports. How far it has come is noted beside its
files; what it was not told, because it failed or the driver died, it is told when the search is gone on with.
"""

import json
import math
import os
import queue
import re
import shlex
import threading
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distprune.core.registry import Choice
from distprune.errors import command
from distprune.search.book import Book
from distprune.search.entry import Entry
from distprune.search.loggers import SECRET, missing_package
from distprune.store.folder import RunFolder
from distprune.store.trials import FAILED

WAIT_S, WAIT_INTERRUPTED_S = 60.0, 5.0  # for a logger that is behind, at the end of a search
_COLUMNS = ("objective", "score", "sparsity", "kept", "cost", "spent", "wall_s")
_EXTRA = ("metrics", "costs", "params", "flops", "saved")
_MOST_ENDING = 8  # trials of which W&B's processes, two each, may still be busy after they were told all


@dataclass(frozen=True)
class Shown:
    """A trial as Ray's callbacks look at one."""

    trial_id: str
    number: int = field(compare=False)
    experiment_dir_name: str = field(compare=False, default="")
    config: Mapping[str, Any] = field(compare=False, default_factory=dict)  # its recipe
    evaluated_params: Mapping[str, Any] = field(compare=False, default_factory=dict)  # what was proposed of it
    local_path: str = field(compare=False, default="")

    def __str__(self) -> str:
        return f"{self.experiment_dir_name}-{self.number}"

    def init_local_path(self) -> None:
        """Make its folder."""
        Path(self.local_path).mkdir(parents=True, exist_ok=True)


def result_of(row: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers of a report as Ray's callbacks take them; the axis is billed samples, which paradigms are compared by."""
    extra = json.loads(row.get("extra") or "{}")
    found = {name: row.get(name) for name in _COLUMNS} | {name: extra.get(name) for name in _EXTRA}
    return {**_numbers(found), "training_iteration": row["index"] + 1, "timesteps_total": int(row.get("cost") or 0)}


def _numbers(value: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, item in value.items():
        if isinstance(item, Mapping):
            found |= {name: inner} if (inner := _numbers(item)) else {}
        elif isinstance(item, int | float) and math.isfinite(item):
            found[name] = item
    return found


def _named(value: Mapping[str, Any]) -> dict[str, Any]:
    """With keys of characters that MLflow takes: those of a recipe may be shell patterns."""
    clean = {re.sub(r"[^\w.\- :/]", lambda found: f"_{ord(found[0]):x}_", str(key)): item for key, item in value.items()}
    return {key: _named(item) if isinstance(item, Mapping) else item for key, item in clean.items()}


class Log:
    """All loggers of a search, as its driver sees them. None of them raises, and none is waited for before the end."""

    def __init__(self, choices: tuple[Choice, ...], folder: RunFolder, listen: Callable[[str, dict[str, Any]], None]) -> None:
        self._loggers = []
        for choice in choices:  # an earlier driver may have had more packages
            if missing := missing_package(choice):
                way_out = f"What is missing there, it is told by: pip install {missing}, {command(f'resume {folder.quoted}')}"
                listen("logger", {"message": f"log {choice.name} is left out, as {missing} is not installed here. {way_out}"})
            else:
                self._loggers.append(_Logger(choice, folder))
        self._folder, self._listen = folder, listen
        self._book: Book | None = None
        self._known: dict[int, tuple[Mapping[str, Any], Mapping[str, Any]]] = {}  # running trial -> (recipe, what was proposed)
        self._gone: set[int] = set()  # trials of which all is told

    def begin(self, book: Book, rows: list[dict[str, Any]]) -> None:
        """Start, with what earlier drivers have heard."""
        self._book = book
        for logger in self._loggers:
            logger.start()
            if show := logger.choice.entry.facts["show"]:
                self._listen("logger", {"message": f"log {logger.choice.name}: {show.format(folder=shlex.quote(str(logger.folder)))}"})
        heard: dict[int, list[dict[str, Any]]] = {entry.number: [] for entry in book.entries}
        for row in rows:
            if row["index"] >= 0:  # else a note of the driver's own
                heard[row["trial"]].append(row)
        for number, mine in heard.items():  # a trial at a time: each that is begun and not ended keeps files or processes open
            for row in mine:
                self.heard(row)
            self.ended(number)

    def heard(self, row: Mapping[str, Any]) -> None:
        """A report that is new."""
        if self._loggers:
            self._tell(row["trial"], dict(row), None)

    def ended(self, number: int) -> None:
        """A trial that may have come to its end. One that was answered from another has nothing to show."""
        if not self._loggers or self._book is None or number in self._gone:
            return
        if (entry := self._book.entries[number]).told:
            self._gone.add(number)
            if entry.ended != "duplicate":
                self._tell(number, None, entry.ended)

    def _tell(self, number: int, row: dict[str, Any] | None, ended: str | None) -> None:
        assert self._book is not None
        if number not in self._known:
            entry: Entry = self._book.entries[number]
            self._known[number] = (_named(entry.recipe.plain()), _named(entry.params))
        for logger in self._loggers:
            logger.tell(number, self._known[number], row, ended)
        if ended:
            del self._known[number]

    def check(self) -> None:
        """Say of a logger that has failed that it has."""
        for logger in self._loggers:
            if logger.failure:
                self._listen("logger", {"message": logger.failure})
                logger.failure = ""

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: Any) -> None:
        for entry in self._book.entries if self._book is not None and kind is None else ():
            self.ended(entry.number)  # those that waited at rungs, too
        for logger in self._loggers:
            logger.close(WAIT_S if kind is None else WAIT_INTERRUPTED_S)
        self.check()


class _Logger:
    """One logger and its thread."""

    def __init__(self, choice: Choice, folder: RunFolder) -> None:
        self.choice, self.failure = choice, ""
        self.folder = (folder.path / "logs" / choice.name.rpartition(":")[2]).absolute()
        self._search, self._again = folder.path.name, folder.quoted
        self._queue: queue.Queue[tuple[Any, ...] | None] = queue.Queue()
        self._thread = threading.Thread(target=self._run, name=f"log {choice.name}", daemon=True)
        self._over = False  # it has failed, or is to end now
        self._id = ""
        self._logged: dict[int, int] = {}  # trial -> reports that it was told
        self._ended: set[int] = set()
        self._runs: dict[int, str] = {}  # trial -> id that MLflow has given it
        self._flushed: tuple[dict[int, int], set[int]] = ({}, set())  # both, when a driver last came to its end
        self._open: dict[int, Shown] = {}

    def start(self) -> None:
        self._thread.start()

    def tell(self, *told: Any) -> None:
        if not self._over:
            self._queue.put(told)

    def close(self, seconds: float) -> None:
        """Wait until it was told everything, for so long at most."""
        if not self._thread.is_alive():
            return
        self._queue.put(None)
        self._thread.join(seconds)
        if self._thread.is_alive():
            self._over = True
            left = f"about {self._queue.qsize()} entries behind after {seconds:g} s"
            self.failure = f"log {self.choice.name} is {left}, and is left behind. {self._way_out()}"

    def _run(self) -> None:
        try:
            self._recall()
            callback: Any = self.choice(self._search)
            callback.setup()
            if hasattr(callback, "_trial_queues"):  # Ray's callback for W&B hands on to actors: what those have not finished may be lost
                self._logged, self._ended = self._flushed
            runs = getattr(callback, "_trial_runs", None)  # where Ray's callback for MLflow keeps the run of each trial
            if runs is not None:
                runs |= {self._shown(number): run for number, run in self._runs.items()}
            while (told := self._queue.get()) is not None and not self._over:
                self._pass_on(callback, runs, *told)
            callback.on_experiment_end(trials=[])
            self._note({"flushed": True})
        except BaseException as error:  # whatever a logger may raise: the search goes on
            self._over = True
            text = _scrubbed(" ".join(str(error).split()))[:300].rstrip(".")
            self.failure = (
                f"log {self.choice.name} has failed: {type(error).__name__}: {text}. The search goes on without it. {self._way_out()}"
            )

    def _way_out(self) -> str:
        return f"What is missing there, it is told by: {command(f'resume {self._again}')}"

    def _pass_on(
        self,
        callback: Any,
        runs: dict[Shown, str] | None,
        number: int,
        known: tuple[Mapping[str, Any], Mapping[str, Any]],
        row: dict[str, Any] | None,
        ended: str | None,
    ) -> None:
        if number in self._ended or (row is not None and row["index"] < self._logged.get(number, 0)):
            return
        if number not in self._open:
            trial = self._open[number] = self._shown(number, *known)
            if runs is None:  # MLflow keeps nothing here
                trial.init_local_path()
            callback.on_trial_start(iteration=0, trials=[], trial=trial)
            if runs is not None and self._runs.get(number) != runs[trial]:
                self._runs[number] = runs[trial]
                self._note({"trial": number, "run": runs[trial]})
        trial = self._open[number]
        if row is not None:
            callback.on_trial_result(iteration=0, trials=[], trial=trial, result=result_of(row))
            self._logged[number] = row["index"] + 1
            self._note({"trial": number, "logged": row["index"] + 1})
        if ended:
            (callback.on_trial_error if ended in FAILED else callback.on_trial_complete)(iteration=0, trials=[], trial=trial)
            self._ended.add(number)
            del self._open[number]
            self._note({"trial": number, "ended": ended})
            while len(getattr(callback, "_trial_queues", ())) - len(self._open) > _MOST_ENDING and not self._over:
                callback._cleanup_logging_actors(timeout=1)  # waits for those that upload

    def _shown(self, number: int, recipe: Mapping[str, Any] | None = None, proposed: Mapping[str, Any] | None = None) -> Shown:
        return Shown(f"{self._id}-{number}", number, self._search, recipe or {}, proposed or {}, str(self.folder / str(number)))

    def _recall(self) -> None:
        """Read how far it has come under earlier drivers."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for line in self._notes.read_bytes().split(b"\n") if self._notes.exists() else ():
            try:
                note = json.loads(line)
            except ValueError:  # torn when a driver died
                continue
            self._id = note.get("id", self._id)
            if "logged" in note:
                self._logged[note["trial"]] = note["logged"]
            if "run" in note:
                self._runs[note["trial"]] = note["run"]
            if "ended" in note:
                self._ended.add(note["trial"])
            if "flushed" in note:
                self._flushed = (dict(self._logged), set(self._ended))
        if not self._id:
            self._id = uuid.uuid4().hex[:8]  # of another search of this name, trials have the same numbers
            self._note({"id": self._id})

    @property
    def _notes(self) -> Path:
        return self.folder / "told.jsonl"

    def _note(self, facts: dict[str, Any]) -> None:
        with open(self._notes, "ab") as file:
            file.write(b"\n" + json.dumps(facts).encode())  # a torn line before it stays alone


def _scrubbed(text: str) -> str:
    """A text without the secrets of this process's environment and of URLs."""
    for name, value in os.environ.items():
        if SECRET.search(name) and len(value) > 3:
            text = text.replace(value, "***")
    text = re.sub(rf"([?&][^=&\s]*(?:{SECRET.pattern})[^=&\s]*=)[^&\s]*", r"\1***", text, flags=re.IGNORECASE)
    return re.sub(r"://[^/\s@]*@", "://***@", text)
