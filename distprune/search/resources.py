"""What a trial asks for, as bundles of resources in Ray's words, and how many trials fit on nodes. Nothing here knows Ray itself.

A trial on one rank is one bundle; on several it is one a rank, so that its ranks may lie on different nodes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from distprune.errors import UserError
from distprune.search.config import Workers
from distprune.search.more import Ask

Bundle = dict[str, float]

_ACCELERATOR_SHARE = 0.001  # of a node's mark for its type of accelerator that each bundle takes, as Ray itself does it
_UNITS = {"CPU": "CPUs", "GPU": "GPUs"}
_OF_A_NODE = 0.95  # of its memory is the most that a trial asks for: nodes of one kind differ by a few megabytes


def bundles(workers: Workers, ask: Ask | None = None) -> list[Bundle]:
    """The bundles of a trial, one a rank."""
    gpus, memory = (workers.gpus, workers.memory) if ask is None else (ask.gpus, ask.memory)
    bundle: Bundle = {"CPU": float(workers.cpus), **dict(workers.resources)}
    if gpus:
        bundle["GPU"] = float(gpus)
    if memory:
        bundle["memory"] = float(memory)
    if workers.accelerator:
        bundle[f"accelerator_type:{workers.accelerator}"] = _ACCELERATOR_SHARE
    return [dict(bundle) for _ in range(workers.ranks)]


def slots_on(nodes: Sequence[Mapping[str, float]], workers: Workers) -> int:
    """Trials that run at once on nodes with these resources, `workers.most` at most. A bundle lies on one node, so each is filled alone."""
    bundle = bundles(workers)[0]
    fits = sum(_fits(node, bundle) for node in nodes) // workers.ranks
    return min(fits, workers.most or fits)


def _fits(node: Mapping[str, float], bundle: Bundle) -> int:
    return min(_times(node.get(name, 0.0), amount, whole=name == "GPU") for name, amount in bundle.items())


def _times(has: float, amount: float, *, whole: bool) -> int:
    """How often an amount is there. Of `whole` things a share lies on one."""
    if whole and amount < 1:
        return int(has + 1e-6) * int(1 / amount + 1e-6)
    return int(has / amount + 1e-6)


def largest_on(nodes: Sequence[Mapping[str, float]], workers: Workers) -> float:
    """The most memory (bytes) that a trial, or each of its ranks, may ask for and still fit on the nodes; 0 if it fits on none."""
    one = bundles(workers)[0]
    sizes = {size for node in nodes if (size := _OF_A_NODE * node.get("memory", 0.0)) > 0}
    return max((size for size in sizes if sum(_fits(node, {**one, "memory": size}) for node in nodes) >= workers.ranks), default=0.0)


def bounded(ask: Ask, workers: Workers, largest: float) -> Ask:
    """What a trial was given, on nodes that may be smaller than those of then. What every trial asks for it asks for anyway."""
    if ask.memory is None or workers.memory is None:
        return ask
    return replace(ask, memory=max(min(ask.memory, int(largest)), workers.memory))


def weight(ask: Ask | None, workers: Workers) -> int:
    """How many trials' room a trial takes that has been given more memory."""
    takes = 1
    if ask is not None and 0 < workers.gpus < 1:
        places, beside = _times(1.0, workers.gpus, whole=True), int((1 - ask.gpus) / workers.gpus + 1e-6)
        takes = max(takes, places - beside)
    if ask is not None and ask.memory and workers.memory:
        takes = max(takes, -(-ask.memory // workers.memory))
    return takes


def no_room(nodes: Sequence[Mapping[str, float]], workers: Workers) -> UserError:
    """The error of a cluster on which not even one trial fits."""
    bundle = bundles(workers)[0]
    asks, ranks = _text(bundle), f" for each of {workers.ranks} ranks" if workers.ranks > 1 else ""
    alike = {_text({name: node.get(name, 0.0) for name in bundle}): node for node in nodes}
    has = "; ".join(sorted(alike)[:5]) or "none is there"
    return UserError(f"workers asks for {asks}{ranks}, and the cluster has no room for one trial. Its nodes have: {has}. Ask for less.")


def _text(bundle: Mapping[str, float]) -> str:
    parts = []
    for name, amount in bundle.items():
        if name.startswith("accelerator_type:"):
            parts.append(f"{'a' if amount else 'no'} {name.partition(':')[2]}")
        elif name == "memory":
            parts.append(f"{amount / 10**9:.3g} GB")
        else:
            parts.append(f"{amount:g} {_UNITS.get(name, name)}")
    return ", ".join(parts)
