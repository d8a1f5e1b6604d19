"""Fixtures: both databases, migrated; a running daemon."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from peers import Postgres

from dicomai.settings import shipped
from dicomai.store.database import Database, current_revision, open_database, upgrade

# Every test has a data folder of its own, where "auto" would measure the engines for seconds.
os.environ["DICOMAI_INFER__DEVICE"] = "cpu"
OURS = {"DICOMAI_SHARED", "DICOMAI_INFER__DEVICE"}

# The files that take minutes: `make test` gives each process the next one, and a long one that
# begins last would leave the other process with nothing to do.
LONGEST = (
    "retrain", "crash", "compress", "loop", "journey", "load", "matrix", "lifecycle", "storm",
    "trouble", "images", "site",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first."""
    names = [f"test_{name}.py" for name in LONGEST]
    items.sort(key=lambda item: (*names, item.path.name).index(item.path.name))


@pytest.fixture(autouse=True)
def no_overrides(monkeypatch: pytest.MonkeyPatch) -> None:
    """The developer's own DICOMAI_ variables do not reach the tests."""
    for name in list(os.environ):
        if name.startswith("DICOMAI_") and name not in OURS:
            monkeypatch.delenv(name)


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """A cluster for the whole run."""
    cluster = Postgres(fsync=False)
    yield cluster
    cluster.stop()


def migrated(url: str) -> str:
    """The same URL, of a database with a schema that nobody is connected to."""
    opened = open_database(url)
    upgrade(opened, shipped("migrations"))
    opened.engine.dispose()
    return url


@pytest.fixture(scope="session")
def sqlite_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A migrated database that nobody writes to: to copy one takes a hundredth of the time."""
    file = tmp_path_factory.mktemp("template") / "dicomai.db"
    migrated(f"sqlite:///{file}")
    return file


@pytest.fixture(scope="session")
def postgres_template(postgres: Postgres) -> str:
    """The same of Postgres: its name."""
    return migrated(postgres.new_database()).rsplit("/", 1)[1]


@pytest.fixture(params=["sqlite", "postgres"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A database of each kind: empty, unless what asks for it asks for `database`, too."""
    is_empty = "database" not in request.fixturenames
    if request.param == "sqlite":
        file = tmp_path / "dicomai.db"
        if not is_empty:
            shutil.copyfile(request.getfixturevalue("sqlite_template"), file)
        return f"sqlite:///{file}"
    template = "template1" if is_empty else request.getfixturevalue("postgres_template")
    url: str = request.getfixturevalue("postgres").new_database(template)
    return url


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    """A migrated database of each kind."""
    opened = open_database(database_url)
    if current_revision(opened) is None:  # where a file has a database_url of its own
        upgrade(opened, shipped("migrations"))
    yield opened
    opened.engine.dispose()
