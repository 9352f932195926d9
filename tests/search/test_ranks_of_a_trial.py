"""A trial on several ranks: what their leader makes of their answers, and searches of such trials on a real Ray."""

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from books import on_ray
from searches import job_in, search
from toys import BASE, recipe

import distprune as dp
from distprune.core.allocation import OutOfMemory, Unsplittable
from distprune.core.data.dataset import Dataset
from distprune.core.loop import Diverged
from distprune.core.ranks import Lost
from distprune.core.recipe import Recipe
from distprune.core.task import Task
from distprune.core.tasks.classification import Classification
from distprune.errors import UserError
from distprune.search.replay import replay
from distprune.search.setup import set_up
from distprune.search.together import Answer, Rank, _error, _told, run_together
from distprune.search.trial import Job, run_trial

HERE = Path(__file__).parent


class Scripted:
    """A crew whose ranks answer as they are told to; a text is the error of a rank that is gone."""

    def __init__(self, *steps: list[Answer] | str) -> None:
        self._steps, self.heard = list(steps), list[Any]()

    def all(self, method: str, *arguments: Any) -> list[Answer]:
        self.heard.append((method, *arguments[2:]))
        if method != "step":
            return [{}, {}]
        if isinstance(step := self._steps.pop(0), str):
            raise Lost(step)
        return step

    def dismiss(self) -> None:
        self.heard.append(("dismiss",))

    @property
    def methods(self) -> list[str]:
        return [call[0] for call in self.heard]


def _row(index: int, **changes: Any) -> list[Answer]:
    return [{"row": {"index": index, "of": rank, **changes}} for rank in range(2)]


def _failed(kind: str, text: str = "why", samples: int | None = None) -> Answer:
    return {"failed": {"kind": kind, "text": text, "samples": samples}}


def _job(tmp_path: Path) -> Any:
    return job_in(tmp_path, recipe=recipe("dense").plain(), ranks=2)


OVER: list[Answer] = [{"over": True}] * 2


def test_rank_0_alone_is_heard_and_ranks_take_the_next_trial(tmp_path: Path) -> None:
    crew = Scripted(_row(0), _row(1), OVER)
    assert [row["of"] for row in run_together(_job(tmp_path), crew)] == [0, 0]
    assert crew.methods == ["begin", "step", "step", "step", "close"]
    crew = Scripted(_row(0), _row(1))
    work = run_together(_job(tmp_path), crew)
    next(work)
    work.close()
    assert crew.methods == ["begin", "step", "close"], "stopped at a report, where all of them stand"


@pytest.mark.parametrize("failures", [1, 2])
def test_out_of_memory_begins_all_again_on_new_ranks(failures: int, tmp_path: Path) -> None:
    crew = Scripted(_row(0), [_failed("shortage", samples=16)] * failures, _row(1), OVER)
    rows = list(run_together(_job(tmp_path), crew))
    assert [row["index"] for row in rows] == [0, 1]
    assert crew.methods == ["begin", "step", "step", "dismiss", "begin", "step", "step", "close"]
    assert [call[1]["micro_batch"] for call in crew.heard if call[0] == "begin"] == [None, 8]


@pytest.mark.parametrize(
    ("answers", "ended", "reason", "then"),
    [
        ([_failed("user", "no such layer"), _failed("lost", "nobody answers")], "error", "no such layer", "dismiss"),
        ([_failed("lost", "nobody answers"), _failed("other", "RuntimeError: broken")], "error", "RuntimeError: broken", "dismiss"),
        ([_failed("diverged", "not finite")] * 2, "nan", "not finite", "close"),
        ([_failed("shortage", "MemoryError: ", 1)] * 2, "oom", "A pass of 1 at once does not fit: MemoryError:", "dismiss"),
        ([_failed("user", "no such layer")] * 2, "error", "no such layer", "dismiss"),
        ([_failed("diverged", "not finite"), _failed("user", "no such layer")], "nan", "not finite", "dismiss"),
    ],
)
def test_the_first_cause_is_told(answers: list[Answer], ended: str, reason: str, then: str, tmp_path: Path) -> None:
    crew = Scripted(_row(0), answers)
    last = list(run_together(_job(tmp_path), crew))[-1]
    assert (last["ended"], json.loads(last["extra"])["reason"], last["index"], last["final"]) == (ended, reason, 1, True)
    assert crew.methods[-1] == then, "ranks are kept where all stopped at one place alone"


@pytest.mark.parametrize("steps", [(_row(0), "its worker process has died"), (_row(0), [_failed("lost")] * 2)])
def test_a_rank_that_is_gone_is_the_end_of_the_worker(steps: Any, tmp_path: Path) -> None:
    crew = Scripted(*steps)
    work = run_together(_job(tmp_path), crew)
    next(work)
    with pytest.raises(Lost):
        next(work)
    assert crew.methods[-1] == "dismiss"


@pytest.mark.parametrize(
    "error", [OutOfMemory(8, MemoryError("much")), MemoryError("much"), Diverged("x"), Unsplittable("x"), UserError("x"), Lost("x")]
)
def test_errors_come_through_as_what_they_are(error: Exception) -> None:
    again = _error(json.loads(json.dumps(_told(error))))
    assert type(again) is type(error) and getattr(again, "samples", None) == getattr(error, "samples", None)
    assert str(_error(_told(KeyError("k")))) == "KeyError: 'k'"


def test_a_batch_that_cannot_be_shared_is_said_before_anything_runs(tmp_path: Path) -> None:
    value = search(tmp_path, workers={"ranks": 64})
    with pytest.raises(UserError, match=r"workers.ranks must be at most train.batch_size, 32, .* got 64\. Write ranks: 1"):
        set_up(value)


class Whole(Classification):
    """A user's task, whose batches nobody can take apart."""

    split = Task.split


def whole(dataset: Dataset) -> Classification:
    return Whole(dataset)


@pytest.mark.parametrize("task", ["inverse", "import"])
def test_a_task_that_cannot_be_shared_is_said_before_anything_runs(task: str, tmp_path: Path) -> None:
    fitted = {"model": "hourglass", "data": {"name": "image", "side": 16}, "task": "inverse", "train": {"length": "1ep", "batch_size": 1}}
    plain = {**BASE, **(fitted if task == "inverse" else {"task": {"import": "test_ranks_of_a_trial:whole"}})}
    space = {"paradigm": ["dense", "at_init"], "sparsity": [0.5], "granularity": ["weight"]}
    set_up(search(tmp_path, recipe=plain, space=space))
    with pytest.raises(UserError, match=r"The batches of (Inverse|Whole) cannot be shared by ranks\. Write workers\.ranks: 1\.$"):
        set_up(search(tmp_path, recipe=plain, space=space, workers={"ranks": 2}))


def test_a_rank_that_dies_while_the_group_starts_is_a_lost_worker(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import ray

    from distprune.search import crew

    def dies(*arguments: Any, **options: Any) -> None:
        raise ray.exceptions.RayError("its node has died")

    monkeypatch.setattr(crew, "WorkerGroup", dies)
    with pytest.raises(Lost, match="do not start: .*its node has died"):
        list(run_together(_job(tmp_path), crew.RayCrew(2, {"CPU": 1.0}, "cpu")))


# Two processes, without Ray.


def serve(rank: int, folder: str) -> None:
    """A rank that is told what to do by lines of JSON."""
    from rank_process import meet

    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    meet(rank, 2, Path(folder))
    one = Rank()
    for line in sys.stdin:
        method, arguments = json.loads(line)
        print(json.dumps(getattr(one, method)(*arguments)), file=out, flush=True)


class Processes:
    """A crew of two processes of this machine, in the place of Ray's."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._meetings, self.processes = folder, 0, list["subprocess.Popen[str]"]()

    def all(self, method: str, *arguments: Any) -> list[Answer]:
        if not self.processes:
            self._meetings += 1
            (meeting := self._folder / str(self._meetings)).mkdir(parents=True)
            program = f"import test_ranks_of_a_trial as t, sys; t.serve(int(sys.argv[1]), {str(meeting)!r})"
            environment = {**os.environ, "PYTHONPATH": f"{HERE}:{HERE.parent}", "OMP_NUM_THREADS": "1"}
            self.processes = [
                subprocess.Popen(
                    [sys.executable, "-c", program, str(rank)], env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
                )
                for rank in range(2)
            ]
        waiting = {process.stdout: process for process in self.processes}
        for process in self.processes:
            assert process.stdin is not None
            try:
                print(json.dumps([method, arguments]), file=process.stdin, flush=True)
            except BrokenPipeError:
                raise Lost("its worker process has died") from None
        answers: list[Answer] = []
        while waiting:
            ready, _, _ = select.select([*waiting], [], [], 5.0 if any("failed" in answer for answer in answers) else 120.0)
            for stream in ready:
                if not (line := stream.readline()):
                    raise Lost("its worker process has died")
                answers.append(json.loads(line))
                del waiting[stream]
            if not ready:
                return answers
        return answers

    def dismiss(self) -> None:
        for process in self.processes:
            process.kill()
            process.communicate()
        self.processes = []


@pytest.fixture(scope="module")
def crew(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Processes]:
    found = Processes(tmp_path_factory.mktemp("meetings"))
    yield found
    found.dismiss()


RECIPE = {**BASE, "model": {"import": "rank_process:double"}}


def _trial(folder: Path, **changes: Any) -> Job:
    changed = {"paradigm": "gradual", "sparsity": 0.9, "allocator": "erk", "criterion": "snip", "seed": 0, **changes.pop("recipe", {})}
    return job_in(folder, recipe=Recipe.read({**RECIPE, **changed}).plain(), ranks=2, **changes)


COLUMNS = ("index", "cost", "spent", "kept", "rung", "final", "ended")


def _same(some: list[dict[str, Any]], others: list[dict[str, Any]], *, exactly: bool, columns: tuple[str, ...] = COLUMNS) -> None:
    assert [[row[name] for name in columns] for row in some] == [[row[name] for name in columns] for row in others]
    for row, other in zip(some, others, strict=True):
        for name in ("objective", "score"):
            assert row[name] == (other[name] if exactly or other[name] is None else pytest.approx(other[name], abs=0.011))


def test_a_trial_on_two_processes_is_that_on_one_and_goes_on_from_rank_0s_checkpoint(crew: Processes, tmp_path: Path) -> None:
    one = list(run_trial(_trial(tmp_path / "one")))
    two = list(run_together(_trial(tmp_path / "two"), crew))
    _same(two, one, exactly=False)
    assert any(row["score"] is not None for row in two[:-1]), "it was scored at a rung"
    first = [process.pid for process in crew.processes]
    assert len({row["attempt"] for row in two}) == 1 and json.loads(two[-1]["extra"])["key"] != json.loads(one[-1]["extra"])["key"]
    held = {path.parent.name for path in (tmp_path / "two" / "checkpoints" / "3").glob("*/*")}
    assert held == {two[0]["attempt"]}, "rank 0 alone writes checkpoints"

    work = run_together(_trial(tmp_path / "cut"), crew)
    heard = [next(work) for _ in range(3)]
    work.close()
    rest = list(run_together(_trial(tmp_path / "cut", known=2), crew))
    _same(heard[:2] + rest, two, exactly=True, columns=("index", "cost", "kept", "rung", "final", "ended"))
    assert rest[-1]["spent"] < two[-1]["spent"] and [process.pid for process in crew.processes] == first, "the same ranks, for all of them"


def test_trials_on_two_ranks_share_what_they_compute_with_each_other_alone(crew: Processes, tmp_path: Path) -> None:
    cache = str(tmp_path / "cache")

    def run(number: int, sparsity: float, *, together: bool, cache: str | None = cache) -> list[dict[str, Any]]:
        lth = {"paradigm": {"name": "lth", "share": 0.7, "rewind_to": "10%"}, "sparsity": sparsity, "criterion": "magnitude"}
        job = _trial(tmp_path / str(number), number=number, recipe=lth, cache=cache, rungs=[])
        return list(run_together(job, crew) if together else run_trial(job))

    def saved(rows: list[dict[str, Any]]) -> int:
        return int(json.loads(rows[-1]["extra"]).get("saved", 0))

    assert saved(run(0, 0.7, together=False)) == 0 == saved(run(1, 0.7, together=True)), "one process's bits are not for two"
    shared = run(2, 0.9, together=True)
    assert saved(shared) > 0 and shared[-1]["spent"] + saved(shared) == shared[-1]["cost"]
    _same(shared, run(3, 0.9, together=True, cache=None), exactly=True, columns=("index", "cost", "kept", "final", "ended"))


def test_a_killed_rank_is_noticed_at_once_and_the_trial_goes_on(crew: Processes, tmp_path: Path) -> None:
    whole = list(run_together(_trial(tmp_path / "whole"), crew))
    work = run_together(_trial(tmp_path / "cut"), crew)
    heard = [next(work) for _ in range(2)]
    crew.processes[1].kill()
    began = time.monotonic()
    with pytest.raises(Lost, match="died"):
        next(work)
    assert time.monotonic() - began < 30 and not crew.processes, "and the other does not wait for it"
    _same(heard + list(run_together(_trial(tmp_path / "cut", known=2), crew)), whole, exactly=True, columns=("index", "cost", "kept"))


# On a real Ray.


def dies_once(parameters: Any, *, folder: str, on: int, at: int = 25) -> torch.optim.Optimizer:
    """SGD whose step kills one of the ranks, once."""

    class Dies(torch.optim.SGD):
        steps = 0

        def step(self, closure: Any = None) -> None:
            super().step(closure)
            Dies.steps += 1
            mark = Path(folder) / f"died-{on}"
            if Dies.steps == at and torch.distributed.is_initialized() and torch.distributed.get_rank() == on and not mark.exists():
                mark.touch()
                os.kill(os.getpid(), signal.SIGKILL)

    return Dies(parameters, lr=0.05)


@pytest.fixture
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", f"{HERE}:{HERE.parent}")  # in workers


@on_ray
@pytest.mark.usefixtures("importable")
def test_a_search_of_trials_on_two_ranks_of_which_one_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    monkeypatch.chdir(tmp_path)
    ray.shutdown()  # one that another test began may not find these modules
    value = search(
        tmp_path,
        trials=2,
        recipe=RECIPE,
        space={
            "paradigm": ["dense", "gradual"],
            "sparsity": [0.9],
            "criterion": ["magnitude"],
            "allocator": ["erk"],
            "optimizer": [{"import": "test_ranks_of_a_trial:dies_once", "folder": str(tmp_path), "on": 1}],
            "regularizer": ["none"],
        },
        sampler="grid",
        scheduler="none",
        cache=False,
        workers={"ranks": 2, "most": 1},
    )
    found = dp.search(value)
    rows = found.trials.to_pylist()
    assert [row["ended"] for row in rows] == ["finished"] * 2, rows
    assert [(row["deaths"], row["attempts"]) for row in rows] == [('["worker process died"]', 2), ("[]", 1)], "begun again, with new ranks"
    for row in rows:
        job = job_in(tmp_path / "alone", number=row["number"], recipe=json.loads(row["recipe"]), rungs=[])
        last = list(run_trial(job))[-1]
        assert row["objective"] == pytest.approx(last["objective"], abs=0.011), "one image of a hundred"
        assert (row["kept"], row["cost"]) == (last["kept"], last["cost"])
        assert json.loads(row["layers"]) == json.loads(last["extra"])["layers"] and row["recipe_key"] != json.loads(last["extra"])["key"]
    assert replay(found.folder.path, 0).surroundings["ranks"] == ("2", "1")
    for trial in found.pareto():
        assert trial.masks.kept == trial.row["kept"]
