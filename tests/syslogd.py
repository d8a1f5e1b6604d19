"""A syslog server on 127.0.0.1: what it got, message by message, over UDP, TCP, TLS or a path."""

import codecs
import re
import shutil
import socket
import ssl
import subprocess
import threading
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import BinaryIO
from xml.etree import ElementTree

from peers import lack, wait_until

# RFC 5424 6: PRI VERSION SP TIMESTAMP SP HOSTNAME SP APP-NAME SP PROCID SP MSGID SP SD SP BOM MSG
RFC5424 = re.compile(
    rb"<(?P<priority>\d{1,3})>1 "
    rb"(?P<moment>\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{1,6}Z) "
    rb"(?P<host>[!-~]{1,255}) (?P<program>[!-~]{1,48}) (?P<process>[!-~]{1,128}) "
    rb"(?P<kind>[!-~]{1,32}) (?P<data>-) " + codecs.BOM_UTF8 + rb"(?P<text>.+)",
    re.DOTALL,
)


@dataclass(frozen=True)
class Message:
    """One message, taken apart."""

    priority: int
    moment: datetime
    program: str
    kind: str
    text: str

    @property
    def root(self) -> ElementTree.Element:
        """Its text as XML."""
        return ElementTree.fromstring(self.text)


def read(raw: bytes) -> Message:
    """Take a message apart; fails where it is not of RFC 5424."""
    found = RFC5424.fullmatch(raw)
    assert found is not None, raw
    return Message(
        int(found["priority"]),
        datetime.fromisoformat(found["moment"].decode()),
        found["program"].decode(),
        found["kind"].decode(),
        found["text"].decode("utf-8"),
    )


def certificate(folder: Path) -> tuple[Path, Path]:
    """A self-signed certificate of 127.0.0.1 and its key."""
    if shutil.which("openssl") is None:
        lack("missing: apt-get install --no-install-recommends openssl")
    folder.mkdir(parents=True, exist_ok=True)
    made, key = folder / "cert.pem", folder / "key.pem"
    curve, name = "ec_paramgen_curve:prime256v1", "subjectAltName=IP:127.0.0.1"
    command = ["openssl", "req", "-x509", "-nodes", "-days", "2", "-subj", "/CN=127.0.0.1"]
    command += ["-newkey", "ec", "-pkeyopt", curve, "-addext", name]
    subprocess.run([*command, "-keyout", key, "-out", made], check=True, capture_output=True)
    return made, key


def frame(stream: BinaryIO) -> bytes | None:
    """The next octet-counted message, or None at the end (RFC 5425 4.3: MSG-LEN SP SYSLOG-MSG)."""
    length = b""
    while (digit := stream.read(1)) != b" ":
        if not digit:
            return None
        assert digit.isdigit(), digit
        length += digit
    return stream.read(int(length))


class Server:
    """Listens until closed; messages: (number of the connection, bytes)."""

    def __init__(
        self,
        kind: str,
        folder: Path | None = None,
        port: int = 0,
        tls: tuple[Path, Path] | None = None,
    ) -> None:
        """kind: udp, tcp, tls or path."""
        self.messages: list[tuple[int, bytes]] = []
        self.connections = 0
        self._open: list[socket.socket] = []
        self._kind = kind
        self._tls = tls
        if kind == "path":
            assert folder is not None
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
            self.address = str(folder / "log")
            self._socket.bind(self.address)
        else:
            how = socket.SOCK_DGRAM if kind == "udp" else socket.SOCK_STREAM
            self._socket = socket.socket(socket.AF_INET, how)
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self._socket.bind(("127.0.0.1", port))
            self.address = f"{kind}://127.0.0.1:{self._socket.getsockname()[1]}"
        work = self._datagrams if self._socket.type == socket.SOCK_DGRAM else self._accept
        if work == self._accept:
            self._socket.listen()
        self._thread = threading.Thread(target=work, daemon=True)
        self._thread.start()

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_: object) -> None:
        self.hang_up()
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # ends accept() and recv()
        self._socket.close()

    def wait(self, count: int, seconds: float = 10) -> list[Message]:
        """So many messages."""
        wait_until(lambda: len(self.messages) >= count, seconds, f"{count} messages")
        return [read(raw) for _, raw in self.messages]

    def hang_up(self) -> None:
        """End every connection."""
        for connection in self._open:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            connection.close()
        self._open.clear()

    def _datagrams(self) -> None:
        with suppress(OSError):
            while data := self._socket.recv(65536):
                self.messages.append((1, data))

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                connection, _ = self._socket.accept()
                self.connections += 1
                self._open.append(connection)
                number = self.connections
                threading.Thread(
                    target=self._stream, args=(number, connection), daemon=True
                ).start()

    def _stream(self, number: int, connection: socket.socket) -> None:
        with suppress(OSError):  # a TLS handshake that failed, or hang_up()
            if self._tls is not None:
                context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
                context.load_cert_chain(*self._tls)
                connection = context.wrap_socket(connection, server_side=True)
                self._open.append(connection)
            with connection.makefile("rb") as stream:
                while (message := frame(stream)) is not None:
                    self.messages.append((number, message))
