"""One of the processes of a run on several ranks, for tests: `python rank_process.py RANK SIZE FOLDER`, with `cases.json` in the folder."""

import json
import os
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import distributed, nn
from toys import finish, ready

from distprune.core.hooks.early_bird import EarlyBird
from distprune.core.masks import Masks
from distprune.core.ranks import ALONE, Ranks, Together
from distprune.core.run import Run


class _Double(nn.Module):
    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return inputs.double()


def double(shape: tuple[int, int, int], classes: int) -> nn.Module:
    """A network with batch normalisation and without dropout, in float64: where no tie is near, rounding decides nothing.

    Its normalised units are off the kink of the ReLU, where those whose weights are all gone would stand.
    """
    network = nn.Sequential(
        _Double(),
        nn.Conv2d(shape[0], 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(6 * (shape[1] // 2) * (shape[2] // 2), 16),
        nn.BatchNorm1d(16),
        nn.ReLU(),
        nn.Linear(16, classes),
    ).double()
    for norm in (network[2], network[7]):
        nn.init.constant_(norm.bias, 0.1)
    return network


def run_case(case: dict[str, Any], ranks: Ranks) -> dict[str, Any]:
    """A recipe on the toys, to its end: what came out as plain data."""
    case = dict(case)
    micro_batch, broken, deaf = case.pop("micro_batch", None), case.pop("broken", False), case.pop("deaf", False)
    run: Run = ready(case.pop("paradigm"), case.pop("sparsity", None), **case)
    run.env.task.ranks = run.state.ranks = ranks
    run.env.task.micro_batch = micro_batch
    if any(weight.dtype == torch.float64 for weight in run.state.weights.values()):  # the task's own loss is float32
        run.env.task.loss_of = lambda outputs, batch: F.cross_entropy(outputs, batch[1])  # type: ignore[method-assign]
    if broken and ranks.rank:  # a process that has come apart
        with torch.no_grad():
            for parameter in run.state.model.parameters():
                parameter.add_(0.01)
    settled = EarlyBird.step
    if deaf and ranks.rank:  # one that would never see that masks have settled
        EarlyBird.step = lambda *arguments: settled(*arguments) and False  # type: ignore[method-assign]
    try:
        reports = finish(run)
    finally:
        EarlyBird.step = settled  # type: ignore[method-assign]
    state = run.state
    tensors = {name: value.double().flatten().tolist() for name, value in state.values().items()}
    return {
        "masks": {name: mask.flatten().int().tolist() for name, mask in state.masks.items()},
        "values": tensors,
        "reports": [[r.index, r.clock, r.cost, r.kept, r.metrics["accuracy"]] for r in reports],
        "losses": [r.metrics["loss"] for r in reports],
        "key": run.key,
    }


def primitives(ranks: Ranks) -> dict[str, Any]:
    """What ranks say to one another."""
    own = Masks({"a": torch.tensor([[True, False], [bool(ranks.rank), True]]), "b": torch.tensor([not ranks.rank])})
    state = ready("dense").state
    kept = state.slots["0.Hook"] = {
        "steps": 3 + ranks.rank,
        "deep": {"a": [0.1 * ranks.rank]},
        "mask": torch.tensor([not ranks.rank]),
        f"only {ranks.rank}": 1,
    }
    state.slots["1.Hook"] = dict(sorted({"x": torch.ones(2) + ranks.rank, "y": torch.zeros(2)}.items(), reverse=bool(ranks.rank)))
    state.penalties = {"l2": {"w": 1.0 + ranks.rank}}
    ranks.align(state)
    parts = torch.arange(22.0).reshape(11, 2).split(3)
    computed: list[int] = []

    def compute(part: torch.Tensor) -> torch.Tensor:
        computed.append(len(part))
        return part * 10

    return {
        "told": ranks.tell(b"rank 0's" if ranks.rank == 0 else b"").decode(),
        "nothing": ranks.tell(b"").decode(),
        "masks": {name: mask.tolist() for name, mask in ranks.agree(own).items()},
        "plain": [{key: value for key, value in kept.items() if key != "mask"}, kept["mask"].tolist(), state.penalties],
        "order": {key: value.tolist() for key, value in state.slots["1.Hook"].items()},
        "each": ranks.each(parts, compute).tolist(),
        "one": ranks.each(parts[:1], compute).tolist(),
        "computed": computed,
    }


def meet(rank: int, size: int, folder: Path) -> None:
    """Join the others on loopback."""
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=size, timeout=timedelta(seconds=60)
    )


def main(rank: int, size: int, folder: Path) -> None:
    """Run every case and write what came of it."""
    meet(rank, size, folder)
    ranks = Together("cpu")
    cases = json.loads((folder / "cases.json").read_text())
    found = {name: run_case(case, ranks) for name, case in cases.items()}
    (folder / f"{rank}.json").write_text(json.dumps({**found, "primitives": primitives(ranks)}))
    distributed.destroy_process_group()


def alone(case: dict[str, Any]) -> dict[str, Any]:
    """The same in one process."""
    return run_case(case, ALONE)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
