"""A listener in this process, and peers that misbehave towards it, as the tests use them."""

import socket
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import cycle
from pathlib import Path
from typing import Any

from peers import free_port, need, wait_until
from pydicom.dataset import Dataset
from sqlalchemy import select

from dicomai.audit import Auditor
from dicomai.receive.listener import Listener
from dicomai.receive.server import bind
from dicomai.settings import Receive
from dicomai.store.database import Database
from dicomai.store.tables import audit

# A test's disk may be small, and its studies are never complete.
USUAL = {"min_free_megabytes": 0, "quiet_seconds": 30.0, "release_quiet_seconds": 1.0}
ASSOCIATE_RQ, ASSOCIATE_AC, ASSOCIATE_RJ, DATA, RELEASE_RQ, RELEASE_RP, ABORT = range(1, 8)
SECURITY_ALERT, TRANSFERRED = "110113", "110104"


@contextmanager
def listening(
    database: Database,
    folder: Path,
    committed: Callable[[Dataset], bool] | None = None,
    **receive: Any,
) -> Iterator[int]:
    """A Storage SCP on a free port; receive: settings that are not the usual ones."""
    port = free_port()
    settings = Receive(**{**USUAL, **receive})
    auditor = Auditor(database)
    listener = Listener(bind("127.0.0.1", port), settings, database, folder, auditor, committed)
    thread = threading.Thread(target=listener.serve)
    thread.start()
    try:
        yield port
    finally:
        listener.stop()
        thread.join()


def dcmtk(program: str, port: int, *arguments: str | Path) -> "subprocess.CompletedProcess[str]":
    """A program of DCMTK against the listener, as MODALITY."""
    need(f"/usr/bin/{program}")
    options = [argument for argument in arguments if isinstance(argument, str)]
    files = [str(argument) for argument in arguments if isinstance(argument, Path)]
    command = [f"/usr/bin/{program}", "-aet", "MODALITY", "-aec", "DICOMAI", *options]
    return subprocess.run(
        [*command, "127.0.0.1", str(port), *files],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def files_of(folder: Path) -> list[Path]:
    """All files below a folder, temporary ones included."""
    return [file for file in folder.rglob("*") if file.is_file()]


def attending() -> set[threading.Thread]:
    """The threads of connections."""
    return {thread for thread in threading.enumerate() if "_attend" in thread.name}


def is_served(port: int) -> bool:
    """Whether a good peer gets its echo."""
    return dcmtk("echoscu", port).returncode == 0


def audited(database: Database, code: str) -> list[dict[str, Any]]:
    """The audit events of a kind."""
    statement = select(audit).where(audit.c.code == code).order_by(audit.c.id)
    with database.read() as connection:
        return [dict(row) for row in connection.execute(statement).mappings()]


def wait_for_alert(database: Database) -> dict[str, Any]:
    """The first security alert, which is written soon, but not at once."""
    rows: list[dict[str, Any]] = wait_until(
        lambda: audited(database, SECURITY_ALERT), 5, "a security alert"
    )
    return rows[0]


def record(port: int, program: str, *arguments: str | Path) -> list[bytes]:
    """The PDUs that a program of DCMTK sends to the listener."""
    sent = bytearray()
    with socket.create_server(("127.0.0.1", 0)) as proxy:
        thread = threading.Thread(target=_relay, args=(proxy, port, sent))
        thread.start()
        done = dcmtk(program, proxy.getsockname()[1], *arguments)
        thread.join()
    assert done.returncode == 0, done.stderr
    return split(bytes(sent))


def _relay(proxy: socket.socket, port: int, sent: bytearray) -> None:
    client, _ = proxy.accept()
    with client, connect(port) as server:
        back = threading.Thread(target=_pump, args=(server, client, bytearray()))
        back.start()
        _pump(client, server, sent)
        back.join()


def _pump(source: socket.socket, target: socket.socket, seen: bytearray) -> None:
    with suppress(OSError):
        while data := source.recv(1 << 16):
            seen += data
            target.sendall(data)
    with suppress(OSError):
        target.shutdown(socket.SHUT_WR)


def split(stream: bytes) -> list[bytes]:
    """A byte stream as its PDUs (PS3.8 9.3.1)."""
    pdus = []
    while stream:
        end = 6 + int.from_bytes(stream[2:6], "big")
        pdus.append(stream[:end])
        stream = stream[end:]
    return pdus


def pdu(kind: int, body: bytes) -> bytes:
    """A PDU around its body."""
    return struct.pack(">BxI", kind, len(body)) + body


def data_pdu(context_id: int, control: int, fragment: bytes) -> bytes:
    """A P-DATA-TF with one fragment."""
    return pdu(DATA, struct.pack(">IBB", len(fragment) + 2, context_id, control) + fragment)


def connect(port: int, timeout: float = 10.0) -> socket.socket:
    """A plain connection."""
    return socket.create_connection(("127.0.0.1", port), timeout)


def establish(port: int, request: bytes) -> socket.socket:
    """A connection with an association."""
    connection = connect(port)
    connection.sendall(request)
    assert read_pdu(connection)[0] == ASSOCIATE_AC
    return connection


def read_pdu(connection: socket.socket) -> bytes:
    """The next PDU, empty where the listener has closed or reset the connection."""
    with suppress(ConnectionError):
        head = _read(connection, 6)
        return head + _read(connection, int.from_bytes(head[2:6], "big"))
    return b""


def _read(connection: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        received = connection.recv(size - len(data))
        if not received:
            raise ConnectionResetError
        data += received
    return data


def is_cut_off(connection: socket.socket) -> bool:
    """Wait for the end of a connection; whether an A-ABORT came before it."""
    last = b""
    while answer := read_pdu(connection):
        last = answer
    return last[:1] == bytes([ABORT])


def drip(connection: socket.socket, pieces: Sequence[bytes], seconds: float) -> float:
    """Send piece after piece, over and over, until the listener hangs up; after how many seconds.

    seconds: between two pieces
    """
    begun = time.monotonic()
    connection.settimeout(seconds)
    with suppress(ConnectionError):
        for piece in cycle(pieces):
            connection.sendall(piece)
            with suppress(TimeoutError):
                if connection.recv(1000)[:1] in {b"", bytes([ABORT])}:
                    break
            assert time.monotonic() - begun < 30, "never cut off"
    return time.monotonic() - begun
