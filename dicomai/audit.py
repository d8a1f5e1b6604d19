"""Audit events (PS3.15 A.5): who did what to which study, as rows and to a syslog server.

What is audited: start and stop, transfers, refused peers, what a person changes, takes out or
deletes by a command, and who reads the audit itself. Commands that only show findings are not: they
name no patient, and whoever may run them may read the same rows with any other program.
"""

import dataclasses
import os
import pwd
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import structlog
from sqlalchemy.exc import SQLAlchemyError

from dicomai import syslog
from dicomai.audit_message import (
    APPLICATION_START,
    APPLICATION_STOP,
    MEANINGS,
    SENT,
    AuditCode,
    AuditEvent,
    Outcome,
    audit_message,
)
from dicomai.errors import Misuse
from dicomai.settings import Settings
from dicomai.store import queue
from dicomai.store.database import Database
from dicomai.syslog import Syslog

__all__ = [
    "APPLICATION_START",
    "APPLICATION_STOP",
    "MEANINGS",
    "SENT",
    "AuditCode",
    "AuditEvent",
    "Auditor",
    "Outcome",
    "open_auditor",
    "person",
]

log = structlog.get_logger()

CLOSE_SECONDS = 1.0
NOBODY = 2**32 - 1  # loginuid(5): nobody has logged in
LONGEST = {"who": 64, "type": 64, "address": 64, "study_instance_uid": 64, "detail": 500}


class Auditor:
    """Writes audit events; trouble with that is logged and stops nobody's work."""

    def __init__(
        self, database: Database, server: Syslog | None = None, ae_title: str = "DICOMAI"
    ) -> None:
        self._database = database
        self._server = server
        self._ae_title = ae_title

    def note(self, event: AuditEvent) -> None:
        """Write one event; the row is the truth, the syslog server gets it besides."""
        event = _cleaned(event)
        try:
            queue.audit_event(
                self._database,
                code=event.code.value,
                type=event.type,
                action=event.action,
                outcome=int(event.outcome),
                who=event.who,
                address=event.address,
                study_instance_uid=event.study_instance_uid,
                count=event.count,
                detail=event.detail,
            )
        except SQLAlchemyError as error:
            log.error("not_audited", code=event.code.value, error=type(error).__name__)
        if self._server is not None:
            moment = datetime.now(UTC)
            good = event.outcome is Outcome.SUCCESS and event.code is not AuditCode.SECURITY_ALERT
            severity = syslog.NOTICE if good else syslog.WARNING
            text = audit_message(event, moment, self._ae_title)
            self._server.send(syslog.rfc5424(text, severity, moment))

    @contextmanager
    def act(self, event: AuditEvent) -> Iterator[None]:
        """Audit what the block does, with how it went."""
        try:
            yield
        except BaseException as error:
            # A.5.2: 4 where it can be done again in another way, 8 where it was ended.
            minor = isinstance(error, Misuse)
            outcome = Outcome.MINOR_FAILURE if minor else Outcome.SERIOUS_FAILURE
            self.note(dataclasses.replace(event, outcome=outcome))
            raise
        self.note(event)

    def close(self, seconds: float = CLOSE_SECONDS) -> None:
        """Give the syslog server so long to take what waits."""
        if self._server is not None:
            self._server.close(seconds)


def open_auditor(settings: Settings, database: Database) -> Auditor:
    """As the settings say; the syslog server is not called before there is something to say."""
    how = settings.audit
    server = Syslog(how.syslog, how.tls_ca) if how.syslog else None
    return Auditor(database, server, settings.receive.ae_title)


def person() -> str:
    """Who runs this: the user who logged in, also behind sudo, else the process's user."""
    user = os.getuid()
    with suppress(OSError, ValueError):  # no such file where the kernel does no auditing
        login = int(Path("/proc/self/loginuid").read_text())
        user = user if login == NOBODY else login
    try:
        return pwd.getpwuid(user).pw_name
    except KeyError:
        return f"user {user}"


def _cleaned(event: AuditEvent) -> AuditEvent:
    """As long as the columns are; without control characters, which Postgres or XML would refuse.

    A peer chooses its AE title: it must not get around being audited.
    """
    cleaned: dict[str, Any] = {}
    for name, most in LONGEST.items():
        value = getattr(event, name)
        if value is not None:
            cleaned[name] = "".join(c if c.isprintable() else "?" for c in value)[:most]
    return dataclasses.replace(event, **cleaned)
