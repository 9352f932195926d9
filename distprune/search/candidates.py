"""What a space may choose from: the entries of an axis, with the options that are fixed and the ranges of those that are searched."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from distprune.core.budgets import check_sparsity
from distprune.core.options import Choices, LogRange, Option, PerLayer, Range
from distprune.core.registry import Choice, Table
from distprune.errors import UserError, unknown


@dataclass(frozen=True)
class Candidate:
    """An entry that may be chosen."""

    label: str  # what the parameter's value is
    table: Table
    name: str
    fixed: Mapping[str, Any]
    searched: Mapping[str, Range | Choices | PerLayer]

    @property
    def choice(self) -> Choice:
        """The entry with its fixed options, for rules that are about names."""
        return Choice(self.table.kind, self.name, self.fixed)


def read_axis(table: Table, value: Any, where: str) -> list[Candidate]:
    """The candidates of an axis from YAML: a name, a mapping, or a list of both; None is the whole table."""
    if value is None:
        value = table.names()
    if isinstance(value, str | Mapping):
        value = [value]
    if not isinstance(value, list | tuple) or not value:
        raise UserError(f"{where} must be a list of names, got {value!r}. Leave it out to search all: {', '.join(table.names())}.")
    found: list[Candidate] = []
    for item in value:
        if not isinstance(item, str | Mapping):
            raise UserError(f"{where} must be a list of names, got {item!r} in it. Known: {', '.join(table.names())}.")
        options = {key: item[key] for key in item if key not in ("name", "import")} if isinstance(item, Mapping) else {}
        head = {key: item[key] for key in item if key in ("name", "import")} if isinstance(item, Mapping) else item
        entry = table.get(_name(head, where))
        for key in options:
            if key not in entry.options:
                raise unknown(f"option of {where} {entry.name}:", key, entry.options)
        fixed, searched = {}, {}
        for key, option in entry.options.items():
            place = f"{where}.{entry.name}.{key}"
            if key not in options:
                if option.search is not None:
                    searched[key] = option.search
            elif isinstance(options[key], list) and option.type not in (tuple, list) and not _is_sequence(option):
                searched[key] = _narrowed(option, options[key], place)
            else:
                fixed[key] = option.check(options[key], place)
        label = entry.name if not any(other.label == entry.name for other in found) else f"{entry.name} {json.dumps(options)}"
        found.append(Candidate(label, table, entry.name, fixed, searched))
    return found


def read_sparsities(value: Any) -> Range | Choices:
    """A number, [low, high], or a list of three and more values, from YAML. Raises UserError."""
    values = [value] if isinstance(value, int | float) else value
    if not isinstance(values, list | tuple) or not values or not all(isinstance(item, int | float) for item in values):
        raise UserError(f"space.sparsity must be a number, [low, high] or a list of values, got {value!r}. Write [0.5, 0.98].")
    values = [check_sparsity(float(item), "space.sparsity") for item in values]
    if min(values) == 0:
        raise UserError(f"space.sparsity must be above 0, got {value}: paradigm 'dense' is the network without pruning. Write [0.5, 0.98].")
    if values != sorted(set(values)):
        raise UserError(f"space.sparsity must rise, got {value}. Write [0.5, 0.98].")
    return Range(*values) if len(values) == 2 else Choices(*values)


def _name(head: Any, where: str) -> str:
    if isinstance(head, str):
        return head
    if len(head) != 1:
        raise UserError(f"{where} entries must be a name or a mapping with 'name' or 'import', got {head!r}.")
    return f"import:{head['import']}" if "import" in head else str(head["name"])


def _is_sequence(option: Option) -> bool:
    return getattr(option.type, "__origin__", None) in (tuple, list)


def _narrowed(option: Option, values: list[Any], where: str) -> Range | Choices | PerLayer:
    checked = [option.check(value, where) for value in values] if not isinstance(option.search, PerLayer) else values
    if isinstance(option.search, Choices) or option.type not in (int, float) or isinstance(option.search, PerLayer):
        if isinstance(option.search, PerLayer):
            raise UserError(f"{where} is searched for each layer; fix it with a mapping of layer names to shares or leave it out.")
        return Choices(*checked)
    if len(checked) > 2:
        return Choices(*dict.fromkeys(checked))
    if len(checked) != 2 or not checked[0] < checked[1]:
        raise UserError(f"{where} must be [low, high] with low < high, or three and more values, got {values}.")
    return LogRange(*checked) if getattr(option.search, "log", False) else Range(*checked)
