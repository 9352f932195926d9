"""Content keys: two states have the same key exactly if the same work leads to them.

`key = sha256(previous key, kind, version, non-default fields)`. Table entries count as name, version and non-default options.
Two rules make sharing between plans real:
a Train that continues another one, equal but for `until`, has the key it would have alone, with Snapshots in between transparent;
and a stage that reads a snapshot has that snapshot's key in its own.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any

from distprune.core.plan import Plan, Stage
from distprune.core.registry import Choice

VERSION = 1  # of the scheme: a change of it is a change of every key


def canonical(value: Any) -> Any:
    """Plain data that a key depends on."""
    if isinstance(value, Choice):
        return value.identity()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {
            field.name: canonical(getattr(value, field.name))
            for field in dataclasses.fields(value)
            if field.default is dataclasses.MISSING or getattr(value, field.name) != field.default
        }
        version = getattr(type(value), "version", 1)
        return {"kind": type(value).__name__, **({"version": version} if version != 1 else {}), **fields}
    if isinstance(value, Mapping):
        return {str(key): canonical(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [canonical(item) for item in value]
    return value


def digest(*parts: Any) -> str:
    """64 hexadecimal digits of canonical parts."""
    text = json.dumps([VERSION, *map(canonical, parts)], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


@dataclasses.dataclass(frozen=True)
class Link:
    """A stage of a plan, as the key after it sees it."""

    base: str  # the key before the trajectory that it belongs to
    whole: Stage  # the trajectory up to its end, as one stage
    reads: tuple[str, ...]  # keys of the snapshots that it reads
    after: str  # the key after it

    def at(self, whole: Stage) -> str:
        """The key of another point of the trajectory, where `whole` is what was done of it."""
        return digest(self.base, whole, *self.reads)


def chain(root: str, plan: Plan) -> list[Link]:
    """What the keys of the stages of `plan` are made of; `root` is the key of the state before the first."""
    links: list[Link] = []
    base = root
    snapshots: dict[str, str] = {}
    for index, stage in enumerate(plan.stages):
        previous = links[-1].after if links else root
        if stage.writes:
            snapshots[stage.writes] = previous
            links.append(Link(base, stage, (), previous))
            continue
        joined = plan.joined(index)
        if joined is None:
            base = previous
        reads = (snapshots[stage.reads],) if stage.reads else ()
        links.append(Link(base, joined or stage, reads, digest(base, joined or stage, *reads)))
    return links


def keys(root: str, plan: Plan) -> list[str]:
    """The key of the state after each stage of `plan`; `root` is the key of the state before the first."""
    return [link.after for link in chain(root, plan)]
