"""What is kept on disk while a search runs: checkpoints of running trials and of those on the front."""

import shutil

from distprune.search.book import Book
from distprune.store.folder import RunFolder


class Retention:
    """Deletes the checkpoints of ended trials that are not on the front."""

    def __init__(self, folder: RunFolder, book: Book) -> None:
        self._folder, self._book = folder, book
        self._held: set[int] = {int(path.name) for path in folder.checkpoints.glob("*") if path.name.isdigit()}

    def sweep(self, ended: int | None = None) -> None:
        """Delete what nobody needs any more; called when trial `ended` was told, and once at the start."""
        if ended is not None:
            self._held.add(ended)
        for number in sorted(self._held):
            known = number < len(self._book.entries)
            if known and self._book.entries[number].told and number not in self._book.front:
                shutil.rmtree(self._folder.checkpoints / str(number), ignore_errors=True)
                self._held.discard(number)
