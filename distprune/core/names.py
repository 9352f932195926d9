"""Names of tensors behind wrappers: what compiles, distributes or checkpoints a module puts a part of its own into the names below it."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from difflib import get_close_matches

# DataParallel, DistributedDataParallel and AveragedModel; torch.compile; FullyShardedDataParallel; activation checkpointing.
WRAPPERS = frozenset({"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})


def unwrapped(name: str) -> str:
    """`name` without the parts that wrappers add, at any level.

    >>> unwrapped("module.encoder._orig_mod.0.weight")
    'encoder.0.weight'
    """
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def paired(wanted: Iterable[str], known: Iterable[str]) -> dict[str, str]:
    """Wanted name -> known name, for those that mean the same.

    All are exact, or they are equal without the parts of wrappers. A network's own module may be called like such a part; then several
    names become equal, and they are paired in the order of their numbers of parts if there are as many on both sides, else not at all.

    >>> paired(["a.weight", "b.weight"], ["module.a.weight", "module._orig_mod.c.weight"])
    {'a.weight': 'module.a.weight'}
    """
    wanted, known = list(wanted), list(known)
    if set(wanted) <= set(known):
        return {name: name for name in wanted}
    left, right = _grouped(wanted), _grouped(known)
    pairs = {
        name: other
        for key, names in left.items()
        if len(names) == len(right.get(key, ()))
        for name, other in zip(names, right[key], strict=True)
    }
    return {name: pairs[name] for name in wanted if name in pairs}


def _grouped(names: Iterable[str]) -> Mapping[str, list[str]]:
    groups: dict[str, list[str]] = defaultdict(list)
    for name in sorted(names, key=lambda name: name.count(".")):
        groups[unwrapped(name)].append(name)
    return groups


def nearest(name: str, known: Iterable[str], count: int = 3) -> list[str]:
    """The names that read most like `name` without the parts of wrappers, the nearest first."""
    names = {unwrapped(other): other for other in known}
    return [names[near] for near in get_close_matches(unwrapped(name), names, n=count, cutoff=0.5)]


def some(names: Iterable[str], most: int = 4) -> str:
    """Names for a message, the first few of them in quotes."""
    names = list(names)
    return ", ".join(f"'{name}'" for name in names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
