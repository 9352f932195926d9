"""Where the database of a study is: a URL as Optuna takes them, without a password in it.

A URL lands in search.yaml, in reports and on the screen. So a password never comes in by it, and nothing here says what was written there
before it is known that there is none.
"""

from typing import TYPE_CHECKING, Any

from distprune.errors import UserError

if TYPE_CHECKING:
    from sqlalchemy import URL

EXAMPLE = "postgresql://user@host:5432/database"
_DRIVERS = {"postgresql": ("psycopg", "psycopg2"), "sqlite": ("pysqlite",)}
_SECRETS = ("password", "sslpassword")
_PATIENCE = {  # of a connection whose other end has gone without a word; what the URL says counts before
    "application_name": "distprune",
    "connect_timeout": "10",
    "keepalives_idle": "30",
    "keepalives_interval": "10",
    "keepalives_count": "3",
    "tcp_user_timeout": "30000",
}


def check_address(value: Any, where: str) -> None:
    """Raise UserError for what is not the URL of a database that a search can keep its study in."""
    url = _parsed(value)
    if url is None:
        raise UserError(f"{where} must be the URL of a database such as {EXAMPLE}. Leave it out for study.journal in the run folder.")
    if url.password is not None or any(name.lower() in _SECRETS for name in url.query):
        raise UserError(
            f"{where} must hold no password, as it is written into search.yaml. Take it out of the URL, and give it as PGPASSWORD, in "
            "~/.pgpass, or by a service file: postgresql:///?service=NAME."
        )
    kind, driver = url.get_backend_name(), url.drivername.partition("+")[2]
    if kind not in _DRIVERS or (driver and driver not in _DRIVERS[kind]):
        known = "postgresql, postgresql+psycopg, postgresql+psycopg2 and sqlite"
        raise UserError(f"{where} must be in a database of the kinds {known}, got {url.drivername!r}. Write {EXAMPLE}.")
    if kind == "sqlite" and not (url.database or "").startswith("/"):
        raise UserError(f"{where} must name a file by its whole path, got {shown(value)!r}. Write sqlite:////home/me/studies.db.")


def _parsed(value: Any) -> "URL | None":
    from sqlalchemy import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        url = make_url(value) if isinstance(value, str) else None
        return url if url is None or url.get_backend_name() else None
    except (ArgumentError, ValueError):  # their texts hold the URL, and a wrong one may hold a password anywhere
        return None


def shown(url: str) -> str:
    """A checked URL for people."""
    parsed = _parsed(url)
    return "a database" if parsed is None else parsed.render_as_string(hide_password=True)


def full_address(url: str) -> str:
    """A checked URL as Optuna's storage takes it: with the driver that is installed, and how long to wait for a network."""
    parsed = _parsed(url)
    assert parsed is not None
    if parsed.get_backend_name() == "postgresql":
        driver = parsed.drivername.partition("+")[2] or _installed()
        parsed = parsed.set(drivername=f"postgresql+{driver}").update_query_dict({**_PATIENCE, **parsed.query})
    return parsed.render_as_string(hide_password=False).replace("{", "{{").replace("}", "}}")  # Optuna fills templates in


def _installed() -> str:
    from importlib.util import find_spec

    found = [driver for driver in _DRIVERS["postgresql"] if find_spec(driver)]
    return found[0] if found else _DRIVERS["postgresql"][0]
