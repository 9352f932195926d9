"""The search room: decides what runs next, what goes on and how it is told; one file of it executes on Ray."""

import sys
from types import ModuleType
from typing import Any


class _Room(ModuleType):
    """Python binds a package's name over a function of the same name, so `distprune.search(...)` is answered by the room itself."""

    def __call__(self, *args: Any, **options: Any) -> Any:
        from distprune.api import search

        return search(*args, **options)


sys.modules[__name__].__class__ = _Room
