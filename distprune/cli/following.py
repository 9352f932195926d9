"""The output of a job, shown as it comes, over whatever connection there is."""

import asyncio
import sys
import time
from typing import Any

from distprune.cli.head import POLL_S, info_of, talking
from distprune.errors import UserError, command

STOPPED = 143  # of a job that somebody stopped, as of a program that SIGTERM ended: Ray keeps no code of it
_SILENCE_S, _LOST_S = 60.0, 600.0
_MOST_STREAMS = 3  # that break before they bring anything new; then the log is asked for, again and again


def logs(job: str, *, address: str, tail: int | None, follow: bool) -> int:
    """Show a job's output, or its last `tail` lines; with `follow` until it ends. Returns its exit code, 0 for one that goes on."""
    if tail is not None and tail < 0:
        raise UserError(f"--tail must be at least 0, got {tail}. Leave it out for all lines.")
    with talking(address) as client:
        info = info_of(client, job)
        reader = _Reader(client, job)
        if tail is not None:
            reader.skip(tail)
        if follow:
            return reader.follow(address)
        reader.read()
        return end(job, info) if info.status.is_terminal() else 0


def end(job: str, info: Any) -> int:
    """Say how a job ended; returns its exit code."""
    code = info.driver_exit_code
    print(f"{job}: {info.status.value}" + (f", exit code {code}" if code else ""), flush=True)
    if info.status.value == "STOPPED":
        return STOPPED
    if info.status.value == "SUCCEEDED":
        return 0
    if code is None and info.message:  # it never started: there is no log
        print(info.message, flush=True)
    return code if code and code > 0 else 1


class _Reader:
    """Prints every character of a log once, however often its parts arrive."""

    def __init__(self, client: Any, job: str) -> None:
        self._client, self._job, self._seen = client, job, 0

    def skip(self, tail: int) -> None:
        """Leave all but the last `tail` lines out."""
        lines = self._client.get_job_logs(self._job).splitlines(keepends=True)
        self._seen = sum(map(len, lines[: len(lines) - tail]))

    def read(self) -> None:
        """Print what is new in the log as it is now."""
        self._show(self._client.get_job_logs(self._job), 0)

    def follow(self, address: str) -> int:
        """Print what comes until the job ends; returns its exit code. A lost connection is taken up again."""
        streams, lost_at = _MOST_STREAMS, None
        try:
            while True:
                seen = self._seen
                try:
                    info = self._client.get_job_info(self._job)
                    if info.status.is_terminal() or not streams:
                        self.read()
                    if lost_at is not None:
                        print("connected again", file=sys.stderr, flush=True)
                        lost_at = None
                    if info.status.is_terminal():
                        return end(self._job, info)
                except OSError:
                    if lost_at is None:
                        lost_at = time.monotonic()
                        print(f"connection lost; {self._job} goes on, and this tries again", file=sys.stderr, flush=True)
                    elif time.monotonic() - lost_at > _LOST_S:
                        raise
                else:
                    try:
                        if streams:
                            asyncio.run(self._stream())
                    except TimeoutError:
                        pass  # silent, or cut off without a sign: ask, and connect anew
                    except Exception:  # aiohttp's errors have no common base with Ray's
                        streams = _MOST_STREAMS if self._seen > seen else streams - 1
                time.sleep(POLL_S)
        except KeyboardInterrupt:
            print(f"\n{self._job} goes on. Follow it: {command(f'logs {self._job} --address {address}')}", flush=True)
            raise

    async def _stream(self) -> None:
        start = 0  # each connection sends the log from its start
        async with asyncio.timeout(_SILENCE_S) as limit:
            async for text in self._client.tail_job_logs(self._job):
                self._show(text, start)
                start += len(text)
                limit.reschedule(asyncio.get_running_loop().time() + _SILENCE_S)

    def _show(self, text: str, start: int) -> None:
        """Print what is new in `text`, which is the log from character `start` on."""
        try:
            print(text[max(self._seen - start, 0) :], end="", flush=True)
        except BrokenPipeError:  # `| head`: nobody reads on, the job needs nobody
            raise SystemExit(141) from None
        self._seen = max(self._seen, start + len(text))
