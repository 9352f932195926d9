"""The disk of a run folder: whether there is room for another trial, and what is said about it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from distprune.search.retention import Retention, size_text
from distprune.store.files import free_bytes

Listener = Callable[[str, dict[str, Any]], None]


class Disk:
    """Why no trial can be begun for now. Says so when it begins and when it ends."""

    def __init__(
        self, folder: Path, least: int, retention: Retention, listen: Listener, *, free: Callable[[Path], int] = free_bytes
    ) -> None:
        self._folder, self._least, self._retention, self._listen, self._free = folder, least, retention, listen, free
        self._why = ""

    def holds(self) -> str:
        """'full' with less than limits.free on the disk, 'crowded' where running trials need more than limits.disk, or ''."""
        free = self._free(self._folder)
        why = "full" if free < self._least else "crowded" if self._retention.crowded else ""
        if why != self._why:
            self._why = why
            says = {
                "full": f"{size_text(free)} are free in {self._folder}, less than limits.free: {size_text(self._least)}. "
                "No trial is begun, and who has to write waits, until there is more.",
                "crowded": f"Running trials need {size_text(self._retention.total)} of checkpoints, more than limits.disk. "
                "No trial is begun until some have ended.",
                "": "There is room on the disk again.",
            }
            self._listen("disk", {"message": says[why]})
        return why


def tell_waiting(listen: Listener, path: Path, waits: bool) -> None:
    """Say that the driver waits for space, or goes on."""
    listen("disk", {"message": f"The disk is full: waiting to write {path}." if waits else f"{path} is written, the search goes on."})
