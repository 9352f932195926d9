"""On a real Ray: workers that die or hang cost their trial nothing, or end it."""

import json
from pathlib import Path
from typing import Any

import pytest
from books import book_of, on_ray, row_of
from searches import job_in, search, trials
from toys import BASE

import distprune as dp
from distprune.search.book import Book
from distprune.search.failures import MOST_DEATHS
from distprune.store.folder import RunFolder

pytestmark = pytest.mark.usefixtures("elsewhere")


class Handle:
    """What Ray knows of a trial, as far as it matters here."""

    trial_id = "t"

    def __init__(self, tmp_path: Path) -> None:
        self.error_file, self._failures = str(tmp_path / "error.txt"), 0
        self.temporary_state = type("State", (), {"ray_actor": "the actor"})()

    def dies(self, gate: Any, face: Any, message: str) -> None:
        """As Ray does it: it adds to the text of errors, and tells the scheduler and the searcher."""
        self._failures += 1
        with open(self.error_file, "a") as file:
            file.write(f"Failure # {self._failures} (occurred at 2026-01-01)\n{message}\n")
        gate.on_trial_error(None, self)
        face.on_trial_complete("t", error=True)


def _goes_on(book: Book) -> bool:
    return (again := book.next()) is not None and again.number == 0


@on_ray
def test_a_trial_is_begun_again_until_its_workers_die_without_progress(tmp_path: Path) -> None:
    from distprune.search.runner import Face, Gate

    book, handle, told = book_of(tmp_path), Handle(tmp_path), list[int]()
    gate, face = Gate(book, {"t": 0}), Face(book, lambda assignment: job_in(tmp_path, recipe=BASE), {"t": 0}, told.append)
    words = "The actor is dead because its worker process has died."
    for index in range(4):
        for _ in range(5):
            handle.dies(gate, face, "The actor died because its node has died. The actor's node was preempted.")
            assert _goes_on(book), "nobody's fault"
            handle.dies(gate, face, "The actor died because its node has died.")
            assert _goes_on(book), "nobody's fault, and what was said before is another death"
        for _ in range(2):
            handle.dies(gate, face, words)
            assert _goes_on(book)
        gate.on_trial_result(None, handle, {"r": json.dumps([row_of(0, index, attempt=str(index))])})  # type: ignore[arg-type]
    for _ in range(2):
        handle.dies(gate, face, words)
        assert _goes_on(book)
    gate.on_trial_result(None, handle, {"r": json.dumps([row_of(0, 3, attempt="again")])})  # type: ignore[arg-type]
    handle.dies(gate, face, "the node running low on memory")
    assert not _goes_on(book), "what was sent again was no progress"
    entry = book.entries[0]
    assert entry.ended == "lost" and entry.deaths[-2:] == ["worker process died", "memory of the node"] and "unknown" not in entry.deaths


@on_ray
def test_a_silent_worker_is_killed_and_a_second_one_is_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from distprune.search import runner

    now, killed, book, handle = [100.0], list[Any](), book_of(tmp_path), Handle(tmp_path)
    monkeypatch.setattr(runner.ray, "kill", killed.append)
    monkeypatch.setattr(runner.time, "monotonic", lambda: now[0])
    gate, draw = runner.Gate(book, {"t": 0}), runner.Draw(lambda: None, book, {"t": 0}, 10)
    face = runner.Face(book, lambda assignment: job_in(tmp_path, recipe=BASE), {"t": 0}, lambda number: None)
    some: Any = {"iteration": 0, "trials": [], "trial": handle}
    full = [""]
    book.holds = lambda: full[0]

    def wait(seconds: float) -> int:
        now[0] += seconds
        draw.on_step_end(0, [])
        return len(killed)

    draw.on_trial_start(**some)
    assert wait(9) == 0
    draw.on_trial_result(**some, result={})
    assert wait(9) == 0 and wait(2) == 1 == wait(30), "given up once"
    handle.dies(gate, face, "killed by `ray.kill`")
    assert _goes_on(book)
    draw.on_trial_error(**some)
    draw.on_trial_start(**some)
    full[0] = "full"
    assert wait(50) == 1, "on a full disk it waits for space"
    full[0] = "crowded"
    assert wait(9) == 1 and wait(2) == 2
    handle.dies(gate, face, "killed by `ray.kill`")
    assert not _goes_on(book) and book.entries[0].ended == "timeout"


@on_ray
def test_a_worker_that_hangs_is_killed_when_its_time_is_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With no limit of silence."""
    from distprune.search import runner

    now, killed, book, handle = [100.0], list[Any](), book_of(tmp_path, most_wall=60.0), Handle(tmp_path)
    monkeypatch.setattr(runner.ray, "kill", killed.append)
    monkeypatch.setattr(runner.time, "monotonic", lambda: now[0])
    gate, draw = runner.Gate(book, {"t": 0}), runner.Draw(lambda: None, book, {"t": 0}, None)
    face = runner.Face(book, lambda assignment: job_in(tmp_path, recipe=BASE), {"t": 0}, lambda number: None)
    some: Any = {"iteration": 0, "trials": [], "trial": handle}
    draw.on_trial_start(**some)

    def wait(seconds: float) -> int:
        now[0] += seconds
        draw.on_step_end(0, [])
        return len(killed)

    assert wait(40) == 0
    gate.on_trial_result(None, handle, {"r": json.dumps([row_of(0, 0, wall_s=40.0)])})  # type: ignore[arg-type]
    draw.on_trial_result(**some, result={})
    assert wait(19) == 0 and wait(2) == 1 == wait(30)
    handle.dies(gate, face, "killed by `ray.kill`")
    assert not _goes_on(book) and book.entries[0].ended == "timeout" and not book.is_busy


@on_ray
def test_nothing_is_born_while_the_disk_is_full(tmp_path: Path) -> None:
    from distprune.search.runner import Face

    full, asked = ["full"], list[int]()
    book = book_of(tmp_path, entries=0)
    book.holds, book.next = lambda: full[0], lambda: asked.append(1)  # type: ignore[assignment, method-assign, func-returns-value]
    face = Face(book, lambda assignment: job_in(tmp_path, recipe=BASE), {}, lambda number: None)
    assert face.suggest("t") is None and asked == [], "Ray asks again"
    full[0] = ""
    assert face.suggest("t") == "FINISHED" and asked == [1]


@pytest.fixture
def toys_are_importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))  # in workers


def _fates(tmp_path: Path, *kinds: str, **limits: Any) -> dict[str, dict[str, Any]]:
    """Rows of the table of trials, one a kind, of a search on one worker."""
    candidates = [{"import": "toys:fate", "kind": kind, "folder": str(tmp_path)} for kind in kinds]
    value = search(
        tmp_path,
        space={"paradigm": ["dense"], "optimizer": candidates, "regularizer": ["none"]},
        limits={"trials": 3 * len(kinds), **limits},
        scheduler="none",
        workers={"most": 1},
    )
    rows = dp.search(value).trials.to_pylist()
    kind_of = {row["number"]: json.loads(row["recipe"])["train"]["optimizer"].get("kind", "lives") for row in rows}
    assert all(trial.state.is_finished() for trial in trials(RunFolder(value.folder)))
    return {kind_of[row["number"]]: row for row in rows if row["ended"] != "duplicate"}


@on_ray
@pytest.mark.usefixtures("toys_are_importable")
def test_workers_that_die_cost_their_trial_nothing_but_a_trial_that_kills_them_is_lost(tmp_path: Path) -> None:
    rows = _fates(tmp_path, "lives", "dies", "dies once")
    deaths = {kind: len(json.loads(row["deaths"])) for kind, row in rows.items()}
    assert {kind: row["ended"] for kind, row in rows.items()} == {"lives": "finished", "dies": "lost", "dies once": "finished"}
    assert (deaths["lives"], deaths["dies once"]) == (0, 1)
    assert MOST_DEATHS <= deaths["dies"] <= 3 * MOST_DEATHS, "reports that wait for others die with their worker, or get through before"
    assert rows["dies once"]["objective"] == rows["lives"]["objective"], "the same numbers as undisturbed"
    assert rows["dies"]["reason"].startswith("its workers died 3 times without a report in between: worker process died")


@on_ray
@pytest.mark.usefixtures("toys_are_importable")
def test_a_worker_that_hangs_is_given_up_and_the_search_ends(tmp_path: Path) -> None:
    (row,) = _fates(tmp_path, "hangs", silence=4).values()
    assert row["ended"] == "timeout", row["reason"]
    assert row["reason"] == "its workers said nothing for 4 s, 2 times without a report in between"
    assert 2 <= len(json.loads(row["deaths"])) <= 4, "the same"
