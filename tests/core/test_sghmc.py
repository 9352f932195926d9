"""Adaptive SGHMC: its step by hand, a posterior that is known in closed form, and what the loop asks of an optimizer."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from toys import finish, ready, same, tensors

from distprune.core import registry
from distprune.core.executor import execute
from distprune.core.optimizers.sghmc import SGHMC
from distprune.errors import UserError

SAMPLES, NOISE, DECAY = 32, 1.0, 0.1


def _regression() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Inputs [n, 3] and targets [n] of a linear model with Gaussian noise and prior; mean [3] and covariance [3, 3] of its posterior."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(SAMPLES, 3, generator=generator)
    inputs[:, 1] += inputs[:, 0]
    inputs[:, 2] *= 2
    targets = inputs @ torch.tensor([1.0, -1.0, 0.5]) + NOISE**0.5 * torch.randn(SAMPLES, generator=generator)
    precision = (inputs.T @ inputs / NOISE + SAMPLES * DECAY * torch.eye(3)).double()
    covariance = torch.linalg.inv(precision)
    return inputs, targets, covariance @ (inputs.T @ targets / NOISE).double(), covariance


@pytest.mark.parametrize(("batch", "temperature"), [(0, 1.0), (0, 4.0), (4, 1.0)], ids=["full batch", "temperature 4", "batches of 4"])
def test_a_conjugate_posterior(batch: int, temperature: float) -> None:
    """400 chains at once, as the step is elementwise: mean, variances and correlation. Batches of 4 bring noise of their own."""
    inputs, targets, mean, covariance = _regression()
    torch.manual_seed(0)
    chains = nn.Parameter(torch.zeros(400, 3))
    optimizer = SGHMC([chains], scale=SAMPLES / temperature, lr=0.05, friction=0.2, burn=400, weight_decay=DECAY)
    kept = []
    for step in range(1500):
        if batch:
            rows = torch.randint(SAMPLES, (400, batch))
            errors = (inputs[rows] @ chains[:, :, None])[:, :, 0] - targets[rows]
        else:
            errors = chains @ inputs.T - targets
        optimizer.zero_grad()
        (errors.square().mean(1) / (2 * NOISE)).sum().backward()
        optimizer.step()
        if step >= 500 and step % 20 == 0:
            kept.append(chains.detach().clone())
    samples = torch.cat(kept).double()
    found, deviation = torch.cov(samples.T), covariance.diag().sqrt()
    assert ((samples.mean(0) - mean).abs() / deviation).max() < 0.15 * temperature**0.5
    torch.testing.assert_close(found.diag() / covariance.diag(), torch.full((3,), temperature).double(), atol=0, rtol=0.15)
    correlation = found[0, 1] / (found[0, 0] * found[1, 1]).sqrt()
    assert correlation == pytest.approx(float(covariance[0, 1] / (deviation[0] * deviation[1])), abs=0.06)


def test_the_step_by_hand() -> None:
    """Two steps of the paper's equations for one weight, with the noise that the generator gives."""
    weight = nn.Parameter(torch.tensor([2.0]))
    lr, friction, scale = 0.1, 0.05, 3.0
    optimizer = SGHMC([weight], scale=scale, lr=lr, friction=friction, burn=1, weight_decay=0.5)
    generator = torch.Generator().manual_seed(7)
    noise = [torch.randn(1, generator=generator).item() for _ in range(2)]
    theta, momentum, tau, mean = 2.0, 0.0, 1.0, scale * (0.4 + 0.5 * 2.0)
    square = 2 * mean**2
    torch.manual_seed(7)
    for step, loss_gradient in enumerate((0.4, -0.2)):
        weight.grad = torch.tensor([loss_gradient])
        optimizer.step()
        gradient = scale * (loss_gradient + 0.5 * theta)
        if step < 1:
            share = 1 / (tau + 1)
            tau += 1 - tau * mean**2 / square
            mean += share * (gradient - mean)
            square += share * (gradient**2 - square)
        inverse_mass = square**-0.5
        sigma = max(2 * lr**2 * friction * inverse_mass - lr**4, 1e-16) ** 0.5
        momentum += -(lr**2) * inverse_mass * gradient - friction * momentum + sigma * noise[step]
        theta += momentum
        assert weight.item() == pytest.approx(theta, rel=1e-5)
    assert optimizer.state[weight]["square"].item() == pytest.approx(square), "frozen after the burn-in"


def test_the_loop_says_how_many_samples_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    original = SGHMC._step

    def watched(self: SGHMC, theta: Any, memory: Any, **options: Any) -> None:
        seen.append(options["scale"])
        original(self, theta, memory, **options)

    monkeypatch.setattr(SGHMC, "_step", watched)
    finish(ready("dense", train={"optimizer": {"name": "sghmc", "temperature": 0.5}, "length": "1it"}))
    assert set(seen) == {320 / 0.5}, "of the toys, whatever the batch size"


def test_removed_weights_stay_at_zero_although_noise_is_added() -> None:
    run = ready("at_init", train={"optimizer": "sghmc"}, criterion="snip")
    finish(run)
    for name, mask in run.state.masks.items():
        assert not run.state.weights[name][~mask].any() and run.state.weights[name][mask].all()
        assert run.state.memory[name].keys() == {"steps", "window", "mean", "square", "momentum"}


def test_a_chain_goes_on_from_any_report_with_the_same_bits(tmp_path: Path) -> None:
    changes: dict[str, Any] = {"train": {"optimizer": {"name": "sghmc", "burn": 12}, "length": "3ep"}, "report_every": "7it"}
    whole = ready("gradual", **changes)
    reports = []
    for report in execute(whole.plan, whole.state, whole.env):
        reports.append(report)
        whole.state.save(tmp_path / f"{report.index}.safetensors")
    for index in range(len(reports)):
        again = ready("gradual", **changes)
        again.state.load(tmp_path / f"{index}.safetensors")
        assert finish(again) == reports[index + 1 :] and same(tensors(again), tensors(whole))


def test_options_that_make_no_sense_say_why() -> None:
    with pytest.raises(UserError, match="optimizer.friction and optimizer.temperature must be above 0, got 0.0 and 1.0"):
        registry.optimizer.choose("sghmc", friction=0.0)([nn.Parameter(torch.zeros(1))])
