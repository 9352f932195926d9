"""A page that follows a search: written anew every few seconds for as long as it runs."""

import time
from collections.abc import Callable
from pathlib import Path

from distprune.errors import UserError
from distprune.report import page
from distprune.report.data import Data
from distprune.store.folder import RunFolder

_SHARE = 0.2  # of one core that following may take


def watch(
    run: str | Path,
    *,
    listen: Callable[[Path, bool], None],
    warn: Callable[[str], None] = lambda line: None,
    every: float = page.EVERY_S,
) -> Path:
    """Write the page of a run until its search has ended, and return where it is.

    `listen` hears of each page: where it is, and whether there will be another. Ctrl-C ends the following, not the search; the last page
    then reads itself no more. Raises UserError if there is no such run or its first page cannot be written; where a later one cannot be,
    `warn` hears it once, and it is tried again.
    """
    written, warned = False, False
    try:
        while True:
            begun = time.monotonic()
            try:
                data = Data.read(RunFolder.existing(run))  # of a run at a URL, a new copy each time
                path = page.write(data, page.draw(data), live=data.running)
            except UserError as error:
                if not written:
                    raise
                if not warned:
                    warn(str(error))
                warned = True
            else:
                written, warned = True, False
                listen(path, data.running)
                if not data.running:
                    return path
            took = time.monotonic() - begun
            time.sleep(max(every - took, took * (1 / _SHARE - 1)))
    except KeyboardInterrupt:
        data = Data.read(RunFolder.existing(run))
        return page.write(data, page.draw(data))
