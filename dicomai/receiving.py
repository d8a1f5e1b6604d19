"""The process that receives."""

import socket
import threading

import structlog
from pydicom.dataset import Dataset

from dicomai.audit import open_auditor
from dicomai.deliver import commitment
from dicomai.receive.listener import Listener
from dicomai.roles import FINISH_SECONDS, join, wait_for
from dicomai.settings import Settings
from dicomai.store import outbox

log = structlog.get_logger()


def listen(settings: Settings, listening: socket.socket, stop: threading.Event) -> None:
    """The Storage SCP."""
    database = join(settings)
    auditor = open_auditor(settings, database)

    def committed(ds: Dataset) -> bool:
        report = commitment.read(ds)
        return outbox.commitment_reported(
            database,
            report.transaction_uid,
            report.committed,
            report.failed,
            settings.deliver.max_attempts,
            settings.deliver.longest_retry_seconds,
        )

    listener = Listener(
        listening, settings.receive, database, settings.data_dir, auditor, committed
    )
    server = threading.Thread(target=listener.serve, name="listener", daemon=True)
    server.start()
    log.info("listening", host=listening.getsockname()[0], port=listening.getsockname()[1])
    wait_for(stop)
    listener.stop()
    server.join(FINISH_SECONDS)
    auditor.close()
