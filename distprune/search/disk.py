"""The disk of a run folder: whether there is room for another trial, and what is said about it."""

import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from distprune.search.retention import Retention, size_text
from distprune.store.files import free_bytes
from distprune.store.folder import RunFolder

LATELY_S = 15.0  # for which a sign that somebody found the disk full is believed; who waits renews it

Listener = Callable[[str, dict[str, Any]], None]


class Disk:
    """Why no trial can be begun for now. Says so when it begins and when it ends."""

    def __init__(
        self,
        folder: RunFolder,
        least: int,
        retention: Retention,
        listen: Listener,
        *,
        free: Callable[[Path], int] = free_bytes,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._folder, self._least, self._retention, self._listen, self._free, self._clock = folder, least, retention, listen, free, clock
        self._why = ""
        with suppress(OSError):
            folder.full.touch()  # now, as there may be no space for it later
        self._sign, self._until = self._latest_sign(), clock()

    def holds(self) -> str:
        """'full' with less than limits.free on the disk or where somebody waits to write, 'crowded' where running trials need more than
        limits.disk, or ''.
        """
        free, found = self._free(self._folder.path), self._found_full()
        why = "full" if free < self._least or found else "crowded" if self._retention.crowded else ""
        if why != self._why:
            self._why = why
            less = f"less than limits.free: {size_text(self._least)}"
            yet = "and yet who had to write found no space, as where a quota is used up"
            says = {
                "full": f"{size_text(free)} are free in {self._folder.path}, {less if free < self._least else yet}. "
                "No trial is begun, and who has to write waits, until there is more.",
                "crowded": f"Running trials need {size_text(self._retention.total)} of checkpoints, more than limits.disk. "
                "No trial is begun until some have ended.",
                "": "There is room on the disk again.",
            }
            self._listen("disk", {"message": says[why]})
        return why

    def _found_full(self) -> bool:
        """Whether somebody has found no space lately, as this process's own clock says."""
        if (sign := self._latest_sign()) != self._sign:
            self._sign, self._until = sign, self._clock() + LATELY_S
        return self._clock() < self._until

    def _latest_sign(self) -> int:
        try:
            return self._folder.full.stat().st_mtime_ns
        except OSError:
            return 0


def tell_waiting(listen: Listener, path: Path, failed: int) -> None:
    """Say that the driver waits for space, or goes on."""
    if failed <= 1:
        listen("disk", {"message": f"The disk is full: waiting to write {path}." if failed else f"{path} is written, the search goes on."})
