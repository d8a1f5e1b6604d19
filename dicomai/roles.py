"""The processes: claim, work, complete; renew leases meanwhile; end on a signal.

Only here and in the C-STORE handler are exceptions caught broadly; their type decides what happens
next: Retryable and trouble with disk or database waits, anything else fails the one piece of work.
"""

import random
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import structlog
from pydicom.dataset import Dataset
from sqlalchemy.exc import SQLAlchemyError

from dicomai.deliver import sender
from dicomai.deliver.backoff import wait_seconds
from dicomai.errors import ModelDamaged, NotDicom, Rejected, Retryable
from dicomai.infer import package
from dicomai.prepare import image
from dicomai.prepare.pool import MEGABYTE, Pool
from dicomai.receive import inbox
from dicomai.receive.listener import Listener
from dicomai.settings import Destination, Settings, shipped
from dicomai.store import queries, queue
from dicomai.store.database import Database, open_database, require_current
from dicomai.study import WITHDRAWAL, Instance, Limits, Model, Reporting

log = structlog.get_logger()

POLL_SECONDS = 0.2
TROUBLE_SECONDS = 5.0
FINISH_SECONDS = 7.0  # of the ten that a stop may take
ORPHAN_SECONDS = 600.0  # younger files may still be on their way to their row


def stop_on_signal() -> threading.Event:
    """Set by SIGTERM and SIGINT."""
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    return stop


def connect(settings: Settings) -> Database:
    """The database, refused unless its schema is this code's."""
    database = open_database(settings.database.url)
    require_current(database, shipped("migrations"))
    return database


def model_folders(settings: Settings) -> tuple[Path, ...]:
    """Where model packages lie: the site's own first, then those that the program ships."""
    return settings.data_dir / "models", shipped("config/models")


def limits(settings: Settings) -> Limits:
    """What one object may ask for."""
    most = settings.prepare
    return Limits(most.max_pixels, most.max_megabytes * MEGABYTE, most.max_frames)


def decoding_pool(settings: Settings) -> Pool:
    """The decoding processes; they start when they are needed."""
    how = settings.prepare
    return Pool(how.workers, how.timeout_seconds, how.memory_megabytes)


def preparer(
    settings: Settings, pool: Pool, model: Model
) -> Callable[[tuple[Instance, ...]], Iterator[list[Any] | Rejected]]:
    """Prepare a study's images for a model, several at a time."""

    def prepare(instances: tuple[Instance, ...]) -> Iterator[list[Any] | Rejected]:
        return pool.map(image.prepare, [(item, model, limits(settings)) for item in instances])

    return prepare


def header_reader(settings: Settings, pool: Pool) -> Callable[[Instance], Dataset | Rejected]:
    """Read the header of one stored object, in a decoding process."""

    def read(instance: Instance) -> Dataset | Rejected:
        (done,) = pool.map(image.read_header, [(instance, limits(settings))])
        return done if isinstance(done, Rejected) else done[0]

    return read


def outputs(settings: Settings) -> dict[str, frozenset[str]]:
    """Destination -> the kinds of results that it gets."""
    return {
        item.name: frozenset(item.outputs)
        | ({WITHDRAWAL} if item.withdraw == "key-object" else frozenset())
        for item in settings.destinations
    }


def reporting(settings: Settings) -> Reporting:
    """What is made: all that any destination gets, and without one what a new one would get."""
    chosen = [item.outputs for item in settings.destinations]
    kinds = chosen or [Destination.model_fields["outputs"].default]
    how = settings.report
    return Reporting(
        how.layout, how.undetermined_margin, frozenset(kind for one in kinds for kind in one)
    )


def listen(settings: Settings, listening: socket.socket, stop: threading.Event) -> None:
    """The Storage SCP."""
    listener = Listener(
        listening,
        settings.receive.ae_title,
        settings.receive.calling_ae_titles,
        settings.receive.max_associations,
        connect(settings),
        settings.data_dir,
        settings.receive.quiet_seconds,
        settings.receive.release_quiet_seconds,
    )
    server = threading.Thread(target=listener.serve, name="listener", daemon=True)
    server.start()
    log.info("listening", host=listening.getsockname()[0], port=listening.getsockname()[1])
    stop.wait()
    listener.stop()
    server.join(FINISH_SECONDS)


def choose_model(settings: Settings, database: Database) -> Model:
    """The active version, verified; the first version found becomes active."""
    name = settings.infer.model
    found = {m.version: m for m in package.installed(model_folders(settings)) if m.name == name}
    if not found:
        folders = " or ".join(str(folder) for folder in model_folders(settings))
        raise ModelDamaged(f"there is no model '{name}' in {folders}: correct infer.model")
    for model in found.values():
        package.verify(model)
        if queue.register_model(database, name, model.version, model.sha256) != model.sha256:
            raise ModelDamaged(
                f"{model.path} is not the {name} {model.version} that the database knows: "
                "give it another version"
            )
    active = queries.active_version(database, name)
    if active not in found:
        raise ModelDamaged(f"the active version {active} of {name} is not installed: install it")
    return found[active]


def infer(settings: Settings, stop: threading.Event) -> None:
    """Score studies until told to stop."""
    from dicomai.worker import Worker  # torch: only the process that scores pays for it

    database = connect(settings)
    worker = Worker(settings, database, choose_model(settings, database))
    worker.run(stop)


def deliver(settings: Settings, stop: threading.Event) -> None:
    """Send results, one thread a destination, so that a slow one holds up no other."""
    database = connect(settings)
    threads = [
        threading.Thread(
            target=deliver_to,
            args=(settings, database, destination, stop),
            name=destination.name,
            daemon=True,
        )
        for destination in settings.destinations
    ]
    for thread in threads:
        thread.start()
    log.info("delivering", destinations=[d.name for d in settings.destinations])
    stop.wait()
    deadline = time.monotonic() + FINISH_SECONDS
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))


def deliver_to(
    settings: Settings, database: Database, destination: Destination, stop: threading.Event
) -> None:
    """Claim what is due for one destination, send it, write how it went."""
    lease_seconds = 2 * settings.deliver.timeout_seconds + 30

    def step() -> bool:
        if destination.name not in queries.due_destinations(database):
            return False
        items = queue.claim_deliveries(
            database,
            destination.name,
            settings.data_dir,
            lease_seconds,
            settings.deliver.batch_size,
        )
        if items:
            send_batch(settings, database, destination, items, lease_seconds, stop)
        return bool(items)

    work_until(stop, step)


def send_batch(
    settings: Settings,
    database: Database,
    destination: Destination,
    items: list[queue.Delivery],
    lease_seconds: float,
    stop: threading.Event,
) -> None:
    """Send claimed deliveries over one association; what is not sent is due again."""
    waiting = [item for item in items if is_whole(database, item)]
    if not waiting:
        return
    try:
        contexts = sender.contexts_for([item.path for item in waiting])
        with sender.association(
            destination.host,
            destination.port,
            destination.ae_title,
            settings.receive.ae_title,
            contexts,
            settings.deliver.timeout_seconds,
        ) as assoc:
            while waiting and not stop.is_set():
                queue.renew_deliveries(database, waiting, lease_seconds)
                item = waiting[0]
                try:
                    warning = sender.store(assoc, item.path)
                except Rejected as error:
                    log.warning("refused", destination=destination.name, error=str(error))
                    queue.finish_delivery(database, item, "failed", str(error))
                else:
                    log.info(
                        "delivered", study=item.study_instance_uid, result=item.sop_instance_uid
                    )
                    queue.finish_delivery(database, item, "delivered", warning)
                waiting.pop(0)
    except Rejected as error:  # of the whole association
        log.warning("refused", destination=destination.name, error=str(error))
        for item in waiting:
            queue.finish_delivery(database, item, "failed", str(error))
    except (Retryable, OSError) as error:
        log.warning("not_delivered", destination=destination.name, error=str(error))
        for item in waiting:
            put_off(settings, database, item, str(error))
    else:
        queue.release_deliveries(database, waiting)


def is_whole(database: Database, item: queue.Delivery) -> bool:
    """Whether the result's file can be sent; if not, only this delivery fails."""
    try:
        sender.kind_of(item.path)
    except Rejected as error:
        log.error("refused", result=item.sop_instance_uid, error=str(error))
        queue.finish_delivery(database, item, "failed", str(error))
        return False
    return True


def put_off(settings: Settings, database: Database, item: queue.Delivery, error: str) -> None:
    """Try again later, or give up after the last attempt."""
    limits = settings.deliver
    if item.attempts >= limits.max_attempts:
        queue.finish_delivery(database, item, "failed", f"given up: {error}")
        return
    wait = wait_seconds(
        item.attempts, limits.first_retry_seconds, limits.longest_retry_seconds, random.random()
    )
    queue.finish_delivery(database, item, "pending", error, wait)


def work_until(stop: threading.Event, step: Callable[[], bool]) -> None:
    """Call step again and again: at once while it finds work, else after a short wait."""
    while not stop.is_set():
        try:
            busy = step()
        except (SQLAlchemyError, OSError) as error:
            log.error("trouble", error=type(error).__name__, detail=first_line(error))
            stop.wait(TROUBLE_SECONDS)
            continue
        if not busy:
            stop.wait(POLL_SECONDS)


def first_line(error: BaseException) -> str:
    """An error in one line; of a database error only the driver's words, never the values."""
    inner = getattr(error, "orig", None) or error
    lines = str(inner).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__


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
    outcome, _ = queue.arrive(
        database,
        queue.Arrival(
            instance,
            header.study_instance_uid,
            size,
            header.analyzable,
            "",
            header.expected_instances,
        ),
        settings.data_dir,
        settings.receive.quiet_seconds,
    )
    # A duplicate that lies under another name is not needed.
    return outcome is not queue.Outcome.DUPLICATE


TASKS: dict[str, Callable[[Settings, Database], str]] = {"sweep": sweep}
