"""`distprune list`: every registered name."""

from distprune.errors import unknown
from distprune.report.framework import described, tables


def print_tables(kind: str | None) -> None:
    """Print the tables, or the one called `kind`. Raises UserError for an unknown one."""
    known = tables()
    if kind is not None and kind not in known:
        raise unknown("table", kind, known)
    for name, table in known.items():
        if kind not in (None, name):
            continue
        print(name)
        for entry in table:
            print(f"  {entry.name:<14} {entry.summary}")
            for label, text in described(entry):
                print(f"  {'':<14} {label}: {text}")
