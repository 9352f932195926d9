"""What an export is made of: the network of a run as it stands, and what its forms have in common."""

import copy
import warnings
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from distprune.core import registry
from distprune.core.edits import structure
from distprune.core.edits.shrink import shrink
from distprune.core.masks import Masks
from distprune.core.run import Run
from distprune.core.units import Units
from distprune.errors import UserError
from distprune.export.kinds import Kind, kind_of


@dataclass(frozen=True, kw_only=True)
class Written:
    """What a format has written."""

    files: Sequence[str]  # names, in the export folder
    notes: Sequence[str] = ()  # what must be known about them, a sentence each
    facts: Mapping[str, Any] = field(default_factory=dict)  # for the manifest


@dataclass(frozen=True)
class Slim:
    """The network without the channels and heads of which masks keep nothing."""

    network: nn.Module
    removed: int  # channels and heads that were taken out
    note: str  # how many, or why none

    @property
    def name(self) -> str:
        """Of what other forms are made of it: the masked network itself where nothing was taken out."""
        return "slim" if self.removed else "masked"


@dataclass(frozen=True)
class Traced:
    """A network as a graph."""

    program: torch.export.ExportedProgram
    any_batch: bool  # else it takes one input at a time
    note: str = ""


@dataclass(frozen=True)
class Source:
    """A network that is exported; everything is in eval mode and on the CPU."""

    run: Run
    network: nn.Module  # removed weights are zero
    edits: Sequence[structure.Edit]  # that `network` is built with
    kind: Kind

    @classmethod
    def of(cls, run: Run) -> "Source":
        """The network as its latest report measured it: of a trial that was stopped, with the weights that its stage showed."""
        state, stage = run.state, run.state.stage
        inside: AbstractContextManager[None] = nullcontext()
        if state.entered and stage < len(run.plan.stages):
            inside = run.plan.stages[stage].viewing(state, run.env)
        with inside:
            network = copy.deepcopy(state.model)
        network.requires_grad_(False)
        for edit in state.edits:
            if edit["kind"] == "scale":
                structure.fold(network, edit)
        kind = kind_of(run.env.task, network)  # on the run's device, whose answers they are
        return cls(run, network.cpu().eval(), [edit for edit in state.edits if edit["kind"] != "scale"], kind)

    @cached_property
    def masks(self) -> Masks:
        """What is kept of each prunable weight."""
        return self.run.state.masks.to("cpu")

    @cached_property
    def example(self) -> Tensor:
        """One input, [1, ...]."""
        return self.run.env.task.example().cpu()

    def values(self) -> dict[str, Tensor]:
        """Parameters and buffers, each in memory of its own."""
        return {name: tensor.detach().clone().contiguous() for name, tensor in self.network.state_dict().items()}

    @cached_property
    def slim(self) -> Slim:
        """See `Slim`."""
        try:
            units = self._channels()
        except UserError as error:
            return Slim(self.network, 0, f"No channel or head can be taken out: {error}")
        kept = units.alive(self.run.state.masks)  # where the units are
        for line in kept.values():
            line[0] |= not line.any()  # of a layer that is removed as a whole, one channel of zeros has to stay
        units_in_all = sum(line.numel() for line in kept.values())
        removed = units_in_all - sum(int(line.sum()) for line in kept.values())
        if not removed:
            granularity = self.run.recipe.granularity.name
            why = (
                "nothing is removed" if self.masks.sparsity == 0 else f"masks of granularity '{granularity}' leave a weight in each of them"
            )
            return Slim(
                self.network,
                0,
                f"None of {units_in_all:,} channels and heads is taken out, as {why}: the network is as large as the dense one. "
                "Masks of granularity filter or channel make it smaller.",
            )
        network = shrink(self.network, units.channels, kept)
        return Slim(network.eval(), removed, f"{removed:,} of {units_in_all:,} channels and heads are taken out.")

    def _channels(self) -> Units:
        """The channels, from what the run has found already where its masks are of channels."""
        recipe, state = self.run.recipe, self.run.state
        own = "sparsity" in recipe.paradigm.entry.facts["uses"] and recipe.granularity.entry.facts["channels"]
        choice = recipe.granularity if own else registry.granularity.choose("filter")
        return state.units(choice, self.run.env.task.example)

    @cached_property
    def traced(self) -> Traced:
        """The slim network as torch.export traces it, for any number of inputs at once where it can be."""
        network = copy.deepcopy(self.slim.network)
        try:
            program = _trace(network, torch.cat([self.example] * 2), {0: torch.export.Dim.DYNAMIC})  # one input would be a constant
            return Traced(program, any_batch=True)
        except Exception as error:  # whatever a forward method does that cannot be traced for an open number
            reason = _first_line(error)
        try:
            program = _trace(network, self.example, None)
        except Exception as error:
            raise UserError(
                f"{type(network).__name__} cannot be traced by torch.export: {_first_line(error)} "
                "Leave out onnx and pt2, or rewrite its forward method."
            ) from error
        return Traced(program, any_batch=False, note=f"It takes one input at a time, as its forward method fixes the number: {reason}")

    @cached_property
    def dense_bytes(self) -> int:
        """Bytes of the parameters and buffers of the network as it was built."""
        dense = self.network
        if self.edits:
            with torch.random.fork_rng([]):
                dense = self.run.env.build()
        return sum(tensor.numel() * tensor.element_size() for tensor in dense.state_dict().values())


def _trace(network: nn.Module, inputs: Tensor, shapes: Any) -> torch.export.ExportedProgram:
    """A graph without the places in the code that its nodes come from, which are paths of this machine.

    Attention is traced as a sum of plain operations, which all runtimes have.
    """
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # of torch, about its own insides
            program = torch.export.export(network, (inputs,), dynamic_shapes=(shapes,))
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)
    return program


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
