"""Image classification, with the data on the device as one tensor of bytes and augmentation by batch."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distprune.core.allocation import fits
from distprune.core.data.dataset import Dataset, Split
from distprune.core.registry import task
from distprune.core.streams import stream
from distprune.core.task import SplitName, Task

Batch = tuple[Tensor, Tensor]  # inputs float [n, channels, height, width], labels int64 [n]
EVALUATION_BATCH = 1000
_SHIFT = 2  # pixels of MNIST-like images
_CROP = 4  # pixels of CIFAR-like images (He et al. 2015, arXiv:1512.03385, section 4.2)


@task("classification")
def classification(dataset: Dataset, *, label_smoothing: float = 0.0) -> "Classification":
    """Cross-entropy and top-1 accuracy.

    Formula:
        L = cross-entropy(f(x), y),   objective: accuracy
    """
    return Classification(dataset, label_smoothing)


class Classification(Task):
    """See `classification`."""

    objective = "accuracy"
    bounds = (0.0, 1.0)
    direction: Literal["maximize"] = "maximize"

    def __init__(self, dataset: Dataset, label_smoothing: float = 0.0) -> None:
        self.dataset, self._smoothing = dataset, label_smoothing
        self._splits = {"train": dataset.train, "validation": dataset.validation, "test": dataset.test}
        self._order: tuple[tuple[int, int, int], Tensor] | None = None  # the permutation of the latest (seed, lap, epoch)
        self.to(torch.device("cpu"))

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.dataset.shape

    @property
    def classes(self) -> int:
        return self.dataset.classes

    def to(self, device: torch.device) -> "Classification":
        self._splits = {name: Split(split.inputs.to(device), split.labels.to(device)) for name, split in self._splits.items()}
        scale = torch.tensor([255 * std for std in self.dataset.std], device=device)
        self._scale = (1 / scale).view(1, -1, 1, 1)
        self._offset = (-torch.tensor([255 * mean for mean in self.dataset.mean], device=device) / scale).view(1, -1, 1, 1)
        self._order = None
        return self

    def steps_per_epoch(self, batch_size: int) -> int:
        return max(1, len(self._splits["train"]) // batch_size)  # the short last batch of an epoch is left out

    def normalise(self, inputs: Tensor) -> Tensor:
        """Bytes to floats of mean 0 and variance 1 in each channel; floats are taken as they are."""
        if inputs.is_floating_point():
            return inputs
        return inputs.float().mul_(self._scale).add_(self._offset)

    def batch(self, seed: int, lap: int, clock: int, size: int) -> Batch:
        train = self._splits["train"]
        epoch, position = divmod(clock, self.steps_per_epoch(size))
        if self._order is None or self._order[0] != (seed, lap, epoch):
            order = torch.randperm(len(train), generator=stream(seed, "order", lap, epoch))
            self._order = ((seed, lap, epoch), order.to(train.labels.device))
        index = self._order[1][position * size : (position + 1) * size]
        inputs = self.normalise(train.inputs.index_select(0, index))  # 30 times as fast as indexing with []
        if self.dataset.augment != "none":
            inputs = augment(inputs, self.dataset.augment, stream(seed, "augment", lap, clock))
        return inputs, train.labels[index]

    def draw(self, generator: torch.Generator, size: int) -> Batch:
        train = self._splits["train"]
        index = torch.randint(len(train), (size,), generator=generator).to(train.labels.device)
        return self.normalise(train.inputs.index_select(0, index)), train.labels[index]

    def samples(self, batch: Batch) -> int:
        return len(batch[1])

    def split(self, batch: Batch, parts: int) -> list[Batch]:
        return list(zip(*(tensor.tensor_split(parts) for tensor in batch), strict=True))

    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        outputs: Tensor = model(batch[0])
        return outputs

    def loss_of(self, outputs: Tensor, batch: Batch) -> Tensor:
        return F.cross_entropy(outputs.float(), batch[1], label_smoothing=self._smoothing)

    def nll_of(self, outputs: Tensor, batch: Batch) -> Tensor:
        return F.nll_loss(outputs.float(), batch[1])

    def metrics(self, model: nn.Module, split: SplitName) -> dict[str, float]:
        labels = self._splits[split].labels
        logits = self.predict(model, split)
        accuracy = (logits.argmax(1) == labels).double().mean().item()
        return {"accuracy": accuracy, "loss": F.cross_entropy(logits, labels).item()}

    @torch.no_grad()
    def predict(self, model: nn.Module, split: SplitName) -> Tensor:
        """Logits, float [n, classes], of a split in its order."""
        training, inputs = model.training, self._splits[split].inputs
        size = min(len(inputs), self.micro_batch or EVALUATION_BATCH, EVALUATION_BATCH)
        model.eval()
        try:
            with fits(size):
                return self.ranks.each(torch.split(inputs, size), lambda part: model(self.normalise(part)).float())
        finally:
            model.train(training)

    def example(self) -> Tensor:
        return self.normalise(self._splits["train"].inputs[:1])


def augment(inputs: Tensor, kind: str, generator: torch.Generator) -> Tensor:
    """Each image of a batch shifted by up to 2 pixels (shift), or cropped from a 4-pixel border and flipped at random (crop_flip)."""
    n, channels, height, width = inputs.shape
    border = _SHIFT if kind == "shift" else _CROP
    padded = F.pad(inputs, (border,) * 4)
    device = inputs.device  # a few numbers an image are drawn on the host; the index of every pixel is made where the images are
    corner = torch.randint(2 * border + 1, (2, n, 1), generator=generator).to(device)
    rows = corner[0] + torch.arange(height, device=device)
    columns = corner[1] + torch.arange(width, device=device)
    if kind == "crop_flip":
        flipped = (torch.rand(n, 1, generator=generator) < 0.5).to(device)
        columns = torch.where(flipped, columns.flip(1), columns)
    index = (rows[:, :, None] * (width + 2 * border) + columns[:, None, :]).view(n, 1, -1)
    return padded.flatten(2).gather(2, index.expand(n, channels, -1)).view(n, channels, height, width)
