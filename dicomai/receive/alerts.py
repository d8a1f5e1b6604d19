"""Refusals in the log and in the audit table, few however many there are."""

import math
import threading
import time
from dataclasses import dataclass

import structlog

from dicomai.audit import AuditCode, AuditEvent, Auditor, Outcome
from dicomai.errors import Misbehaviour

log = structlog.get_logger()

EVERY_SECONDS = 60.0
MOST_KINDS = 1000  # of (code, address) told apart
TOGETHER_SECONDS = 0.1
NODE_AUTHENTICATION = "110126"  # PS3.16 CID 401
UNFINISHED = "unfinished"  # a line breaks off, or a sender is stopped: no alarm, only a log line
OF_AUTHENTICATION = {"address", "called-ae-title", "calling-ae-title", "tls"}
ELSEWHERE = "other addresses"


@dataclass
class _Kind:
    """What has happened since it was last written; due: when it may be written again."""

    words: str = ""
    who: str = ""
    count: int = 0
    due: float = 0.0


class Alerts:
    """Counts refusals and writes them, each kind from each address once a minute at most.

    A thread of its own writes: a database that is locked holds up no connection.
    """

    def __init__(self, auditor: Auditor) -> None:
        self._auditor = auditor
        self._kinds: dict[tuple[str, str], _Kind] = {}
        self._lock = threading.Lock()
        self._news = threading.Event()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="alerts", daemon=True)

    def start(self) -> None:
        """Begin to write."""
        self._thread.start()

    def stop(self) -> None:
        """Write what is left, and end."""
        self._stop.set()
        self._news.set()
        if self._thread.ident is not None:
            self._thread.join()
        self._write(math.inf)

    def note(self, error: Misbehaviour, address: str, who: str) -> None:
        """Count one refusal; who: the calling AE title, where it is known."""
        with self._lock:
            key = (error.code, address)
            if key not in self._kinds and len(self._kinds) >= MOST_KINDS:
                key = (error.code, ELSEWHERE)
            kind = self._kinds.setdefault(key, _Kind())
            kind.words, kind.who = str(error), who
            kind.count += 1
        self._news.set()

    def _run(self) -> None:
        while not self._stop.is_set():
            self._news.wait(self._seconds_to_due())
            self._stop.wait(TOGETHER_SECONDS)
            self._news.clear()
            self._write(time.monotonic())

    def _seconds_to_due(self) -> float | None:
        """Of what is known already; None where nothing is."""
        with self._lock:
            first = min((kind.due for kind in self._kinds.values()), default=None)
        return None if first is None else max(0.0, first - time.monotonic())

    def _write(self, now: float) -> None:
        for (code, address), kind in self._take(now):
            log.warning(
                "unfinished" if code == UNFINISHED else "refused",
                kind=code,
                reason=kind.words,
                address=address,
                calling_ae_title=kind.who,
                count=kind.count,
            )
            if code != UNFINISHED:
                self._auditor.note(_event(code, address, kind))

    def _take(self, now: float) -> list[tuple[tuple[str, str], _Kind]]:
        with self._lock:
            due = {key: kind for key, kind in self._kinds.items() if kind.due <= now}
            for key, kind in due.items():
                if kind.count:
                    self._kinds[key] = _Kind(due=now + EVERY_SECONDS)
                else:
                    del self._kinds[key]
        return [item for item in due.items() if item[1].count]


def _event(code: str, address: str, kind: _Kind) -> AuditEvent:
    return AuditEvent(
        AuditCode.SECURITY_ALERT,
        "E",
        kind.who or "unknown",
        type=NODE_AUTHENTICATION if code in OF_AUTHENTICATION else code,
        outcome=Outcome.MINOR_FAILURE,
        address=address,
        count=kind.count,
        detail=kind.words,
    )
