"""Masks on a network of the user's own. Its state is read and written as safetensors, under the names and in the types of its file."""

import contextlib
import inspect
import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from distprune.core import names as naming
from distprune.core.masks import Masks, Match
from distprune.core.registry import import_object
from distprune.errors import UserError

_COUNTER = "num_batches_tracked"  # of batch normalisation, which older files lack and inference does not read


@dataclass(frozen=True)
class Applied:
    """A network with its masks applied."""

    model: nn.Module = field(repr=False)
    masks: Masks
    match: Match  # of the masks with the network's weights
    unread: tuple[str, ...] = ()  # tensors of the state's file that the network has not
    unset: tuple[str, ...] = ()  # tensors of the network that are not in the file, and keep the values that it was built with
    written: Path | None = None
    unfit: Mapping[str, str] = field(default_factory=dict)  # tensor of the file of another shape -> what is wrong, in one sentence

    def lines(self) -> list[str]:
        """What did not match, a sentence each."""
        found = list(self.match.unfit.values())
        if self.match.unmasked:
            found.append(f"Prunable weights without a mask stay whole: {naming.some(self.match.unmasked)}.")
        return found + self.lines_of_file()

    def lines_of_file(self) -> list[str]:
        """What did not match of the file of weights."""
        found = list(self.unfit.values())
        if self.unread:
            found.append(f"The network has no place for what the file of weights calls {naming.some(self.unread)}.")
        if self.unset:
            found.append(f"The file of weights lacks {naming.some(self.unset)}: they keep the values that the network was built with.")
        return found


def build(path: str, options: Mapping[str, Any]) -> nn.Module:
    """The network that the function or class at 'package.module:name' makes of `options`. Raises UserError if it makes none."""
    if ":" not in path:
        raise UserError(f"--model must be 'package.module:function', got '{path}'. For the function network of mine.py write mine:network.")
    made = import_object(path, "--model")
    if isinstance(made, nn.Module):
        if options:
            raise UserError(
                f"--model '{path}' is a network already, so that options have no use, got {', '.join(options)}. Leave them out."
            )
        return made
    if not callable(made):
        raise UserError(f"--model '{path}' must be a function that returns a torch network, got a {type(made).__name__}. Name another.")
    try:
        network = made(**options)
    except Exception as error:  # the user's code may raise anything
        raise UserError(f"--model '{path}' could not be built ({type(error).__name__}: {error}).{_wants(made, error)}") from error
    if not isinstance(network, nn.Module):
        raise UserError(f"--model '{path}' must return a torch.nn.Module, got a {type(network).__name__}. Return the network alone.")
    return network


def _wants(function: Callable[..., Any], error: Exception) -> str:
    """What a function takes, where it was called wrongly."""
    try:
        return f" It takes {inspect.signature(function)}: give what it needs by --option name=value." * isinstance(error, TypeError)
    except ValueError:  # of a function that is not written in Python
        return ""


def apply(masks: Masks, model: nn.Module, *, weights: str | Path | None, to: str | Path | None, strict: bool) -> Applied:
    """Put `masks` on `model` in place, with its state from the file `weights`, and write the pruned state to the new file `to`.

    Raises UserError, with the model as it was and nothing written, for what cannot be read, for masks of which none fits and, with
    `strict`, for masks or tensors that do not fit.
    """
    if to is not None and (Path(to).exists() or not Path(to).parent.is_dir()):
        why = "exists already" if Path(to).exists() else "is in a folder that does not exist"
        raise UserError(f"--to must be a new file in an existing folder, {to} {why}. Choose another.")
    match = masks.match(model)
    match.check(strict=strict)
    own = {name: tensor for name, tensor in model.state_dict().items() if isinstance(tensor, Tensor)}
    state, metadata = _read(Path(weights)) if weights is not None else (own, {"format": "pt"})
    named = naming.paired(state, own)
    places = {name: other for name, other in named.items() if state[name].shape == own[other].shape}
    unfit = {
        name: f"'{name}' must be shaped like its place in the network, {tuple(own[other].shape)}, got {tuple(state[name].shape)}."
        for name, other in named.items()
        if name not in places
    }
    known = {own[name].data_ptr() for name in named.values()}  # tied tensors may come under one of their names
    unread = tuple(name for name in state if name not in named)
    unset = tuple(name for name, tensor in own.items() if tensor.data_ptr() not in known and not name.endswith(_COUNTER))
    found = Applied(model, masks, match, unread, unset, None if to is None else Path(to), unfit)
    if strict and unfit:
        raise UserError(
            f"{weights}: {next(iter(unfit.values()))} Give the options it was built with, or leave out the {len(unfit)} of another shape: "
            "--partial, in Python strict=False."
        )
    if not places or (strict and (unread or unset)):
        way = "To go on: --partial, in Python strict=False." if places else "Give the file of this network."
        raise UserError(f"{weights} does not fit the network. {' '.join(found.lines_of_file())} {way}")
    pruned = _pruned(model, masks, match, state, places)
    if to is not None:
        _write(Path(to), pruned, metadata)
    if weights is not None:
        model.load_state_dict({places[name]: tensor for name, tensor in pruned.items() if name in places}, strict=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what is left out stands in `match`
        masks.apply_(model, strict=strict)
    return found


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(str(path), framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})
    except Exception as error:  # safetensors raises its own and OS errors
        raise UserError(
            f"{path} is not a readable safetensors file of weights: {' '.join(str(error).split())}. Pickled checkpoints are not read: "
            "write one with safetensors.torch.save_model(model, path)."
        ) from error


def _pruned(model: nn.Module, masks: Masks, match: Match, state: Mapping[str, Tensor], places: Mapping[str, str]) -> dict[str, Tensor]:
    """The tensors of `state` under their own names, copied, with removed weights zero."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    mask_of = {id(parameters[other]): masks[name].cpu() for name, other in match.pairs.items()}
    found = {}
    for name, tensor in state.items():
        mask = mask_of.get(id(parameters.get(places.get(name, ""))))
        tensor = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        found[name] = tensor if mask is None else tensor.masked_fill_(~mask, 0)
    return found


def _write(path: Path, state: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    aside = path.with_name(f".{path.name}.{os.getpid()}")  # readers see a whole file or none
    try:
        save_file(dict(state), str(aside), metadata=dict(metadata))
        os.replace(aside, path)
    except Exception as error:  # safetensors raises its own and OS errors
        with contextlib.suppress(OSError):
            aside.unlink()
        raise UserError(f"{path} cannot be written: {' '.join(str(error).split())}. Choose another with --to.") from error
