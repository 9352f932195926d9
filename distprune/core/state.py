"""State: the one mutable object of a run. What outlives a report lives here, and a run goes on from a saved State bit for bit."""

import copy
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from distprune.core.costs import price
from distprune.core.edits import structure
from distprune.core.masks import Masks, prunable
from distprune.core.metrics import Profile, flops, profile, shapes_of
from distprune.core.ranks import ALONE, Ranks
from distprune.core.registry import PARAMS, Choice
from distprune.core.streams import global_stream
from distprune.core.units import Network, Units
from distprune.errors import UserError

FORMAT = "distprune.state/2"


TRAINING = 3  # forward passes that a step costs: one forward, two for the gradients of inputs and weights


@dataclass
class Ledger:
    """Samples and FLOPs. The first three are the bill, a pure function of the plan; `observing` says what else was run."""

    dense: int = 0  # training steps with every weight kept
    sparse: int = 0  # training steps under masks
    scoring: int = 0  # passes of criteria and calibration
    observing: int = 0  # passes of observers: projections and their recovery
    flops: float = 0.0  # of the bill in the prunable layers, as dense hardware runs it
    sparse_flops: float = 0.0  # of the bill, if every zero were skipped

    @property
    def cost(self) -> int:
        """The bill."""
        return self.dense + self.sparse + self.scoring


@dataclass
class State:
    """A network on its way through a plan."""

    model: nn.Module
    weights: dict[str, nn.Parameter]  # the prunable ones
    masks: Masks
    edits: list[structure.Edit] = field(default_factory=list)  # changes of structure since the network was built
    leaves: dict[str, nn.Parameter] = field(default_factory=dict)  # what is trained besides or in place of the weights: learned scores
    memory: dict[str, dict[str, Any]] = field(default_factory=dict)  # parameter or leaf name -> what the optimizer remembers of it
    optimizer: str = ""  # whose memory it is
    slots: dict[str, dict[str, Any]] = field(default_factory=dict)  # hook -> its memory: tensors and plain numbers
    snapshots: dict[str, dict[str, Tensor]] = field(default_factory=dict)  # tag -> parameters and buffers
    penalties: dict[str, dict[str, float]] = field(default_factory=dict)  # what made them -> weight name -> L2 coefficient
    ledger: Ledger = field(default_factory=Ledger)
    stage: int = 0  # index into the plan
    entered: bool = False  # whether that stage has begun
    clock: int = 0  # steps: drives learning rate and data order
    lap: int = 0  # times that the clock was set back
    reports: int = 0  # reports made so far
    sparsity_of: Choice = PARAMS  # the cost that budgets are a share of; no part of what is saved, like the network as it was built
    ranks: Ranks = ALONE  # the processes of the run; no part of what is saved either

    @classmethod
    def new(
        cls,
        build: Callable[[], nn.Module],
        *,
        seed: int,
        device: torch.device,
        include: Iterable[str] = ("*",),
        exclude: Iterable[str] = (),
        sparsity_of: Choice = PARAMS,
    ) -> "State":
        """The state before the first stage: `build` is called under the seed's own random stream."""
        with global_stream(seed, "init"):
            model = build()
        model = model.to(device)
        weights = prunable(model, include=include, exclude=exclude)
        return cls(model, weights, Masks.ones(weights), sparsity_of=sparsity_of)

    def __post_init__(self) -> None:
        self.total = self.masks.total  # prunable weights of the network as it was built: sparsity is counted against it
        self._masked: list[tuple[nn.Parameter, Tensor]] = []
        self._profile: Profile | None = None
        self._units: dict[str, Units] = {}
        self._refresh()

    def _refresh(self) -> None:
        # A step multiplies gradients by float copies in one foreach call, which is cheaper than masked_fill; full layers need nothing.
        full = {name for name, count in self.masks.counts.items() if count == self.masks[name].numel()}
        self._flops: tuple[float, float] | None = None  # of a forward pass: dense, and with zeros skipped
        self._masked = [(self.weights[name], mask.to(self.weights[name].dtype)) for name, mask in self.masks.items() if name not in full]

    def profile(self, example: Callable[[], Tensor]) -> Profile:
        """What the network's layers take for one dense sample; no more than shapes for a network that the counter cannot run."""
        if self._profile is None:
            try:
                self._profile = profile(self.model, example(), self.weights)
            except Exception:  # the forward pass is the user's, and fails where it is trained, with its own words
                self._profile = Profile(shapes_of(self.weights))
        return self._profile

    def layer_flops(self, example: Callable[[], Tensor]) -> Mapping[str, int]:
        """FLOPs of a forward pass of one dense sample in each prunable layer; empty for a network that the counter cannot run."""
        return self.profile(example).flops

    def bill(self, kind: Literal["training", "scoring"], samples: int, example: Callable[[], Tensor], *, passes: int = TRAINING) -> None:
        """Enter `samples` into the ledger; FLOPs are counted on `example`, and a sample costs `passes` forward passes."""
        room = kind if kind == "scoring" else "dense" if self.is_dense else "sparse"
        setattr(self.ledger, room, getattr(self.ledger, room) + samples)
        if self._flops is None:
            dense = self.layer_flops(example)
            self._flops = (float(sum(dense.values())), flops(dense, self.masks) if dense else 0.0)
        self.ledger.flops += passes * samples * self._flops[0]
        self.ledger.sparse_flops += passes * samples * self._flops[1]

    @property
    def sparsity(self) -> float:
        """Share of the prunable weights of the network as it was built that is gone."""
        return 1 - self.masks.kept / self.total

    @property
    def is_dense(self) -> bool:
        """Whether every prunable weight is kept."""
        return not self._masked

    @torch.no_grad()
    def set_masks(self, masks: Masks) -> None:
        """The one place where masks change: removed weights and what the optimizer remembers of them become exactly zero."""
        self.masks = self.ranks.agree(masks)
        self._refresh()
        self.zero_removed()

    def edit(self, edit: structure.Edit) -> None:
        """Change the structure and record it. New weights hold what torch draws until they are set, and are all kept.

        Where weights vanish, what belonged to them goes too: optimizer memory, slots, snapshots, penalties.
        """
        self._apply(edit)
        if edit["kind"] != "scale":
            self.memory, self.slots, self.snapshots = {}, {}, {}
            left = self.weights.keys() - structure.created(edit)
            self.penalties = {
                key: {name: value for name, value in values.items() if name in left} for key, values in self.penalties.items()
            }

    def fold(self) -> None:
        """Write scales into the parameters that they multiply, after which the network needs no edit of this kind."""
        for edit in self.edits:
            if edit["kind"] == "scale":
                structure.fold(self.model, edit)
        self.edits = [edit for edit in self.edits if edit["kind"] != "scale"]

    def _apply(self, edit: structure.Edit) -> None:
        structure.apply(self.model, edit)
        self.edits.append(edit)
        new = structure.created(edit)
        names = self.weights.keys() | new
        self.weights = {name: weight for name, weight in prunable(self.model).items() if name in names}
        kept = {name: mask for name, mask in self.masks.items() if name in self.weights.keys() - new}
        self.masks = Masks({**Masks.ones(self.weights), **kept})
        self._profile, self._units = None, {}
        self._refresh()

    @torch.no_grad()
    def zero_removed(self) -> None:
        """Set removed weights and same-shaped optimizer memory to zero."""
        names = {id(parameter): name for name, parameter in self.weights.items()}
        for weight, mask in self._masked:
            weight.mul_(mask)
            for tensor in self.memory.get(names[id(weight)], {}).values():
                if isinstance(tensor, Tensor) and tensor.shape == mask.shape:
                    tensor.mul_(mask)

    @torch.no_grad()
    def mask_gradients(self) -> None:
        """Set the gradients of removed weights to zero: with it, optimizers whose update keeps zeros never revive a weight."""
        pairs = [(weight.grad, mask) for weight, mask in self._masked if weight.grad is not None]
        if pairs:
            torch._foreach_mul_([grad for grad, _ in pairs], [mask for _, mask in pairs])

    def units(self, granularity: Choice, example: Callable[[], Tensor]) -> Units:
        """What a granularity removes as one in this network, worked out once. Raises UserError where it fits no layer."""
        text = json.dumps(granularity.plain(), sort_keys=True)
        if text not in self._units:
            units: Units = granularity(Network(self.model, self.weights, example))
            if self.sparsity_of != PARAMS:
                units.price = price(self.sparsity_of, self.profile(example))
            self._units[text] = units
        return self._units[text]

    def values(self) -> dict[str, Tensor]:
        """A copy of all parameters and buffers."""
        return {name: tensor.detach().clone() for name, tensor in self.model.state_dict().items()}

    def save(self, path: str | Path, **facts: Any) -> None:
        """Write one safetensors file: tensors under `room/name`, everything else as JSON in the header, `facts` beside it."""
        tensors: dict[str, Tensor] = {f"model/{name}": tensor for name, tensor in self.model.state_dict().items()}
        tensors |= {f"masks/{name}": mask for name, mask in self.masks.items()}
        tensors |= {f"leaves/{name}": leaf for name, leaf in self.leaves.items()}
        tensors |= {f"snapshots/{tag}/{name}": tensor for tag, values in self.snapshots.items() for name, tensor in values.items()}
        plain: dict[str, dict[str, dict[str, Any]]] = {"memory": {}, "slots": {}}
        for room, rows in (("memory", self.memory), ("slots", self.slots)):
            for owner, values in rows.items():
                plain[room][owner] = {key: value for key, value in values.items() if not isinstance(value, Tensor)}
                tensors |= {f"{room}/{owner}/{key}": value for key, value in values.items() if isinstance(value, Tensor)}
        position = {key: getattr(self, key) for key in ("optimizer", "stage", "entered", "clock", "lap", "reports")}
        on_host = [name for name, tensor in tensors.items() if tensor.device.type == "cpu"]  # step counts of some optimizers
        tree: dict[str, Any] = {"position": position, "ledger": asdict(self.ledger), "plain": plain, "on_host": on_host, "facts": facts}
        tree |= {"edits": self.edits, "penalties": self.penalties}
        # Tied weights share storage, which safetensors refuses: each name is written as its own copy.
        written = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
        save_file(written, str(path), metadata={"format": FORMAT, "tree": json.dumps(tree)})

    @staticmethod
    def facts(path: str | Path) -> dict[str, Any]:
        """The facts in the header of a saved state. Raises UserError if it is not one."""
        try:
            with safe_open(str(path), framework="pt") as file:
                return dict(json.loads((file.metadata() or {})["tree"])["facts"])
        except Exception as error:  # a damaged file may fail in safetensors or JSON
            raise UserError(f"{path} is not a readable state: {error}.") from error

    def load(self, path: str | Path) -> dict[str, Any]:
        """Take over what `save` wrote, into this state's network, and return the facts. Raises UserError if the file does not fit."""
        device = next(self.model.parameters()).device
        try:
            with safe_open(str(path), framework="pt", device=str(device)) as file:
                header = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}
            if header.get("format") != FORMAT:
                raise ValueError(f"its format is {header.get('format')!r}, not {FORMAT!r}")
            tree = json.loads(header["tree"])
            rooms: dict[str, dict[str, Tensor]] = {room: {} for room in ("model", "masks", "leaves", "snapshots", "memory", "slots")}
            on_host = set(tree["on_host"])
            for name, tensor in tensors.items():
                room, _, rest = name.partition("/")
                rooms[room][rest] = tensor.cpu() if name in on_host and room == "memory" else tensor
            # Checked before anything is copied: a file that does not fit leaves the network as it was.
            if self.edits:
                raise ValueError("it was edited, and states are loaded into networks as they are built")
            edited = copy.deepcopy(self) if tree["edits"] else self
            with torch.random.fork_rng([]):  # new layers are drawn, and hold what was saved in the end
                for edit in tree["edits"]:
                    edited._apply(edit)
            shapes = {name: tensor.shape for name, tensor in edited.model.state_dict().items()}
            if shapes != {name: tensor.shape for name, tensor in rooms["model"].items()} or rooms["masks"].keys() != edited.weights.keys():
                raise ValueError("it holds another network")
            with torch.random.fork_rng([]):
                for edit in tree["edits"]:
                    self._apply(edit)
            self.model.load_state_dict(rooms["model"])
        except Exception as error:  # a damaged file may fail in safetensors, JSON or torch
            raise UserError(f"{path} is not a readable state of this network: {error}.") from error
        self.leaves = {name: nn.Parameter(tensor) for name, tensor in rooms["leaves"].items()}
        self.memory, self.slots = tree["plain"]["memory"], tree["plain"]["slots"]
        for room, rows in (("memory", self.memory), ("slots", self.slots)):
            for name, tensor in rooms[room].items():
                owner, _, key = name.rpartition("/")
                rows.setdefault(owner, {})[key] = tensor
        self.snapshots = {}
        for name, tensor in rooms["snapshots"].items():
            tag, _, key = name.partition("/")
            self.snapshots.setdefault(tag, {})[key] = tensor
        for key, value in tree["position"].items():
            setattr(self, key, value)
        self.ledger, self.penalties = Ledger(**tree["ledger"]), tree["penalties"]
        self.masks = Masks({name: rooms["masks"][name] for name in self.weights})
        self._refresh()
        return dict(tree["facts"])
