"""Memory that runs out: a trial is tried again with half of the samples at once, and that is recorded."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from greedy import Greedy
from searches import checkpoints, job_in, search, start
from toys import BASE, recipe

from distprune.search.trial import Job, run_trial
from distprune.store.trials import read_trials

pytestmark = pytest.mark.usefixtures("elsewhere")


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Any:
    def has(**values: Any) -> None:
        for key, value in {"most": 10, "at_once": 1000, "after": 0, "passes": 0, **values}.items():
            monkeypatch.setattr(Greedy, key, value)

    return has


def _job(folder: Path, *, paradigm: Any = "dense", number: int = 3, **changes: Any) -> Job:
    model = {"import": "greedy:greedy", **changes.pop("model", {})}
    value = {**recipe(paradigm, model=model, **changes.pop("recipe", {})).plain()}
    return job_in(folder, number=number, recipe=value, **{"rungs": [640], **changes})


def _numbers(rows: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    """Each report once, the first of it."""
    first = {row["index"]: row for row in reversed(rows)}
    return [tuple(first[index][key] for key in ("index", "cost", "objective", "kept", "final")) for index in sorted(first)]


ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."
    ),
    MemoryError(),
]


@pytest.mark.parametrize("error", ERRORS, ids=["cuda", "cpu", "python"])
def test_out_of_memory_is_tried_again_with_half_of_the_samples_and_recorded(error: Exception, memory: Any, tmp_path: Path) -> None:
    memory(most=1000)
    whole = list(run_trial(_job(tmp_path / "whole")))
    memory(error=error)
    rows = list(run_trial(_job(tmp_path / "short")))
    extra = json.loads(rows[-1]["extra"])
    assert rows[-1]["ended"] == "finished" and (extra["micro_batch"], extra["retries"]) == (8, 2), "32, 16, 8"
    assert [row[:2] for row in _numbers(rows)] == [row[:2] for row in _numbers(whole)], "the same bill"
    assert [row[2] for row in _numbers(rows)] == pytest.approx([row[2] for row in _numbers(whole)], abs=0.02)
    assert "micro_batch" not in json.loads(whole[-1]["extra"])


def test_it_goes_on_from_its_own_checkpoint_and_stays_where_it_was(memory: Any, tmp_path: Path) -> None:
    memory(most=1000)
    whole = list(run_trial(_job(tmp_path / "whole")))
    memory(after=35)  # after three epochs of ten steps, with a checkpoint at the rung after the second
    rows = list(run_trial(_job(tmp_path / "short")))
    assert rows[-1]["ended"] == "finished" and json.loads(rows[-1]["extra"])["micro_batch"] == 8
    assert _numbers(rows)[:2] == _numbers(whole)[:2]
    assert len({row["attempt"] for row in rows}) > 1, "what was lost is paid for by the attempt that lost it"
    assert max(row["spent"] for row in rows if row["attempt"] == rows[-1]["attempt"]) < whole[-1]["spent"], "not from the start"
    memory(after=10**9)  # memory would be enough again: after a kill it goes on as it did all the same
    last = checkpoints(tmp_path / "short", 3)
    again = list(run_trial(_job(tmp_path / "short", known=0)))
    assert last and [row["objective"] for row in again] == [row[2] for row in _numbers(rows)]


def test_after_a_kill_a_trial_goes_on_with_the_micro_batch_that_it_had(memory: Any, tmp_path: Path) -> None:
    memory()
    undisturbed = list(run_trial(_job(tmp_path / "whole")))
    memory()
    work = run_trial(_job(tmp_path / "cut"))
    heard = [next(work) for _ in range(3)]
    work.close()
    memory(most=1000)
    rows = list(run_trial(_job(tmp_path / "cut", known=2)))
    assert _numbers(heard[:2] + rows) == _numbers(undisturbed)
    assert json.loads(rows[-1]["extra"])["retries"] == 2


def test_measuring_that_does_not_fit_leaves_training_alone(memory: Any, tmp_path: Path) -> None:
    memory(most=1000)
    whole = list(run_trial(_job(tmp_path / "whole")))
    memory(most=1000, at_once=60)
    rows = list(run_trial(_job(tmp_path / "short")))
    assert json.loads(rows[-1]["extra"])["micro_batch"] == 50, "of 100 samples of validation"
    assert _numbers(rows) == [tuple(pytest.approx(value, abs=1e-6) for value in row) for row in _numbers(whole)]


def test_a_trial_that_fails_with_a_single_sample_is_told_so(memory: Any, tmp_path: Path) -> None:
    memory(most=0)
    (row,) = run_trial(_job(tmp_path))
    extra = json.loads(row["extra"])
    assert row["ended"] == "oom" and row["final"] and row["index"] == 0 and extra["micro_batch"] == 1 and extra["retries"] == 5
    assert "micro-batch of 1 after running out of memory" in extra["reason"] and "CUDA out of memory" in extra["reason"]


@pytest.mark.parametrize(("most", "ended", "micro_batch"), [(2, "finished", 2), (1, "oom", 1)])
def test_batch_normalisation_needs_two_samples(most: int, ended: str, micro_batch: int, memory: Any, tmp_path: Path) -> None:
    memory(most=most)
    last = list(run_trial(_job(tmp_path, model={"norm": True})))[-1]
    assert last["ended"] == ended and json.loads(last["extra"])["micro_batch"] == micro_batch


def test_a_batch_that_cannot_be_split_is_told_as_out_of_memory(memory: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from distprune.core.task import Task
    from distprune.core.tasks.classification import Classification

    monkeypatch.setattr(Classification, "split", Task.split)
    memory()
    (row,) = run_trial(_job(tmp_path))
    assert row["ended"] == "oom" and "cannot be split" in json.loads(row["extra"])["reason"]


def test_scoring_runs_out_of_memory_and_is_halved(memory: Any, tmp_path: Path) -> None:
    memory()
    rows = list(run_trial(_job(tmp_path, paradigm="at_init", recipe={"criterion": "snip"})))
    assert rows[-1]["ended"] == "finished" and json.loads(rows[-1]["extra"])["micro_batch"] == 8


def test_the_table_of_trials_says_what_memory_cost(memory: Any, tmp_path: Path) -> None:
    memory()
    value = search(tmp_path, trials=1, recipe={**BASE, "model": {"import": "greedy:greedy"}}, space={"paradigm": ["dense"]})
    (row,) = read_trials(start(value, workers=1, using=run_trial).trials).to_pylist()
    assert (row["ended"], row["micro_batch"], row["retries"], json.loads(row["deaths"])) == ("finished", 8, 2, [])
