"""Errors for users: one line that says the rule, the value and the way out."""

import os
from collections.abc import Iterable
from difflib import get_close_matches


class UserError(ValueError):
    """Something the user wrote cannot be done. The command line prints it as one line and exits with code 2."""


class TakenOver(BaseException):
    """Another driver goes on with this search. No Exception: no engine between a driver and its book is to catch it and go on."""


class Terminated(KeyboardInterrupt):
    """SIGTERM, taken as Ctrl-C is: whoever ends this process wants to go on later."""


def command(arguments: str) -> str:
    """A distprune command as this user types it: under `uv run`, no `distprune` is on the path."""
    return f"{'uv run ' if 'UV_RUN_RECURSION_DEPTH' in os.environ else ''}distprune {arguments}"


def unknown(what: str, name: object, known: Iterable[str]) -> UserError:
    """The error for a name that is not in a list, with the nearest one that is.

    >>> str(unknown("criterion", "magnitud", ["magnitude", "random"]))
    "Unknown criterion 'magnitud'. Did you mean 'magnitude'? Known: magnitude, random."
    """
    names = sorted(known)
    near = get_close_matches(str(name), names, n=1)
    hint = f" Did you mean '{near[0]}'?" if near else ""
    return UserError(f"Unknown {what} '{name}'.{hint} Known: {', '.join(names) or 'none'}.")
