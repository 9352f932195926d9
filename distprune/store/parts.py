"""Tables at a URL: streams that only grow, in numbered parts, as nothing is appended to an object.

    tables/<generation>-<owner>-<part>[-whole]

A part holds the next bytes of every stream; one that is `whole` holds them from the beginning, and is the first of each driver. Each driver
has a generation of its own, above all that it found: the highest one that has a whole part is what counts, and what a driver of a lower
one still writes is never read. All of one part is there or nothing, so that the journal is never ahead of the reports.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import NamedTuple

from distprune.errors import UserError
from distprune.store.place import Objects

STREAMS = ("study.journal", "reports.arrows")  # in the order in which a driver reads them: what is told has been reported before
FOLDER = "tables"
_NAME = re.compile(rf"{FOLDER}/(\d{{8}})-([0-9a-f]{{8}})-(\d{{8}})(-whole)?")
_AT_ONCE = 8  # downloads
_AGAIN = 5  # times that a list is read anew, whose parts went as a driver put them together


class Part(NamedTuple):
    """Which part: of two, the greater counts. Drivers of one generation are told apart by their owner, which is drawn."""

    generation: int
    owner: str
    number: int
    whole: bool

    @property
    def name(self) -> str:
        """Of its object."""
        return f"{FOLDER}/{self.generation:08}-{self.owner}-{self.number:08}{'-whole' if self.whole else ''}"

    @property
    def driver(self) -> tuple[int, str]:
        """Whose it is: drivers supersede each other in this order."""
        return self.generation, self.owner


@dataclass(frozen=True)
class Tables:
    """The streams as they were found."""

    driver: tuple[int, str] = (0, "")  # whose they are
    streams: Mapping[str, bytes] = field(default_factory=lambda: dict.fromkeys(STREAMS, b""))


def listed(objects: Objects) -> list[Part]:
    """The parts that are there, in order; anything else that lies there is none."""
    found = filter(None, (_NAME.fullmatch(name) for name, _, _ in objects.list(FOLDER, deep=False)))
    return sorted(Part(int(match[1]), match[2], int(match[3]), bool(match[4])) for match in found)


def pack(pieces: Mapping[str, tuple[int, bytes]]) -> bytes:
    """The content of a part: stream -> (where in the stream, bytes), with a checksum of all."""
    head = json.dumps([[name, start, len(data)] for name, (start, data) in pieces.items()])
    body = b"".join([head.encode(), b"\n", *(data for _, data in pieces.values())])
    return hashlib.sha256(body).hexdigest().encode() + b"\n" + body


def unpack(content: bytes) -> dict[str, tuple[int, bytes]] | None:
    """The inverse of `pack`; None for what is torn or damaged."""
    digest, _, body = content.partition(b"\n")
    if hashlib.sha256(body).hexdigest().encode() != digest:
        return None
    head, _, rest = body.partition(b"\n")
    pieces = {}
    for name, start, size in json.loads(head):
        if name in STREAMS:
            pieces[name] = (int(start), rest[:size])
        rest = rest[size:]
    return pieces


def read(objects: Objects) -> Tables:
    """The streams of the driver that counts, up to the first part that is torn or missing.

    Raises OSError, or UserError if they never hold still.
    """
    for _ in range(_AGAIN):
        try:
            return _read(objects, listed(objects))
        except FileNotFoundError:
            continue
    raise UserError("The tables of the run change faster than they can be read. Try again.")


def _read(objects: Objects, parts: list[Part]) -> Tables:
    for first in sorted((part for part in parts if part.whole), key=lambda part: (part.driver, part.number), reverse=True):
        if (pieces := unpack(objects.get(first.name))) is None:
            continue
        streams = {name: bytearray(pieces.get(name, (0, b""))[1]) for name in STREAMS}
        for content in _contents(objects, _following(first, parts)):
            pieces = unpack(content)
            if pieces is None or any(start != len(streams[name]) for name, (start, _) in pieces.items()):
                break
            for name, (_, data) in pieces.items():
                streams[name] += data
        return Tables(first.driver, {name: bytes(data) for name, data in streams.items()})
    return Tables()


def _following(first: Part, parts: list[Part]) -> list[Part]:
    """The parts after one, up to the first that is missing."""
    own = {part.number: part for part in parts if part.driver == first.driver and not part.whole}
    number, found = first.number, []
    while (number := number + 1) in own:
        found.append(own[number])
    return found


def _contents(objects: Objects, parts: list[Part]) -> Iterator[bytes]:
    if parts:
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            yield from pool.map(lambda part: objects.get(part.name), parts)
