"""Audit events (PS3.15 A.5): who did what to which study, as rows; never patient data."""

from dataclasses import dataclass
from enum import Enum, IntEnum

import structlog
from sqlalchemy.exc import SQLAlchemyError

from dicomai.store import queue
from dicomai.store.database import Database

log = structlog.get_logger()


class AuditCode(Enum):
    """Audit Event ID (PS3.16 CID 400)."""

    APPLICATION_ACTIVITY = "110100"
    TRANSFERRED = "110104"
    STUDY_DELETED = "110105"
    SECURITY_ALERT = "110113"


class Outcome(IntEnum):
    """Event Outcome Indicator (PS3.15 A.5.2.1)."""

    SUCCESS = 0
    MINOR_FAILURE = 4
    SERIOUS_FAILURE = 8


@dataclass(frozen=True, slots=True)
class AuditEvent:
    """One event.

    type: of PS3.16 CID 401 where there is one ("110120" Application Start), else a word of ours;
    action: C, R, U, D or E; who: an AE title or the user of a command; address: of the peer
    """

    code: AuditCode
    action: str
    who: str
    type: str | None = None
    outcome: Outcome = Outcome.SUCCESS
    address: str | None = None
    study_instance_uid: str | None = None
    count: int | None = None
    detail: str | None = None


class Auditor:
    """Writes audit events; trouble with that is logged and stops nobody's work."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def note(self, event: AuditEvent) -> None:
        """Write one event."""
        try:
            queue.audit_event(
                self._database,
                code=event.code.value,
                type=event.type,
                action=event.action,
                outcome=int(event.outcome),
                who=event.who[:64],
                address=event.address,
                study_instance_uid=event.study_instance_uid,
                count=event.count,
                detail=event.detail and event.detail[:500],
            )
        except SQLAlchemyError as error:
            log.error("not_audited", code=event.code.value, error=type(error).__name__)
