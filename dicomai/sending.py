"""The delivering process: threads that send what is due to each destination."""

import random
import threading
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path

import structlog
from pynetdicom.association import Association
from pynetdicom.presentation import PresentationContext

from dicomai import tls
from dicomai.audit import SENT, AuditCode, AuditEvent, Auditor, open_auditor
from dicomai.deliver import commitment, sender
from dicomai.deliver.backoff import wait_seconds
from dicomai.errors import Rejected, Retryable
from dicomai.roles import FINISH_SECONDS, join, wait_for, work_until
from dicomai.settings import Destination, Settings
from dicomai.store import outbox, queries
from dicomai.store.database import Database
from dicomai.store.outbox import Commitment, Delivery

log = structlog.get_logger()

REPORT_SECONDS = 3600.0  # for a PACS to say whether it commits itself; then it is asked again
COMMITMENT_SIZE = 500
IDLE_SECONDS = 3.0  # that an association stays open with nothing to send


def deliver(settings: Settings, stop: threading.Event) -> None:
    """Send results until told to stop; a slow destination holds up no other."""
    tls.check(settings.destinations)
    database = join(settings)
    auditor = open_auditor(settings, database)
    threads = [
        threading.Thread(
            target=Sending(settings, database, destination, auditor, stop).run, daemon=True
        )
        for destination in settings.destinations
        for _ in range(destination.associations)
    ]
    for thread in threads:
        thread.start()
    log.info("delivering", destinations=[d.name for d in settings.destinations])
    wait_for(stop)
    deadline = time.monotonic() + FINISH_SECONDS
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    auditor.close()


class Sending:
    """What one destination gets, over one association after the other.

    One stays open from study to study, for as long as there is something to send.
    """

    def __init__(
        self,
        settings: Settings,
        database: Database,
        destination: Destination,
        auditor: Auditor,
        stop: threading.Event,
    ) -> None:
        self._limits = settings.deliver
        self._data_dir = settings.data_dir
        self._calling_ae_title = settings.receive.ae_title
        self._database = database
        self._destination = destination
        self._auditor = auditor
        self._stop = stop
        self._lease_seconds = 2 * self._limits.timeout_seconds + 30
        self._open: Association | None = None
        self._closing = ExitStack()
        self._kinds: set[tuple[str, str]] = set()
        self._last_used = 0.0

    def run(self) -> None:
        """Until told to stop."""
        try:
            work_until(self._stop, self._database, self.step, self._seconds_to_due)
        finally:
            self._hang_up()

    def _seconds_to_due(self) -> float:
        seconds = queries.seconds_to_due_delivery(self._database, self._destination.name)
        return seconds if self._open is None else min(seconds, IDLE_SECONDS)

    def step(self) -> bool:
        """Send what is due, then ask for commitment; False where there was nothing to do."""
        name = self._destination.name
        if not queries.has_due(self._database, name):
            if time.monotonic() - self._last_used > IDLE_SECONDS:
                self._hang_up()
            return False
        # After a failure one object shows whether the destination is back.
        away = outbox.failures(self._database, name) > 0
        items = outbox.claim_deliveries(
            self._database,
            name,
            self._data_dir,
            self._lease_seconds,
            1 if away else self._limits.batch_size,
        )
        if items:
            if self._send(items) and away:
                outbox.resume_destination(self._database, name)
            self._last_used = time.monotonic()
            return True
        asked = outbox.claim_commitment(self._database, name, REPORT_SECONDS, COMMITMENT_SIZE)
        if asked is not None:
            self._ask(asked)
        return asked is not None

    def _send(self, items: list[Delivery]) -> bool:
        """Send claimed deliveries over one association; whether any was stored.

        What was not sent is due again.
        """
        waiting = [item for item in items if self._is_whole(item)]
        if not waiting:
            return False
        stored: Counter[str] = Counter()
        try:
            assoc = self._connected([item.path for item in waiting])
            while waiting and not self._stop.is_set():
                if outbox.start_delivery(self._database, waiting, self._lease_seconds):
                    stored[waiting[0].study_instance_uid] += self._store(assoc, waiting[0])
                waiting.pop(0)
        except Rejected as error:  # of the whole association
            for item in waiting:
                self._refused(item, error)
        except (Retryable, OSError) as error:
            self._hang_up()
            self._pause(str(error))
            outbox.release_deliveries(self._database, waiting)
        else:
            outbox.release_deliveries(self._database, waiting)
        self._audit(stored)
        return bool(+stored)

    def _audit(self, stored: Counter[str]) -> None:
        """One event for each study that went over an association."""
        for uid, count in (+stored).items():
            self._auditor.note(
                AuditEvent(
                    AuditCode.TRANSFERRED,
                    "R",
                    self._destination.ae_title,
                    type=SENT,
                    address=self._destination.host,
                    study_instance_uid=uid,
                    count=count,
                )
            )

    def _store(self, assoc: Association, item: Delivery) -> bool:
        """Send one object; whether it was stored.

        Raises Retryable where the association is of no more use.
        """
        try:
            warning = sender.store(assoc, item.path)
        except Rejected as error:
            self._refused(item, error)
            return False
        except Retryable as error:
            self._put_off(item, str(error))
            raise
        log.info(
            "delivered",
            destination=self._destination.name,
            study=item.study_instance_uid,
            result=item.sop_instance_uid,
            warning=warning,
        )
        if self._destination.commit:
            outbox.finish_delivery(self._database, item, "committing", warning, 0.0)
        else:
            outbox.finish_delivery(self._database, item, "delivered", warning)
        return True

    def _is_whole(self, item: Delivery) -> bool:
        """Whether the result's file can be sent; if not, only this delivery fails."""
        try:
            sender.kind_of(item.path)
        except Rejected as error:
            self._refused(item, error)
            return False
        return True

    def _refused(self, item: Delivery, error: Rejected) -> None:
        log.warning(
            "refused",
            destination=self._destination.name,
            result=item.sop_instance_uid,
            error=str(error),
        )
        outbox.finish_delivery(self._database, item, "failed", str(error))

    def _put_off(self, item: Delivery, error: str) -> None:
        """Try this object again later, or give it up after the last attempt."""
        sent = item.attempts + 1
        if sent >= self._limits.max_attempts:
            outbox.finish_delivery(self._database, item, "failed", f"given up: {error}")
        else:
            outbox.finish_delivery(self._database, item, "pending", error, self._wait(sent))

    def _pause(self, error: str) -> None:
        log.warning("not_delivered", destination=self._destination.name, error=error)
        outbox.pause_destination(self._database, self._destination.name, error, self._wait)

    def _wait(self, attempts: int) -> float:
        limits = self._limits
        return wait_seconds(
            attempts, limits.first_retry_seconds, limits.longest_retry_seconds, random.random()
        )

    def _ask(self, asked: Commitment) -> None:
        """Ask for commitment; what the PACS says of it comes to the listener."""
        name = self._destination.name
        try:
            with self._association([commitment.context()]) as assoc:
                commitment.request(assoc, asked.transaction_uid, asked.instances)
        except (Rejected, Retryable, OSError) as error:
            log.warning("no_commitment", destination=name, error=str(error))
            longest = self._limits.longest_retry_seconds
            outbox.put_off_commitment(self._database, asked, str(error), longest)
        else:
            log.info("asked_for_commitment", destination=name, results=len(asked.instances))

    def _connected(self, files: Sequence[Path]) -> Association:
        """The association that is open, where it was offered such objects, or a new one.

        Raises PeerUnreachable and PeerRefused.
        """
        wanted = {sender.kind_of(file) for file in files}
        if self._open is None or not self._open.is_established or not wanted <= self._kinds:
            self._hang_up()
            self._kinds |= wanted
            association = self._association(sender.contexts_of(self._kinds))
            self._open = self._closing.enter_context(association)
        return self._open

    def _hang_up(self) -> None:
        self._open = None
        self._closing.close()

    def _association(
        self, contexts: Sequence[PresentationContext]
    ) -> AbstractContextManager[Association]:
        peer = self._destination
        return sender.association(
            peer.host,
            peer.port,
            peer.ae_title,
            self._calling_ae_title,
            contexts,
            self._limits.timeout_seconds,
            tls.channel(peer),
        )
