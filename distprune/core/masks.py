"""Masks: which prunable weights of a network are kept."""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from distprune.errors import UserError

PRUNABLE = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
# What torch.nn.DataParallel, DistributedDataParallel and torch.compile put before the names of a network's parameters.
_WRAPPERS = ("module.", "_orig_mod.")


class Masks(Mapping[str, Tensor]):
    """Name -> bool tensor shaped like the weight, True = kept."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = {name: tensor.detach().bool() for name, tensor in tensors.items()}

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __repr__(self) -> str:
        return f"Masks({len(self)} layers, kept {self.kept:,} of {self.total:,}, sparsity {self.sparsity:.4f})"

    @classmethod
    def ones(cls, weights: Mapping[str, Tensor]) -> "Masks":
        """Masks that keep everything."""
        return cls({name: torch.ones_like(weight, dtype=torch.bool) for name, weight in weights.items()})

    @property
    def total(self) -> int:
        """Number of prunable weights."""
        return sum(mask.numel() for mask in self.values())

    @property
    def counts(self) -> dict[str, int]:
        """Kept weights of each layer."""
        return dict(zip(self, torch.stack([mask.sum() for mask in self.values()]).tolist(), strict=True)) if self else {}

    @property
    def kept(self) -> int:
        """Number of kept weights."""
        return sum(self.counts.values())

    @property
    def sparsity(self) -> float:
        """Share of the prunable weights that is removed."""
        return 1 - self.kept / self.total if self.total else 0.0

    def nested_in(self, other: "Masks") -> bool:
        """Whether every weight kept here is kept in `other` too."""
        return self.keys() == other.keys() and all(bool((~mask | other[name]).all()) for name, mask in self.items())

    def equal(self, other: "Masks") -> bool:
        """Whether both keep the same weights."""
        return self.keys() == other.keys() and all(torch.equal(mask, other[name]) for name, mask in self.items())

    def to(self, device: torch.device | str) -> "Masks":
        """The same masks on `device`."""
        return Masks({name: mask.to(device) for name, mask in self.items()})

    @torch.no_grad()
    def apply_(self, model: nn.Module) -> nn.Module:
        """Set the removed weights of `model` to zero, in place, and return it.

        Names may differ by the prefixes that wrappers add (`module.`, `_orig_mod.`).
        Raises UserError naming the first mask whose weight is missing or has another shape.
        """
        parameters = {_unwrapped(name): parameter for name, parameter in model.named_parameters()}
        for name, mask in self.items():
            weight = parameters.get(_unwrapped(name))
            if weight is None:
                raise UserError(f"The model has no weight '{name}' for its mask. Its parameters: {', '.join(parameters)}.")
            if weight.shape != mask.shape:
                raise UserError(f"Mask '{name}' must be shaped like its weight {tuple(weight.shape)}, got {tuple(mask.shape)}.")
        for name, mask in self.items():
            weight = parameters[_unwrapped(name)]
            weight.mul_(mask.to(weight.device, weight.dtype))
        return model

    def save(self, path: str | Path, **metadata: Any) -> Path:
        """Write a safetensors file of bool tensors. `metadata` goes in as JSON beside sparsity and the kept weights of each layer."""
        facts = {"format": "distprune.masks/1", "sparsity": self.sparsity, "kept": self.kept, "total": self.total, "layers": self.counts}
        text = {key: json.dumps(value) for key, value in {**facts, **metadata}.items()}
        path = Path(path)
        aside = path.with_name(f".{path.name}.{os.getpid()}")  # readers see a whole file or none
        save_file({name: mask.cpu().contiguous() for name, mask in self.items()}, str(aside), metadata=text)
        os.replace(aside, path)
        return path

    @classmethod
    def load(cls, path: str | Path) -> "Masks":
        """Read a file written by `save`. Raises UserError if it is not one."""
        try:
            with safe_open(str(path), framework="pt") as file:
                names = json.loads((file.metadata() or {}).get("layers", "[]")) or file.keys()
                tensors = {name: file.get_tensor(name) for name in names}
        except Exception as error:  # safetensors raises its own and OS errors
            raise UserError(f"{path} is not a readable safetensors file of masks: {error}.") from error
        if wrong := [name for name, tensor in tensors.items() if tensor.dtype != torch.bool]:
            raise UserError(f"{path}: masks must be bool tensors, '{wrong[0]}' is {tensors[wrong[0]].dtype}.")
        return cls(tensors)


def _unwrapped(name: str) -> str:
    while name.startswith(_WRAPPERS):
        name = name.split(".", 1)[1]
    return name


def _weights(module: nn.Module) -> list[Tensor]:
    if isinstance(module, nn.MultiheadAttention):  # query, key and value are rows of one parameter, or three where their inputs differ
        packed = (module.in_proj_weight, module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)
        return [weight for weight in packed if weight is not None]
    return [module.weight] if isinstance(module, PRUNABLE) else []


def prunable(model: nn.Module, *, include: Iterable[str] = ("*",), exclude: Iterable[str] = ()) -> dict[str, nn.Parameter]:
    """Name -> weight of every trainable weight of the module types in PRUNABLE and of attention's packed projections.

    Tied weights come once, under their first name. `include` and `exclude` are shell patterns over parameter names.
    Raises UserError if nothing is left.
    """
    include, exclude = tuple(include), tuple(exclude)
    owners = {id(weight) for module in model.modules() for weight in _weights(module)}
    found = {
        name: parameter
        for name, parameter in model.named_parameters()  # yields a tied parameter once
        if id(parameter) in owners and parameter.requires_grad
    }
    if not found:
        kinds = ", ".join(kind.__name__ for kind in PRUNABLE)
        raise UserError(f"{type(model).__name__} must have trainable weights in one of {kinds} to be pruned, got none. Check the model.")
    chosen = {
        name: parameter
        for name, parameter in found.items()
        if any(fnmatch(name, pattern) for pattern in include) and not any(fnmatch(name, pattern) for pattern in exclude)
    }
    if not chosen:
        raise UserError(f"include {list(include)} and exclude {list(exclude)} leave no weight to prune. The model has: {', '.join(found)}.")
    return chosen
