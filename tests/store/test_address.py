"""A study's address holds no password, and what is wrong with one is said without repeating it."""

import traceback
from pathlib import Path
from typing import Any

import pytest
from postgres import PASSWORD, Postgres
from toys import BASE

from distprune.errors import UserError
from distprune.search.config import Search
from distprune.store import address
from distprune.store.address import check_address, full_address, shown
from distprune.store.connection import check_study

SECRET = "s3cret"


def search(url: Any) -> Search:
    return Search.read({"name": "s", "recipe": BASE, "study": url})


@pytest.mark.parametrize(
    "url",
    [
        f"postgresql://me:{SECRET}@host/db",
        f"postgresql+psycopg2://me:{SECRET}@host:5432/db",
        f"postgresql://me:@{SECRET}/db",
        f"postgresql:///db?password={SECRET}",
        f"postgresql://me@host/db?sslmode=require&sslpassword={SECRET}",
        f"sqlite://me:{SECRET}@/tmp/x.db",
        f"mysql://me:{SECRET}@host/db",
        f"me:{SECRET}@host/db",
        f"postgresql://me:{SECRET}@host:port/db",
        [f"postgresql://me:{SECRET}@host/db"],
        {"url": f"postgresql://me:{SECRET}@host/db"},
        f"nodatabase://me:{SECRET}@host/db",
    ],
)
def test_a_password_is_refused_and_never_repeated(url: Any) -> None:
    for check in (lambda: check_address(url, "search.study"), lambda: search(url)):
        with pytest.raises(UserError, match=r"search\.study must ") as raised:
            check()
        said = "".join(traceback.format_exception(raised.value, chain=True)).replace(repr(url), "")
        assert SECRET not in str(raised.value) and SECRET not in said and "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("mysql://me@host/db", r"must be in a database of the kinds .*, got 'mysql'"),
        ("postgresql+asyncpg://me@host/db", r"got 'postgresql\+asyncpg'"),
        ("sqlite:///studies.db", "must name a file by its whole path"),
        ("sqlite://", "must name a file by its whole path"),
        ("study.db", "must be the URL of a database"),
        ("", "must be the URL of a database"),
    ],
)
def test_what_a_search_cannot_keep_its_study_in_is_refused(url: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_address(url, "search.study")


@pytest.mark.parametrize("url", ["postgresql://me@host:5432/db", "postgresql:///?service=studies", "sqlite:////home/me/studies.db"])
def test_what_is_right_passes_and_is_shown_as_it_is(url: str) -> None:
    check_address(url, "search.study")
    assert search(url).plain()["study"] == url
    assert shown(url) == url and full_address(url).startswith(url.split(":")[0])


def test_a_connection_is_not_waited_for_for_ever_unless_the_url_says_so() -> None:
    assert "connect_timeout=10" in full_address("postgresql://me@host/db")
    assert "connect_timeout=99" in full_address("postgresql://me@host/db?connect_timeout=99")


def test_a_missing_driver_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "psycopg2", None)
    with pytest.raises(UserError, match=r'needs a driver that is not installed\. Write: pip install "distprune\[postgresql\]"\.$'):
        check_study("postgresql+psycopg2://me@127.0.0.1:1/db", "s", "r", begun=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert address.full_address("postgresql://me@host/db").startswith("postgresql+psycopg://"), "which is then what is asked for"


def test_a_password_comes_from_where_the_url_is_not(postgres_server: Postgres, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = postgres_server.database("guarded")
    with pytest.raises(UserError, match=r"cannot be used: .*no password supplied.*given as PGPASSWORD, in ~/\.pgpass or by a service file"):
        check_study(url, "s", "r", begun=False)
    monkeypatch.setenv("PGPASSWORD", f"{PASSWORD}no")
    with pytest.raises(UserError, match="password authentication failed") as raised:
        check_study(url, "s", "r", begun=False)
    assert PASSWORD not in "".join(traceback.format_exception(raised.value, chain=True))
    monkeypatch.setenv("PGPASSWORD", PASSWORD)
    check_study(url, "s", "r", begun=False)
    monkeypatch.delenv("PGPASSWORD")
    file = tmp_path / "pgpass"
    file.write_text(f"127.0.0.1:*:*:guarded:{PASSWORD.replace(':', chr(92) + ':')}\n")
    file.chmod(0o600)
    monkeypatch.setenv("PGPASSFILE", str(file))
    check_study(url, "s", "r", begun=False)
    services = tmp_path / "services"
    services.write_text(f"[studies]\nhost=127.0.0.1\nport={postgres_server.port}\nuser=guarded\ndbname={url.rpartition('/')[2]}\n")
    monkeypatch.setenv("PGSERVICEFILE", str(services))
    check_study("postgresql:///?service=studies", "s", "r", begun=False)
