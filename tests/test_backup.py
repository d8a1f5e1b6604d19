"""`db backup`: a whole database while others write to it, or one line and no file."""

import os
import re
import resource
import shlex
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path

import pytest
from daemon import command
from peers import Postgres, wait_until
from studies import Bench, Clock

from dicomai import settings
from dicomai.errors import Misuse
from dicomai.store.backup import PAGES, backup
from dicomai.store.database import Database, open_database, require_current, upgrade

BALLAST = 24 << 20


@pytest.fixture
def sqlite(tmp_path: Path) -> Iterator[Database]:
    """A migrated database of some size, beside a settings file that names it."""
    url = f"sqlite:///{tmp_path}/data/dicomai.db"
    (tmp_path / "dicomai.toml").write_text(
        f'data_dir = "{tmp_path}/data"\n[database]\nurl = "{url}"\n'
    )
    opened = open_database(url)
    upgrade(opened, settings.shipped("migrations"))
    with opened.write() as connection:
        connection.exec_driver_sql(
            "INSERT INTO prediction VALUES "
            "('digest', 1, 'm', '1', 'cpu', x'', x'', zeroblob(?), 1, 1, '2026-11-21 00:00:00')",
            (BALLAST,),
        )
    yield opened
    opened.engine.dispose()


def bench(database: Database) -> Bench:
    """The queue's functions on this database."""
    return Bench(database, Clock(datetime.now(UTC)))


def studies(file: Path) -> set[str]:
    """The studies in a database file that is whole."""
    with closing(sqlite3.connect(file)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        assert connection.execute("PRAGMA foreign_key_check").fetchall() == []
        return {uid for (uid,) in connection.execute("SELECT study_instance_uid FROM study")}


class Writer:
    """Receives a study after the other until the block ends; committed: those that were."""

    def __init__(self, url: str, number: int) -> None:
        self.committed: list[str] = []
        self._url = url
        self._number = number
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._write)

    def __enter__(self) -> "Writer":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _write(self) -> None:
        database = open_database(self._url)
        while not self._stop.is_set():
            uid = f"1.2.{self._number}.{len(self.committed)}"
            bench(database).arrive(1, uid, uid=f"{uid}.1")
            self.committed.append(uid)
        database.engine.dispose()


def test_a_backup_during_writes_is_whole_and_has_all_that_was_committed_before(
    tmp_path: Path, sqlite: Database
) -> None:
    url, file = str(sqlite.engine.url), tmp_path / "backup.db"
    with Writer(url, 1) as one, Writer(url, 2) as two:
        wait_until(lambda: one.committed and two.committed, 20, "both have written")
        before = {*one.committed, *two.committed}
        done = command(tmp_path / "dicomai.toml", "db", "backup", str(file))
        after = {*one.committed, *two.committed}

    assert done.returncode == 0, done.stderr
    assert before < after  # they wrote meanwhile
    assert before <= studies(file) <= after
    assert oct(file.stat().st_mode & 0o777) == "0o600"
    assert {path.name for path in tmp_path.iterdir()} == {"data", "dicomai.toml", "backup.db"}
    require_current(open_database(f"sqlite:///{file}"), settings.shipped("migrations"))


def test_writers_go_on_at_every_step_and_the_copy_is_of_its_beginning(
    tmp_path: Path, sqlite: Database
) -> None:
    file, writer, steps = tmp_path / "backup.db", bench(sqlite), []

    def write(done: int, pages: int) -> None:
        writer.arrive(1, f"1.2.{len(steps)}", uid=f"1.2.{len(steps)}.1")
        steps.append((done, pages))
        assert len(steps) < 100  # the copy begins anew at every write

    writer.arrive(1, "1.9", uid="1.9.1")
    umask = os.umask(0)
    try:
        size = backup(sqlite, file, write)
    finally:
        os.umask(umask)

    assert studies(file) == {"1.9"}
    assert size == file.stat().st_size
    # Not WAL (sqlite.org/fileformat2.html 1.3): it needs no other file beside it.
    assert file.read_bytes()[18:20] == b"\x01\x01"
    pages = size // 4096
    assert len(steps) == -(-pages // PAGES) > 3  # none was done twice
    assert steps[-1] == (pages, pages)
    assert oct(file.stat().st_mode & 0o777) == "0o600"


def test_an_existing_file_is_left_alone(tmp_path: Path, sqlite: Database) -> None:
    file = tmp_path / "backup.db"
    file.write_text("precious")

    done = command(tmp_path / "dicomai.toml", "db", "backup", str(file))

    assert (done.returncode, file.read_text()) == (2, "precious")
    assert done.stderr == f"dicomai: {file} exists already: name a new file\n"


def test_a_file_that_appears_meanwhile_is_left_alone(tmp_path: Path, sqlite: Database) -> None:
    file = tmp_path / "backup.db"
    with pytest.raises(Misuse, match="exists already"):
        backup(sqlite, file, lambda *_: file.write_text("precious") and None)

    assert file.read_text() == "precious"
    assert {path.name for path in tmp_path.iterdir()} == {"data", "dicomai.toml", "backup.db"}


def test_without_room_there_is_one_line_and_no_file(tmp_path: Path, sqlite: Database) -> None:
    def little_room() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (BALLAST // 2, BALLAST // 2))

    file = tmp_path / "backup.db"
    program = [sys.executable, "-m", "dicomai"]
    done = subprocess.run(
        [*program, "db", "backup", file, "--config", tmp_path / "dicomai.toml"],
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=little_room,
    )

    assert done.returncode == 1
    assert re.fullmatch(rf"dicomai: cannot write the backup {file}: .+\n", done.stderr)
    assert {path.name for path in tmp_path.iterdir()} == {"data", "dicomai.toml"}


def test_a_damaged_database_is_not_called_a_backup(tmp_path: Path, sqlite: Database) -> None:
    with sqlite.read() as connection:
        connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)")
    sqlite.engine.dispose()
    with (tmp_path / "data/dicomai.db").open("r+b") as damaged:
        damaged.seek(-4096, os.SEEK_END)
        damaged.write(b"\xff" * 4096)

    done = command(tmp_path / "dicomai.toml", "db", "backup", str(tmp_path / "backup.db"))

    assert done.returncode == 1
    assert done.stderr.startswith("dicomai: the database is damaged, it was not backed up: ")
    assert {path.name for path in tmp_path.iterdir()} == {"data", "dicomai.toml"}


def test_an_empty_database_is_not_backed_up(tmp_path: Path) -> None:
    config = tmp_path / "dicomai.toml"
    config.write_text(f'[database]\nurl = "sqlite:///{tmp_path}/dicomai.db"\n')

    done = command(config, "db", "backup", str(tmp_path / "backup.db"))

    assert done.returncode == 1
    assert "the database is empty" in done.stderr
    assert not (tmp_path / "backup.db").exists()


def test_for_postgres_the_line_that_is_given_works_and_shows_no_password(
    tmp_path: Path, postgres: Postgres
) -> None:
    url = postgres.new_database()
    database = open_database(url)
    upgrade(database, settings.shipped("migrations"))
    database.engine.dispose()
    secret = url.replace("dicomai@", "dicomai:s3cret@") + "?connect_timeout=5&password=s3cret"
    config, file = tmp_path / "dicomai.toml", tmp_path / "a backup.dump"
    config.write_text(f'[database]\nurl = "{secret}"\n')

    done = command(config, "db", "backup", str(file))

    assert done.returncode == 2
    assert "s3cret" not in done.stdout + done.stderr
    (line,) = done.stderr.splitlines()
    program, *arguments = shlex.split(line[line.index("pg_dump") :])
    subprocess.run([postgres.bin / program, *arguments], check=True)
    restored = subprocess.run(
        [postgres.bin / "pg_restore", "--list", file], capture_output=True, text=True, check=True
    )
    assert "TABLE public study dicomai" in restored.stdout
