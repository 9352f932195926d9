"""Options of table entries: the keyword-only parameters of a function, with their search ranges.

A range stands in the annotation of the option that it belongs to: `strength: Annotated[float, LogRange(1e-6, 1e-3)] = 1e-5`
is an option with a default and a place in the default search space. An option without a range is configurable, not searched.
"""

import inspect
import json
import math
import re
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import UnionType
from typing import Any, Literal

from distprune.core.lengths import LengthMark, check_length
from distprune.errors import UserError, unknown

REQUIRED = inspect.Parameter.empty


@dataclass(frozen=True)
class Range:
    """Uniform between `low` and `high`, both included; integers where the option is an integer."""

    low: float
    high: float
    log = False

    def __str__(self) -> str:
        return f"[{self.low:g}, {self.high:g}]"


@dataclass(frozen=True)
class LogRange(Range):
    """As Range, uniform in the logarithm."""

    log = True


@dataclass(frozen=True)
class Choices:
    """One of `values`; empty for all values of a Literal or bool option."""

    values: tuple[Any, ...] = ()

    def __init__(self, *values: Any) -> None:
        object.__setattr__(self, "values", values)


@dataclass(frozen=True)
class PerLayer:
    """One number for each prunable layer of the recipe's model, each in `range`."""

    range: Range

    def __str__(self) -> str:
        return f"{self.range} for each layer"


@dataclass(frozen=True)
class Option:
    """One keyword-only parameter of an entry."""

    name: str
    type: Any
    default: Any
    search: Range | Choices | PerLayer | None  # where the default search space looks, None = nowhere
    is_length: bool

    def check(self, value: Any, where: str) -> Any:
        """Return `value` as this option's type. Raises UserError naming `where`."""
        if self.is_length:
            return check_length(value, where)
        return check_type(value, self.type, where)

    @property
    def values(self) -> tuple[Any, ...]:
        """The values that a Choices option takes."""
        assert isinstance(self.search, Choices)
        if self.search.values:
            return self.search.values
        return (False, True) if self.type is bool else typing.get_args(self.type)


def check_type(value: Any, kind: Any, where: str) -> Any:
    """Return `value` converted to the annotation `kind`; a YAML int is a float where a float is due, nothing else changes.

    Numbers are finite, and whole ones below 2^63, as files hold them.
    """
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if origin is Literal:
        if value not in args:
            raise unknown(f"value for {where}:", value, map(str, args))
        return value
    if origin in (typing.Union, UnionType):
        for option in args:
            try:
                return check_type(value, option, where)
            except UserError:
                continue
    elif origin in (dict, Mapping) and isinstance(value, Mapping):
        return {str(key): check_type(item, args[1], f"{where}.{key}") for key, item in value.items()}
    elif origin in (list, tuple) and isinstance(value, list | tuple):
        return tuple(check_type(item, args[0], f"{where}[{i}]") for i, item in enumerate(value))
    elif kind is type(None) and value is None:
        return None
    elif kind is float and isinstance(value, int | float | str) and not isinstance(value, bool):
        try:
            number = float(value)  # YAML reads 1e-3 as text
        except (ValueError, OverflowError):
            number = math.nan
        if math.isfinite(number):
            return number
    elif kind is int and isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63:
        return value
    elif kind in (bool, str) and isinstance(value, kind):
        return value
    raise UserError(f"{where} must be {_type_name(kind)}, got {value!r}. Write {_written_right(value, kind)}.")


def _written_right(value: Any, kind: Any) -> str:
    """The way out: the value as it was meant, where that can be guessed, else what may stand there."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, UnionType):
        first = next(arg for arg in args if arg is not type(None))
        return _written_right(value, first) + (", or leave it out" if type(None) in args else "")
    number = re.fullmatch(r"(\d*\.?\d+) *(%?)", value) if isinstance(value, str) else None
    if kind in (float, int) and number is not None:  # a percentage in place of a share, a number in quotation marks
        meant = float(number[1]) / (100 if number[2] else 1)
        if kind is float or meant.is_integer():
            return f"{meant:g}"
    if kind is int and isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        return f"{value:.0f}"
    if kind is str and isinstance(value, int | float):
        return f"'{value}'"
    if origin in (list, tuple) and isinstance(value, str | int | float | Mapping):
        return f"[{json.dumps(value, default=str) if isinstance(value, Mapping) else value}]"
    return f"a value such as {_example(kind)}"


def _example(kind: Any) -> str:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (list, tuple):
        return f"[{_example(args[0])}]"
    if origin in (dict, Mapping):
        return f"{{name: {_example(args[1])}}}"
    return {float: "0.5", int: "1", str: "'text'", bool: "true", type(None): "null"}.get(kind, "0.5")


def _type_name(kind: Any) -> str:
    plain = {float: "a number", int: "a whole number", str: "text", bool: "true or false", type(None): "null"}
    if kind in plain:
        return plain[kind]
    origin = typing.get_origin(kind)
    if origin in (typing.Union, UnionType):
        return " or ".join(_type_name(arg) for arg in typing.get_args(kind))
    if origin in (dict, Mapping):
        return "a mapping"
    if origin in (list, tuple):
        return "a list"
    return str(kind)


def options_of(function: Callable[..., Any]) -> dict[str, Option]:
    """The keyword-only parameters of a function."""
    options = {}
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind is not inspect.Parameter.KEYWORD_ONLY:
            continue
        kind, search, is_length = parameter.annotation, None, False
        if isinstance(kind, str):  # written under `from __future__ import annotations`
            kind = eval(kind, inspect.unwrap(function).__globals__)
        if kind is inspect.Parameter.empty:
            kind = Any
        if typing.get_origin(kind) is typing.Annotated:
            kind, *marks = typing.get_args(kind)
            search = next((mark for mark in marks if isinstance(mark, Range | Choices | PerLayer)), None)
            is_length = any(isinstance(mark, LengthMark) for mark in marks)
        options[name] = Option(name, kind, parameter.default, search, is_length)
    return options
