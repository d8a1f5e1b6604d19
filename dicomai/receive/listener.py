"""Storage and Verification SCP (PS3.4 Annex B and A): keep, commit, and only then Success."""

import dataclasses
import io
import os
import socket
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import structlog
from pydicom.dataset import Dataset
from pydicom.uid import UID
from pynetdicom import (
    ALL_TRANSFER_SYNTAXES,
    PYNETDICOM_IMPLEMENTATION_UID,
    PYNETDICOM_IMPLEMENTATION_VERSION,
    AllStoragePresentationContexts,
)
from pynetdicom.sop_class import (  # type: ignore[attr-defined]
    StorageCommitmentPushModel,
    Verification,
)
from sqlalchemy.exc import SQLAlchemyError

from dicomai import durable, tls
from dicomai.audit import AuditCode, AuditEvent, Auditor
from dicomai.errors import HeldElsewhere, Misbehaviour, NotDicom
from dicomai.parse import PARSER_ERRORS, parse
from dicomai.receive import command, inbox
from dicomai.receive.admission import Admission
from dicomai.receive.alerts import Alerts
from dicomai.receive.association import Association, Message, Sink, Terms
from dicomai.receive.command import Command
from dicomai.receive.header import is_uid
from dicomai.receive.server import Doors, Server
from dicomai.receive.upper_layer import Context
from dicomai.settings import Receive
from dicomai.store import arrivals
from dicomai.store.database import Database

log = structlog.get_logger()

# PS3.4 B.2.3 and PS3.7 C.
SUCCESS = 0x0000
PROCESSING_FAILURE = 0x0110
SOP_CLASS_NOT_SUPPORTED = 0x0122
OUT_OF_RESOURCES = 0xA700
MISMATCH = 0xA900
CANNOT_UNDERSTAND = 0xC000

MEGABYTE = 1 << 20
LARGEST_IN_MEMORY = 64 * MEGABYTE  # a report of 100,000 instances has 14
IMPLEMENTATION = str(PYNETDICOM_IMPLEMENTATION_UID), PYNETDICOM_IMPLEMENTATION_VERSION
UNCOMPRESSED = ALL_TRANSFER_SYNTAXES[:2]
STORAGE = {str(context.abstract_syntax) for context in AllStoragePresentationContexts}
SUPPORTED = {
    **dict.fromkeys(STORAGE, tuple(ALL_TRANSFER_SYNTAXES)),
    str(Verification): tuple(UNCOMPRESSED),
    str(StorageCommitmentPushModel): tuple(UNCOMPRESSED),
}
# A PACS that reports what it has committed itself to is the SCP of its own association
# (PS3.4 J.3.3).
ROLES = {str(StorageCommitmentPushModel): (False, True)}


@dataclass
class _Visit:
    """What one association has brought; kept: Study Instance UID -> instances.

    desk: for the one object that is under way
    """

    touched: set[str] = field(default_factory=set)
    kept: Counter[str] = field(default_factory=Counter)
    is_told_of_full_disk: bool = False
    desk: durable.Desk = field(default_factory=durable.Desk)


class _Memory(io.BytesIO):
    """What is not kept: a report of what was committed, or of what nobody offers."""

    def write(self, data: Any) -> int:
        """Take the next bytes. Raises Misbehaviour where they are too many."""
        if self.tell() + len(data) > LARGEST_IN_MEMORY:
            words = f"a request that is no C-STORE with more than {LARGEST_IN_MEMORY} bytes"
            raise Misbehaviour("too-large", words)
        return super().write(data)


@dataclass(frozen=True, slots=True)
class _Refused:
    """What is not even read, but must arrive before it can be answered."""

    status: int

    def write(self, data: memoryview) -> None:
        """Forget it."""

    def close(self) -> None:
        """Nothing is open."""


class Listener:
    """Serves associations on an already listening socket until stop().

    committed: what a PACS reports of a storage commitment; false where nobody had asked for it.
    Raises Misuse where the TLS files cannot be used.
    """

    def __init__(
        self,
        listening: socket.socket,
        receive: Receive,
        database: Database,
        data_dir: Path,
        auditor: Auditor,
        committed: Callable[[Dataset], bool] | None = None,
    ) -> None:
        self._receive = receive
        self._database = database
        self._data_dir = data_dir
        self._auditor = auditor
        self._committed = committed
        self._visits: dict[Association, _Visit] = {}
        self._lock = threading.Lock()
        self._admission = Admission(database, data_dir, receive.quiet_seconds)
        self._alerts = Alerts(auditor)
        terms = Terms(
            ae_title=receive.ae_title,
            calling_ae_titles=receive.calling_ae_titles,
            supported=SUPPORTED,
            roles=ROLES,
            services={
                command.C_ECHO_RQ: _echo,
                command.C_STORE_RQ: self._store,
                command.N_EVENT_REPORT_RQ: self._report,
            },
            sink=self._sink,
            max_bytes=receive.max_megabytes * MEGABYTE,
            implementation=IMPLEMENTATION,
        )
        doors = Doors(
            receive.addresses, receive.max_associations, receive.idle_seconds, tls.listens(receive)
        )
        self._server = Server(listening, doors, terms, self._alerts, self._released, self._ended)

    def serve(self) -> None:
        """Block until stop()."""
        self._alerts.start()
        self._server.serve()

    def stop(self) -> None:
        """Take no new association, give open ones some seconds to end, abort the rest."""
        self._server.stop()
        self._alerts.stop()

    def _store(self, association: Association, message: Message) -> int:
        calling = association.calling_ae_title
        try:
            return self._keep(association, message)
        except NotDicom as error:
            log.warning("refused", calling_ae_title=calling, reason=str(error))
            return CANNOT_UNDERSTAND
        except (OSError, SQLAlchemyError, HeldElsewhere) as error:
            log.error("not_kept", calling_ae_title=calling, error=type(error).__name__)
            return OUT_OF_RESOURCES
        except Exception:  # the sender must get a status, and keeps the object
            log.exception("not_kept", calling_ae_title=calling)
            return OUT_OF_RESOURCES

    def _sink(self, association: Association, context: Context, asked: Command) -> Sink:
        """A file for an image, memory for anything else."""
        if asked.field != command.C_STORE_RQ:
            return _Memory()
        if context.abstract_syntax not in STORAGE:
            return _Refused(SOP_CLASS_NOT_SUPPORTED)
        if not (is_uid(asked.sop_class_uid) and is_uid(asked.sop_instance_uid)):
            return _Refused(MISMATCH)
        try:
            visit = self._visit(association)
            if not self._has_space(visit):
                return _Refused(OUT_OF_RESOURCES)
            syntax = context.transfer_syntax
            meta = inbox.file_meta(
                asked.sop_class_uid, asked.sop_instance_uid, syntax, IMPLEMENTATION
            )
            return inbox.Draft(self._data_dir / "inbox", syntax, meta, visit.desk)
        except OSError as error:
            calling = association.calling_ae_title
            log.error("not_kept", calling_ae_title=calling, error=type(error).__name__)
            return _Refused(OUT_OF_RESOURCES)

    def _keep(self, association: Association, message: Message) -> int:
        draft, asked = message.dataset, message.command
        if isinstance(draft, _Refused):
            return draft.status
        assert isinstance(draft, inbox.Draft)
        header = draft.header()
        if (header.sop_instance_uid, header.sop_class_uid) != (
            asked.sop_instance_uid,
            asked.sop_class_uid,
        ):
            log.warning(
                "refused",
                calling_ae_title=association.calling_ae_title,
                reason="not the command's UID",
            )
            return MISMATCH
        if asked.is_high or self._is_stat(association):
            header = dataclasses.replace(header, stat=True)
        visit = self._visit(association)
        with self._lock:
            visit.touched.add(header.study_instance_uid)
        outcome = self._admission.admit(
            header, draft.keep(header), draft.size, association.calling_ae_title
        )
        visit.kept[header.study_instance_uid] += 1
        log.info(
            "received",
            study=header.study_instance_uid,
            instance=header.sop_instance_uid,
            outcome=outcome.value,
        )
        return SUCCESS

    def _is_stat(self, association: Association) -> bool:
        return association.calling_ae_title in self._receive.stat_calling_ae_titles

    def _has_space(self, visit: _Visit) -> bool:
        found = os.statvfs(self._data_dir)
        free_megabytes = found.f_bavail * found.f_frsize // MEGABYTE
        if free_megabytes >= self._receive.min_free_megabytes:
            return True
        if not visit.is_told_of_full_disk:
            visit.is_told_of_full_disk = True
            log.error(
                "disk_nearly_full",
                free_megabytes=free_megabytes,
                min_free_megabytes=self._receive.min_free_megabytes,
            )
        return False

    def _report(self, association: Association, message: Message) -> int:
        """N-EVENT-REPORT: what a PACS says of a storage commitment (PS3.4 J.3.3)."""
        if message.context.abstract_syntax != StorageCommitmentPushModel:
            return SOP_CLASS_NOT_SUPPORTED
        try:
            assert isinstance(message.dataset, _Memory)
            ds = parse(message.dataset.getvalue(), UID(message.context.transfer_syntax))
            known = self._committed is not None and self._committed(ds)
        except (*PARSER_ERRORS, NotDicom, SQLAlchemyError) as error:
            log.error("commitment_not_noted", error=type(error).__name__)
            return PROCESSING_FAILURE
        if not known:
            calling = association.calling_ae_title
            log.warning("commitment_of_nothing_asked", calling_ae_title=calling)
        return SUCCESS

    def _visit(self, association: Association) -> _Visit:
        with self._lock:
            if association not in self._visits:
                self._visits[association] = _Visit()
            return self._visits[association]

    def _released(self, association: Association) -> None:
        with self._lock:
            if association not in self._visits:
                return
            mine = self._visits[association].touched
            others = [v.touched for a, v in self._visits.items() if a is not association]
            finished = sorted(mine.difference(*others))
        try:
            arrivals.association_released(
                self._database, finished, self._receive.release_quiet_seconds
            )
        except SQLAlchemyError as error:  # the quiet period still ends by itself
            log.warning("release_not_noted", error=type(error).__name__)

    def _ended(self, association: Association) -> None:
        with self._lock:
            visit = self._visits.pop(association, None)
        if visit is None:
            return
        visit.desk.close()
        for study, count in visit.kept.items():
            self._auditor.note(
                AuditEvent(
                    AuditCode.TRANSFERRED,
                    "C",
                    association.calling_ae_title,
                    address=association.address,
                    study_instance_uid=study,
                    count=count,
                )
            )


def _echo(_association: Association, _message: Message) -> int:
    return SUCCESS
