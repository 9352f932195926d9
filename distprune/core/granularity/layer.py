"""Whole layers and blocks."""

from collections.abc import Mapping
from functools import cached_property

import torch
from torch import Tensor

from distprune.core.budgets import Layer, budget, layers_of
from distprune.core.granularity.kernel import reduced
from distprune.core.masks import Masks
from distprune.core.metrics import collapsed
from distprune.core.registry import Choice, granularity
from distprune.core.units import CLOSE, Network, Reduction, Units, check_share
from distprune.errors import UserError

_NAME = "layers"  # of the one layer of units


@granularity(
    "layer", paper="Wen et al. 2016, arXiv:1608.03665, depth-wise sparsity; Huang & Wang 2018, arXiv:1707.01213", allocator="global"
)
def layer(network: Network) -> Units:
    """A layer that the network can do without, together with all that only it feeds: a residual branch, most often.

    Formula:
        unit = a layer and those that fall silent without it
    """
    return Blocks(network)


class Blocks(Units):
    """Units of shape [blocks]; all of them are ranked against each other."""

    def __init__(self, network: Network) -> None:
        super().__init__(network.weights)
        self._model, self._example = network.model, network.example()
        self._device = next(iter(network.weights.values())).device
        self.blocks = self._removable()
        if not self.blocks:
            raise UserError(
                f"granularity 'layer' needs layers that a signal can go around, {type(network.model).__name__} has none. "
                "Take a residual network, or granularity: filter."
            )

    def _removable(self) -> list[tuple[str, ...]]:
        """Remove each layer in turn; those that fall silent with it are its block. Without a signal at the end, it is not removable."""
        found: list[tuple[str, ...]] = []
        for name in self.shapes:
            if not any(name in block for block in found) and self._passes(block := self._silent((name,))):
                found.append(block)
        # A block inside another one goes for itself; the larger one takes it along.
        return sorted(found, key=lambda block: list(self.shapes).index(block[0]))

    def _silent(self, removed: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(collapsed(self._model, self._masks(removed), self._example))

    def _passes(self, silent: tuple[str, ...]) -> bool:
        return len(silent) < len(self.shapes)

    def _masks(self, removed: tuple[str, ...]) -> Masks:
        return Masks({name: torch.full(shape, name not in removed, device=self._device) for name, shape in self.shapes.items()})

    def layers(self, alive: Mapping[str, Tensor] | None = None) -> list[Layer]:
        return layers_of({_NAME: (len(self.blocks),)}, alive)

    def reduce(self, values: Mapping[str, Tensor], reduction: Reduction) -> dict[str, Tensor]:
        return {_NAME: torch.stack([reduced(torch.cat([values[name].flatten() for name in block]), reduction) for block in self.blocks])}

    def spread(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        worth = {name: value for block, value in zip(self.blocks, values[_NAME], strict=True) for name in block}
        some = values[_NAME].new_ones(())
        return {name: worth.get(name, some).expand(shape) for name, shape in self.shapes.items()}

    def expand(self, kept: Mapping[str, Tensor]) -> Masks:
        gone = [name for block, keep in zip(self.blocks, kept[_NAME].tolist(), strict=True) if not keep for name in block]
        return self._masks(tuple(gone))

    def alive(self, masks: Masks) -> dict[str, Tensor]:
        return {_NAME: torch.stack([torch.stack([masks[name].any() for name in block]).any() for block in self.blocks])}

    def kept_weights(self, counts: Mapping[str, int]) -> dict[str, int]:
        raise NotImplementedError("blocks are of different sizes: a number of them has no number of weights")

    def sparsity(self, masks: Masks) -> float:
        return masks.sparsity if self.price is None else 1 - self.price.share(masks.counts, self.shapes)

    @cached_property
    def _least(self) -> tuple[int, float]:
        """(weights, sparsity) of the least that can be kept: blocks are removed in order and the largest first, as one may stand in
        another's way."""
        orders = (torch.zeros(len(self.blocks)), self._largest_first)
        found = [self._masks(self._removed(order, 1.0, None)) for order in orders]
        return min(masks.kept for masks in found), max(map(self.sparsity, found))

    @property
    def _largest_first(self) -> Tensor:
        one_by_one = [self.sparsity(self._masks(block)) for block in self.blocks]
        return -torch.tensor(one_by_one, dtype=torch.double)

    def _meets(self, masks: Masks, sparsity: float) -> bool:
        if self.price is None:
            return masks.kept <= (budget(sparsity, self.total) if sparsity < 1 else 0)
        return self.sparsity(masks) >= sparsity - CLOSE

    def check(self, sparsity: float) -> None:
        (least, largest), rule = self._least, "the layers that the network cannot do without"
        if self.price is not None:
            check_share(self.price.name, sparsity, 1 - largest, rule)
        elif budget(sparsity, self.total) < least:
            raise UserError(
                f"sparsity must leave {rule}, got {sparsity} of {self.total:,} weights. "
                f"The largest feasible sparsity at granularity 'layer' is {int((1 - least / self.total) * 1e6) / 1e6}."
            )

    def counts(
        self, sparsity: float, allocator: Choice, scores: Mapping[str, Tensor] | None = None, alive: Mapping[str, Tensor] | None = None
    ) -> dict[str, int]:
        raise NotImplementedError("which blocks are removed decides how many")

    def choose(self, scores: Mapping[str, Tensor], sparsity: float, allocator: Choice, masks: Masks | None) -> Masks:
        """Remove the blocks of the lowest score until the budget is met, passing over one without which no signal would get through.

        Where that ends above the budget, because small blocks that went first keep a large one in place, the largest go first.
        """
        self.check(sparsity)
        if not bool(torch.isfinite(scores[_NAME]).all()):
            raise UserError("Scores of layers must be finite, got NaN or infinity. Score in float64, or check the loss and the weights.")
        alive = self.alive(masks)[_NAME] if masks is not None else None
        for order in (scores[_NAME], self._largest_first):
            found = self._masks(self._removed(order, sparsity, alive))
            if self._meets(found, sparsity):
                return found
        raise UserError(
            f"sparsity {sparsity} cannot be reached from the blocks that are left: without another one no signal would get through. "
            "Ask for less, or for fewer rounds."
        )

    def _removed(self, scores: Tensor, sparsity: float, alive: Tensor | None) -> tuple[str, ...]:
        """Names of the layers to remove so that the budget is met, or as little as can be is left."""
        gone: tuple[str, ...] = ()
        if alive is not None:
            gone = tuple(name for block, keep in zip(self.blocks, alive.tolist(), strict=True) if not keep for name in block)
        for index in torch.sort(scores, stable=True).indices.tolist():
            if self._meets(self._masks(gone), sparsity):
                break
            more = tuple(dict.fromkeys((*gone, *self.blocks[index])))
            if self._passes(self._silent(more)):
                gone = more
        return gone
