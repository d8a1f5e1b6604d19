"""What people get wrong is answered with one line on standard error and exit code 1 or 2."""

import shutil
import socket
import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import make
import pytest
from killed import say
from peers import free_port

from dicomai.settings import shipped
from dicomai.store.database import open_database, upgrade

FAILED, MISUSED = 1, 2
DESTINATION = """
[[destinations]]
name = "pacs"
ae_title = "ORTHANC"
host = "127.0.0.1"
port = {port}
"""


@dataclass(frozen=True)
class Site:
    """A folder with a settings file, as an administrator has it."""

    folder: Path

    @property
    def config(self) -> Path:
        """The settings file."""
        return self.folder / "dicomai.toml"

    @property
    def url(self) -> str:
        """The SQLite database of the settings."""
        return f"sqlite:///{self.folder}/dicomai.db"

    def write(self, more: str = "", url: str = "", top: str = "", port: int = 0) -> None:
        """The settings; more: sections, top: keys above the first section."""
        self.config.write_text(
            f'data_dir = "{self.folder}/data"\n{top}\n[database]\nurl = "{url or self.url}"\n'
            f'[receive]\nhost = "127.0.0.1"\nport = {port or free_port()}\n{more}\n'
        )

    def migrate(self, version: str | None = None) -> None:
        """Make the database, at another version where one is given."""
        database = open_database(self.url)
        upgrade(database, shipped("migrations"))
        if version is not None:
            with database.write() as connection:
                connection.exec_driver_sql(f"UPDATE alembic_version SET version_num = '{version}'")
        database.engine.dispose()

    def refuses(self, arguments: Sequence[str], exit_code: int, *words: str) -> None:
        """The command ends with one line that holds these words."""
        done = say(self.config, *arguments)
        said = done.stdout + done.stderr
        assert "Traceback" not in said, said
        assert done.returncode == exit_code, said
        assert len(done.stderr.splitlines()) == 1, said
        assert done.stderr.startswith("dicomai: ")
        for word in words:
            assert word in done.stderr


@pytest.fixture
def site(tmp_path: Path) -> Site:
    """A site with good settings and no database yet."""
    made = Site(tmp_path)
    made.write()
    return made


# Settings


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ("[infer]\nmodle = 'x'", "infer.modle"),
        ("[infer]\nworkers = 'two'", "infer.workers"),
        ("[infer\n", "cannot read the settings file"),
        ("[infer]\nmodel = 'no-such-model'", "no-such-model"),
        ("[schedule]\nsweep = 'hourly'", "schedule.sweep"),
    ],
)
def test_a_wrong_setting(site: Site, more: str, words: str) -> None:
    site.write(more)
    site.refuses(["config", "check"], MISUSED, words)


def test_a_misspelt_variable(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DICOMAI_RECEIVE__PROT", "104")
    site.refuses(["run"], MISUSED, "DICOMAI_RECEIVE__PROT")


def test_a_settings_file_that_is_not_there(site: Site) -> None:
    site.config.unlink()
    site.refuses(["run"], MISUSED, str(site.config), "--config")


def test_a_folder_as_settings_file(site: Site) -> None:
    Site(site.folder.parent).refuses(["config", "check"], MISUSED, "dicomai.toml")


def test_good_settings_are_good(site: Site) -> None:
    done = say(site.config, "config", "check")
    assert (done.returncode, done.stderr) == (0, "")


# Database


@pytest.mark.parametrize(
    ("url", "exit_code", "words"),
    [
        ("nonsense", MISUSED, "database.url"),
        ("mysql://db/dicomai", MISUSED, "neither sqlite nor postgresql"),
        ("postgresql+psycopg://db:port/dicomai", MISUSED, "database.url"),
        ("postgresql+nodriver://db/dicomai", MISUSED, "database.url"),
        ("sqlite://", MISUSED, "needs a file"),
        ("sqlite:////dev/null/dicomai.db", FAILED, "/dev/null"),
    ],
)
def test_a_wrong_database_url(site: Site, url: str, exit_code: int, words: str) -> None:
    site.write(url=url)
    site.refuses(["db", "current"], exit_code, words)


@pytest.mark.parametrize("arguments", [["run"], ["db", "upgrade"], ["study", "list"]])
def test_postgres_that_is_not_reachable(site: Site, arguments: list[str]) -> None:
    port = free_port()
    site.write(url=f"postgresql+psycopg://dicomai:s3cret@127.0.0.1:{port}/dicomai")
    site.refuses(arguments, FAILED, f"dicomai:***@127.0.0.1:{port}", "database.url")


@pytest.mark.parametrize("arguments", [["run"], ["results"]])
def test_a_file_that_is_no_database(site: Site, arguments: list[str]) -> None:
    (site.folder / "dicomai.db").write_text("this is a letter, not a database\n" * 100)
    site.refuses(arguments, FAILED, "not a database")


@pytest.mark.parametrize("arguments", [["study", "list"], ["results"], ["deliver"]])
def test_a_database_that_is_not_migrated(site: Site, arguments: list[str]) -> None:
    site.refuses(arguments, FAILED, "dicomai db upgrade")


@pytest.mark.parametrize("arguments", [["run"], ["db", "upgrade"], ["db", "current"], ["results"]])
def test_a_database_that_is_newer_than_the_code(site: Site, arguments: list[str]) -> None:
    site.migrate("9999")
    site.refuses(arguments, FAILED, "9999", "newer")


@pytest.mark.parametrize("arguments", [["run"], ["db", "upgrade"]])
def test_tables_that_are_somebody_elses(site: Site, arguments: list[str]) -> None:
    with sqlite3.connect(site.folder / "dicomai.db") as connection:
        connection.execute("CREATE TABLE study (id INTEGER)")
    connection.close()
    site.refuses(arguments, FAILED, "study")


def test_db_current_fails_until_the_database_is_upgraded(site: Site) -> None:
    site.refuses(["db", "current"], FAILED, "dicomai db upgrade")
    assert say(site.config, "db", "upgrade").returncode == 0
    done = say(site.config, "db", "current")
    assert (done.returncode, done.stderr) == (0, "")


# Network


def test_a_port_in_use(site: Site) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        site.write(port=port)
        site.refuses(["run"], FAILED, f"127.0.0.1:{port}", "receive.port")


def test_a_destination_that_does_not_answer(site: Site) -> None:
    port = free_port()
    site.write(DESTINATION.format(port=port))
    site.refuses(["echo", "pacs"], FAILED, f"ORTHANC at 127.0.0.1:{port} does not answer")


def test_an_unknown_destination(site: Site) -> None:
    site.write(DESTINATION.format(port=104))
    site.refuses(["echo", "pcas"], MISUSED, "'pcas' (pacs)")


# Models


def damage(site: Site, broken: str) -> None:
    """The shipped model in the site's own folder, with broken weights or a broken description."""
    folder = site.folder / "data" / "models" / "chest-starter" / "2"
    folder.mkdir(parents=True)
    shutil.copy(make.STARTER / "model.toml", folder)
    if broken == "weights":
        (folder / "weights.safetensors").write_bytes(b"\0" * 1000)
    if broken == "model.toml":
        (folder / "model.toml").write_text('name = "chest-starter"\n')


@pytest.mark.parametrize("broken", ["weights", "missing weights", "model.toml"])
@pytest.mark.parametrize("arguments", [["run"], ["model", "verify", "chest-starter"]])
def test_a_damaged_model(site: Site, broken: str, arguments: list[str]) -> None:
    damage(site, broken)
    site.refuses(arguments, FAILED, "data/models/chest-starter/2", "install the package again")


def test_a_damaged_model_and_good_files(site: Site) -> None:
    damage(site, "weights")
    (file,) = make.save(site.folder, [make.chest_radiograph()])
    site.refuses(["try", str(file), "--out", str(site.folder / "out")], FAILED, "is damaged")


def test_a_model_that_is_not_installed(site: Site) -> None:
    site.refuses(["model", "verify", "chest-stater"], MISUSED, "chest-stater")
    site.write("[infer]\nmodel = 'chest-stater'")
    site.refuses(["run"], FAILED, "chest-stater", "infer.model")


# Arguments


@pytest.mark.parametrize("content", [b"", b"a letter", b"\0" * 128 + b"DICM\xff" * 99])
def test_a_file_that_is_not_dicom(site: Site, content: bytes) -> None:
    file = site.folder / "letter.dcm"
    file.write_bytes(content)
    site.refuses(["try", str(file), "--out", str(site.folder / "out")], FAILED, "letter.dcm")


def test_a_path_that_is_not_there(site: Site) -> None:
    missing = str(site.folder / "missing")
    site.refuses(["try", missing], MISUSED, missing)


def test_a_folder_without_a_file(site: Site) -> None:
    empty = site.folder / "empty"
    empty.mkdir()
    site.refuses(["try", str(empty)], MISUSED, str(empty))


def test_an_output_folder_that_is_a_file(site: Site) -> None:
    (file,) = make.save(site.folder, [make.chest_radiograph()])
    site.refuses(["try", str(file), "--out", str(site.config)], FAILED, "dicomai.toml")


@pytest.mark.parametrize("arguments", [["study", "show", "1.2.3"], ["study", "retry", "1.2.3"]])
def test_an_unknown_study(site: Site, arguments: list[str]) -> None:
    site.migrate()
    site.refuses(arguments, MISUSED, "1.2.3")


@pytest.mark.parametrize("moment", ["yesterday", "2026-13-01", "7y", "0001-01-01T00:00+01:00"])
def test_a_moment_that_is_none(site: Site, moment: str) -> None:
    site.migrate()
    site.refuses(["results", f"--since={moment}"], MISUSED, moment)
