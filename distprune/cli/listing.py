"""`distprune list`: every registered name."""

import importlib
from pathlib import Path

import distprune
from distprune.core import registry
from distprune.core.options import REQUIRED
from distprune.errors import unknown


def print_tables(kind: str | None) -> None:
    """Print the tables, or the one called `kind`. Raises UserError for an unknown one."""
    importlib.import_module("distprune.search.tables")
    if kind is not None and kind not in registry.TABLES:
        raise unknown("table", kind, registry.TABLES)
    for table in registry.TABLES.values():
        if kind not in (None, table.kind):
            continue
        print(f"{table.kind}")
        for entry in table:
            print(f"  {entry.name:<14} {entry.summary}")
            options = [
                f"{option.name}{'' if option.default is REQUIRED else f' = {option.default!r}'}{' (searched)' if option.search else ''}"
                for option in entry.options.values()
            ]
            for label, text in (("options", ", ".join(options)), ("paper", entry.paper), ("file", _short(entry.file))):
                if text:
                    print(f"  {'':<14} {label}: {text}")


def _short(path: Path) -> str:
    root = Path(distprune.__file__).parent.parent
    return str(path.relative_to(root)) if path.is_relative_to(root) else str(path)
