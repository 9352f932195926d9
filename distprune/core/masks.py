"""Masks: which prunable weights of a network are kept."""

import json
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from distprune.core import names as naming
from distprune.core import packed
from distprune.errors import UserError

PRUNABLE = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass(frozen=True)
class Match:
    """How masks and a network fit together."""

    network: str  # what it is called
    pairs: Mapping[str, str]  # mask -> parameter of the same shape
    unfit: Mapping[str, str]  # mask without such a parameter -> what is wrong, in one sentence
    unmasked: tuple[str, ...]  # prunable weights of the network for which there is no mask

    def summary(self) -> str:
        """What did not match, in one line; empty if everything did."""
        parts = list(self.unfit.values())[:1]
        if len(self.unfit) > 1:
            parts.append(f"{len(self.unfit) - 1} more masks have no weight of their name and shape: {naming.some(list(self.unfit)[1:])}.")
        if self.unmasked:
            parts.append(f"Prunable weights without a mask: {naming.some(self.unmasked)}.")
        return " ".join(parts)

    def check(self, *, strict: bool) -> None:
        """Raise UserError if no mask has a weight or, with `strict`, if one has none."""
        count = len(self.pairs) + len(self.unfit)
        if not self.pairs:
            raise UserError(f"At least one of {count} masks must have its weight in {self.network}, none has. {self.summary()}")
        if self.unfit and strict:
            raise UserError(f"{self.summary()} To apply the other masks, {len(self.pairs)} of {count}: strict=False, or --partial.")


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

    def match(self, model: nn.Module) -> Match:
        """Which mask belongs to which weight of `model`, and what is left over on both sides.

        Names may differ by the parts that wrappers add at any level (`module.`, `_orig_mod.` and others: `core/names.py`).
        """
        if not isinstance(model, nn.Module):
            raise UserError(
                f"Masks are for a torch.nn.Module, got {type(model).__name__}. For a state: model.load_state_dict(state) first."
            )
        parameters = dict(model.named_parameters(remove_duplicate=False))  # a tied weight may be masked under any of its names
        found = naming.paired(self, parameters)
        unfit, prunable_names = {}, _owned(model)
        for name, mask in self.items():
            if name not in found:
                alike = [other for other in prunable_names if parameters[other].shape == mask.shape]
                near = naming.nearest(name, alike or prunable_names or parameters) or alike
                unfit[name] = f"The model has no weight '{name}' for its mask." + (f" Nearest: {naming.some(near)}." if near else "")
            elif (shape := parameters[found[name]].shape) != mask.shape:
                unfit[name] = f"Mask '{name}' must be shaped like its weight {tuple(shape)}, got {tuple(mask.shape)}."
        pairs = {name: other for name, other in found.items() if name not in unfit}
        masked = {id(parameters[other]) for other in found.values()}
        return Match(type(model).__name__, pairs, unfit, tuple(name for name in prunable_names if id(parameters[name]) not in masked))

    @torch.no_grad()
    def apply_(self, model: nn.Module, *, strict: bool = True) -> nn.Module:
        """Set the removed weights of `model` to zero, in place, and return it. `match(model)` says beforehand what fits.

        Names may differ by the parts that wrappers add (`module.`, `_orig_mod.`). Prunable weights without a mask stay as they are.
        Raises UserError, with the model as it was, naming the masks whose weights are missing or have another shape; with `strict=False`
        those are left out with a warning, and UserError is raised only if no mask has a weight.
        """
        match = self.match(model)
        match.check(strict=strict)
        if match.unfit:
            warnings.warn(f"{len(match.pairs)} of {len(self)} masks are applied. {match.summary()}", stacklevel=2)
        parameters = dict(model.named_parameters(remove_duplicate=False))
        for name, other in match.pairs.items():
            weight = parameters[other]
            weight.masked_fill_(~self[name].to(weight.device), 0)  # a product with zero would leave what is not finite
        return model

    def save(self, path: str | Path, **metadata: Any) -> Path:
        """Write a safetensors file of bool tensors or, to a name that ends in `.parquet`, a table with a bit a weight (`core/packed.py`).

        `metadata` goes in as JSON beside sparsity and the kept weights of each layer. Raises UserError for another ending, a folder
        that does not exist, and Parquet without pyarrow.
        """
        path = Path(path)
        if path.suffix not in (".safetensors", ".parquet"):
            raise UserError(f"Masks are written to .safetensors or .parquet, got {path}. Write {path.stem}.safetensors.")
        if not path.parent.is_dir():
            raise UserError(f"Masks must be written to an existing folder, and {path.parent} is none. Make it first.")
        facts = {"format": packed.FORMAT, "sparsity": self.sparsity, "kept": self.kept, "total": self.total, "layers": self.counts}
        text = {key: json.dumps(value) for key, value in {**facts, **metadata}.items()}
        aside = path.with_name(f".{path.name}.{os.getpid()}")  # readers see a whole file or none
        if path.suffix == ".parquet":
            packed.write(aside, self, text)
        else:
            save_file({name: mask.cpu().contiguous() for name, mask in self.items()}, str(aside), metadata=text)
        os.replace(aside, path)
        return path

    @classmethod
    def load(cls, path: str | Path) -> "Masks":
        """Read a file written by `save`, of either form. Raises UserError if it is not one, or is damaged."""
        try:
            with open(path, "rb") as file:
                is_packed = file.read(len(packed.MAGIC)) == packed.MAGIC
        except OSError as error:
            raise UserError(
                f"Cannot read masks from {path}: {error.strerror}. Give the path of a .safetensors or .parquet file."
            ) from error
        return cls(packed.read(Path(path)) if is_packed else _read_safetensors(path))


def _read_safetensors(path: str | Path) -> dict[str, Tensor]:
    try:
        with safe_open(str(path), framework="pt") as file:
            counts = json.loads((file.metadata() or {}).get("layers", "null"))
            counts = dict.fromkeys(file.keys()) if counts is None else {name: int(count) for name, count in counts.items()}
            if extra := set(file.keys()) - set(counts):
                raise ValueError(f"it holds '{extra.pop()}', of which its header knows nothing")
            tensors = {name: file.get_tensor(name) for name in counts}  # in the order that they were saved in
    except Exception as error:  # safetensors raises its own and OS errors
        raise UserError(f"{path} is not a readable safetensors file of masks: {' '.join(str(error).split())}.") from error
    if wrong := [name for name, tensor in tensors.items() if tensor.dtype != torch.bool]:
        raise UserError(f"{path}: masks must be bool tensors, '{wrong[0]}' is {tensors[wrong[0]].dtype}.")
    for name, tensor in tensors.items():
        raw = tensor.view(torch.uint8)
        if bool((raw > 1).any()) or counts[name] not in (None, int(raw.sum(dtype=torch.int64))):
            raise UserError(f"{path} is damaged: mask '{name}' does not keep the {counts[name]} weights of its header. Copy it again.")
    return tensors


def _weights(module: nn.Module) -> list[Tensor]:
    if isinstance(module, nn.MultiheadAttention):  # query, key and value are rows of one parameter, or three where their inputs differ
        projections = (module.in_proj_weight, module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)
        return [weight for weight in projections if weight is not None]
    return [module.weight] if isinstance(module, PRUNABLE) else []


def _owned(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name -> weight of the modules in PRUNABLE and of attention, trainable or not; a tied one comes once."""
    if lazy := [name for name, parameter in model.named_parameters() if is_lazy(parameter)]:
        raise UserError(f"Weights must have a shape, and '{lazy[0]}' has none before the first pass. Run the network once: model(inputs).")
    owners = {id(weight) for module in model.modules() for weight in _weights(module)}
    return {name: parameter for name, parameter in model.named_parameters() if id(parameter) in owners}


def prunable(model: nn.Module, *, include: Iterable[str] = ("*",), exclude: Iterable[str] = ()) -> dict[str, nn.Parameter]:
    """Name -> weight of every trainable weight of the module types in PRUNABLE and of attention's packed projections.

    Tied weights come once, under their first name. `include` and `exclude` are shell patterns over parameter names.
    Raises UserError if nothing is left.
    """
    include, exclude = tuple(include), tuple(exclude)
    found = {name: parameter for name, parameter in _owned(model).items() if parameter.requires_grad}
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
