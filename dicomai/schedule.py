"""APScheduler inserts task rows by the clock; whoever is free runs them."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

import structlog
from apscheduler.schedulers.background import BackgroundScheduler
from apscheduler.triggers.cron import CronTrigger
from sqlalchemy.exc import SQLAlchemyError

from dicomai.errors import Misuse
from dicomai.roles import join, label_codes, recipe_file
from dicomai.settings import Settings
from dicomai.store import queries, queue, runs
from dicomai.store.database import Database
from dicomai.supervise import die_with
from dicomai.train import recipe
from dicomai.upkeep import run_tasks

log = structlog.get_logger()

CLOCK_SECONDS = 2
STEP_SECONDS = 1.5  # less may be a busy machine
LOOK_SECONDS = 20
END_SECONDS = 5.0  # of the ten that a stop may take


def triggers(settings: Settings) -> dict[str, CronTrigger]:
    """Task kind -> when. Raises Misuse for what is no cron line."""
    lines = settings.schedule.model_dump()
    if settings.retrain.cron:
        lines["retrain"] = settings.retrain.cron
    found = {}
    for kind, line in lines.items():
        try:
            found[kind] = CronTrigger.from_crontab(line)  # in local time, as people plan
        except ValueError as error:
            raise Misuse(f"{_key(kind)}: '{line}' is no cron line: {error}") from error
    return found


def _key(kind: str) -> str:
    return "retrain.cron" if kind == "retrain" else f"schedule.{kind}"


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


def schedule(settings: Settings, config: Path | None, stop: threading.Event) -> None:
    """Insert tasks until told to stop, and run them here; config: for the training's process."""
    database = join(settings)
    scheduler = BackgroundScheduler()
    for kind, trigger in triggers(settings).items():
        scheduler.add_job(_inserter(database, kind), trigger, coalesce=True, misfire_grace_time=60)
    scheduler.add_job(ClockWatch(settings, database).look, "interval", seconds=CLOCK_SECONDS)
    trainer = Trainer(settings, config)
    scheduler.add_job(trainer.look, "interval", seconds=LOOK_SECONDS)
    scheduler.start()
    log.info("scheduling", sweep=settings.schedule.sweep)
    _inserter(database, "sweep")()  # once at the start: what died last time left its files
    catch_up(settings, database)
    run_tasks(settings, database, stop, {"retrain": trainer.begin})
    scheduler.shutdown(wait=False)
    trainer.end()


def catch_up(settings: Settings, database: Database) -> None:
    """Insert one training where the time of one, or of several, passed while nobody was there."""
    trigger, last = triggers(settings).get("retrain"), queries.last_task(database, "retrain")
    if trigger is None or last is None:
        return
    missed = trigger.get_next_fire_time(None, last + timedelta(minutes=1))
    if missed is not None and missed < datetime.now(UTC):
        _inserter(database, "retrain")()


class Trainer:
    """The training's process: one that this role starts, and ends when its hours are over."""

    def __init__(self, settings: Settings, config: Path | None) -> None:
        self._settings, self._config = settings, config
        self._process: subprocess.Popen[bytes] | None = None

    def begin(self, settings: Settings, database: Database) -> str:
        """Start it, where there are enough new labels, or one is to go on; returns what it did."""
        if self._process is not None and self._process.poll() is None:
            return f"process {self._process.pid} is training"
        if not within(settings.retrain.hours, datetime.now().astimezone().hour):
            return f"it is not within {settings.retrain.hours}"
        new = runs.new_labels(database, tuple(label_codes(settings)))
        wanted = settings.retrain.min_new_labels
        text = recipe.load(recipe_file(settings)).as_text()
        if new < wanted and not runs.is_unfinished(database, text):
            return f"{new} new labels, {wanted} are needed (retrain.min_new_labels)"
        command = [sys.executable, "-m", "dicomai", "retrain", "--scheduled"]
        if self._config is not None:
            command += ["--config", str(self._config)]
        parent = os.getpid()
        self._process = subprocess.Popen(command, preexec_fn=lambda: die_with(parent))
        return f"training begins with {new} new labels, process {self._process.pid}"

    def look(self) -> None:
        """Stop it at the end of its hours: it goes on at the next time of retrain.cron."""
        if self._process is None or self._process.poll() is not None:
            return
        if not within(self._settings.retrain.hours, datetime.now().astimezone().hour):
            self._process.terminate()

    def end(self) -> None:
        """Stop it and wait for its checkpoint."""
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(END_SECONDS)


def within(hours: str, hour: int) -> bool:
    """Whether an hour is in "20-6" (from 20:00 to 6:00); always in ""."""
    if not hours:
        return True
    first, last = map(int, hours.split("-"))
    return first <= hour < last if first < last else hour >= first or hour < last


def _inserter(database: Database, kind: str) -> Callable[[], None]:
    def insert() -> None:
        # To the minute, so that two daemons on one database insert the same row.
        due = datetime.now(UTC).replace(second=0, microsecond=0)
        try:
            queue.add_task(database, kind, due, "" if kind == "retrain" else None)
        except SQLAlchemyError as error:
            log.error("task_not_inserted", kind=kind, error=type(error).__name__)

    return insert
