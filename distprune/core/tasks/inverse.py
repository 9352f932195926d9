"""Inverse problems: a network makes an image out of a fixed input, and is fitted to measurements of the image that is sought."""

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

from distprune.core.data.dataset import Dataset
from distprune.core.registry import task
from distprune.core.streams import stream
from distprune.core.task import SplitName, Task
from distprune.core.tasks.operators import Kind, operator
from distprune.errors import UserError

_FLOOR = 1e-20  # of a relative squared residual: 200 dB


@task("inverse", paper="Ulyanov et al. 2018, arXiv:1711.10925; Buskulic et al. 2023, arXiv:2303.11265, section 2")
def inverse(
    dataset: Dataset,
    *,
    operator: Kind = "identity",
    noise: float = 0.0,
    share: float = 0.5,
    radius: float = 1.5,
    measurements: int = 0,
    held_out: float = 0.05,
    latent: int = 32,
    start: Literal["uniform", "sphere"] = "uniform",
    epoch: int = 100,
    seed: int = 0,
) -> "Inverse":
    """Deep inverse prior: mean squared error to y = A x + `noise` N(0, 1) for the first test image x, which no training sees.

    Formula:
        y = A x + noise N(0, 1),   L = mean (A f(z) - y)^2 over the seen measurements
        objective: held_out = -10 log10(|A f(z) - y|^2 / |y|^2) over the others, in dB

    `operator` is A: identity (denoising), mask (a `share` of the pixels), blur (of `radius` pixels) or gaussian (a random matrix of
    `measurements` rows). Trials are compared by a share `held_out` of the measurements, which the loss does not see. The network's
    input has `latent` channels and the image's sides; it is drawn once, from U(0, 0.1), or uniformly on the unit sphere. Its output is the
    image, for data in bytes the logits of its pixels in [0, 1]. Every step sees all that is measured, so a batch is one sample, and
    `epoch` steps are called an epoch. `seed` draws all but the network's weights.
    """
    if dataset.test.inputs.dim() != 4:
        raise UserError(
            f"task 'inverse' needs images [n, channels, height, width], got {tuple(dataset.test.inputs.shape)}. Choose other data."
        )
    options = {"share": share, "radius": radius, "measurements": measurements}
    if noise < 0 or not 0 < held_out < 1 or latent < 1 or epoch < 1:
        raise UserError(
            "task.noise must be at least 0, held_out in (0, 1), latent and epoch at least 1, "
            f"got {noise}, {held_out}, {latent} and {epoch}. Leave them out for the defaults."
        )
    return Inverse(dataset, kind=operator, noise=noise, held_out=held_out, latent=latent, start=start, epoch=epoch, seed=seed, **options)


class Inverse(Task):
    """See `inverse`.

    Metrics in dB: `held_out` and `fit` are |y|^2 / |A g - y|^2 over the measurements that the loss does not see and over those that it
    does. The true image is looked at for the test split only, which also has `psnr`.
    """

    objective = "held_out"
    direction: Literal["maximize"] = "maximize"

    def __init__(
        self,
        dataset: Dataset,
        *,
        kind: Kind,
        noise: float,
        held_out: float,
        latent: int,
        start: Literal["uniform", "sphere"],
        epoch: int,
        seed: int,
        **options: Any,
    ) -> None:
        self.dataset, self._epoch = dataset, epoch
        found = dataset.test.inputs[:1]
        self.bytes = not found.is_floating_point()
        self.truth = found.float() / 255 if self.bytes else found
        channels, height, width = dataset.shape
        self.operator = operator(kind, (channels, height, width), generator=stream(seed, "inverse.operator"), **options)
        clean: Tensor = self.operator(self.truth)
        self.measured = clean + noise * torch.randn(clean.shape, generator=stream(seed, "inverse.noise"))
        order = torch.randperm(clean.shape[1], generator=stream(seed, "inverse.held_out"))
        held = min(max(1, round(held_out * len(order))), len(order) - 1)
        self.held, self.seen = order[:held].sort().values, order[held:].sort().values  # columns of `measured`
        draw = stream(seed, "inverse.input")
        if start == "uniform":
            self.input = 0.1 * torch.rand(1, latent, height, width, generator=draw)
        else:
            ray = torch.randn(1, latent, height, width, generator=draw)
            self.input = ray / ray.norm()

    @property
    def shape(self) -> tuple[int, int, int]:
        return tuple(self.input.shape[1:])  # type: ignore[return-value]

    @property
    def classes(self) -> int:
        return self.dataset.shape[0]

    def to(self, device: torch.device) -> "Inverse":
        self.operator.to(device)
        for name in ("truth", "measured", "held", "seen", "input"):
            setattr(self, name, getattr(self, name).to(device))
        return self

    def steps_per_epoch(self, batch_size: int) -> int:
        if batch_size != 1:
            raise UserError(f"train.batch_size must be 1 for task 'inverse': its one input gives the whole image, got {batch_size}.")
        return self._epoch

    def batch(self, seed: int, lap: int, clock: int, size: int) -> Tensor:
        return self.input

    def draw(self, generator: torch.Generator, size: int) -> Tensor:
        return self.input

    def samples(self, batch: Tensor) -> int:
        return len(batch)

    def outputs(self, model: nn.Module, batch: Tensor) -> Tensor:
        made: Tensor = model(batch)
        if made.numel() != self.truth.numel():
            raise UserError(
                f"The model must make an image of {tuple(self.truth.shape)} out of its input of {tuple(batch.shape)}, "
                f"got {tuple(made.shape)}. Choose hourglass or two_layer."
            )
        return made.view_as(self.truth)

    def image(self, outputs: Tensor) -> Tensor:
        """The image that outputs stand for, float [1, channels, height, width]."""
        return torch.sigmoid(outputs.float()) if self.bytes else outputs.float()

    def loss_of(self, outputs: Tensor, batch: Tensor) -> Tensor:
        made: Tensor = self.operator(self.image(outputs))
        return (made - self.measured).index_select(1, self.seen).square().mean()

    def metrics(self, model: nn.Module, split: SplitName) -> dict[str, float]:
        image = self.image(self.predict(model))
        made = self.operator(image)
        found = {"held_out": self._decibels(made, self.held), "fit": self._decibels(made, self.seen)}
        if split != "test":
            return found
        peak = 1.0 if self.bytes else self.truth.abs().max().item()
        return {"psnr": decibels((image - self.truth).square().mean().item() / peak**2), **found}

    def _decibels(self, made: Tensor, columns: Tensor) -> float:
        due = self.measured[:, columns]
        return decibels(((made[:, columns] - due).square().sum() / due.square().sum()).item())

    @torch.no_grad()
    def predict(self, model: nn.Module) -> Tensor:
        """The network's outputs in eval mode, float [1, channels, height, width]."""
        training = model.training
        model.eval()
        try:
            return self.outputs(model, self.input).float()
        finally:
            model.train(training)

    def example(self) -> Tensor:
        return self.input


def decibels(share: float) -> float:
    """A share of a squared norm, as a distance in dB: 0.01 is 20."""
    return -10 * math.log10(max(share, _FLOOR))
