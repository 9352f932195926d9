"""A search with its study in a database comes to what one with a journal comes to, survives what that survives, and has one owner."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from searches import curve, reports, resume, search, start
from sqlalchemy import Engine, event
from toys import BASE
from victims import environment

from distprune.errors import UserError
from distprune.search import driver
from distprune.search.config import Search
from distprune.search.setup import set_up
from distprune.search.simulate import Simulator
from distprune.search.trial import Job
from distprune.store.connection import connect, read_study
from distprune.store.database import Database
from distprune.store.folder import RunFolder
from distprune.store.reports import ReportWriter, read
from distprune.store.study import Truth

pytestmark = [pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning"), pytest.mark.usefixtures("no_finale")]
TRIALS = 5


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/studies.db" if request.param == "sqlite" else str(request.getfixturevalue("postgres_server").database())


@pytest.fixture(autouse=True)
def tried_out_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The space does not depend on where the study is."""
    known: list[Any] = []

    def once(value: Search, **given: Any) -> Any:
        known[:] = known or [set_up(value, **given)]
        return driver.replace(known[0], search=value)

    monkeypatch.setattr(driver, "set_up", once)


def facts_of(folder: RunFolder) -> dict[str, Any]:
    return dict(yaml.safe_load(folder.search_yaml.read_text()))


def told(folder: RunFolder) -> list[Any]:
    """All that was told of each trial, wherever."""
    facts = facts_of(folder)
    if "study" in facts:
        trials = read_study(facts["search"]["study"], facts["study"]["name"])
    else:
        trials = Truth.open(folder.journal, "s", ["maximize", "minimize"]).trials()
    return [
        (t.number, t.state.name, t.values, sorted(t.params.items()), sorted(t.constraints.items()), sorted(t.user_attrs.items(), key=str))
        for t in trials
    ]


def by_journal(tmp_path: Path) -> RunFolder:
    return start(search(tmp_path / "journal", trials=TRIALS), workers=1)


def test_it_comes_to_what_a_journal_comes_to(url: str, tmp_path: Path) -> None:
    """Under another name, and after its run folder was renamed, it goes on with the same study."""
    whole = by_journal(tmp_path)
    folder = start(search(tmp_path, trials=3, study=url), workers=1)
    assert not folder.journal.exists() and facts_of(folder)["study"]["name"].startswith("s-")
    renamed = RunFolder(folder.path.rename(tmp_path / "another"))
    resume(renamed.path, workers=1, trials=TRIALS)
    assert told(renamed) == told(whole) and len(told(renamed)) == TRIALS
    assert reports(renamed) == reports(whole)


def test_two_searches_of_one_name_have_studies_of_their_own(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/studies.db"
    folders = [start(search(tmp_path / place, trials=2, study=url), workers=1) for place in ("a", "b")]
    names = {facts_of(folder)["study"]["name"] for folder in folders}
    assert len(names) == 2 and all(len(told(folder)) == 2 for folder in folders)


def test_killed_at_statements_all_over_a_search_it_ends_as_undisturbed(url: str, tmp_path: Path) -> None:
    whole, count = by_journal(tmp_path), [0]
    counting = lambda *ignored: count.__setitem__(0, count[0] + 1)  # noqa: E731
    connect(url).engine.dispose()  # makes the tables
    event.listen(Engine, "before_cursor_execute", counting)
    start(search(tmp_path / "counted", trials=TRIALS, study=url), workers=1)
    event.remove(Engine, "before_cursor_execute", counting)
    for part in (0.3, 0.6, 0.9) if "sqlite" in url else (0.55, 0.9):
        value = search(tmp_path / str(part), trials=TRIALS, study=url)
        if (child := os.fork()) == 0:
            left = [int(part * count[0])]

            def dying(*ignored: Any, left: list[int] = left) -> None:
                left[0] -= 1
                if left[0] <= 0:
                    os.kill(os.getpid(), signal.SIGKILL)

            try:
                event.listen(Engine, "before_cursor_execute", dying)
                start(value, workers=1)
            finally:
                os._exit(70)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        folder = resume(value.folder, workers=1)
        assert [end[:5] for end in told(folder)] == [end[:5] for end in told(whole)], f"killed at {part:.0%} of its statements"
        assert {n: len(rows) for n, rows in reports(folder).items()} == {n: len(rows) for n, rows in reports(whole).items()}


def test_where_the_database_is_ahead_of_the_reports_what_was_lost_is_run_again(tmp_path: Path) -> None:
    """As after a head is lost whose reports go up to an object store a little later."""
    whole = by_journal(tmp_path)
    folder = start(search(tmp_path, trials=TRIALS, study=f"sqlite:///{tmp_path}/studies.db"), workers=1)
    rows = read(folder.reports).to_pylist()
    folder.reports.unlink()
    with ReportWriter(folder.reports) as writer:
        for row in rows[:-9]:
            writer.add(row)
    resume(folder.path, workers=1)
    assert [end[:5] for end in told(folder)] == [end[:5] for end in told(whole)]
    finished = [end[0] for end in told(whole) if end[5][0][1]["ended"] == "finished"]
    assert finished and all(reports(folder)[number][-1]["final"] for number in finished)


def test_a_driver_whose_study_is_taken_over_ends_with_one_line(url: str, tmp_path: Path) -> None:
    """As one on another machine does it, where no lock of a folder reaches. The newer one goes on with all that was told."""
    value = search(tmp_path / "old", trials=TRIALS, study=url)
    began = 0

    def slow(job: Job) -> Iterator[dict[str, Any]]:
        nonlocal began
        began += 1
        if began == 3:
            shutil.copytree(value.folder, tmp_path / "new")
            resume(tmp_path / "new", workers=1)
        yield from curve(job)

    with pytest.raises(UserError, match="was taken over by process .*: this driver ends, and all that it has told is kept"):
        driver.start(value, engine=Simulator(slow, workers=1), listen=lambda event, facts: None)
    assert [end[:3] for end in told(RunFolder(tmp_path / "new"))] == [end[:3] for end in told(by_journal(tmp_path))]


def test_a_study_that_is_another_runs_or_lost_is_refused_before_anything_starts(tmp_path: Path) -> None:
    class Never(Simulator):
        def open(self, value: Search) -> None:
            raise AssertionError("nothing may start")

    url = f"sqlite:///{tmp_path}/studies.db"
    folder = start(search(tmp_path, trials=2, study=url), workers=1)
    facts = facts_of(folder)
    for change, message in (
        ({"study": {**facts["study"], "run": "another"}}, "has a study 's-.*' already, of another run"),
        ({"search": {**facts["search"], "study": None}}, "was begun with its study in a database, got study: the journal"),
        ({"study": {"name": 3}}, "must say which study is its own"),
        ({"study": {**facts["study"], "name": "s-lost"}}, "has lost study 's-lost' of this run"),
    ):
        folder.search_yaml.write_text(yaml.safe_dump({**facts, **change}))
        with pytest.raises(UserError, match=message):
            driver.resume(folder.path, limits={}, engine=Never(curve, workers=1), listen=lambda event, facts: None)


def test_a_database_that_is_not_there_is_said_before_anything_is_written(tmp_path: Path) -> None:
    value = search(tmp_path / "runs", study="postgresql://nobody@127.0.0.1:1/none")
    with pytest.raises(
        UserError, match=r"study postgresql://nobody@127.0.0.1:1/none cannot be used: .*refused.*\. Check that the server runs"
    ):
        start(value)
    assert not value.folder.exists()


def test_trials_of_a_study_in_a_database_are_learned_from(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/studies.db"
    earlier = start(search(tmp_path, name="earlier", trials=TRIALS, study=url, scheduler="none"), workers=1)
    setup = set_up(search(tmp_path, learn_from=[str(earlier.path)], sampler="tpe"))
    assert len(setup.learned[str(earlier.path)]) == sum(end[1] == "COMPLETE" for end in told(earlier)) > 0


def test_what_waits_for_a_database_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(Database, "at", classmethod(lambda cls, url, *, waits, **given: waits("it does not answer")))
    value = search(tmp_path, study=f"sqlite:///{tmp_path}/studies.db")
    with pytest.raises(TypeError):  # there is no study
        driver.start(value, engine=Simulator(curve, workers=1), listen=lambda event, facts: said.append(facts.get("message", "")))
    assert "it does not answer" in said


def _has_finished_one(folder: RunFolder) -> bool:
    try:
        return folder.search_yaml.exists() and any(end[1] == "COMPLETE" for end in told(folder))
    except UserError:
        return False  # the study is begun after search.yaml is written


@pytest.mark.ray
@pytest.mark.slow
def test_on_ray_too_a_driver_whose_study_is_taken_over_ends_with_one_line(tmp_path: Path) -> None:
    """Ray's controller catches exceptions of whoever it asks; this one it does not."""
    url = f"sqlite:///{tmp_path}/studies.db"
    recipe = {**BASE, "train": {**BASE["train"], "length": "40ep"}}
    value = search(tmp_path / "runs", trials=6, recipe=recipe, study=url, workers={"most": 1}, scheduler="none")
    (tmp_path / "search.yaml").write_text(yaml.safe_dump(value.plain()))
    folder = RunFolder(value.folder)
    command = [sys.executable, "-m", "distprune", "search", str(tmp_path / "search.yaml")]
    with open(tmp_path / "output", "w+") as output:
        process = subprocess.Popen(command, env=environment(), cwd=tmp_path, stdout=output, stderr=output, start_new_session=True)
        try:
            end = time.monotonic() + 200
            while not _has_finished_one(folder):
                assert process.poll() is None and time.monotonic() < end, (tmp_path / "output").read_text()
                time.sleep(0.2)
            study = facts_of(folder)["study"]
            taken = Database.at(url, **study, directions=("maximize", "minimize"))
            before = [end[:3] for end in told(folder)]
            assert process.wait(120) == 2
            assert [end[:3] for end in told(folder)] == before
            taken.close()
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    said = (tmp_path / "output").read_text()
    assert "Traceback" not in said and said.rstrip().splitlines()[-1].startswith(f"Error: The study in {url} was taken over by process")
