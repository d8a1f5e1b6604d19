"""Fixtures: both databases, migrated; a running daemon."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from peers import Postgres

from dicomai.settings import shipped
from dicomai.store.database import Database, open_database, upgrade

# Every test has a data folder of its own, where "auto" would measure the engines for seconds.
os.environ["DICOMAI_INFER__DEVICE"] = "cpu"
OURS = {"DICOMAI_SHARED", "DICOMAI_INFER__DEVICE"}


@pytest.fixture(autouse=True)
def no_overrides(monkeypatch: pytest.MonkeyPatch) -> None:
    """The developer's own DICOMAI_ variables do not reach the tests."""
    for name in list(os.environ):
        if name.startswith("DICOMAI_") and name not in OURS:
            monkeypatch.delenv(name)


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """A cluster for the whole run."""
    cluster = Postgres()
    yield cluster
    cluster.stop()


@pytest.fixture(params=["sqlite", "postgres"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty database of each kind."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/dicomai.db"
    url: str = request.getfixturevalue("postgres").new_database()
    return url


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    """A migrated database of each kind."""
    opened = open_database(database_url)
    upgrade(opened, shipped("migrations"))
    yield opened
    opened.engine.dispose()
