"""APScheduler inserts task rows by the clock; whoever is free runs them."""

import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime

import structlog
from apscheduler.schedulers.background import BackgroundScheduler
from apscheduler.triggers.cron import CronTrigger
from sqlalchemy.exc import SQLAlchemyError

from dicomai.errors import Misuse
from dicomai.roles import join
from dicomai.settings import Settings
from dicomai.store import queue
from dicomai.store.database import Database
from dicomai.upkeep import run_tasks

log = structlog.get_logger()

CLOCK_SECONDS = 2
STEP_SECONDS = 1.5  # less may be a busy machine


def triggers(settings: Settings) -> dict[str, CronTrigger]:
    """Task kind -> when. Raises Misuse for what is no cron line."""
    lines = {"sweep": settings.schedule.sweep, "retention": settings.schedule.retention}
    found = {}
    for kind, line in lines.items():
        try:
            found[kind] = CronTrigger.from_crontab(line, timezone=UTC)
        except ValueError as error:
            raise Misuse(f"schedule.{kind}: '{line}' is no cron line: {error}") from error
    return found


class ClockWatch:
    """Notices a clock that was set back, after which everything due would wait for too long.

    At its start, too: nobody knows what happened to the clock before. One that is set forward
    makes leases expire early: work is done twice, and nothing is lost.
    """

    def __init__(self, settings: Settings, database: Database) -> None:
        self._database = database
        self._longest = max(settings.receive.quiet_seconds, settings.infer.lease_seconds, 60.0)
        self._ahead = float("inf")  # of the monotonic clock

    def look(self) -> None:
        """Pull in what is due too late where the clock has gone back since the last look."""
        try:
            ahead = self._clock_ahead()
            if ahead < self._ahead - STEP_SECONDS:
                queue.pull_in(self._database, self._longest)
                if self._ahead < float("inf"):
                    log.warning("clock_set_back", seconds=round(self._ahead - ahead, 1))
            self._ahead = ahead
        except SQLAlchemyError as error:
            log.error("clock_not_looked_at", error=type(error).__name__)

    def _clock_ahead(self) -> float:
        before = time.monotonic()
        with self._database.read() as connection:
            now = self._database.now(connection).timestamp()
        return now - (before + time.monotonic()) / 2


def schedule(settings: Settings, stop: threading.Event) -> None:
    """Insert tasks until told to stop, and run them here."""
    database = join(settings)
    scheduler = BackgroundScheduler(timezone=UTC)
    for kind, trigger in triggers(settings).items():
        scheduler.add_job(_inserter(database, kind), trigger, coalesce=True, misfire_grace_time=60)
    scheduler.add_job(ClockWatch(settings, database).look, "interval", seconds=CLOCK_SECONDS)
    scheduler.start()
    log.info("scheduling", sweep=settings.schedule.sweep)
    _inserter(database, "sweep")()  # once at the start: what died last time left its files
    run_tasks(settings, database, stop)
    scheduler.shutdown(wait=False)


def _inserter(database: Database, kind: str) -> Callable[[], None]:
    def insert() -> None:
        # To the minute, so that two daemons on one database insert the same row.
        due = datetime.now(UTC).replace(second=0, microsecond=0)
        try:
            queue.add_task(database, kind, due)
        except SQLAlchemyError as error:
            log.error("task_not_inserted", kind=kind, error=type(error).__name__)

    return insert
