"""n of every m: the pattern that sparse tensor cores take."""

import math
from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from distprune.core.budgets import check_finite
from distprune.core.masks import Masks
from distprune.core.registry import Choice, granularity
from distprune.core.units import Network, Weights
from distprune.errors import UserError


@granularity(
    "n_m",
    paper="Mishra et al. 2021, arXiv:2104.08378; Zhou et al. 2021, arXiv:2102.04010",
    sparsity=lambda choice: _sparsity(choice.option("n"), choice.option("m")),
    allocator="uniform",
)
def n_m(network: Network, *, n: int = 2, m: int = 4) -> "Pattern":
    """At most `n` of every `m` consecutive inputs of an output are kept, input channels first and kernel positions after them.

    Formula:
        kept of W[o, j m], ..., W[o, j m + m - 1] <= n,   sparsity = 1 - n / m

    Rows whose length m does not divide end in a shorter piece of r, which keeps n * r / m of them, rounded down; a row shorter than m at
    least one. On the way to its target a schedule passes through n' of m with n' > n.
    """
    _sparsity(n, m)
    transposed = {id(module.weight) for module in network.model.modules() if isinstance(module, nn.modules.conv._ConvTransposeNd)}
    inputs_first = {name for name, weight in network.weights.items() if id(weight) in transposed}
    return Pattern(network.weights, n, m, inputs_first=inputs_first)


def _sparsity(n: int, m: int) -> float:
    if not 1 <= n < m:
        raise UserError(f"granularity.n must be at least 1 and below granularity.m, got {n} and {m}. Write n: 2 and m: 4.")
    return 1 - n / m


class Pattern(Weights):
    """Weights that are kept in a pattern: the scores say which, the pattern how many."""

    def __init__(self, weights: Mapping[str, Tensor], n: int, m: int, *, inputs_first: Collection[str] = ()) -> None:
        """`inputs_first` names the weights of shape [in, out, ...]: those of transposed convolutions."""
        super().__init__(weights)
        self.n, self.m, self._inputs_first = n, m, inputs_first

    def check(self, sparsity: float) -> None:
        if sparsity > 1 - self.n / self.m + 1e-6:
            raise UserError(
                f"granularity n_m keeps {self.n} of {self.m} weights, so sparsity must be {1 - self.n / self.m:.6g}, got {sparsity}. "
                "Write that, or change n and m."
            )

    def choose(self, scores: Mapping[str, Tensor], sparsity: float, allocator: Choice, masks: Masks | None) -> Masks:
        """n' of m, with the largest n' that `sparsity` allows and at least n."""
        self.check(sparsity)
        n = max(self.n, math.floor((1 - sparsity) * self.m + 1e-6))
        check_finite(scores)
        found = {}
        for name, score in scores.items():
            alive = masks[name] if masks is not None else None
            if name in self._inputs_first:
                mask = self._pattern(score.transpose(0, 1), n, None if alive is None else alive.transpose(0, 1)).transpose(0, 1)
                found[name] = mask.contiguous()
            else:
                found[name] = self._pattern(score, n, alive)
        return Masks(found)

    def _pattern(self, scores: Tensor, n: int, alive: Tensor | None) -> Tensor:
        moved = scores.detach().double()
        if alive is not None:
            moved = moved.masked_fill(~alive, -math.inf)
        moved = moved.movedim(1, -1)  # channels last, as the hardware's matrix product reads a convolution
        rows = moved.reshape(len(moved), -1)
        whole, rest = divmod(rows.shape[1], self.m)
        kept = torch.zeros_like(rows, dtype=torch.bool)
        if whole:
            pieces = rows[:, : whole * self.m].reshape(len(rows), whole, self.m)
            kept[:, : whole * self.m] = _top(pieces, n).reshape(len(rows), -1)
        if rest:
            kept[:, whole * self.m :] = _top(rows[:, whole * self.m :], max(rest * n // self.m, 0 if whole else 1))
        kept &= torch.isfinite(rows)
        return kept.reshape(moved.shape).movedim(-1, 1).contiguous()


def _top(scores: Tensor, count: int) -> Tensor:
    """The `count` largest along the last dimension, ties to the lower index."""
    best = torch.sort(scores, dim=-1, descending=True, stable=True).indices[..., :count]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, best, True)
