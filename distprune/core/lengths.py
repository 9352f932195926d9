"""Training lengths: text with a unit where people write them, integer steps where programs use them."""

import re
from typing import Annotated, Any

from distprune.errors import UserError

_PATTERN = re.compile(r"([0-9]+(?:\.[0-9]+)?)(ep|it|%)")
_MOST = 1e9


class LengthMark:
    """Marks an option as a length in an annotation."""


# An option of this type is written as '20ep', '500it' or '10%' and arrives as integer steps.
Length = Annotated[Any, LengthMark()]


def check_length(text: Any, where: str, *, relative: bool = True, zero: bool = True) -> str:
    """Return `text` if it is a length. Raises UserError with the accepted forms otherwise."""
    match = _PATTERN.fullmatch(text) if isinstance(text, str) else None
    if match is None:
        raise UserError(f"{where} must be a length with a unit, got {text!r}. Write '20ep' for epochs or '500it' for steps.")
    if match[2] == "%" and not relative:
        raise UserError(f"{where} must be in epochs or steps, got {text!r}. Write '20ep' or '500it'.")
    if float(match[1]) > _MOST or not (zero or float(match[1])):
        raise UserError(f"{where} must be {'' if zero else 'above 0 and '}at most {_MOST:g}, got {text!r}. Write '1ep' or '500it'.")
    return str(text)


def to_steps(text: str, *, steps_per_epoch: int, whole: int = 0) -> int:
    """Steps of a length, rounded half up. `whole` (steps) is what a percentage refers to.

    >>> to_steps("1.5ep", steps_per_epoch=10), to_steps("7it", steps_per_epoch=10), to_steps("50%", steps_per_epoch=10, whole=30)
    (15, 7, 15)
    """
    match = _PATTERN.fullmatch(text)
    assert match is not None, text
    unit = {"ep": steps_per_epoch, "it": 1, "%": whole / 100}[match[2]]
    return int(float(match[1]) * unit + 0.5)
