"""The doctor: a healthy site has no complaint, and each kind of damage is found and named."""

import os
import shutil
import sqlite3
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import make
import pytest
from certificates import Authority
from daemon import command, daemon
from peers import Postgres, free_port, storescu
from pydicom.uid import generate_uid
from sqlalchemy import create_engine, insert, text
from sqlalchemy import event as listening
from sqlalchemy.engine import make_url

from dicomai import doctor
from dicomai.demo.archive import Archive
from dicomai.settings import Settings, load, shipped
from dicomai.store import inspect, states
from dicomai.store.database import Database, open_database, upgrade
from dicomai.store.tables import event, instance, result, study

HOUR = 3600.0


@dataclass
class Site:
    """A copy of a site after a journey, to be damaged."""

    folder: Path
    url: str

    @property
    def data(self) -> Path:
        """Its data folder."""
        return self.folder / "data"

    def settings(self, **sections: Any) -> Settings:
        """Its settings, with changes in some sections."""
        loaded = load(self.folder / "dicomai.toml")
        values = loaded.model_dump() | {"data_dir": self.data, "database": {"url": self.url}}
        for name, changes in sections.items():
            values[name] = changes if isinstance(changes, list) else values[name] | changes
        return Settings(**values)

    def sql(self, *statements: str) -> None:
        """Damage by hand; on SQLite without its care for foreign keys."""
        database = open_database(self.url)
        try:
            with database.engine.connect() as connection:
                if database.is_sqlite:
                    connection.exec_driver_sql("ROLLBACK")
                    connection.exec_driver_sql("PRAGMA foreign_keys=OFF")
                    connection.exec_driver_sql("BEGIN")
                for statement in statements:
                    connection.execute(text(statement), {"then": _hours_ago(database, 2)})
                connection.commit()
        finally:
            database.engine.dispose()

    def complaints(self, deep: bool = False, pause: float = 0.0, **sections: Any) -> list[str]:
        """What the doctor says, a line each with the name of its check."""
        checks = doctor.examine(self.settings(**sections), deep, pause)
        return [f"{check.name}: {problem.words}" for check in checks for problem in check.problems]

    def file(self, name: str) -> Path:
        """Some file of inbox or results that stands."""
        database = open_database(self.url)
        table = instance if name == "inbox" else result
        with database.read() as connection:
            path = connection.execute(table.select().order_by(table.c.path)).first().path
        database.engine.dispose()
        return self.data / str(path)


def _hours_ago(database: Database, hours: float) -> Any:
    with database.read() as connection:
        moment = database.now(connection) - timedelta(hours=hours)
    return (
        moment.replace(tzinfo=None).isoformat(" ", "microseconds") if database.is_sqlite else moment
    )


@pytest.fixture(scope="module", params=["sqlite", "postgres"])
def journey(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Site]:
    """A study of two images, then a late one: results, a withdrawal, all delivered."""
    folder = tmp_path_factory.mktemp("journey")
    folder.chmod(0o700)
    cluster: Postgres | None = None
    if request.param == "postgres":
        cluster = request.getfixturevalue("postgres")
    url = cluster.new_database() if cluster else f"sqlite:///{folder}/dicomai.db"
    archive, uid = Archive(folder / "archive"), generate_uid()
    images = [make.chest_radiograph(number, uid, number + 1) for number in range(3)]
    peers = [("archive", "ARCHIVE", archive.port)]
    said = []
    with daemon(folder, url, free_port(), peers, 1.0, 0.2) as running:
        for sent in (images[:2], images[2:]):
            storescu(running.port, make.save(folder / "sent" / str(len(sent)), sent))
            said.append(command(running.config, "doctor"))  # a study is in flight
            running.wait_idle(1)
    archive.close()
    for done in said:
        assert done.returncode == 0, done.stdout + done.stderr
    yield Site(folder, url), url.rsplit("/", 1)[1] if cluster else None


@pytest.fixture
def site(request: pytest.FixtureRequest, journey: tuple[Site, str | None], tmp_path: Path) -> Site:
    """A copy of it."""
    original, template = journey
    tmp_path.chmod(0o700)
    shutil.copytree(original.data, tmp_path / "data")
    shutil.copy(original.folder / "dicomai.toml", tmp_path)
    if template is None:
        shutil.copy(original.folder / "dicomai.db", tmp_path)
        return Site(tmp_path, f"sqlite:///{tmp_path}/dicomai.db")
    return Site(tmp_path, copy_of(original.url))


def copy_of(url: str) -> str:
    """A copy of a database of Postgres."""
    copy = make_url(url).set(database=f"copy_{uuid.uuid4().hex}")
    server = create_engine(copy.set(database="postgres"), isolation_level="AUTOCOMMIT")
    with server.connect() as connection:
        name = make_url(url).database
        connection.exec_driver_sql(f"CREATE DATABASE {copy.database} TEMPLATE {name}")
    server.dispose()
    return copy.render_as_string(hide_password=False)


@pytest.fixture
def sqlite_site(site: Site) -> Site:
    """Only where it is SQLite."""
    if not site.url.startswith("sqlite"):
        pytest.skip("of SQLite")
    return site


# Health


def test_a_site_after_a_journey_has_no_complaint(site: Site) -> None:
    assert site.complaints() == site.complaints(deep=True) == []


def test_the_command_says_each_figure_and_ends_with_1_where_something_is_wrong(site: Site) -> None:
    config = site.folder / "dicomai.toml"
    words = config.read_text()
    words = words.replace(str(load(config).data_dir), str(site.data))
    config.write_text(words.replace(load(config).database.url, site.url))
    done = command(config, "doctor", "--deep")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith("\nno problem\n")
    for figure in ("studies       1: 1 analyzed", "chest-starter 2", "TLS is off", "GB free"):
        assert figure in done.stdout

    site.file("inbox").unlink()
    done = command(config, "doctor")
    assert done.returncode == 1
    assert "\nPROBLEM  files " in done.stdout
    assert "\n1 problems\n" in done.stdout


def test_what_is_under_way_is_looked_at_again_before_it_is_complained_of(site: Site) -> None:
    file = site.file("inbox")
    away = file.rename(site.folder / "away")
    threading.Timer(0.5, lambda: away.rename(file)).start()
    assert site.complaints(pause=1.5) == []
    file.unlink()
    assert len(site.complaints(pause=0.1)) == 1


def test_files_that_retention_has_removed_are_not_missed(site: Site) -> None:
    site.sql("UPDATE instance SET path = NULL", "UPDATE result SET path = NULL")
    for name in ("inbox", "results"):
        shutil.rmtree(site.data / name)
        (site.data / name).mkdir(mode=0o700)
    assert site.complaints(deep=True) == []


def test_every_state_is_known() -> None:
    for subject, known in inspect.HOLDS.items():
        assert set(states.TRANSITIONS[subject]) - {None} == set(known)


# Rows

ROWS = [
    ("UPDATE study SET state = 'lost'", "is 'lost', which no study can be"),
    ("UPDATE study SET state = 'receiving'", "is receiving without a time when it is due"),
    ("UPDATE study SET state = 'analyzing'", "is analyzing without a time when it is due and"),
    ("UPDATE study SET lease = 'x'", "is analyzed with a lease"),
    ("UPDATE study SET due_at = received_at", "is analyzed with a time when it is due"),
    ("UPDATE delivery SET state = 'sending'", "delivery 1 is sending without a time when it is"),
    ("UPDATE delivery SET state = 'committing'", "delivery 1 is committing without a time when"),
    ("UPDATE delivery SET state = 'gone'", "delivery 1 is 'gone', which no delivery can be"),
    ("UPDATE delivery SET lease = 'x'", "delivery 1 is delivered with a lease"),
    ("UPDATE task SET state = 'running'", "task 1 is running without a time when it is due"),
    ("UPDATE study SET analyzed_revision = 9", "has no analysis of revision 9"),
    ("UPDATE study SET analyzed_revision = 1", "at revision 2, but its analysis is of 1"),
    (
        "UPDATE study SET revision = 3, analyzed_revision = 3",
        "is at revision 3, but was raised 2 times",
    ),
    ("UPDATE delivery SET state = 'failed'", "is failed, but its history ends in 'delivered'"),
    ("DELETE FROM event WHERE subject = 'study'", "is analyzed, but its history is empty"),
    (
        "DELETE FROM event WHERE to_state = 'sending'",
        "the history of delivery 1 goes on from 'sending' after 'pending'",
    ),
    (
        "DELETE FROM delivery WHERE sop_instance_uid IN (SELECT min(sop_instance_uid) FROM result"
        " WHERE kind = 'sr' AND replaced_by IS NULL)",
        "was not put down for archive: 'dicomai study retry",
    ),
    (
        "DELETE FROM delivery WHERE sop_instance_uid IN"
        " (SELECT sop_instance_uid FROM result WHERE kind = 'withdrawal')",
        "was put down for no destination: 'dicomai study retry",
    ),
    (
        "UPDATE study SET state = 'receiving', due_at = :then",
        "is due since",
    ),
    ("UPDATE task SET state = 'due', due_at = :then", "does the role schedule run?"),
    (
        "UPDATE delivery SET state = 'pending', due_at = :then, last_error = 'is away'",
        "deliveries to archive are due since",
    ),
    (
        "UPDATE delivery SET state = 'committing', due_at = :then, destination = 'old'",
        "the settings have no such destination",
    ),
    (
        "UPDATE delivery SET state = 'failed', last_error = 'status 0xC000'",
        "have failed: status 0xC000: correct that, then 'dicomai delivery retry",
    ),
    (
        "UPDATE model SET sha256 = 'x'",
        "is not the chest-starter 2 that the database knows",
    ),
    ("UPDATE model SET version = '7' WHERE state = 'active'", "chest-starter 7 is not installed"),
]


@pytest.mark.parametrize(("statement", "words"), ROWS)
def test_a_row_that_is_not_as_it_must_be_is_named(site: Site, statement: str, words: str) -> None:
    site.sql(statement)
    assert [line for line in site.complaints() if words in line]


def test_a_row_that_names_none_is_found(sqlite_site: Site) -> None:
    sqlite_site.sql("DELETE FROM analysis")
    assert any("names a row of analysis" in line for line in sqlite_site.complaints())


def test_a_damaged_database_file_is_found(sqlite_site: Site) -> None:
    with sqlite3.connect(sqlite_site.folder / "dicomai.db") as connection:
        (page,) = connection.execute(
            "SELECT rootpage FROM sqlite_master WHERE name = 'ix_event_subject_id'"
        ).fetchone()
        (size,) = connection.execute("PRAGMA page_size").fetchone()
    connection.close()
    with (sqlite_site.folder / "dicomai.db").open("r+b") as file:
        file.seek((page - 1) * size + size // 2)
        file.write(b"\xaa" * (size // 2))
    assert any("restore the database" in line for line in sqlite_site.complaints())


def test_a_database_that_is_not_there_is_said_and_not_made(tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path, database={"url": f"sqlite:///{tmp_path}/none.db"})
    first, *rest = doctor.examine(settings, False, 0)
    assert "there is no" in first.problems[0].words
    assert [check.name for check in rest] == ["permissions", "disk", "certificates"]
    assert list(tmp_path.iterdir()) == []


def test_a_server_that_does_not_answer_is_said(site: Site) -> None:
    url = f"postgresql+psycopg://dicomai@127.0.0.1:{free_port()}/none"
    first, *_ = doctor.examine(site.settings(database={"url": url}), False, 0)
    assert "cannot use the database" in first.problems[0].words


def test_an_old_schema_is_said(site: Site) -> None:
    site.sql("UPDATE alembic_version SET version_num = '0002'")
    assert "run 'dicomai db upgrade'" in site.complaints()[0]


# Files


def test_a_missing_or_shortened_image_is_named(site: Site) -> None:
    file = site.file("inbox")
    os.truncate(file, file.stat().st_size - 1)
    (line,) = site.complaints()
    assert f"{file.name}: has {file.stat().st_size} bytes, not" in line
    file.unlink()
    (line,) = site.complaints()
    assert f"{file.name}: is missing: restore it, or send study" in line


def test_a_missing_or_empty_result_is_named(site: Site) -> None:
    file = site.file("results")
    os.truncate(file, 0)
    (line,) = site.complaints()
    assert f"{file.name}: has 0 bytes" in line
    file.unlink()
    (line,) = site.complaints()
    assert f"{file.name}: is missing: 'dicomai study retry" in line


def test_deep_finds_other_bytes_of_the_same_length(site: Site) -> None:
    file = site.file("inbox")
    with file.open("r+b") as opened:
        opened.seek(-2, os.SEEK_END)
        opened.write(b"\x77\x78")
    assert site.complaints() == []
    (line,) = site.complaints(deep=True)
    assert f"{file.name}: does not hold the bytes that were received" in line


def test_deep_finds_a_result_that_is_another_or_none(site: Site) -> None:
    file = site.file("results")
    other = next(path for path in file.parent.iterdir() if path != file)
    shutil.copy(other, file)
    assert site.complaints() == []
    (line,) = site.complaints(deep=True)
    assert f"{file.name}: holds the object {other.stem}" in line
    file.write_bytes(b"no DICOM")
    (line,) = site.complaints(deep=True)
    assert f"{file.name}: is not DICOM" in line


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("inbox/1.2/1.2.3.dcm", "without a row, older than ten minutes"),
        ("results/1.2/1.2.3.dcm", "without a row, older than ten minutes"),
        ("inbox/1.2/0a.part", "temporary, older than ten minutes"),
        ("0b.part", "temporary, older than ten minutes: remove it"),
        ("models/chest-starter/3.part/3/model.toml.part", "temporary"),
    ],
)
def test_what_was_left_over_is_named_once_it_is_old(site: Site, name: str, words: str) -> None:
    file = site.data / name
    file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    file.touch(0o600)
    for folder in (file.parent, file.parent.parent):
        folder.chmod(0o700)
    assert site.complaints() == []
    os.utime(file, (time.time() - HOUR,) * 2)
    (line,) = site.complaints()
    assert f"{name}: {words}" in line


def test_what_others_can_read_is_named(site: Site) -> None:
    file = site.file("inbox")
    file.chmod(0o640)
    file.parent.chmod(0o711)
    lines = site.complaints()
    assert len(lines) == 2
    assert [line for line in lines if f"{file.parent}: mode 0711" in line]
    assert [line for line in lines if f"{file}: mode 0640, open to others" in line]


def test_a_database_file_that_others_can_read_is_named(sqlite_site: Site) -> None:
    (sqlite_site.folder / "dicomai.db").chmod(0o644)
    line, *_ = sqlite_site.complaints()
    assert "dicomai.db: mode 0644" in line


# The surroundings


def test_a_disk_that_is_nearly_full_is_said(site: Site) -> None:
    (line,) = site.complaints(receive={"min_free_megabytes": 1 << 40})
    assert "less than receive.min_free_megabytes" in line


def test_a_damaged_model_is_said(site: Site) -> None:
    copy = site.data / "models" / "chest-starter" / "2"
    shutil.copytree(make.STARTER, copy)
    assert site.complaints() == []
    with (copy / "weights.safetensors").open("r+b") as file:
        file.seek(-8, os.SEEK_END)
        file.write(b"\1")
    (line,) = site.complaints()
    assert "is damaged" in line


def expired(authority: Authority) -> dict[str, Any]:
    pair = authority.sign("old", days=-1)
    return {"tls_certificate": pair.certificate, "tls_key": pair.key}


def soon(authority: Authority) -> dict[str, Any]:
    pair = authority.sign("soon", days=20)
    return {"tls_certificate": pair.certificate, "tls_key": pair.key}


def missing(authority: Authority) -> dict[str, Any]:
    pair = authority.sign("none")
    pair.key.unlink()
    return {"tls_certificate": pair.certificate, "tls_key": pair.key}


def another_key(authority: Authority) -> dict[str, Any]:
    return {
        "tls_certificate": authority.sign("one").certificate,
        "tls_key": authority.sign("two").key,
    }


def no_authority(authority: Authority) -> dict[str, Any]:
    pair, file = authority.sign("good"), authority.folder / "nothing.pem"
    file.write_text("nothing\n")
    return {"tls_certificate": pair.certificate, "tls_key": pair.key, "tls_ca": file}


TLS: list[tuple[Callable[[Authority], dict[str, Any]], str]] = [
    (expired, "has expired on"),
    (soon, "expires on"),
    (missing, "there is no"),
    (another_key, "cannot be used"),
    (no_authority, "cannot be used"),
]


@pytest.mark.parametrize(("make_files", "words"), TLS)
def test_a_certificate_that_does_not_do_is_named(
    tmp_path: Path, make_files: Callable[[Authority], dict[str, Any]], words: str
) -> None:
    authority = Authority(tmp_path / "ca", "hospital")
    pair = authority.sign("good")
    (tmp_path / "data").mkdir(mode=0o700)
    (line,) = tls_complaints(tmp_path, make_files(authority))
    assert line.startswith("receive tls_")
    assert words in line
    good = {"tls_certificate": pair.certificate, "tls_key": pair.key}
    assert tls_complaints(tmp_path, good | {"tls_ca": authority.certificate}) == []


def tls_complaints(folder: Path, receive: dict[str, Any]) -> list[str]:
    """What is said of the certificates of a listener."""
    settings = Settings(data_dir=folder / "data", receive=receive)
    database = open_database(f"sqlite:///{folder}/dicomai.db")
    check = doctor.certificates(doctor.Site(settings, database, None, False))
    assert check.figure.endswith("certificate files")
    return [problem.words for problem in check.problems]


def test_the_authorities_of_destinations_and_of_the_syslog_are_looked_at(site: Site) -> None:
    (destination,) = site.settings().destinations
    changed = destination.model_dump() | {"tls_ca": Path("/none/pacs.pem")}
    lines = site.complaints(destinations=[changed], audit={"tls_ca": Path("/none/syslog.pem")})
    assert "certificates: destination archive tls_ca: there is no /none/pacs.pem" in lines[0]
    assert "certificates: audit tls_ca: there is no /none/syslog.pem" in lines[1]


# Many rows


def test_many_rows_take_few_statements(tmp_path: Path) -> None:
    counts = []
    for number in (100, 5000):
        folder = tmp_path / str(number)
        settings = many(folder, number)
        statements = list[str]()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(doctor, "open_database", lambda url, s=statements: counting(url, s))
            checks = doctor.examine(settings, False, 0)
        assert {c.name: len(c.problems) for c in checks if c.problems} == {
            "files": number, "model": 1,
        }  # fmt: skip
        counts.append(len(statements))
    assert counts[1] - counts[0] < 40


def many(folder: Path, number: int) -> Settings:
    """A database of so many studies of an image each, without the files."""
    folder.mkdir(mode=0o700)
    (folder / "data").mkdir(mode=0o700)
    database = open_database(f"sqlite:///{folder}/dicomai.db")
    upgrade(database, shipped("migrations"))
    (folder / "dicomai.db").chmod(0o600)
    with database.write() as connection:
        now = database.now(connection)
        uids = [f"1.2.{n}" for n in range(number)]
        studies = {"state": "skipped", "revision": 0, "attempts": 0}
        times = {"received_at": now, "last_received_at": now}
        rows = [{"study_instance_uid": uid, **studies, **times} for uid in uids]
        connection.execute(insert(study), rows)
        told = {"at": now, "subject": "study", "to_state": "skipped"}
        connection.execute(insert(event), [{"subject_id": uid, **told} for uid in uids])
        same = {
            "series_instance_uid": "1", "sop_class_uid": "1", "transfer_syntax_uid": "1",
            "digest": "1", "size": 1, "analyzable": False, "calling_ae_title": "",
            "received_at": now,
        }  # fmt: skip
        images = [
            {"study_instance_uid": uid, "sop_instance_uid": uid, "path": f"inbox/{uid}", **same}
            for uid in uids
        ]
        connection.execute(insert(instance), images)
    database.engine.dispose()
    return Settings(
        data_dir=folder / "data",
        database={"url": f"sqlite:///{folder}/dicomai.db"},
        infer={"model": "none"},
        receive={"min_free_megabytes": 0},
    )


def counting(url: str, statements: list[str]) -> Database:
    """A database that notes each statement."""
    database = open_database(url)

    @listening.listens_for(database.engine, "before_cursor_execute")
    def _note(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        statements.append(statement)

    return database
