"""Gradients summed over parts of a batch: what they equal, what sees them, and what may differ."""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch
from test_inverse import ready as ready_inverse
from torch import nn
from toys import finish, ready, same, tensors

from distprune.core.allocation import OutOfMemory, Unsplittable, fits, is_shortage
from distprune.core.hooks.hook import Hook
from distprune.core.plan import Plan
from distprune.core.run import Run
from distprune.core.scoring import Probe

PLAIN: dict[str, Any] = {"model": {"name": "mlp", "hidden": [16]}}  # no batch normalisation, no dropout
SEEN: list[dict[str, torch.Tensor]] = []


@dataclass(frozen=True, kw_only=True)
class Spy(Hook):
    """Keeps the gradients that it sees."""

    def grad(self, memory: Any, state: Any, env: Any) -> None:
        SEEN.append({name: weight.grad.clone() for name, weight in state.weights.items()})


def gradients(run: Run, micro_batch: int | None, *, steps: int = 1) -> list[dict[str, torch.Tensor]]:
    """What hooks see in the first steps of a dense training."""
    SEEN.clear()
    run.env.task.micro_batch = micro_batch
    (stage,) = run.plan.stages
    finish(replace(run, plan=Plan([replace(stage, until=steps, hooks=(Spy(),))])))
    return list(SEEN)


@pytest.mark.parametrize("micro_batch", [31, 16, 11, 4, 1])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_gradient_is_that_of_the_whole_batch_and_hooks_see_it_once(micro_batch: int, precision: str) -> None:
    (whole,) = gradients(ready("dense", precision=precision, **PLAIN), None)
    (parts,) = gradients(ready("dense", precision=precision, **PLAIN), micro_batch)
    for name, gradient in whole.items():
        torch.testing.assert_close(parts[name], gradient, atol=1e-6 if precision == "fp32" else 2e-3, rtol=0)
    assert max(gradient.abs().max() for gradient in whole.values()) > 1e-2, "a tolerance of 1e-6 means something"


def test_parts_keep_to_the_limit_are_all_of_the_batch_and_no_more_than_needed() -> None:
    task = ready("dense").env.task
    batch = task.batch(0, 0, 0, 32)
    for limit in range(1, 40):
        task.micro_batch = limit
        parts = task.parts(batch)
        assert len(parts) == -(-32 // limit) and all(task.samples(part) <= limit for part in parts)
        assert max(map(task.samples, parts)) - min(map(task.samples, parts)) <= 1
        for index in range(2):
            assert torch.equal(torch.cat([part[index] for part in parts]), batch[index])


def test_no_limit_and_one_that_is_not_reached_leave_every_bit() -> None:
    whole, limited = ready("lth"), ready("lth")
    limited.env.task.micro_batch = 32
    reports = finish(whole), finish(limited)
    assert same(tensors(whole), tensors(limited)) and reports[0] == reports[1]


def test_bill_clock_and_reports_are_those_of_whole_batches() -> None:
    whole, limited = ready("gradual", criterion="snip"), ready("gradual", criterion="snip")
    limited.env.task.micro_batch = 8
    columns = [[(r.index, r.clock, r.lap, r.cost, r.kept, r.final) for r in finish(run)] for run in (whole, limited)]
    assert columns[0] == columns[1]
    assert whole.key == limited.key, "how a gradient is summed is no part of a recipe"
    assert whole.state.ledger == limited.state.ledger


class Noise(nn.Module):
    """Shows the mask that dropout draws, and lets gradients through."""

    drawn: ClassVar[list[torch.Tensor]] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.drawn.append(nn.functional.dropout(torch.ones(8, 50), 0.5, self.training))
        return x


def test_every_step_and_every_part_of_it_has_its_own_noise_and_has_it_again() -> None:
    def drawn() -> list[torch.Tensor]:
        run = ready("dense", **PLAIN)
        run.state.model.add_module("noise", Noise())
        Noise.drawn.clear()
        gradients(run, 8, steps=3)
        return [value for value in Noise.drawn if (value == 0).any()]

    first, second = drawn(), drawn()
    assert len(first) == 3 * 4 and all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not any(torch.equal(a, b) for index, a in enumerate(first) for b in first[:index])


def test_batch_normalisation_sees_the_parts() -> None:
    """Its running mean after one step of two parts is that of two updates, computed by hand."""
    run = ready("dense")
    norm = run.state.model[1]
    run.env.task.micro_batch = 16
    inputs, _ = run.env.task.batch(run.env.seed, 0, 0, 32)
    with torch.no_grad():
        means = [run.state.model[0](part).mean((0, 2, 3)) for part in inputs.tensor_split(2)]
    (stage,) = run.plan.stages
    finish(replace(run, plan=Plan([replace(stage, until=1)])))
    torch.testing.assert_close(norm.running_mean, 0.9 * 0.1 * means[0] + 0.1 * means[1])


def test_scores_of_gradients_are_those_of_the_whole_batch() -> None:
    def scores(micro_batch: int | None) -> dict[str, torch.Tensor]:
        run = ready("dense", **PLAIN)
        run.env.task.micro_batch = micro_batch
        return Probe(run.state.model, run.env.task, run.state.masks, seed=0, draw=(0,), batch_size=32).gradients(2)

    for name, score in scores(None).items():
        torch.testing.assert_close(scores(5)[name], score, atol=1e-6, rtol=0)


def test_evaluation_in_parts_gives_the_same_metrics() -> None:
    run = ready("dense")
    whole = run.env.task.metrics(run.state.model, "validation")
    seen: list[int] = []
    run.state.model.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    run.env.task.micro_batch = 7
    parts = run.env.task.metrics(run.state.model, "validation")
    assert parts == pytest.approx(whole, abs=1e-6) and max(seen) == 7 and sum(seen) == 100


def test_a_task_whose_batch_is_one_whole_says_so() -> None:
    task = ready_inverse().env.task
    task.micro_batch = 1
    batch = task.batch(0, 0, 0, 1)
    assert task.parts(batch) == [batch], "one sample is no shortage"
    with pytest.raises(Unsplittable, match="Inverse cannot be split. Lower"):
        task.split(batch, 2)


@pytest.mark.parametrize(
    ("error", "shortage"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (MemoryError(), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"), True),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("not enough memory"), False),
    ],
)
def test_what_counts_as_running_out_of_memory(error: Exception, shortage: bool) -> None:
    assert is_shortage(error) is shortage
    with pytest.raises(OutOfMemory if shortage else type(error)) as caught, fits(9):
        raise error
    assert not shortage or (caught.value.samples == 9 and caught.value.__cause__ is error)  # type: ignore[attr-defined]


def test_the_allocator_of_this_machine_is_understood() -> None:
    with pytest.raises(OutOfMemory) as caught, fits(3):
        torch.empty(2**55)
    assert caught.value.samples == 3


def test_criteria_that_need_a_batch_as_one_whole_see_its_first_part() -> None:
    run = ready("dense")
    whole = Probe(run.state.model, run.env.task, run.state.masks, seed=0, draw=(0,), batch_size=32).batch()
    run.env.task.micro_batch = 8
    part = Probe(run.state.model, run.env.task, run.state.masks, seed=0, draw=(0,), batch_size=32).batch()
    assert torch.equal(part[0], whole[0][:8])


@pytest.mark.parametrize(("micro_batch", "samples"), [(None, 32), (8, 8), (100, 32)])
def test_scoring_that_does_not_fit_says_with_how_many_samples(
    micro_batch: int | None, samples: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def greedy(*arguments: Any) -> dict[str, torch.Tensor]:
        raise MemoryError

    run = ready("at_init", criterion="snip")
    run.env.task.micro_batch = micro_batch
    monkeypatch.setattr(Probe, "gradients", greedy)
    with pytest.raises(OutOfMemory) as caught:
        finish(run)
    assert caught.value.samples == samples
