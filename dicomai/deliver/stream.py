"""A file's dataset as P-DATA-TF PDUs, many in one call.

pynetdicom makes an object of each PDU and hands it to another thread, which costs more than all the
rest of sending, for many peers take no more than 16 kB in a PDU. It goes on doing everything else:
negotiation, responses, aborts, and TLS, whose connection is not for two threads.
"""

import socket
import ssl
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from pynetdicom.association import Association

P_DATA_TF = 4
HEAD = struct.Struct(">BxIIBB")  # PDU: type, length; its one fragment: length, context, control
BEHIND_LENGTH = HEAD.size - 6
IS_COMMAND, IS_LAST = 1, 2  # of the control header (PS3.8 E.2)
BLOCK_BYTES = 1 << 20
LARGEST_PDU = 1 << 18  # where the peer takes any
C_STORE_RQ = 0x0001
MEDIUM = 0x0000
HAS_DATASET = 0x0000
TIMEVAL = struct.Struct("@ll")


def hasten(assoc: Association, timeout_seconds: float) -> None:
    """Let an association of plain TCP send its C-STORE requests so.

    timeout_seconds: for the peer to take what is sent in one call
    """
    transport = assoc.dul.socket
    connection = None if transport is None else transport.socket
    if connection is None or isinstance(connection, ssl.SSLSocket):
        return
    limit = TIMEVAL.pack(int(timeout_seconds), int(timeout_seconds % 1 * 1e6))
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
    stock = assoc.dimse.send_msg

    def send(primitive: Any, context_id: int) -> None:
        file = getattr(primitive, "_dataset_path", None)
        if file is None:
            stock(primitive, context_id)
            return
        try:
            for block in blocks(command(primitive), context_id, file, assoc.dimse.maximum_pdu_size):
                connection.sendall(block)
        except OSError:
            assoc.dul.event_queue.put("Evt17")  # the connection is of no more use (PS3.8 9.2.2)

    assoc.dimse.send_msg = send  # type: ignore[method-assign]


def command(request: Any) -> bytes:
    """The command set of a C-STORE-RQ (PS3.7 9.3.1), Implicit VR Little Endian."""
    elements = (
        _element(0x0002, _uid(request.AffectedSOPClassUID))
        + _element(0x0100, struct.pack("<H", C_STORE_RQ))
        + _element(0x0110, struct.pack("<H", request.MessageID))
        + _element(0x0700, struct.pack("<H", MEDIUM))
        + _element(0x0800, struct.pack("<H", HAS_DATASET))
        + _element(0x1000, _uid(request.AffectedSOPInstanceUID))
    )
    return _element(0x0000, struct.pack("<I", len(elements))) + elements


def _element(number: int, value: bytes) -> bytes:
    return struct.pack("<HHI", 0, number, len(value)) + value


def _uid(value: str) -> bytes:
    return value.encode() + b"\0" * (len(value) % 2)


def blocks(
    command_set: bytes, context_id: int, file: tuple[Path, int], largest_pdu: int
) -> Iterator[memoryview]:
    """Command and dataset as whole PDUs; a block is overwritten when the next one is asked for.

    file: path, and where the dataset begins; largest_pdu: that the peer takes, 0 for any
    """
    size = min(largest_pdu or LARGEST_PDU, LARGEST_PDU)
    most = (size - BEHIND_LENGTH) & ~1  # a fragment has an even length (PS3.8 E.1)
    for start in range(0, len(command_set), most):
        part = command_set[start : start + most]
        last = IS_LAST if start + most >= len(command_set) else 0
        head = HEAD.pack(
            P_DATA_TF, len(part) + BEHIND_LENGTH, len(part) + 2, context_id, IS_COMMAND | last
        )
        yield memoryview(head + part)
    path, offset = file
    with path.open("rb", buffering=0) as source:
        left = source.seek(0, 2) - offset
        source.seek(offset)
        yield from _of_dataset(source, left, context_id, most)


def _of_dataset(source: BinaryIO, left: int, context_id: int, most: int) -> Iterator[memoryview]:
    block = memoryview(bytearray(max(BLOCK_BYTES, most + HEAD.size)))
    filled = 0
    while True:
        size = min(left, most)
        left -= size
        HEAD.pack_into(
            block,
            filled,
            P_DATA_TF,
            size + BEHIND_LENGTH,
            size + 2,
            context_id,
            0 if left else IS_LAST,
        )
        filled += HEAD.size
        _fill(source, block[filled : filled + size])
        filled += size
        if not left or filled + HEAD.size + most > len(block):
            yield block[:filled]
            filled = 0
        if not left:
            return


def _fill(source: BinaryIO, into: memoryview) -> None:
    """Raises OSError where the file has become shorter."""
    while len(into):
        count = source.readinto(into)  # type: ignore[attr-defined]
        if not count:
            raise OSError("the file became shorter while it was sent")
        into = into[count:]
