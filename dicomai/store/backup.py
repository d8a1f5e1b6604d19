"""A copy of the SQLite database while the daemon runs (sqlite3 online backup)."""

import os
import shlex
import sqlite3
import uuid
from collections.abc import Callable
from pathlib import Path

from dicomai import durable
from dicomai.errors import DatabaseUnready, Misuse
from dicomai.store.database import Database, current_revision

PAGES = 1000  # in one step; 4 MB


def backup(database: Database, file: Path, progress: Callable[[int, int], None]) -> int:
    """Write the database as it is at this moment to a new file, durably; its size in bytes.

    progress(done, pages): called after each step
    Raises Misuse where the file exists or the database is Postgres, DatabaseUnready where there is
    nothing to copy, or the copy cannot be written or is damaged.
    """
    if not database.is_sqlite:
        raise Misuse(f"this is for SQLite; for Postgres: {pg_dump(database, file)}")
    if file.exists():
        raise Misuse(f"{file} exists already: name a new file")
    if current_revision(database) is None:
        raise DatabaseUnready("there is nothing to back up: the database is empty")
    scratch = file.with_name(f"{uuid.uuid4().hex}{durable.TEMPORARY}")
    try:
        _copy(database, scratch, progress)
        _check(scratch)
        with scratch.open("rb") as copied:
            os.fsync(copied.fileno())
        if file.exists():
            raise Misuse(f"{file} exists already: name a new file")
        scratch.rename(file)
    except sqlite3.Error as error:
        raise DatabaseUnready(f"cannot write the backup {file}: {error}") from error
    finally:
        for suffix in ("", "-journal", "-wal", "-shm"):
            scratch.with_name(scratch.name + suffix).unlink(missing_ok=True)
    durable.sync_folder(file.parent)
    return file.stat().st_size


def _copy(database: Database, scratch: Path, progress: Callable[[int, int], None]) -> None:
    # O_EXCL, and for this user alone whatever the umask is; SQLite takes the file as it finds it.
    os.close(os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    target = sqlite3.connect(scratch)
    try:
        with database.read() as connection:
            # The first read takes the snapshot (WAL): writers go on, and the copy, however long it
            # takes, is of this moment; without it, each write would start the copy anew.
            connection.exec_driver_sql("SELECT count(*) FROM sqlite_master").one()
            source = connection.connection.driver_connection
            assert isinstance(source, sqlite3.Connection)
            source.backup(
                target,
                pages=PAGES,
                progress=lambda _status, left, pages: progress(pages - left, pages),
            )
        # One file that needs no others beside it; the daemon that opens it sets WAL again.
        target.execute("PRAGMA journal_mode=DELETE")
    finally:
        target.close()


def _check(scratch: Path) -> None:
    """A copy that was never read is no backup."""
    copied = sqlite3.connect(scratch)
    try:
        (found,) = copied.execute("PRAGMA quick_check(1)").fetchone()
    finally:
        copied.close()
    if found != "ok":
        raise DatabaseUnready(f"the database is damaged, it was not backed up: {found}")


def pg_dump(database: Database, file: Path) -> str:
    """The command that backs up a Postgres database; without its password, which ~/.pgpass has."""
    url = database.engine.url.set(drivername="postgresql", password=None)
    url = url.difference_update_query(["password"])
    where = shlex.quote(url.render_as_string())
    return f"pg_dump --format=custom --file={shlex.quote(str(file))} --dbname={where}"
