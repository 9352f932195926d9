"""What `distprune apply` shows: a row a layer, and what did not match."""

from typing import TYPE_CHECKING

from rich.table import Table

if TYPE_CHECKING:
    from distprune.export.applied import Applied


def applied_table(applied: "Applied") -> Table:
    """A row a mask, with its weight in the network, then one for each prunable weight without a mask."""
    masks, match, counts = applied.masks, applied.match, applied.masks.counts
    weights = dict(applied.model.named_parameters(remove_duplicate=False))
    table = Table(title=f"{match.network}: {len(match.pairs)} of {len(masks)} masks applied", title_justify="left")
    for name in ("mask", "weight", "shape", "kept", "of", ""):
        table.add_column(name, justify="right" if name in ("kept", "of", "") else "left")

    def row(mask: str, weight: str, shape: "tuple[int, ...]", kept: int, total: int) -> None:
        table.add_row(mask, weight, "x".join(map(str, shape)), f"{kept:,}", f"{total:,}", f"{kept / max(total, 1):.2%}")

    for name, mask in masks.items():
        row(name, match.pairs.get(name, "none"), tuple(mask.shape), counts[name], mask.numel())
    for name in match.unmasked:
        row("none", name, tuple(weights[name].shape), weights[name].numel(), weights[name].numel())
    fit = [masks[name].numel() for name in match.pairs]
    whole = sum(weights[name].numel() for name in match.unmasked)
    table.add_section()
    row("of the network", "", (), sum(counts[name] for name in match.pairs) + whole, sum(fit) + whole)
    return table


def show_applied(applied: "Applied") -> None:
    """The table, what did not match, and where the state was written."""
    from distprune.report.tables import show

    show(applied_table(applied))
    for line in applied.lines():
        print(line)
    print(f"written to {applied.written}" if applied.written else "Nothing was written: name a file with --to OUT.safetensors.")
