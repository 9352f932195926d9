"""Gibbs distributions over masks, p(x) ~ exp(-beta H(x)) with a spin x = +1 for a kept weight and -1 for a removed one
(Labach & Valaee 2020, arXiv:2006.04981).

Distributions take *fields*, beta (w^2 - Q), where Q lies between the units that are removed and those that are kept, and a coupling,
beta c; both have no unit. Spins of a row are coupled, rows are independent of each other. The factors are those of the authors' code,
where beta means half as much to spins that are drawn one by one, sigmoid(field), as to kernels, exp(field * x).
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace

import torch
from torch import Tensor

_LARGEST = 1e30  # of a field, so that the sums of a row stay finite
_ENOUGH = 1 << 16  # weights for a median


@dataclass(frozen=True)
class Moments:
    """Of a mask of `spins` weights: mean and variance of the number that is kept, and the entropy of the whole mask in bits."""

    spins: int
    kept: float
    variance: float
    bits: float

    @property
    def sparsity(self) -> float:
        """Expected share of removed weights."""
        return 1 - self.kept / self.spins

    @property
    def spread(self) -> float:
        """Standard deviation of the share of removed weights."""
        return math.sqrt(self.variance) / self.spins

    @property
    def entropy(self) -> float:
        """Bits a weight: 1 where every weight tosses a fair coin, 0 once the mask is decided."""
        return self.bits / self.spins


class Distribution(ABC):
    """A distribution over the masks of one layer."""

    @abstractmethod
    def draw(self, generator: torch.Generator) -> Tensor:
        """A mask: bool, of the shape of the fields."""

    @abstractmethod
    def moments(self, generator: torch.Generator) -> Moments:
        """What `draw` gives. The generator is for a distribution that is known through its chain alone."""


def threshold(scores: Tensor, kept: int) -> Tensor:
    """Q: the p-quantile of `scores`, linearly interpolated, with p = 1 - kept / n and 0 < kept < n. But for ties, `kept` lie above it.

    Its place in their order is p (n - 1) = n - kept - 1 + kept / n, between the largest that is removed and the smallest that is kept.
    """
    flat = scores.flatten()
    low = flat.kthvalue(len(flat) - kept).values
    below = flat <= low
    high = torch.where(below.sum() > len(flat) - kept, low, flat.masked_fill(below, math.inf).min())
    return low + kept / len(flat) * (high - low)


def unit_of(squares: Tensor) -> Tensor:
    """The median of w^2, on at most 65,536 of them that lie evenly: it is a unit of temperature, and is needed at every step."""
    flat = squares.flatten()
    return flat[:: -(-len(flat) // _ENOUGH)].median().clamp(min=torch.finfo(flat.dtype).tiny)


def fields(squares: Tensor, quantile: Tensor, beta: float, unit: float | Tensor = 1.0) -> Tensor:
    """beta (w^2 - Q) with w^2 in a unit: positive where a weight had better be kept."""
    return ((squares - quantile) / unit * beta).clamp(-_LARGEST, _LARGEST)


@dataclass(frozen=True)
class Independent(Distribution):
    """The unstructured Hamiltonian: a weight is kept with probability sigmoid(field)."""

    fields: Tensor

    def draw(self, generator: torch.Generator) -> Tensor:
        return toss(torch.sigmoid(self.fields), generator)

    def moments(self, generator: torch.Generator) -> Moments:
        return _of_coins(torch.sigmoid(self.fields.double()))


@dataclass(frozen=True)
class Kernels(Distribution):
    """The kernel Hamiltonian: p(x) ~ exp(sum_i field_i x_i + coupling ((sum_i x_i)^2 - k)) in each row of k spins.

    The sum over all pairs i != j of x_i x_j is (sum_i x_i)^2 - k, so the pairs matter through the number of kept weights alone. That number
    is drawn from its exact distribution and then the weights given it, in k^2 operations in place of 2^k: the draw is that of enumerating
    all states, for kernels of any size.
    """

    fields: Tensor  # [rows, k]
    coupling: float | Tensor

    def draw(self, generator: torch.Generator) -> Tensor:
        doubled = 2 * self.fields.t().contiguous()
        sums = log_sums(doubled)
        up_to = torch.softmax(self._pairs() + sums[-1], dim=0).cumsum(0)
        left = (up_to[:-1] <= torch.rand(up_to.shape[1], generator=generator, device=up_to.device) * up_to[-1]).sum(0)
        kept = torch.empty_like(doubled, dtype=torch.bool)
        for i in reversed(range(len(doubled))):  # is the last weight among those that are left to keep, given how many they are?
            with_it = sums[i].gather(0, (left - 1).clamp(min=0)[None])[0] + doubled[i]
            kept[i] = toss((with_it - sums[i + 1].gather(0, left[None])[0]).exp(), generator) & (left > 0)
            left = left - kept[i].long()
        return kept.t().contiguous()

    def moments(self, generator: torch.Generator) -> Moments:
        doubled = 2 * self.fields.double().t()
        with torch.enable_grad():  # entropy = log Z - t d(log Z)/dt at t = 1, where t multiplies all fields and couplings
            t = torch.ones_like(doubled[0], requires_grad=True)
            logits = t * self._pairs().double() + log_sums(t * doubled)[-1] - t * self.fields.double().sum(1)
            log_partition = logits.logsumexp(dim=0)
            (slope,) = torch.autograd.grad(log_partition.sum(), t)
        chances = logits.detach().softmax(dim=0)
        numbers = torch.arange(len(chances), device=chances.device)[:, None]
        mean = (chances * numbers).sum(0)
        variance = (chances * numbers.square()).sum(0) - mean.square()
        bits = (log_partition.detach() - slope).clamp(min=0).sum() / math.log(2)
        return Moments(self.fields.numel(), float(mean.sum()), float(variance.clamp(min=0).sum()), float(bits))

    def _pairs(self) -> Tensor:
        """coupling ((sum_i x_i)^2 - k) for 0 to k kept weights: [k + 1, 1]."""
        k = self.fields.shape[1]
        total = 2 * torch.arange(k + 1, device=self.fields.device) - k
        return (self.coupling * (total.square() - k))[:, None]


def log_sums(doubled: Tensor) -> list[Tensor]:
    """log of the sum of exp(sum_i doubled_i m_i) over all m in {0, 1}^j with i kept: for each j up to k, [j + 1, rows] from [k, rows]."""
    sums = [torch.zeros_like(doubled[:1])]
    for field in doubled:
        last = sums[-1]
        sums.append(torch.cat([last[:1], torch.logaddexp(last[1:], last[:-1] + field), last[-1:] + field]))
    return sums


@dataclass(frozen=True)
class Filters(Distribution):
    """The filter Hamiltonian on a complete bipartite graph: the first `cut` spins of a row are coupled to all others of the row.

    Drawn by chromatic Gibbs sampling: all of one half given the other, `sweeps` times in turn, a spin being kept with probability
    sigmoid(field + coupling * sum of the other half). The chain begins with the other half as one, on the side of the row's mean field.
    Once the coupling is strong it stays there, so that what is drawn may freeze before the distribution does.
    """

    fields: Tensor  # [rows, n]
    coupling: float | Tensor
    cut: int
    sweeps: int

    def draw(self, generator: torch.Generator) -> Tensor:
        first, second = self._halves(self.fields)
        total = first.shape[1] * self.fields.mean(1, keepdim=True).sign()
        for _ in range(self.sweeps):
            above = toss(torch.sigmoid(first + self.coupling * total), generator)
            below = toss(torch.sigmoid(second + self.coupling * magnetization(above)), generator)
            total = magnetization(below)
        return torch.cat([above, below], dim=1)

    def moments(self, generator: torch.Generator) -> Moments:
        """Of a drawn mask and what the next sweep would toss, given it: zero bits say that the chain stands still."""
        mask = self.draw(generator)
        first, second = self._halves(self.fields.double())
        above, below = self._halves(mask)
        chances = torch.cat([first + self.coupling * magnetization(below), second + self.coupling * magnetization(above)], dim=1)
        coins = _of_coins(torch.sigmoid(chances))
        return replace(coins, kept=float(mask.sum()))

    def _halves(self, values: Tensor) -> tuple[Tensor, Tensor]:
        return values[:, : self.cut], values[:, self.cut :]


def magnetization(kept: Tensor) -> Tensor:
    """The sum of a row's spins, [rows, 1]."""
    return (2 * kept.sum(1, keepdim=True) - kept.shape[1]).float()


def toss(chances: Tensor, generator: torch.Generator) -> Tensor:
    """True with the given probability."""
    return torch.rand(chances.shape, generator=generator, device=chances.device, dtype=chances.dtype) < chances


def _of_coins(chances: Tensor) -> Moments:
    other = 1 - chances
    bits = -(torch.xlogy(chances, chances) + torch.xlogy(other, other)).sum() / math.log(2)
    return Moments(chances.numel(), float(chances.sum()), float((chances * other).sum()), float(bits))
