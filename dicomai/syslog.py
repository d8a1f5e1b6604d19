"""Messages to a syslog server (RFC 5424), sent by a thread of their own: nobody waits for them."""

import codecs
import os
import queue
import socket
import ssl
import threading
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import structlog

log = structlog.get_logger()

# PS3.15 A.6 and A.7: security/authorization messages, most of them "normal but significant".
FACILITY = 10
NOTICE, WARNING = 5, 4
MESSAGE_ID = "DICOM+RFC3881"

TIMEOUT_SECONDS = 3.0
FIRST_PAUSE_SECONDS = 1.0
LONGEST_PAUSE_SECONDS = 60.0
MOST_WAITING = 1000


def rfc5424(text: str, severity: int, moment: datetime) -> bytes:
    """One message; its text in UTF-8 begins with a byte order mark (RFC 5424 6.4)."""
    stamp = moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
    host = socket.gethostname()[:255] or "-"
    priority = FACILITY * 8 + severity
    head = f"<{priority}>1 {stamp} {host} dicomai {os.getpid()} {MESSAGE_ID} - "
    return head.encode("ascii", "replace") + codecs.BOM_UTF8 + text.encode()


class Syslog:
    """A server by its address: "/dev/log", "udp://host:514", "tcp://..." or "tls://...".

    What cannot be sent is tried again after ever longer pauses; while that lasts, so many messages
    wait, and more are dropped. One line in the log says so.
    """

    def __init__(self, address: str, tls_ca: Path | None = None) -> None:
        self._address = address
        self._tls_ca = tls_ca
        self._socket: socket.socket | None = None
        self._waiting: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._dropped = 0
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None

    def send(self, message: bytes) -> None:
        """Have a message sent; returns at once."""
        if self._waiting.qsize() >= MOST_WAITING:
            self._dropped += 1
            return
        self._waiting.put(message)
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="syslog", daemon=True)
            self._thread.start()

    def close(self, seconds: float) -> None:
        """Send what waits, for so long at most; a server that is away is not waited for."""
        self._closing.set()
        self._waiting.put(None)
        if self._thread is not None:
            self._thread.join(seconds)

    def _work(self) -> None:
        pause = 0.0
        while (message := self._waiting.get()) is not None:
            while (error := self._try(message)) is not None:
                if not pause:
                    kind, words = type(error).__name__, str(error)
                    log.warning("syslog_away", address=self._address, error=kind, detail=words)
                pause = min(LONGEST_PAUSE_SECONDS, pause * 2 or FIRST_PAUSE_SECONDS)
                if self._closing.wait(pause):
                    return
            if pause:
                log.info("syslog_back", address=self._address, dropped=self._dropped)
                pause, self._dropped = 0.0, 0
        self._disconnect()

    def _try(self, message: bytes) -> OSError | ValueError | None:
        """Send one message; why that failed, or None."""
        try:
            if self._socket is not None and _has_ended(self._socket):
                self._disconnect()
            if self._socket is None:
                self._socket = connect(self._address, self._tls_ca)
            self._socket.sendall(framed(self._address, message))
        except (OSError, ValueError) as error:
            self._disconnect()
            return error
        return None

    def _disconnect(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None


def framed(address: str, message: bytes) -> bytes:
    """A datagram is its own frame; in a stream, octets are counted (RFC 5425 4.3, RFC 6587 3.4)."""
    if address.startswith(("tcp:", "tls:")):
        return b"%d %s" % (len(message), message)
    return message


def connect(address: str, tls_ca: Path | None) -> socket.socket:
    """A connected socket. Raises OSError, ValueError for a host name that cannot be one."""
    if address.startswith("/"):
        return _datagram(socket.AF_UNIX, address)
    parts = urlsplit(address)
    host, port = parts.hostname or "", parts.port or 0
    if parts.scheme == "udp":
        family, *_, where = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
        return _datagram(family, where)
    plain = socket.create_connection((host, port), TIMEOUT_SECONDS)
    if parts.scheme == "tcp":
        return plain
    try:
        # PS3.15 A.6: TLS 1.2 or later. Without tls_ca, the system's certificate authorities.
        context = ssl.create_default_context(cafile=tls_ca)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        return context.wrap_socket(plain, server_hostname=host)
    except BaseException:
        plain.close()
        raise


def _datagram(family: int, where: Any) -> socket.socket:
    found = socket.socket(family, socket.SOCK_DGRAM)
    found.settimeout(TIMEOUT_SECONDS)
    try:
        found.connect(where)
    except OSError:
        found.close()
        raise
    return found


def _has_ended(connected: socket.socket) -> bool:
    """Whether the server has closed a stream: what is written to it then is lost unseen."""
    if connected.type == socket.SOCK_DGRAM:
        return False
    connected.settimeout(0)
    try:
        # A server has nothing to say; what TLS itself sends is read and forgotten.
        return connected.recv(4096) == b""
    except (BlockingIOError, ssl.SSLWantReadError):
        return False
    except OSError:
        return True
    finally:
        connected.settimeout(TIMEOUT_SECONDS)
