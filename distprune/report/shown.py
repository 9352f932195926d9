"""What the command `report` does: the table, the page, and where they are."""

from pathlib import Path

from distprune.errors import UserError
from distprune.report import images, page, watch
from distprune.report.data import Data
from distprune.report.tables import show_result
from distprune.result import Result


def show_report(run: str | Path, to: Path | None = None) -> None:
    """Print the table and write the page; with `to`, each figure too. A page that cannot be written is a line.

    Raises UserError before anything is written.
    """
    if to is not None:
        images.check_target(to)
    result = Result(run)
    show_result(result)
    data = Data.read(result.folder)
    drawn = page.draw(data)
    if to is not None:
        print("\n".join(images.write(drawn, to)))
    try:
        print(f"Page: {page.write(data, drawn)}")
    except UserError as error:
        print(f"No page: {error}")


def follow(run: str | Path) -> None:
    """Write the page for as long as the search runs, then print the table."""
    told: set[bool] = set()

    def listen(path: Path, live: bool) -> None:
        if live and not told:
            print(f"Live page: {path}. Open it in a browser; Ctrl-C ends the following, not the search.", flush=True)
        told.add(live)

    path = watch.watch(run, listen=listen, warn=lambda line: print(f"{line} Trying again.", flush=True))
    result = Result(run)
    if result.folder.trials.exists():
        show_result(result)
    print(f"Page: {path}")
