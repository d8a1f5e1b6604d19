"""DIMSE command sets as bytes (PS3.7 6.3.1 and annex E), read and made; no network here."""

import struct
from collections.abc import Mapping
from dataclasses import dataclass

from dicomai.receive.upper_layer import malformed

# Command Field (PS3.7 E.1); a response has the highest bit.
C_STORE_RQ = 0x0001
C_ECHO_RQ = 0x0030
N_EVENT_REPORT_RQ = 0x0100
C_CANCEL_RQ = 0x0FFF
RESPONSE = 0x8000

# Elements of group 0000 (PS3.7 E.1).
GROUP_LENGTH = 0x0000
AFFECTED_SOP_CLASS_UID = 0x0002
COMMAND_FIELD = 0x0100
MESSAGE_ID = 0x0110
MESSAGE_ID_RESPONDED_TO = 0x0120
PRIORITY = 0x0700
DATASET_TYPE = 0x0800
STATUS = 0x0900
AFFECTED_SOP_INSTANCE_UID = 0x1000
EVENT_TYPE_ID = 0x1002

NO_DATASET = 0x0101
HIGH = b"\x01\x00"  # PS3.7 9.3.1.1; medium is 0, low 2
LONGEST_UID = 64
FOUR_NUMBERS = struct.Struct("<" + "HHIH" * 4)


@dataclass(frozen=True, slots=True)
class Command:
    """A request's command set: element -> value, as it came."""

    elements: Mapping[int, bytes]

    @property
    def field(self) -> int:
        """What is asked for."""
        return self._number(COMMAND_FIELD)

    @property
    def message_id(self) -> int:
        """By which the response is known."""
        return self._number(MESSAGE_ID)

    @property
    def has_dataset(self) -> bool:
        """Whether a dataset follows."""
        return self._number(DATASET_TYPE) != NO_DATASET

    @property
    def sop_class_uid(self) -> str:
        """Affected SOP Class UID, empty where it is missing."""
        return self._uid(AFFECTED_SOP_CLASS_UID)

    @property
    def sop_instance_uid(self) -> str:
        """Affected SOP Instance UID, empty where it is missing."""
        return self._uid(AFFECTED_SOP_INSTANCE_UID)

    @property
    def is_high(self) -> bool:
        """Whether a C-STORE has priority; a priority that is none is passed over."""
        return self.elements.get(PRIORITY) == HIGH

    def _number(self, element: int) -> int:
        value = self.elements.get(element, b"")
        if len(value) != 2:
            raise malformed(f"a command without a valid (0000,{element:04X})")
        return int.from_bytes(value, "little")

    def _uid(self, element: int) -> str:
        return self.elements.get(element, b"").rstrip(b"\0 ").decode("latin-1")


def read(data: bytes) -> Command:
    """Read a command set: Implicit VR Little Endian, group 0000, no sequences.

    Raises Misbehaviour, also where an element that every request has is missing.
    """
    elements = {}
    at = 0
    while at < len(data):
        if at + 8 > len(data):
            raise malformed("a command element that is cut off")
        group, element, length = struct.unpack_from("<HHI", data, at)
        at += 8 + length
        if group != 0 or at > len(data):
            raise malformed("a command that is no command set")
        elements[element] = data[at - length : at]
    command = Command(elements)
    if command.field & RESPONSE:
        raise malformed("a response to what nobody asked")
    _ = command.has_dataset
    if command.field != C_CANCEL_RQ:
        _ = command.message_id
    return command


def response(request: Command, status: int) -> bytes:
    """The command set that answers a request."""
    numbers = FOUR_NUMBERS.pack(
        0, COMMAND_FIELD, 2, request.field | RESPONSE,
        0, MESSAGE_ID_RESPONDED_TO, 2, request.message_id,
        0, DATASET_TYPE, 2, NO_DATASET,
        0, STATUS, 2, status,
    )  # fmt: skip
    before = _returned(request, AFFECTED_SOP_CLASS_UID)
    behind = _returned(request, AFFECTED_SOP_INSTANCE_UID) + _returned(request, EVENT_TYPE_ID)
    length = len(before) + len(numbers) + len(behind)
    return struct.pack("<HHII", 0, GROUP_LENGTH, 4, length) + before + numbers + behind


def _returned(request: Command, element: int) -> bytes:
    value = request.elements.get(element)
    if value is None or len(value) > LONGEST_UID:
        return b""
    return struct.pack("<HHI", 0, element, len(value)) + value
