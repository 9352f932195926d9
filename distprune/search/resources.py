"""What a trial asks for, as bundles of resources in Ray's words, and how many trials fit on nodes. Nothing here knows Ray itself.

A trial on one rank is one bundle; on several it is one a rank, so that its ranks may lie on different nodes.
"""

from collections.abc import Mapping, Sequence

from distprune.errors import UserError
from distprune.search.config import Workers
from distprune.search.more import Ask

Bundle = dict[str, float]

_ACCELERATOR_SHARE = 0.001  # of a node's mark for its type of accelerator that each bundle takes, as Ray itself does it
_UNITS = {"CPU": "CPUs", "GPU": "GPUs"}


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
    return int(min(node.get(name, 0.0) / amount + 1e-6 for name, amount in bundle.items()))


def weight(ask: Ask | None, workers: Workers) -> int:
    """How many trials' room a trial takes that has been given more memory."""
    if ask is None:
        return 1
    ratios = [given / first for given, first in ((ask.gpus, workers.gpus), (ask.memory, workers.memory)) if given and first]
    return max((-int(-ratio // 1) for ratio in ratios), default=1)


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
