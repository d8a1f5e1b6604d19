"""What is done by the clock: the sweep, retention, and reading documents for labels."""

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

import structlog
from sqlalchemy.exc import DataError, IntegrityError

from dicomai import durable
from dicomai.errors import HeldElsewhere, NotDicom
from dicomai.learning import read_documents
from dicomai.receive import inbox
from dicomai.receive.admission import Admission, discard
from dicomai.receive.line import LEAST_BYTES
from dicomai.roles import first_line, work_until
from dicomai.settings import Settings
from dicomai.store import queries, queue, removal
from dicomai.store.arrivals import Outcome
from dicomai.store.database import Database

log = structlog.get_logger()

Work = Callable[[Settings, Database], str]
MEGABYTE, GIGABYTE = 1e6, 1e9
PAGE = 1000  # files of which the database is asked at once
ORPHAN_SECONDS = 600.0  # younger files may still be on their way to their row


def run_tasks(
    settings: Settings, database: Database, stop: threading.Event, more: Mapping[str, Work]
) -> None:
    """Run what the schedule has inserted; more: kinds of tasks beside those of this module."""
    kinds = {**TASKS, **more}

    def step() -> bool:
        if not queries.task_is_due(database):
            return False
        task = queue.claim_task(database, lease_seconds=600)
        if task is None:
            return False
        try:
            detail = kinds[task.kind](settings, database)
        except Exception as error:  # noqa: BLE001 - one task failed, the next may not
            log.error("task_failed", kind=task.kind, error=first_line(error))
            queue.finish_task(database, task, "failed", first_line(error))
        else:
            queue.finish_task(database, task, "done", detail)
        return True

    # Tasks are inserted by the clock: the many changes that studies make are none of theirs.
    work_until(stop, database, step, lambda: queries.seconds_to_due_task(database), 1.0)


def sweep(settings: Settings, database: Database) -> str:
    """Adopt whole files that have no row, remove broken and temporary ones and orphaned results."""
    before = time.time() - ORPHAN_SECONDS
    # A sender may take as long for what fills the buffer before it is written.
    slowest = settings.receive.idle_seconds * durable.BUFFER_BYTES / LEAST_BYTES
    removed = inbox.remove_drafts(settings.data_dir / "inbox", before - slowest)
    adopted = 0
    for folder in ("inbox", "results"):
        for orphans in _orphans(settings, database, folder, before):
            taken = [
                file for file in orphans if folder == "inbox" and adopt(settings, database, file)
            ]
            left = [file for file in orphans if file not in taken]
            adopted += len(taken)
            removed += discard_orphans(settings, database, left, before)
    log.info("swept", adopted=adopted, removed=removed)
    return f"{adopted} adopted, {removed} removed"


def _orphans(
    settings: Settings, database: Database, folder: str, before: float
) -> Iterator[list[Path]]:
    """Files without a row, a study's at a time; the database is asked of many studies at once."""
    page: list[list[Path]] = []
    for files in inbox.files_before(settings.data_dir / folder, before):
        page.append(files)
        if sum(map(len, page)) >= PAGE:
            yield from _without_row(settings, database, page)
            page = []
    if page:
        yield from _without_row(settings, database, page)


def _without_row(
    settings: Settings, database: Database, page: list[list[Path]]
) -> Iterator[list[Path]]:
    names = {file: str(file.relative_to(settings.data_dir)) for files in page for file in files}
    known = queries.known_paths(database, list(names.values()))
    for files in page:
        orphans = [file for file in files if names[file] not in known]
        if orphans:
            yield orphans


def discard_orphans(
    settings: Settings, database: Database, files: list[Path], before: float
) -> int:
    """Remove files of one study that still have no row and have not changed; returns how many.

    Meanwhile they may have been sent or made again, under the same name.
    """
    if not files:
        return 0
    names = {str(file.relative_to(settings.data_dir)): file for file in files}
    count = 0
    with removal.unreferenced(database, files[0].parent.name, list(names)) as free:
        for file in (names[name] for name in free):
            with suppress(FileNotFoundError):
                if file.stat().st_mtime < before:
                    file.unlink()
                    count += 1
    return count


def adopt(settings: Settings, database: Database, file: Path) -> bool:
    """Give a whole received file its row; False where it is broken, or not needed."""
    if file.suffix != ".dcm":
        return False
    try:
        header, instance, size = inbox.read_back(file)
        # Other bytes than the row's: never acknowledged, or replaced by those that the row names.
        if queries.is_known(database, header.study_instance_uid, header.sop_instance_uid):
            return False
        admission = Admission(database, settings.data_dir, settings.receive.quiet_seconds)
        outcome = admission.admit(header, instance, size, "")
    except NotDicom as error:
        log.warning("broken_file", reason=str(error))
        return False
    except (HeldElsewhere, FileNotFoundError):  # was refused, or replaced: its sender knows
        return False
    except (DataError, IntegrityError) as error:  # what no database takes was never acknowledged
        log.error("not_adopted", file=str(file), error=type(error).__name__)
        return False
    # A duplicate that lies under another name is not needed.
    return outcome is not Outcome.DUPLICATE


def retain(settings: Settings, database: Database) -> str:
    """Remove the files of old studies, and of the oldest where all take too much space."""
    how = settings.retention
    freed = studies = 0
    if how.days:
        for uid in removal.removable(database, datetime.now(UTC) - timedelta(days=how.days)):
            freed, studies = freed + _remove_files(settings, database, uid), studies + 1
    if how.max_gigabytes:
        excess = _used(settings.data_dir) - how.max_gigabytes * GIGABYTE
        for uid in removal.removable(database) if excess > 0 else ():
            if excess <= 0:
                break
            size = _remove_files(settings, database, uid)
            excess, freed, studies = excess - size, freed + size, studies + 1
        if excess > 0:
            log.warning("too_much_is_kept", megabytes=round(excess / MEGABYTE))
    log.info("retention", studies=studies, megabytes=round(freed / MEGABYTE))
    return f"{studies} studies, {freed / MEGABYTE:.1f} MB removed"


def _remove_files(settings: Settings, database: Database, uid: str) -> int:
    folder = settings.data_dir
    paths = [folder / path for path in removal.forget_files(database, uid)]
    return discard(database, folder, uid, paths)


def _used(data_dir: Path) -> int:
    used = 0
    for folder in ("inbox", "results"):
        for file in (data_dir / folder).glob("*/*"):
            with suppress(FileNotFoundError):
                used += file.stat().st_size
    return used


TASKS: dict[str, Work] = {
    "sweep": sweep,
    "retention": retain,
    "labels": read_documents,
}
