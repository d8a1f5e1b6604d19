"""When something may have changed in the database, so that nobody asks it again and again.

SQLite counts the commits of others (PRAGMA data_version, a hundredth of the time of a query through
SQLAlchemy); Postgres tells of them (NOTIFY, in Database).
"""

import threading
import time
from multiprocessing.connection import wait as ready
from typing import Any

from dicomai.store.database import CHANNEL, Database

# How often SQLite is asked, and how often when nothing has happened for some seconds. What arrives
# is not due before its quiet period is over: nobody waits for the slower one.
TICK_SECONDS, SLOW_TICK_SECONDS = 0.05, 0.5
LIVELY_SECONDS = 5.0
LOOK_UP_SECONDS = 0.5


class Changes:
    """Of one database, for one thread."""

    def __init__(self, database: Database) -> None:
        self._database = database
        dbapi = database.engine.dialect.dbapi
        assert dbapi is not None
        self._error: type[Exception] = dbapi.Error
        self._connection: Any = None
        self._seen: int | None = None
        self._changed = time.monotonic()

    def begin(self) -> None:
        """From now on: what is read after this is not missed."""
        try:
            if self._database.is_sqlite:
                self._seen = self._version()
            else:
                self._told(0.0)
        except self._error:
            self._lose()

    def wait(self, stop: threading.Event, seconds: float) -> None:
        """Until somebody has committed since begin(), stop is set, or so long."""
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            try:
                if self._database.is_sqlite:
                    if stop.wait(min(self._tick(), left)) or self._version() != self._seen:
                        return
                elif self._told(min(LOOK_UP_SECONDS, left)) or stop.is_set():
                    return
            except self._error:  # as if there were no such help
                self._lose()
                stop.wait(min(LOOK_UP_SECONDS, left))
                return

    def close(self) -> None:
        """Nobody waits any more."""
        self._lose()

    def _tick(self) -> float:
        is_lively = time.monotonic() - self._changed < LIVELY_SECONDS
        return TICK_SECONDS if is_lively else SLOW_TICK_SECONDS

    def _version(self) -> int:
        """Goes up with every commit of another connection; this one never commits."""
        (found,) = self._opened().execute("PRAGMA data_version").fetchone()
        if found != self._seen:
            self._changed = time.monotonic()
        return int(found)

    def _told(self, seconds: float) -> bool:
        """Whether somebody tells of a commit within so many seconds.

        psycopg itself would look up ten times a second while it waits.
        """
        connection = self._opened()
        if not ready([connection], seconds):
            return False
        return any(True for _ in connection.notifies(timeout=0.0, stop_after=1))

    def _opened(self) -> Any:
        if self._connection is None:
            pooled = self._database.engine.raw_connection()
            self._connection = pooled.driver_connection
            pooled.detach()
            if not self._database.is_sqlite:
                self._connection.autocommit = True
                self._connection.execute(f"LISTEN {CHANNEL}")
        return self._connection

    def _lose(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()
