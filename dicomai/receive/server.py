"""Who is let in, how many, and for how long; a thread for each connection."""

import contextlib
import ipaddress
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import structlog

from dicomai.errors import Misbehaviour, PortInUse
from dicomai.receive.alerts import UNFINISHED, Alerts
from dicomai.receive.association import Association, Terms
from dicomai.receive.line import Line, Vanished
from dicomai.tls import Acceptor

log = structlog.get_logger()

MOST_WAITING = 100  # connections that have no association, or have it no more
POLL_SECONDS = 0.2
PATIENCE_SECONDS = 4.0
LAST_SECONDS = 1.0


def bind(host: str, port: int) -> socket.socket:
    """The listening socket; the listener processes inherit it. Raises PortInUse."""
    server = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        server.bind((host, port))
    except OSError as error:
        server.close()
        raise PortInUse(
            f"cannot listen on {host}:{port}: {error.strerror}: "
            "stop the other program or change receive.host or receive.port"
        ) from error
    server.listen(128)
    return server


class Stopping(Exception):
    """We end; the peer is told by an abort."""


@dataclass(frozen=True, slots=True)
class Doors:
    """Who may connect (empty: anybody), how many, how idle, and with what TLS."""

    addresses: Sequence[str]
    max_associations: int
    idle_seconds: float
    tls: Acceptor | None


class Server:
    """Accepts connections on a listening socket and serves each in a thread of its own.

    released: called before an association's release is confirmed; ended: after the end of each
    """

    def __init__(
        self,
        listening: socket.socket,
        doors: Doors,
        terms: Terms,
        alerts: Alerts,
        released: Callable[[Association], None],
        ended: Callable[[Association], None],
    ) -> None:
        self._listening = listening
        self._doors = doors
        self._networks = [ipaddress.ip_network(address) for address in doors.addresses]
        self._terms = terms
        self._alerts = alerts
        self._released = released
        self._ended = ended
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._waiting: dict[Line, None] = {}  # without an association, the oldest first
        self._established: set[Line] = set()
        self._threads: set[threading.Thread] = set()

    def serve(self) -> None:
        """Block until stop()."""
        self._listening.settimeout(POLL_SECONDS)
        with self._listening:  # other processes go on listening on the same socket
            while not self._stop.is_set():
                try:
                    connection, (address, _) = self._listening.accept()
                except TimeoutError:
                    continue
                except OSError as error:  # no more files, for instance: others may end
                    log.error("cannot_accept", error=error.strerror)
                    self._stop.wait(1.0)
                    continue
                self._let_in(connection, address)

    def stop(self) -> None:
        """Take no new association, give open ones some seconds to end, abort the rest."""
        self._stop.set()
        self._hang_up(self._waiting)
        self._wait(PATIENCE_SECONDS)
        self._hang_up(self._established)
        self._wait(LAST_SECONDS)

    def _hang_up(self, lines: "dict[Line, None] | set[Line]") -> None:
        with self._lock:
            chosen = list(lines)
        for line in chosen:
            line.hang_up(Stopping())

    def _wait(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while self._threads and time.monotonic() < deadline:
            time.sleep(0.02)

    def _let_in(self, connection: socket.socket, address: str) -> None:
        if not self._is_allowed(address):
            connection.close()
            error = Misbehaviour("address", "the address is not among receive.addresses")
            self._alerts.note(error, address, "")
            return
        line = Line(connection, self._doors.idle_seconds)
        self._make_room(line, address)
        if self._stop.is_set():  # stop() may have been through before this one was there
            line.hang_up(Stopping())
        thread = threading.Thread(target=self._attend, args=(line, address), daemon=True)
        with self._lock:
            self._threads.add(thread)
        try:
            thread.start()
        except RuntimeError:  # no more threads
            log.error("cannot_accept", error="no more threads")
            self._forget(line, thread)
            connection.close()

    def _is_allowed(self, address: str) -> bool:
        found = ipaddress.ip_address(address)
        return not self._networks or any(found in network for network in self._networks)

    def _make_room(self, line: Line, address: str) -> None:
        """Too many that say nothing: the one that has said nothing for longest makes room."""
        oldest = None
        with self._lock:
            self._waiting[line] = None
            if len(self._waiting) > MOST_WAITING:
                oldest = next(iter(self._waiting))
                del self._waiting[oldest]
        if oldest is not None:
            words = f"more than {MOST_WAITING} connections without an association"
            oldest.hang_up(Misbehaviour("too-many-connections", words))

    def _attend(self, line: Line, address: str) -> None:
        association = Association(line, address, self._terms)
        try:
            try:
                self._converse(line, association)
            finally:
                self._leave(line)
                association.close()
                self._ended(association)
        except Misbehaviour as error:
            self._refuse(line, association, error)
        except Stopping:
            _abort(association)
        except Vanished:
            self._note_unfinished(association)
        except Exception:  # one connection fails, the others go on
            log.exception("association_failed", address=address)
            _abort(association)
        finally:
            line.close()
            self._forget(line, threading.current_thread())

    def _converse(self, line: Line, association: Association) -> None:
        line.send_at_once()
        if self._doors.tls is not None:
            line.secure(self._doors.tls.context())
        if association.establish(lambda: self._enter(line)):
            association.serve(lambda: self._release(line, association))
            self._note_unfinished(association)

    def _enter(self, line: Line) -> bool:
        with self._lock:
            if len(self._established) >= self._doors.max_associations:
                return False
            self._waiting.pop(line, None)
            self._established.add(line)
            return True

    def _leave(self, line: Line) -> None:
        """Its place is free; what is left of it counts among those that say nothing."""
        with self._lock:
            if line in self._established:
                self._established.remove(line)
                self._waiting[line] = None

    def _forget(self, line: Line, thread: threading.Thread) -> None:
        with self._lock:
            self._waiting.pop(line, None)
            self._threads.discard(thread)

    def _release(self, line: Line, association: Association) -> None:
        # Its place is free before the peer knows: it may come back at once.
        self._leave(line)
        self._released(association)

    def _refuse(self, line: Line, association: Association, error: Misbehaviour) -> None:
        self._leave(line)
        self._alerts.note(error, association.address, association.calling_ae_title)
        if not error.is_answered:
            _abort(association)

    def _note_unfinished(self, association: Association) -> None:
        if association.is_within_message:
            error = Misbehaviour(UNFINISHED, "the sender ended in the middle of an object")
            self._alerts.note(error, association.address, association.calling_ae_title)


def _abort(association: Association) -> None:
    with contextlib.suppress(Misbehaviour, Vanished):
        association.abort()
