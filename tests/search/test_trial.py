"""A trial as its worker runs it: checkpoints, restarts, and that nothing of it stays behind."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from searches import checkpoints, job_in, resume, search, start
from toys import finish, ready, recipe, same, tensors

from distprune.core.allocation import OutOfMemory
from distprune.core.executor import execute
from distprune.core.projection import project
from distprune.result import Result
from distprune.search.trial import Job, Memory, grace_cost, run_trial

ROUNDS = {"name": "lth", "share": 0.6, "rewind_to": "10%"}


def _job(tmp_path: Path, **changes: Any) -> Job:
    return job_in(tmp_path, **{"recipe": recipe(ROUNDS, sparsity=0.8).plain(), **changes})


def _plain(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What must not depend on when and where a trial ran."""
    skipped = ("attempt", "wall_s", "spent", "extra")
    return [{key: value for key, value in row.items() if key not in skipped} for row in rows]


pytestmark = pytest.mark.usefixtures("elsewhere")


def test_reports_rungs_and_the_end(tmp_path: Path) -> None:
    rows = list(run_trial(_job(tmp_path)))
    assert [row["index"] for row in rows] == list(range(len(rows)))
    assert rows[-1]["final"] and rows[-1]["ended"] == "finished" and rows[-1]["score"] == rows[-1]["objective"]
    scored = [row for row in rows[:-1] if row["score"] is not None]
    assert [row["rung"] for row in scored] == [1], "the first rung lies in the grace of the first round"
    extra = json.loads(rows[-1]["extra"])
    assert extra["ledger"]["observing"] > 0 and extra["collapsed"] == [] and 0 < extra["flops"] < extra["dense_flops"]
    assert sum(extra["layers"].values()) == rows[-1]["kept"]


@pytest.mark.parametrize("stop", [1, 6, 9, 12])
def test_a_restart_sends_what_is_not_known_and_goes_on(stop: int, tmp_path: Path) -> None:
    whole = list(run_trial(_job(tmp_path / "whole")))
    work = run_trial(_job(tmp_path / "cut"))
    heard = [next(work) for _ in range(stop)]
    work.close()
    for known in (0, stop):
        again = list(run_trial(_job(tmp_path / "cut", known=known)))
        assert _plain(heard[:known] + [row for row in again if row["index"] >= known]) == _plain(whole)


def test_a_checkpoint_is_never_ahead_of_its_reports(tmp_path: Path) -> None:
    for row in run_trial(_job(tmp_path)):
        for checkpoint in checkpoints(tmp_path, 3):
            run = ready(ROUNDS, sparsity=0.8)
            outbox = run.state.load(checkpoint / "state.safetensors")["outbox"]
            assert outbox[-1]["index"] == int(checkpoint.name) == run.state.reports - 1 <= row["index"]
        assert len(checkpoints(tmp_path, 3)) <= 2


def test_an_unreadable_checkpoint_is_passed_over(tmp_path: Path) -> None:
    whole = list(run_trial(_job(tmp_path)))
    newest = checkpoints(tmp_path, 3)[0]
    (newest / "state.safetensors").write_bytes(b"torn")
    assert _plain(list(run_trial(_job(tmp_path)))) == _plain(whole)


def test_a_worker_is_left_clean(tmp_path: Path) -> None:
    other = recipe("at_init", criterion="grasp", seed=9, train={"optimizer": "adamw"}).plain()
    alone = list(run_trial(_job(tmp_path / "alone")))
    assert alone[-1]["ended"] == "finished"
    list(run_trial(_job(tmp_path / "other", recipe=other)))
    half = run_trial(_job(tmp_path / "half", recipe=other))
    next(half)
    half.close()
    torch.rand(5)
    assert _plain(list(run_trial(_job(tmp_path / "after")))) == _plain(alone)


@pytest.mark.parametrize(
    ("model", "reason"), [("raises", "RuntimeError: this network is broken"), ("nothing", "must have trainable weights")]
)
def test_what_goes_wrong_is_the_last_report(model: str, reason: str, tmp_path: Path) -> None:
    value = {**recipe("dense").plain(), "model": {"import": f"toys:{model}"}}
    (row,) = run_trial(_job(tmp_path, recipe=value))
    assert row["ended"] == "error" and row["final"] and reason in json.loads(row["extra"])["reason"]


def test_a_broken_gpu_is_the_last_report_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def broken(share: float) -> None:
        raise RuntimeError("Found no NVIDIA driver")

    monkeypatch.setattr("torch.cuda.set_per_process_memory_fraction", broken)
    (row,) = run_trial(_job(tmp_path, device="cuda", ask={"gpus": 0.25}))
    assert row["ended"] == "error" and row["final"] and "RuntimeError: Found no NVIDIA driver" in json.loads(row["extra"])["reason"]


@pytest.mark.parametrize("samples", [1, 2, 64])
def test_a_pass_that_does_not_fit_is_halved_until_it_is_one_sample(samples: int) -> None:
    """Even one that holds more than it is told to, as a slice of a batch may."""
    memory, error = Memory(), OutOfMemory(samples, MemoryError())
    halved = [memory.micro_batch for _ in range(10) if memory.halve(error, 32)]
    assert halved == [samples >> times for times in range(1, samples.bit_length())]


def test_divergence_is_reported_as_nan(tmp_path: Path) -> None:
    value = recipe("dense", train={"optimizer": {"name": "sgd", "lr": 1e12}}).plain()
    rows = list(run_trial(_job(tmp_path, recipe=value)))
    assert rows[-1]["ended"] == "nan" and "not finite" in json.loads(rows[-1]["extra"])["reason"]


def test_projecting_changes_nothing_and_measures_the_final_budget() -> None:
    undisturbed, observed = ready("gradual"), ready("gradual")
    finish(undisturbed)
    scores = []
    for report in execute(observed.plan, observed.state, observed.env):
        score, spent, _ = project(observed.state, observed.recipe, observed.plan, observed.env, recovery=5)
        scores.append(score)
        assert spent == 5 * 32 + 5 * 32, "recovery and calibration"
        assert report.metrics["accuracy"] >= 0
    assert same(tensors(undisturbed), tensors(observed))
    assert len(set(scores)) > 1


@pytest.mark.parametrize(("recovery", "steps"), [(None, 4), ("30%", 12), ("3it", 3), ("1ep", 10)])
def test_a_score_costs_its_recovery_and_nothing_for_statistics_that_a_network_has_not(
    recovery: str | None, steps: int, tmp_path: Path
) -> None:
    value = recipe("gradual", model={"name": "mlp"}).plain()  # 40 steps of 32 samples
    rows = list(run_trial(_job(tmp_path, recipe=value, recovery=recovery, rungs=[2 * 320])))
    assert [row["score"] is not None for row in rows] == [False, True, False, True]
    assert rows[-1]["spent"] == 4 * 320 + steps * 32


def test_grace_is_the_first_round_of_plans_that_prune_in_rounds() -> None:
    assert grace_cost(ready(ROUNDS, sparsity=0.9).plan) == 4 * 320 + (4 * 320 - 4 * 32)
    assert grace_cost(ready("finetune").plan) == grace_cost(ready("at_init").plan) == grace_cost(ready("dense").plan) == 0


def test_the_end_of_a_search_can_be_done_again(tmp_path: Path) -> None:
    folder = start(search(tmp_path, trials=3, report_every="4ep"), workers=1, using=run_trial)
    rows, masks = Result(folder.path).trials.to_pylist(), {path.name for path in folder.masks.iterdir()}
    assert masks == {f"{row['number']}.safetensors" for row in rows if row["pareto"]}
    shutil.rmtree(folder.masks)
    folder.trials.unlink()
    resume(folder.path, workers=1, using=run_trial)
    again = Result(folder.path).trials.to_pylist()
    assert again == rows and {path.name for path in folder.masks.iterdir()} == masks
