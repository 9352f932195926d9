"""Deep inverse priors: operators and metrics by hand, what training may see, generators, and when a wide one fits its measurements."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from toys import same

from distprune.core import registry
from distprune.core.data.dataset import Dataset, Split
from distprune.core.data.image import image
from distprune.core.edits.shrink import shrink
from distprune.core.executor import execute
from distprune.core.models.generators import hourglass, two_layer
from distprune.core.projection import project
from distprune.core.recipe import Recipe
from distprune.core.run import Run, prepare
from distprune.core.scoring import Probe
from distprune.core.tasks.inverse import Inverse, inverse
from distprune.errors import UserError
from distprune.search.config import Search
from distprune.search.setup import set_up

ADAM = {"name": "adamw", "lr": 1e-2, "weight_decay": 0.0}
SMALL: dict[str, Any] = {
    "model": {"name": "hourglass", "widths": [6, 8]},
    "data": {"name": "image", "side": 16},
    "task": {"name": "inverse", "noise": 0.1, "latent": 4, "epoch": 10},
    "train": {"length": "30it", "batch_size": 1, "optimizer": ADAM},
}


def ready(paradigm: Any = "dense", **changes: Any) -> Run:
    train = {**SMALL["train"], **changes.pop("train", {})}
    return prepare(Recipe.read({**SMALL, "paradigm": paradigm, **changes, "train": train}))


def finished(run: Run) -> Run:
    list(execute(run.plan, run.state, run.env))
    return run


def task_of(run: Run) -> Inverse:
    assert isinstance(run.env.task, Inverse)
    return run.env.task


def signal(values: torch.Tensor) -> Dataset:
    split = Split(values, torch.zeros(1, dtype=torch.int64))
    return Dataset("signal", split, split, split, classes=1, mean=(0.5,) * values.shape[1], std=(0.25,) * values.shape[1])


class Says(torch.nn.Module):
    """Gives the same image whatever it is asked."""

    def __init__(self, value: torch.Tensor) -> None:
        super().__init__()
        self.value = value

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.value


@pytest.mark.parametrize("kind", ["identity", "mask", "blur", "gaussian"])
def test_every_operator_is_linear_and_measures_what_it_says(kind: Any) -> None:
    task = inverse(image(side=12, grey=False), operator=kind, share=0.25, radius=0.8, measurements=30)
    generator = torch.Generator().manual_seed(0)
    x, z = torch.randn(2, 1, 3, 12, 12, generator=generator)
    operator = task.operator
    torch.testing.assert_close(operator(2 * x - 3 * z), 2 * operator(x) - 3 * operator(z), rtol=1e-4, atol=1e-5)
    matrix = torch.stack([operator(row.view(1, 3, 12, 12)).flatten() for row in torch.eye(432)], dim=1)  # a column a pixel
    torch.testing.assert_close(matrix @ x.flatten(), operator(x).flatten(), rtol=1e-4, atol=1e-5)
    if kind in ("identity", "mask"):
        assert torch.equal(matrix.sum(1), torch.ones(len(matrix))) and set(matrix.flatten().tolist()) == {0.0, 1.0}
        assert len(matrix) == {"identity": 432, "mask": 108}[kind]
    elif kind == "blur":
        torch.testing.assert_close(matrix.sum(1), torch.ones(432))  # a constant image stays
        near = [math.exp(-0.5 * (k / 0.8) ** 2) for k in (-2, -1, 0, 1, 2)]
        centre = (6 * 12 + 6, 6 * 12 + 7)  # a pixel in the middle, and the weight of its right neighbour
        assert float(matrix[centre]) == pytest.approx(near[2] * near[3] / sum(near) ** 2, rel=1e-5)
    else:
        assert matrix.shape == (30, 432) and float(matrix.std()) == pytest.approx(432**-0.5, rel=0.05)


def test_measurements_are_the_image_and_noise_of_the_tasks_own_seed() -> None:
    data = image(side=48)
    clean, noisy, other = inverse(data), inverse(data, noise=0.1), inverse(data, noise=0.1, seed=1)
    assert torch.equal(clean.measured, clean.operator(clean.truth)) and clean.truth.max() <= 1
    noise = noisy.measured - clean.measured
    assert float(noise.std()) == pytest.approx(0.1, rel=0.05) and abs(float(noise.mean())) < 0.01
    for name in ("measured", "input", "held"):
        assert not torch.equal(getattr(noisy, name), getattr(other, name))
    first, second = task_of(ready(seed=0)), task_of(ready(seed=1))
    for name in ("measured", "input", "held", "seen"):
        assert torch.equal(getattr(first, name), getattr(second, name)), "trials of all seeds see one problem"


def test_a_share_of_the_measurements_is_held_out() -> None:
    task = inverse(image(side=20, grey=False), held_out=0.1)
    assert len(task.held) == 40 and torch.cat([task.held, task.seen]).sort().values.equal(torch.arange(400))
    assert len(inverse(image(side=8), operator="gaussian", measurements=3).held) == 1


def test_neither_the_truth_nor_what_is_held_out_reaches_the_network() -> None:
    runs = [ready("at_init", criterion="snip", sparsity=0.5) for _ in range(3)]
    tasks = [task_of(run) for run in runs]
    tasks[1].truth = torch.rand(tasks[1].truth.shape)
    tasks[1].measured[:, tasks[1].held] = 7.0
    tasks[2].measured[:, tasks[2].seen[0]] += 0.1
    values = [finished(run).state.values() for run in runs]
    assert same(values[0], values[1]) and not same(values[0], values[2])


def test_metrics_by_hand() -> None:
    truth = torch.tensor([3.0, -4.0, 1.0, 2.0]).view(1, 1, 2, 2)
    task = inverse(signal(truth), held_out=0.25)
    made = truth.clone()
    made.flatten()[int(task.held)] += 0.1 * truth.flatten()[int(task.held)]
    found = task.metrics(Says(made), "test")
    error = 0.1 * float(truth.flatten()[int(task.held)])
    assert found["held_out"] == pytest.approx(20, abs=1e-3), "a tenth is 20 dB"
    assert found["fit"] == 200, "an exact fit has a finite number too"
    assert found["psnr"] == pytest.approx(10 * math.log10(4.0**2 / (error**2 / 4)), abs=1e-3)
    assert next(iter(found)) == "psnr" and task.metrics(Says(made), "validation").keys() == {"held_out", "fit"}
    seen = float(truth.square().sum() - truth.flatten()[int(task.held)] ** 2)
    assert float(task.loss(Says(torch.zeros_like(truth)), task.input)) == pytest.approx(seen / 3)
    assert (task.objective, task.direction) == ("held_out", "maximize")


def test_bytes_are_images_between_0_and_1_given_as_logits() -> None:
    task = inverse(image(side=16))
    made = task.metrics(Says(torch.logit(task.truth, eps=1e-6)), "test")
    assert made["psnr"] > 60 and task.metrics(Says(task.truth), "test")["psnr"] < 15


def test_a_step_bills_one_sample_and_an_epoch_is_what_the_task_says() -> None:
    run = finished(ready(train={"length": "3ep"}))
    assert run.state.ledger.cost == run.plan.cost == 30
    assert run.state.ledger.flops == 3 * 30 * sum(run.env.flops.values())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": {"batch_size": 8}}, r"train.batch_size must be 1 for task 'inverse'.* got 8"),
        ({"task": {"name": "inverse", "held_out": 0.0}}, r"held_out in \(0, 1\)"),
        ({"task": {"name": "inverse", "operator": "mask", "share": 1.0}}, r"task.share must be in \(0, 1\), got 1.0"),
        ({"task": {"name": "inverse", "operator": "blur", "radius": 9.0}}, "task.radius must be above 0 and below a third"),
        ({"task": {"name": "inverse", "operator": "gaussian"}}, "task.measurements must be at least 2, got 0"),
        ({"data": {"name": "image", "picture": "nowhere.png"}}, "must be china, flower or the path of an image, got 'nowhere.png'"),
        ({"data": {"name": "image", "side": 4}}, "data.side must be at least 8 pixels, got 4"),
        ({"model": {"name": "hourglass", "widths": [4, 4, 4, 4, 4]}}, "hourglass.widths must hold numbers of at least 1"),
        ({"model": {"name": "two_layer", "width": 0}}, "two_layer.width must be at least 1"),
        ({"data": {"name": "gaussian_signal", "n": 0}}, "data.n must be at least 1, got 0"),
    ],
)
def test_what_cannot_be_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ready(**changes)


def test_a_network_that_makes_no_image_says_so() -> None:
    with pytest.raises(UserError, match=r"must make an image of \(1, 1, 16, 16\) .* got \(1, 1\). Choose hourglass or two_layer"):
        finished(ready(model="mlp"))


def test_pictures_are_cropped_scaled_and_grey(tmp_path: Path) -> None:
    from PIL import Image

    assert image(picture="flower", side=40, grey=False).train.inputs.shape == (1, 3, 40, 40)
    assert not torch.equal(image(picture="china").test.inputs, image(picture="flower").test.inputs)
    pixels = np.zeros((20, 60, 3), dtype=np.uint8)
    pixels[:, 20:30], pixels[:, 30:40], pixels[:, :20], pixels[:, 40:] = (100, 0, 0), (0, 0, 200), 255, 255
    Image.fromarray(pixels).save(tmp_path / "mine.png")
    made = image(picture=str(tmp_path / "mine.png"), side=10).test.inputs
    assert made.dtype == torch.uint8 and made.shape == (1, 1, 10, 10)
    assert set(made[0, 0, :, :4].flatten().tolist()) == {30}, "0.299 of 100, and the white margins are cut off"
    assert set(made[0, 0, :, 6:].flatten().tolist()) == {23}, "0.114 of 200"


def test_the_two_layer_generator_is_its_formula_and_trains_w_alone() -> None:
    task = {"name": "inverse", "operator": "gaussian", "measurements": 8, "latent": 5, "start": "sphere", "epoch": 10}
    run = ready(model={"name": "two_layer", "width": 30, "spread": 2.0}, data={"name": "gaussian_signal", "n": 12}, task=task)
    u = task_of(run).input
    assert u.shape == (1, 5, 1, 1) and float(u.norm()) == pytest.approx(1)
    before = run.state.values()
    made = before["read.weight"] @ torch.sigmoid(before["hidden.weight"] @ u.flatten()) / 30**0.5
    torch.testing.assert_close(run.state.model(u).flatten(), made)
    assert list(run.state.weights) == ["hidden.weight"] and run.state.total == 150
    assert before["read.weight"].abs().max() <= 3**0.5 and float(before["read.weight"].var()) == pytest.approx(1, rel=0.15)
    assert float(before["hidden.weight"].std()) == pytest.approx(2, rel=0.15)
    after = finished(run).state.values()
    assert torch.equal(after["read.weight"], before["read.weight"]) and not torch.equal(after["hidden.weight"], before["hidden.weight"])
    assert two_layer((3, 6, 5), 2, width=4)(torch.ones(1, 3, 6, 5)).shape == (1, 2, 6, 5)


def test_the_hourglass_keeps_odd_sides_and_is_measured_as_it_is_trained() -> None:
    network = hourglass((4, 17, 22), 3, widths=(6, 8))
    u = torch.rand(1, 4, 17, 22)
    made = network(u)
    assert made.shape == (1, 3, 17, 22)
    assert torch.equal(network.eval()(u), made) and not list(network.buffers()), "batch norm has the input's own statistics"
    narrow = [module for module in network if isinstance(module, torch.nn.Conv2d)][3]
    assert narrow(torch.rand(1, 8, 5, 6)).shape == (1, 8, 5, 6), "two halvings of 17x22, and no skips around them"


def test_synaptic_flow_is_conserved_from_layer_to_layer() -> None:
    run = ready(model="hourglass", data={"name": "image", "side": 16})
    scores = registry.criterion.choose("synflow")(Probe(run.state.model, run.env.task, run.state.masks, seed=0, draw=(), batch_size=1))
    flows = torch.stack([score.sum() for score in scores.values()])
    assert len(flows) == 13 and float(flows.min()) > 0
    torch.testing.assert_close(flows, flows[:1].expand(13), rtol=1e-9, atol=0)


@pytest.mark.parametrize("criterion", ["snip", "grasp", "random", "synflow"])
def test_criteria_prune_filters_of_a_generator_and_the_smaller_one_makes_the_same_image(criterion: str) -> None:
    run = finished(ready("at_init", criterion=criterion, granularity="filter", sparsity=0.4))
    state, task = run.state, task_of(run)
    units: Any = state.units(run.recipe.granularity, task.example)
    small = shrink(state.model, units.channels, units.alive(state.masks))
    assert sum(p.numel() for p in small.parameters()) < 0.75 * sum(p.numel() for p in state.model.parameters())
    torch.testing.assert_close(task.predict(small), task.predict(state.model), rtol=1e-4, atol=1e-4)


def test_a_search_can_be_set_up_and_unfinished_trials_are_scored() -> None:
    recipe = {**SMALL, "train": {**SMALL["train"], "length": "4ep"}}
    space = {"paradigm": ["dense", "at_init", "finetune", "eye_surgeon"], "sparsity": [0.5, 0.8], "granularity": ["weight"]}
    setup = set_up(Search.read({"name": "small", "recipe": recipe, "space": space}))
    assert setup.dense_cost == 40 < setup.most_cost
    run = ready("eye_surgeon", sparsity=0.8, allocator="erk", train={"length": "4ep"})
    for report in execute(run.plan, run.state, run.env):
        score, spent, _ = project(run.state, run.recipe, run.plan, run.env, recovery=10)
        assert spent == 10 and abs(score - report.metrics["held_out"]) < 20


# The convergence workload: gradient descent on W with the step 1 / (largest eigenvalue of the tangent kernel at the start).


def wide(n: int, m: int, width: int, seed: int, *, steps: int, lr: float = 1.0) -> Run:
    task = {"name": "inverse", "operator": "gaussian", "measurements": m + 1, "held_out": 1 / (m + 1), "latent": 50, "start": "sphere"}
    descent = {"name": "sgd", "lr": lr, "momentum": 0.0, "weight_decay": 0.0, "nesterov": False}
    return ready(
        model={"name": "two_layer", "width": width},
        data={"name": "gaussian_signal", "n": n, "seed": seed},
        task={**task, "seed": seed, "epoch": 10},
        train={"length": f"{steps}it", "optimizer": descent, "decay": "constant"},
        seed=seed,
    )


def residual(run: Run) -> torch.Tensor:
    task = task_of(run)
    made: torch.Tensor = task.operator(task.outputs(run.state.model, task.input))
    return (made - task.measured)[0, task.seen]


def kernel(run: Run) -> torch.Tensor:
    """J J^T of the seen measurements, [m, m], from the formula: A V diag(phi')^2 V^T A^T / k, as u has norm 1."""
    task, values = task_of(run), run.state.values()
    hidden = torch.sigmoid(values["hidden.weight"] @ task.input.flatten())
    slopes = task.operator.matrix[task.seen] @ values["read.weight"] * (hidden * (1 - hidden)) / len(hidden) ** 0.5  # type: ignore[index]
    return slopes @ slopes.T


def step_of(n: int, m: int, width: int, seed: int) -> float:
    """1 / lambda for half the sum of squares, for the loss that is the mean of m squares."""
    return m / 2 / float(torch.linalg.eigvalsh(kernel(wide(n, m, width, seed, steps=1)))[-1])


def test_a_very_wide_generator_is_trained_as_its_tangent_kernel_says() -> None:
    n, m, width, steps = 20, 5, 20_000, 3
    lr = step_of(n, m, width, 0)
    run = wide(n, m, width, 0, steps=steps, lr=lr)
    due = residual(run).detach()
    start = float(due.norm())
    matrix = torch.eye(m) - kernel(run) * (2 * lr / m)
    for _ in range(steps):
        due = matrix @ due
    found = residual(finished(run)).detach()
    assert 0.05 * start < float(due.norm()) < 0.5 * start, "far from the start, and not yet at the end"
    assert float((found - due).norm()) < 0.03 * start


@pytest.mark.parametrize("seed", range(3))
def test_the_width_decides_whether_the_measurements_are_fitted(seed: int) -> None:
    ends = {}
    for width in (40, 640):
        run = finished(wide(60, 20, width, seed, steps=400, lr=step_of(60, 20, width, seed)))
        ends[width] = task_of(run).metrics(run.state.model, "validation")["fit"]
    assert ends[640] > 60 > 20 > ends[40], "dB; 60 is a relative squared residual of 1e-6"
