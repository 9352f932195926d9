"""From YAML to frozen dataclasses: unknown keys, missing keys and wrong types fail here, in one line that names the place.

Recipes must load where only torch is installed, so the reader is these few functions and not a validation library; searches use it too.
"""

import dataclasses
import typing
from collections.abc import Mapping
from pathlib import Path
from types import UnionType
from typing import Any

from distprune.core import registry
from distprune.core.options import check_type
from distprune.core.registry import Choice
from distprune.errors import UserError, unknown

_TABLE_OF = {"sparsity_of": "cost"}  # fields that are not called like their table


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises UserError if there is none."""
    import yaml

    try:
        text = Path(path).read_text()
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not text"
        raise UserError(f"Cannot read {path}: {why}. Give the path of a YAML file, such as configs/digits.yaml.") from error
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:  # a date or a number that is none raises the latter
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}. Mend it there.") from error
    if not isinstance(value, Mapping):
        raise UserError(f"{path} must hold a mapping of keys, got {type(value).__name__}. configs/digits.yaml is an example.")
    return dict(value)


def read_fields(cls: Any, value: Any, where: str) -> dict[str, Any]:
    """Keyword arguments of the dataclass `cls` from a mapping; a Choice field is looked up in the table of its name."""
    if isinstance(value, cls):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if not isinstance(value, Mapping):
        keys = ", ".join(f"{field.name}: ..." for field in dataclasses.fields(cls)[:3])
        raise UserError(f"{where} must be a mapping of keys, got {value!r}. Write {{{keys}}}.")
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}
    for key in value:
        if key not in fields:
            raise unknown(f"key in {where}:", key, fields)
    for name, field in fields.items():
        if name not in value and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise UserError(f"{where} needs '{name}'. Write {name}: ...")
    return {name: _read(hints[name], name, item, f"{where}.{name}") for name, item in value.items()}


def _read(kind: Any, name: str, value: Any, where: str) -> Any:
    if isinstance(kind, UnionType) and type(None) in (parts := typing.get_args(kind)) and any(hasattr(part, "read") for part in parts):
        return None if value is None else _read(parts[0], name, value, where)
    if kind is Choice:
        return registry.TABLES[_TABLE_OF.get(name, name)].read(value, where)
    if hasattr(kind, "read"):
        return kind.read(value, where)
    return check_type(value, kind, where)
