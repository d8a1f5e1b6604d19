"""APScheduler inserts task rows by the clock; whoever is free runs them."""

import threading
from collections.abc import Callable
from datetime import UTC, datetime

import structlog
from apscheduler.schedulers.background import BackgroundScheduler
from apscheduler.triggers.cron import CronTrigger
from sqlalchemy.exc import SQLAlchemyError

from dicomai.errors import Misuse
from dicomai.roles import connect, run_tasks
from dicomai.settings import Settings
from dicomai.store import queue
from dicomai.store.database import Database

log = structlog.get_logger()


def triggers(settings: Settings) -> dict[str, CronTrigger]:
    """Task kind -> when. Raises Misuse for what is no cron line."""
    lines = {"sweep": settings.schedule.sweep}
    found = {}
    for kind, line in lines.items():
        try:
            found[kind] = CronTrigger.from_crontab(line, timezone=UTC)
        except ValueError as error:
            raise Misuse(f"schedule.{kind}: '{line}' is no cron line: {error}") from error
    return found


def schedule(settings: Settings, stop: threading.Event) -> None:
    """Insert tasks until told to stop, and run them here."""
    database = connect(settings)
    scheduler = BackgroundScheduler(timezone=UTC)
    for kind, trigger in triggers(settings).items():
        scheduler.add_job(_inserter(database, kind), trigger, coalesce=True, misfire_grace_time=60)
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
