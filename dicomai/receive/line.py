"""One connection: PDUs in, bounded in size and time."""

import contextlib
import socket
import ssl
import struct
import time
from collections.abc import Callable, Mapping

from dicomai import tls
from dicomai.errors import Misbehaviour
from dicomai.receive.upper_layer import HEADER

BUFFER_BYTES = 1 << 18
# What a sender must bring within idle_seconds, or end a message: about 1 kB/s with the default.
LEAST_BYTES = 1 << 16
HANDSHAKE_SECONDS = 10.0
LINGER_SECONDS = 2.0
TIMEVAL = struct.Struct("@ll")


class Vanished(Exception):
    """The peer is gone, or we hang up: there is nobody to answer."""


class Line:
    """A connection with one clock: the peer must get on before it runs out.

    The clock starts anew when the peer begins a PDU between two messages, whenever it has brought
    LEAST_BYTES of messages, and when got_on() says so. So a message that is dripped, in whatever
    pieces, does not last.
    """

    def __init__(self, connection: socket.socket, idle_seconds: float) -> None:
        self._connection = connection
        self._idle_seconds = idle_seconds
        self._bytes = 0
        self._hung_up: Exception | None = None
        self._buffer = memoryview(bytearray(BUFFER_BYTES))
        self._read_to = self._filled_to = 0
        self.got_on()

    def secure(self, context: ssl.SSLContext) -> None:
        """The TLS handshake. Raises Misbehaviour."""
        self._connection.settimeout(min(self._idle_seconds, HANDSHAKE_SECONDS))
        try:
            secured = context.wrap_socket(
                self._connection, server_side=True, do_handshake_on_connect=False
            )
            self._connection = secured
            secured.do_handshake()
        except TimeoutError:
            raise Misbehaviour("tls", "no TLS handshake in time", is_answered=True) from None
        except (ssl.SSLEOFError, ssl.SSLZeroReturnError) as error:
            raise Vanished from error
        except ssl.SSLError as error:  # the TLS alert is the answer
            raise Misbehaviour("tls", f"TLS: {tls.words(error)}", is_answered=True) from None
        except OSError as error:
            raise Vanished from error
        self._check()
        self.got_on()

    def send_at_once(self) -> None:
        """Nagle's algorithm holds each response back for up to 40 ms."""
        self._connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def got_on(self) -> None:
        """Start the clock anew."""
        self._due = time.monotonic() + self._idle_seconds
        self._bytes = 0

    def read_header(self, largest: Mapping[int, int], between_messages: bool) -> tuple[int, int]:
        """The next PDU: type, and the length of what follows its header.

        largest: PDU type -> length that is accepted; other types are refused before they are read.
        Raises Misbehaviour, or Vanished where the peer has closed the connection.
        """
        if self._read_to == self._filled_to:
            self._fill()
        if between_messages:
            self.got_on()
        kind, length = HEADER.unpack(self.read(HEADER.size))
        if kind not in largest:
            raise Misbehaviour("malformed", f"a PDU of type 0x{kind:02X} out of place")
        if length > largest[kind]:
            raise Misbehaviour("malformed", f"a PDU of {length} bytes where {largest[kind]} may be")
        return kind, length

    def read(self, size: int) -> bytes:
        """So many bytes. Raises Misbehaviour and Vanished."""
        end = self._read_to + size
        if end > self._filled_to:
            parts: list[bytes] = []
            self._pass_on(size, lambda piece: parts.append(bytes(piece)))
            return b"".join(parts)
        start, self._read_to = self._read_to, end
        return bytes(self._buffer[start:end])

    def bring(self, size: int, take: Callable[[memoryview], object]) -> None:
        """So many bytes of a message, as they come; what take() is given is soon overwritten.

        Raises Misbehaviour and Vanished.
        """

        def count(piece: memoryview) -> None:
            begun = time.monotonic()
            take(piece)
            self._due += time.monotonic() - begun  # ours, not the peer's
            self._bytes += len(piece)
            if self._bytes >= LEAST_BYTES:
                self.got_on()

        self._pass_on(size, count)

    def _pass_on(self, size: int, take: Callable[[memoryview], object]) -> None:
        while size:
            if self._read_to == self._filled_to:
                self._fill()
            start, self._read_to = self._read_to, min(self._read_to + size, self._filled_to)
            size -= self._read_to - start
            take(self._buffer[start : self._read_to])

    def _fill(self) -> None:
        self._check()
        left = self._due - time.monotonic()
        if left <= 0:
            raise self._too_slow()
        self._limit(socket.SO_RCVTIMEO, left)
        try:
            received = self._connection.recv_into(self._buffer)
            # Many senders hold the end of a PDU back until what went before is acknowledged, which
            # the kernel puts off for 40 ms: measured 43 against 11 ms an image (tcp(7)).
            self._connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
        except (TimeoutError, BlockingIOError):
            raise self._too_slow() from None
        except OSError:
            received = 0
        self._check()
        if not received:
            raise Vanished
        self._read_to, self._filled_to = 0, received

    def _limit(self, option: int, seconds: float) -> None:
        """How long the next call may take; option: SO_RCVTIMEO or SO_SNDTIMEO.

        By the kernel (socket(7)), not by Python, which asks it twice more for each call, and lets
        the other threads go first each time; OpenSSL knows of Python's only.
        """
        if isinstance(self._connection, ssl.SSLSocket):
            self._connection.settimeout(seconds)
            return
        limit = TIMEVAL.pack(int(seconds), max(1, int(seconds % 1 * 1e6)))
        self._connection.setsockopt(socket.SOL_SOCKET, option, limit)

    def _too_slow(self) -> Misbehaviour:
        return Misbehaviour("too-slow", f"silent or too slow for {self._idle_seconds:g} s")

    def _check(self) -> None:
        if self._hung_up is not None:
            raise self._hung_up

    def send(self, pdu: bytes) -> None:
        """Send one PDU. Raises Misbehaviour where the peer takes nothing, Vanished."""
        self._limit(socket.SO_SNDTIMEO, self._idle_seconds)
        try:
            self._connection.sendall(pdu)
        except (TimeoutError, BlockingIOError):
            raise self._too_slow() from None
        except OSError as error:
            raise Vanished from error

    def hang_up(self, why: Exception) -> None:
        """From another thread: the one that reads gets this error, at once."""
        self._hung_up = why
        with contextlib.suppress(OSError):
            # Not SSLSocket.shutdown(), which takes the TLS object away from its reader.
            socket.socket.shutdown(self._connection, socket.SHUT_RD)

    def close(self) -> None:
        """Close, so that what was sent last still arrives.

        With unread data the kernel would answer with a reset, which throws it away at the peer.
        """
        deadline = time.monotonic() + LINGER_SECONDS
        with contextlib.suppress(OSError), self._connection:
            self._say_goodbye()
            socket.socket.shutdown(self._connection, socket.SHUT_WR)
            while (left := deadline - time.monotonic()) > 0:
                self._connection.settimeout(left)
                if not socket.socket.recv(self._connection, BUFFER_BYTES):
                    break

    def _say_goodbye(self) -> None:
        if isinstance(self._connection, ssl.SSLSocket):
            self._connection.settimeout(LINGER_SECONDS)
            with contextlib.suppress(OSError, ValueError):
                self._connection.unwrap()
