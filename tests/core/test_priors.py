"""Functional priors: Gaussian processes, families, the distance between the two, and the penalty that comes of them."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from toys import finish, ready, same, tensors

from distprune.core import registry
from distprune.core.executor import execute
from distprune.core.hooks import functional_prior
from distprune.core.hooks.functional_prior import FunctionalPrior, measurement_points, untrained
from distprune.core.priors.families import Family, Gaussian, Hierarchical, Layer, PlanarFlow, family, layers_of
from distprune.core.priors.gaussian_process import GaussianProcess
from distprune.core.priors.wasserstein import Critic, Matching, functions_of, mixed
from distprune.errors import UserError

CPU = torch.device("cpu")
SMALL: dict[str, Any] = {"iterations": 4, "functions": 8, "points": 8, "critic_steps": 5, "hidden": 16}


def _tanh() -> tuple[nn.Module, list[Layer]]:
    network = nn.Sequential(nn.Linear(1, 30), nn.Tanh(), nn.Linear(30, 30), nn.Tanh(), nn.Linear(30, 1))
    return network, layers_of(network)


def _prior(**options: Any) -> FunctionalPrior:
    hook = registry.regularizer.choose("functional_prior", **{**SMALL, **options})()
    assert isinstance(hook, FunctionalPrior)
    return hook


# Gaussian processes


def test_a_process_draws_functions_of_its_covariance() -> None:
    torch.manual_seed(0)
    process = GaussianProcess(lengthscale=0.5, amplitude=2.0)
    points = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 3.0]])
    values = process.draw(points, 20_000, 2)
    # D = 2 inputs: the lengthscale is 0.5 * sqrt(2 * 2) = 1.
    due = 4 * torch.exp(-torch.tensor([[0.0, 1.0, 9.0], [1.0, 0.0, 10.0], [9.0, 10.0, 0.0]]) / 2)
    for output in values.unbind(2):
        torch.testing.assert_close(torch.cov(output.T), due, atol=0.12, rtol=0)
    assert abs(torch.corrcoef(values[:, 0].T)[0, 1]) < 0.03, "outputs are independent"


def test_a_hierarchical_process_mixes_lengthscales() -> None:
    torch.manual_seed(0)
    process = GaussianProcess(spread=1.0, ard=True)
    scales = process.scales(2, 20_000, CPU)
    assert scales.shape == (20_000, 2) and scales.log().mean(0).tolist() == pytest.approx([math.log(2)] * 2, abs=0.03)
    assert scales.log().std(0).tolist() == pytest.approx([1.0] * 2, abs=0.03)
    points = torch.tensor([[0.0, 0.0], [1.0, 2.0]])
    mixture = torch.exp(-0.5 * (points[1] / scales).square().sum(1)).mean()
    found = torch.cov(process.draw(points, 20_000, 1)[:, :, 0].T)
    torch.testing.assert_close(found, torch.tensor([[1.0, mixture], [mixture, 1.0]]), atol=0.04, rtol=0)


# Families


@pytest.mark.parametrize(
    ("layer", "fan_in"),
    [
        (nn.Linear(20, 30), 20),
        (nn.Conv2d(4, 6, 3, groups=2), 18),
        (nn.ConvTranspose2d(4, 6, 3), 36),
        (nn.ConvTranspose2d(4, 6, 3, groups=2), 18),
    ],
    ids=str,
)
def test_draws_are_scaled_by_the_fan_in(layer: nn.Module, fan_in: int) -> None:
    """sigma / sqrt(fan-in) for weights and sigma for biases, so that inputs of ones give outputs of variance 2 sigma^2."""
    torch.manual_seed(0)
    prior = Gaussian(layers_of(layer), CPU)
    prior.rho.data.fill_(math.log(math.exp(1.5) - 1))  # sigma is 1.5
    drawn = prior.draw(2000)
    assert drawn["weight"].std().item() == pytest.approx(1.5 / fan_in**0.5, rel=0.02) and drawn["bias"].std().item() == pytest.approx(
        1.5, rel=0.03
    )
    assert prior.penalties() == {"weight": pytest.approx(fan_in / 1.5**2, rel=1e-6)}
    if isinstance(layer, nn.ConvTranspose2d):
        return  # not every output sees the whole kernel
    ones = torch.ones(1, *((20,) if isinstance(layer, nn.Linear) else (4, 3, 3)))
    assert functions_of(layer, prior, ones, 2000).var().item() == pytest.approx(2 * 1.5**2, rel=0.1)


def test_a_hierarchical_prior_draws_one_variance_a_layer() -> None:
    torch.manual_seed(0)
    prior = Hierarchical(layers_of(nn.Linear(40, 50)), CPU)
    assert prior.shape_and_rate(0) == (pytest.approx(2.0), pytest.approx(1.0)) and prior.penalties()["weight"] == pytest.approx(40 * 2.0)
    variances = prior.draw(4000)["weight"].flatten(1).var(1) * 40
    # 1 / variance is Gamma(2, 1): mean 2, variance 2.
    assert (1 / variances).mean().item() == pytest.approx(2.0, rel=0.06) and (1 / variances).var().item() == pytest.approx(2.0, rel=0.2)


def test_the_density_of_a_flow_integrates_to_one_and_is_that_of_its_draws() -> None:
    torch.manual_seed(0)
    flow = PlanarFlow(2, CPU, flows=4)
    with torch.no_grad():
        flow.u.copy_(2 * torch.randn(4, 2))
        flow.w.copy_(2 * torch.randn(4, 2))
        flow.c.copy_(torch.randn(4))
        side = torch.linspace(-12, 12, 481)
        grid = torch.cartesian_prod(side, side).double()
        for tensor in flow.parameters:
            tensor.data = tensor.double()
        density = flow.log_density(grid).exp().view(481, 481) * (24 / 480) ** 2
        assert density.sum().item() == pytest.approx(1.0, abs=2e-3)
        torch.set_default_dtype(torch.float64)
        try:
            drawn = flow.draw(100_000)
        finally:
            torch.set_default_dtype(torch.float32)
    mean = (density.view(-1, 1) * grid).sum(0)
    second = grid.T @ (density.view(-1, 1) * grid)
    torch.testing.assert_close(drawn.mean(0), mean, atol=0.03, rtol=0.02)
    torch.testing.assert_close(drawn.T @ drawn / len(drawn), second, atol=0.05, rtol=0.03)
    assert torch.det(second - mean[:, None] * mean) > 0 and (torch.cov(drawn.T) - torch.eye(2)).abs().max() > 0.2, "no longer the base"


def test_the_gradient_of_a_flows_density_is_that_of_finite_differences() -> None:
    torch.manual_seed(0)
    flow = PlanarFlow(3, CPU, flows=3)
    for tensor in flow.parameters:
        tensor.data = (tensor + 0.7 * torch.randn_like(tensor)).detach().double()
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(flow.log_density, (x,))


def test_a_flow_is_refused_for_a_large_network() -> None:
    with pytest.raises(
        UserError, match=r"family 'gpi_nf' is for networks of at most 100,000 weights, .* got 250,500. Write family: gpi_g."
    ):
        family("gpi_nf", layers_of(nn.Linear(500, 500)), CPU)


# The distance


def test_the_critics_slope_is_its_gradient() -> None:
    torch.manual_seed(0)
    critic, values = Critic(4, 8, CPU), torch.randn(6, 4, requires_grad=True)
    (gradient,) = torch.autograd.grad(critic(values).sum(), values)
    torch.testing.assert_close(critic.slope(values), gradient)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_the_distance_of_shifted_gaussians_by_hand(shift: float) -> None:
    """The critic that is best under the penalty has the slope s of the largest shift s - 10 (s - 1)^2: 1 + shift / 20."""
    torch.manual_seed(0)
    theirs = torch.randn(300, 1)
    ours, critic = theirs[torch.randperm(300)] + shift, Critic(1, 64, CPU)
    Matching(critic_steps=100, stop=0.0, one_sided=True)._train(critic, ours, theirs)
    assert float((critic(ours).mean() - critic(theirs).mean()).detach()) == pytest.approx(shift * (1 + shift / 20), rel=0.02)


def test_matching_finds_the_prior_that_is_known() -> None:
    """A line w x + b against a process of constants of standard deviation 3: sigma_b is 3, and sigma_w is small."""
    network = nn.Linear(1, 1)
    prior = Gaussian(layers_of(network), CPU)
    matching = Matching(iterations=60, functions=64, critic_steps=20, hidden=32, one_sided=True)
    matching.match(prior, GaussianProcess(lengthscale=100.0, amplitude=3.0), network, lambda: 2 * torch.rand(8, 1) - 1, seed=0)
    weight, bias = torch.nn.functional.softplus(prior.rho.detach())[0].tolist()
    assert bias == pytest.approx(3.0, rel=0.25) and weight < 0.5


@pytest.mark.parametrize("name", ["gpi_g", "gpi_h", "gpi_nf"])
def test_the_distance_falls_and_the_functions_become_those_of_the_process(name: Any) -> None:
    """A network of N(0, 1) weights is far too smooth for a process of this lengthscale."""
    network, layers = _tanh()
    process, points = GaussianProcess(lengthscale=0.5), torch.linspace(-2, 2, 5)[:, None]
    due = process.covariance(points, process.scales(1, 1, CPU)).float()

    def far(prior: Family) -> float:
        torch.manual_seed(1)
        values = functions_of(network, prior, points, 3000)[:, :, 0].detach()
        return float((torch.cov(values.T) - due).norm())

    torch.manual_seed(0)
    prior = family(name, layers, CPU)
    matching = Matching(iterations=40, functions=64, critic_steps=20, hidden=32)
    ruler = replace(
        matching, iterations=2, critic_steps=100, functions=128, rate=0.0
    )  # fits nothing, and sees the same draws before and after

    def distance() -> float:
        return sum(ruler.match(prior, process, network, lambda: 4 * torch.rand(16, 1) - 2, seed=5)) / 2

    before = distance()
    matching.match(prior, process, network, lambda: 4 * torch.rand(16, 1) - 2, seed=0)
    assert distance() < 0.55 * before
    assert far(prior) < 0.6 * far(family("fixed", layers, CPU))


def test_matching_depends_on_its_seed_alone_and_leaves_network_and_generator_as_they_were() -> None:
    network, layers = _tanh()
    before, state = {name: value.clone() for name, value in network.state_dict().items()}, torch.get_rng_state()
    found = []
    for seed in (0, 0, 1):
        prior = Gaussian(layers, CPU)
        Matching(iterations=2, functions=8, critic_steps=3, hidden=8).match(
            prior, GaussianProcess(), network, lambda: torch.rand(4, 1), seed=seed
        )
        found.append(prior.rho.tolist())
    assert found[0] == found[1] != found[2] and torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_measurement_points_of_tables_are_mixed_and_those_of_images_are_images() -> None:
    torch.manual_seed(0)
    inputs = torch.stack([torch.arange(50.0), torch.arange(50.0)], 1)
    points = mixed(inputs, 100)
    assert (
        (points[:70, 0] == points[:70, 1]).all()
        and not (points[70:, 0] == points[70:, 1]).any()
        and 0 <= points.min()
        and points.max() <= 49
    )
    task = ready("dense").env.task
    images = measurement_points(task, 5)
    seen = task.normalise(task.dataset.train.inputs)
    assert all(any(torch.equal(image, row) for row in seen) for image in images)


# The penalty


def test_coefficients_by_hand() -> None:
    """fan-in / (sigma^2 N): 320 samples, fan-ins 9, 96 and 32, and sigma = 1 where the prior is fixed."""
    run, hook = ready("dense"), _prior(family="fixed", strength=0.5, ramp=4)
    hook.start(memory := {}, run.state, run.env)
    due = {"0.weight": 9 / 320, "6.weight": 96 / 320, "8.weight": 32 / 320}
    (penalties,) = run.state.penalties.values()
    assert penalties == pytest.approx(due)
    for step in range(6):
        for parameter in run.state.model.parameters():
            parameter.grad = torch.ones_like(parameter)
        hook.grad(memory, run.state, run.env)
        for name, weight in run.state.weights.items():
            torch.testing.assert_close(weight.grad, 1 + 0.5 * min(step / 4, 1) * due[name] * weight.detach())
        assert (run.state.model[6].bias.grad == 1).all(), "prunable weights alone"


def test_coefficients_are_those_of_the_matched_prior() -> None:
    run, hook = ready("dense"), _prior()
    hook.start({}, run.state, run.env)
    network, layers = untrained(run.state.model), layers_of(run.state.model)
    prior = Gaussian(layers, CPU)
    hook.matching.match(prior, hook.process, network, lambda: measurement_points(run.env.task, 8), seed=0)
    sigma = torch.nn.functional.softplus(prior.rho.detach().double())[:, 0]
    assert (sigma - 1).abs().min() > 0.02, "it moved"
    due = {layer.weight: layer.fan_in / float(sigma[index]) ** 2 / 320 for index, layer in enumerate(layers)}
    assert run.state.penalties == {f"{hook._key(run.state)}/l2": pytest.approx(due)}


def test_matching_runs_once_and_a_cached_result_is_that_of_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, original = [], Matching.match

    def counted(self: Matching, *args: Any, **options: Any) -> list[float]:
        calls.append(self)
        return original(self, *args, **options)

    monkeypatch.setattr(Matching, "match", counted)
    monkeypatch.setattr(functional_prior, "_MATCHED", {})
    penalties = []
    for seed, lengthscale in ((0, 1.0), (0, 1.0), (1, 1.0), (0, 2.0)):
        run = ready({"name": "lth", "share": 0.7}, regularizer={"name": "functional_prior", "lengthscale": lengthscale, **SMALL}, seed=seed)
        finish(run)
        assert run.state.ledger.observing == 4 * 8 * 8, "whether it came from the cache or not"
        penalties.append(list(run.state.penalties.values()))
    assert len(calls) == 3, "once for all laps, and once for equal runs"
    assert penalties[0] == penalties[1] and penalties[0] not in penalties[2:]
    functional_prior._MATCHED.clear()
    again = ready({"name": "lth", "share": 0.7}, regularizer={"name": "functional_prior", **SMALL})
    finish(again)
    assert list(again.state.penalties.values()) == penalties[0]


def test_gibbs_draws_variances_given_the_weights() -> None:
    run, hook = ready("dense"), _prior(family="gpi_h", gibbs=10, strength=1.0)
    hook.start(memory := {}, run.state, run.env)
    key, weight = hook._key(run.state), run.state.weights["6.weight"]
    shape, rate = (run.state.penalties[f"{key}/{row}"]["6.weight"] for row in ("shape", "rate"))
    assert memory["6.weight"] == pytest.approx(96 / 320 * shape / rate), "E[1 / sigma^2] before there are draws"
    drawn = []
    for clock in range(30):
        run.state.clock = clock
        weight.grad = torch.zeros_like(weight)
        hook.grad(memory, run.state, run.env)
        torch.testing.assert_close(weight.grad, memory["6.weight"] * weight.detach())
        drawn.append(memory["6.weight"])
    assert len(set(drawn)) == 3, "every ten steps"
    n, energy = weight.numel(), 96 * float(weight.detach().square().sum())
    mean = 96 / 320 * (shape + n / 2) / (rate + energy / 2)
    assert all(abs(value / mean - 1) < 4 * (n / 2) ** -0.5 for value in drawn)


@pytest.mark.parametrize("options", [{}, {"family": "gpi_h", "gibbs": 3, "ramp": 5}], ids=str)
def test_a_run_goes_on_from_any_report_with_the_same_bits(options: dict[str, Any], tmp_path: Path) -> None:
    changes: dict[str, Any] = {
        "train": {"length": "2ep"},
        "regularizer": {"name": "functional_prior", **SMALL, **options},
        "report_every": "7it",
    }
    whole = ready("finetune", **changes)
    reports = []
    for report in execute(whole.plan, whole.state, whole.env):
        reports.append(report)
        whole.state.save(tmp_path / f"{report.index}.safetensors")
    for index in range(len(reports)):
        functional_prior._MATCHED.clear()
        again = ready("finetune", **changes)
        again.state.load(tmp_path / f"{index}.safetensors")
        assert finish(again) == reports[index + 1 :]
        assert same(tensors(again), tensors(whole)) and again.state.penalties == whole.state.penalties


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lengthscale": 0.0}, "regularizer.lengthscale must be above 0, got 0.0"),
        ({"functions": 0}, "regularizer.functions must be above 0, got 0"),
        ({"ramp": -1}, "regularizer.ramp, gibbs and spread must be at least 0, got -1, 0 and 0.0"),
        ({"gibbs": 5}, "regularizer.gibbs draws the variances of a hierarchical prior, got family 'gpi_g'. Write family: gpi_h"),
    ],
    ids=str,
)
def test_options_that_make_no_sense_say_why(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        _prior(**options)


def test_a_prior_that_is_not_for_the_network_is_refused_before_anything_is_trained() -> None:
    with pytest.raises(UserError, match="family 'gpi_nf' is for networks of at most 100,000 weights"):
        ready("finetune", 0.9, model={"name": "mlp", "hidden": [4000]}, regularizer={"name": "functional_prior", "family": "gpi_nf"})
