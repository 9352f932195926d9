"""Replay: the same bits where nothing changed, and every change found and named."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from greedy import Greedy
from searches import search, start
from toys import BASE

from distprune.api import replay
from distprune.cli import main
from distprune.core.masks import Masks
from distprune.result import Result
from distprune.search.trial import run_trial
from distprune.store import reports
from distprune.store.folder import RunFolder

SPACE = {"paradigm": ["at_init", "gradual"], "criterion": "magnitude", "allocator": ["erk", "uniform"], "regularizer": "none"}


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A search on the toys, really trained."""
    value = search(tmp_path_factory.mktemp("runs"), trials=6, space={**SPACE, "sparsity": [0.5, 0.9]}, recovery="2it")
    return start(value, using=run_trial).path


@pytest.fixture
def run(recorded: Path, tmp_path: Path) -> RunFolder:
    """A copy of it."""
    shutil.copytree(recorded, tmp_path / "s")
    return RunFolder(tmp_path / "s")


def _ended(run: RunFolder, how: str) -> int:
    return next(trial.number for trial in Result(run.path).rows() if trial.row["ended"] == how)


def _front(run: RunFolder) -> int:
    return Result(run.path).pareto()[0].number


def _rewrite(run: RunFolder, number: int, index: int, **changes: Any) -> None:
    """Reports of the stream as if the trial had said something else once."""
    rows = reports.read(run.reports).to_pylist()
    run.reports.unlink()
    with reports.ReportWriter(run.reports) as writer:
        for row in rows:
            writer.add({**row, **changes} if (row["trial"], row["index"]) == (number, index) else row)


def test_a_finished_trial_has_the_same_bits_and_the_same_masks(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    number, threads = _front(run), torch.get_num_threads()
    count = sum(row["trial"] == number for row in reports.read(run.reports).to_pylist())
    before = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}
    assert main(["replay", str(run.path), str(number)]) == 0
    assert f"trial {number}: the same bits in {count} reports and in the masks" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()} == before, "the run folder is only read"
    assert torch.get_num_threads() == threads


def test_a_stopped_trial_is_replayed_up_to_its_stop(run: RunFolder) -> None:
    number = _ended(run, "stopped")
    rows = [row for row in reports.read(run.reports).to_pylist() if row["trial"] == number]
    assert not rows[-1]["final"]
    outcome = Result(run.path).trial(number).replay()
    assert outcome.same and outcome.compared == len(rows) and outcome.masks is None


@pytest.mark.parametrize("column", ["objective", "kept", "cost", "step"])
def test_a_tampered_report_is_found(column: str, run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    number = _front(run)
    rows = {row["index"]: row for row in reports.read(run.reports).to_pylist() if row["trial"] == number}
    true = rows[1][column]
    wrong = torch.nextafter(torch.tensor(true, dtype=torch.float64), torch.tensor(2.0)).item() if column == "objective" else true + 1
    _rewrite(run, number, 1, **{column: wrong})
    outcome = replay(run.path, number)
    assert not outcome.same and [d.index for d in outcome.differences] == [1], "one bit, in one report"
    assert outcome.differences[0].columns == {column: (wrong, true)}
    assert main(["replay", str(run.path), str(number)]) == 1
    assert f"{column}: recorded {wrong!r}, now {true!r}" in capsys.readouterr().out


def test_the_score_at_a_rung_is_compared(run: RunFolder) -> None:
    row = next(row for row in reports.read(run.reports).to_pylist() if row["score"] is not None and not row["final"])
    _rewrite(run, row["trial"], row["index"], score=row["score"] + 0.25)
    outcome = replay(run.path, row["trial"])
    assert [(d.index, set(d.columns)) for d in outcome.differences] == [(row["index"], {"score"})]


def test_other_masks_are_found(run: RunFolder) -> None:
    path = run.masks_file(_front(run))
    masks = Masks.load(path)
    first = next(iter(masks.values())).view(-1)
    first[0] = ~first[0]
    masks.save(path)
    outcome = replay(run.path, _front(run))
    assert outcome.masks is False and not outcome.same and not outcome.differences


def test_other_versions_are_said(run: RunFolder) -> None:
    facts = yaml.safe_load(run.search_yaml.read_text())
    facts["environment"]["torch"] = "1.0.0"
    run.search_yaml.write_text(yaml.safe_dump(facts))
    outcome = replay(run.path, _ended(run, "stopped"))
    assert outcome.same, "the bits are compared, whatever the versions say"
    assert f"torch: recorded with 1.0.0, now {torch.__version__.split('+')[0]}" in "\n".join(outcome.lines())


def test_another_seed_differs_from_the_first_report_on(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    from distprune.search import replay as room

    true = room._recipe
    monkeypatch.setattr(room, "_recipe", lambda folder, trial: ({**true(folder, trial)[0], "seed": 1}, True))
    outcome = replay(run.path, _front(run))
    assert not outcome.same and outcome.differences[0].index == 0


@pytest.mark.parametrize("after", [0, 25], ids=["at the first pass", "later"])
def test_a_trial_that_ran_out_of_memory_is_replayed_in_the_same_parts(after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though there is enough memory now: sums of gradients are rounded otherwise than those of a whole batch."""
    for name, value in {"most": 10, "at_once": 1000, "after": after, "passes": 0}.items():
        monkeypatch.setattr(Greedy, name, value)
    recipe = {**BASE, "model": {"import": "greedy:greedy"}, "train": {**BASE["train"], "length": "8ep"}}
    value = search(tmp_path, trials=1, recipe=recipe, space={"paradigm": ["dense"]}, report_every="1ep")
    folder = start(value, workers=1, using=run_trial)
    micro = [json.loads(row["extra"]).get("micro_batch") for row in reports.read(folder.reports).to_pylist()]
    assert micro[-1] == 8 and (micro[0] is None) == bool(after)
    monkeypatch.setattr(Greedy, "after", 10**9)
    found = replay(folder.path, 0)
    assert found.same and found.compared == len(micro), found.lines()


def test_nothing_is_taken_from_earlier_work(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    from distprune.search import replay as room

    jobs: list[Any] = []
    monkeypatch.setattr(room, "run_trial", lambda job: run_trial(jobs.append(job) or job))
    assert replay(run.path, _front(run)).same
    assert [(job.cache, job.known, Path(job.folder) == run.path) for job in jobs] == [(None, 0, False)]


def test_mistakes_are_one_line(run: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(run.path, broken)
    (broken / "search.yaml").write_text("a: 1\n")
    for arguments, message in [
        ((str(tmp_path / "nowhere"), "0"), "is not a run folder"),
        ((str(run.path), "99"), "has no reports of trial 99. Trials with reports: 0, 1"),
        ((str(run.path), "0", "--device", "tpu9"), "device must be one that torch can use here, got 'tpu9'"),
        ((str(run.path), "many"), "Input should be a valid integer"),
        ((str(broken), "0"), "must hold search, rungs and environment"),
    ]:
        assert main(["replay", *arguments]) == 2
        error = capsys.readouterr().err
        assert message.lower() in error.lower() and error.startswith("Error: ") and error.count("\n") == 1, error


def test_extra_of_reports_is_plain(run: RunFolder) -> None:
    """The metrics of a report are compared too: they are in its JSON."""
    number = _front(run)
    row = next(row for row in reports.read(run.reports).to_pylist() if (row["trial"], row["index"]) == (number, 0))
    extra = json.loads(row["extra"])
    extra["metrics"]["loss"] += 1e-9
    _rewrite(run, number, 0, extra=json.dumps(extra))
    assert [set(d.columns) for d in replay(run.path, number).differences] == [{"metrics"}]
