"""Whether a network has learnt the signal or memorised the noise of `data/signal_noise.py`."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distprune.core.data.dataset import Dataset, Split
from distprune.core.registry import task
from distprune.core.task import SplitName
from distprune.core.tasks.classification import Batch, Classification
from distprune.errors import UserError


@task("signal_noise", paper="Yang et al. 2023, arXiv:2301.00335")
def signal_noise(dataset: Dataset) -> "SignalNoise":
    """Classification that also measures what filters w_jr see: the signal of their class, the noise of the training points, or both.

    Formula:
        signal_strength = mean_j max_r <w_jr, signal e_j>,   noise_memorisation = max_i max_r <w_(y_i)r, xi_i>
    """
    return SignalNoise(dataset)


class SignalNoise(Classification):
    """Besides accuracy and loss of a split, five metrics.

    train_loss              on the training points
    test_err                share of wrong answers on the split: fresh points, unless it is the train split
    signal_strength         max_r <w_jr, signal e_j>, the mean over classes j
    noise_memorisation      max_i max_r <w_(y_i)r, xi_i> over the training points i with noise xi_i
    live_signal_weights     how many filters see the signal of their class at all: w_jr[j] != 0
    """

    def __init__(self, dataset: Dataset) -> None:
        _parts(dataset.train)
        super().__init__(dataset)

    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        _filters(model)  # a network without any fails at its first step, not at its first report
        return super().outputs(model, batch)

    @torch.no_grad()
    def metrics(self, model: nn.Module, split: SplitName) -> dict[str, float]:
        found, train = super().metrics(model, split), self._splits["train"]
        strength, noise = _parts(train)
        filters = _filters(model)  # [classes, filters, dimension]
        seen = filters.diagonal(dim1=0, dim2=2)  # [filters, classes]: the coordinate of w_jr that its class's signal lies on
        points = torch.arange(len(noise), device=noise.device)
        heard = torch.einsum("nd,krd->nkr", noise, filters)[points, train.labels]  # [n, filters]
        return {
            **found,
            "train_loss": F.cross_entropy(self.predict(model, "train"), train.labels).item(),
            "test_err": 1 - found["accuracy"],
            "signal_strength": (strength * seen.amax(0)).mean().item(),
            "noise_memorisation": heard.max().item(),
            "live_signal_weights": float(seen.count_nonzero()),
        }


def _parts(split: Split) -> tuple[float, Tensor]:
    """The strength of the signal, and the noise patches [n, dimension]. Raises UserError for points that are not signal plus noise."""
    if split.inputs.is_floating_point() and split.inputs.shape[1:3] == (1, 2):
        patches = split.inputs.flatten(1, 2)
        points, at = torch.arange(len(patches), device=patches.device), patches.count_nonzero(2).argmin(1)  # noise is nowhere zero
        signal, strength = patches[points, at], float(patches[0, at[0], split.labels[0]])
        if torch.equal(signal, strength * F.one_hot(split.labels, patches.shape[2])):
            return strength, patches[points, 1 - at]
    raise UserError(
        "task 'signal_noise' measures points of one signal and one noise patch, and this data has others. Take data: signal_noise."
    )


def _filters(model: nn.Module) -> Tensor:
    filters = getattr(model, "filters", None)
    if not isinstance(filters, Tensor):
        raise UserError(
            f"task 'signal_noise' looks at the filters of each class, and {type(model).__name__} does not say what they are. "
            "Take model: repu, or give yours a property `filters`, a tensor [classes, filters, dimension]."
        )
    return filters
