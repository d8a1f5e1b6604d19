"""What is done by the clock: the sweep, and retention."""

import threading
import time
from collections.abc import Callable
from pathlib import Path

import structlog

from dicomai.errors import HeldElsewhere, NotDicom
from dicomai.receive import inbox
from dicomai.roles import first_line, work_until
from dicomai.settings import Settings
from dicomai.store import queries, queue
from dicomai.store.database import Database

log = structlog.get_logger()

ORPHAN_SECONDS = 600.0  # younger files may still be on their way to their row


def run_tasks(settings: Settings, database: Database, stop: threading.Event) -> None:
    """Run what the schedule has inserted."""

    def step() -> bool:
        if not queries.task_is_due(database):
            return False
        task = queue.claim_task(database, lease_seconds=600)
        if task is None:
            return False
        try:
            detail = TASKS[task.kind](settings, database)
        except Exception as error:  # noqa: BLE001 - one task failed, the next may not
            log.error("task_failed", kind=task.kind, error=first_line(error))
            queue.finish_task(database, task, "failed", first_line(error))
        else:
            queue.finish_task(database, task, "done", detail)
        return True

    work_until(stop, step)


def sweep(settings: Settings, database: Database) -> str:
    """Adopt whole files that have no row, remove broken and temporary ones and orphaned results."""
    before = time.time() - ORPHAN_SECONDS
    adopted = removed = 0
    for folder in ("inbox", "results"):
        for files in inbox.files_before(settings.data_dir / folder, before):
            names = {str(file.relative_to(settings.data_dir)): file for file in files}
            known = queries.known_paths(database, list(names))
            for name in names.keys() - known:
                if folder == "inbox" and adopt(settings, database, names[name]):
                    adopted += 1
                else:
                    names[name].unlink(missing_ok=True)
                    removed += 1
    log.info("swept", adopted=adopted, removed=removed)
    return f"{adopted} adopted, {removed} removed"


def adopt(settings: Settings, database: Database, file: Path) -> bool:
    """Give a whole received file its row; False where it is broken."""
    if file.suffix != ".dcm":
        return False
    try:
        header, instance, size = inbox.read_back(file)
    except NotDicom as error:
        log.warning("broken_file", reason=str(error))
        return False
    arrival = queue.Arrival(
        instance,
        header.study_instance_uid,
        size,
        header.analyzable,
        "",
        header.expected_instances,
        header.patient_id,
    )
    try:
        outcome, _ = queue.arrive(
            database, arrival, settings.data_dir, settings.receive.quiet_seconds
        )
    except HeldElsewhere:  # was refused, so that its sender has it
        return False
    # A duplicate that lies under another name is not needed.
    return outcome is not queue.Outcome.DUPLICATE


TASKS: dict[str, Callable[[Settings, Database], str]] = {"sweep": sweep}
