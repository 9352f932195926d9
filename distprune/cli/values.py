"""Values that one option of the command line holds several of."""

from collections.abc import Sequence
from typing import Any

from distprune.errors import UserError


def numbers(text: str, option: str) -> list[int]:
    """Whole numbers with commas between.

    >>> numbers("1,64", "--batch")
    [1, 64]
    """
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise UserError(f"{option} must be whole numbers with commas between, got '{text}'. Write {option} 1,64.") from error


def named(texts: Sequence[str]) -> dict[str, Any]:
    """Values by name from 'name=value', read as YAML reads them.

    >>> named(["hidden=64", "shape=[1, 8, 8]"])
    {'hidden': 64, 'shape': [1, 8, 8]}
    """
    import yaml

    found = {}
    for text in texts:
        name, equals, value = text.partition("=")
        try:
            if not name.isidentifier() or not equals or name in found:
                raise ValueError
            found[name] = yaml.safe_load(value)
        except (ValueError, yaml.YAMLError) as error:
            raise UserError(f"--option must be name=value, each name once, got '{text}'. Write --option hidden=64.") from error
    return found
