"""The table of the export room."""

from distprune.core.registry import Table

# always: every export holds it, as the others are checked against it. plain: it needs no further package, and is written unless others
# are asked for. packages: modules that it needs, and the extra that brings them. network: how an `Export` reads it back as a network of
# its own, (export, device) -> callable; loaded: the same where it is the masked network once more. device: where it is checked and timed.
format = Table(
    "format", "distprune.export.formats", always=False, plain=False, packages=(), extra="", network=None, loaded=None, device="cpu"
)
