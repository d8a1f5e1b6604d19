"""The acceptor's PDUs as bytes (PS3.8 9.3 and annex D), read and made; no network here."""

import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum, IntEnum

from dicomai.errors import Misbehaviour

APPLICATION_CONTEXT = b"1.2.840.10008.3.1.1.1"  # PS3.7 A.2.1
HEADER = struct.Struct(">BxI")  # PDU type, length of what follows
# A fragment's length, presentation context and control header; the first counts the other two.
FRAGMENT = struct.Struct(">IBB")
FIXED_BYTES = 68  # protocol version, reserved, called and calling AE title, reserved


class Pdu(IntEnum):
    """PDU types (PS3.8 9.3.1)."""

    ASSOCIATE_RQ = 1
    ASSOCIATE_AC = 2
    ASSOCIATE_RJ = 3
    DATA = 4
    RELEASE_RQ = 5
    RELEASE_RP = 6
    ABORT = 7


class Item(IntEnum):
    """Items and sub-items of A-ASSOCIATE PDUs (PS3.8 9.3.2, 9.3.3, annex D; PS3.7 D.3.3)."""

    APPLICATION_CONTEXT = 0x10
    CONTEXT_RQ = 0x20
    CONTEXT_AC = 0x21
    ABSTRACT_SYNTAX = 0x30
    TRANSFER_SYNTAX = 0x40
    USER_INFORMATION = 0x50
    MAXIMUM_LENGTH = 0x51
    IMPLEMENTATION_CLASS_UID = 0x52
    ROLES = 0x54
    IMPLEMENTATION_VERSION = 0x55


class ContextResult(IntEnum):
    """What becomes of a proposed presentation context (PS3.8 Table 9-18)."""

    ACCEPTED = 0
    ABSTRACT_SYNTAX_NOT_SUPPORTED = 3
    TRANSFER_SYNTAXES_NOT_SUPPORTED = 4


class Rejection(Enum):
    """Result, source and reason of an A-ASSOCIATE-RJ (PS3.8 Table 9-21)."""

    CALLING_AE_TITLE = (1, 1, 3)
    CALLED_AE_TITLE = (1, 1, 7)
    PROTOCOL_VERSION = (1, 2, 2)
    LOCAL_LIMIT = (2, 3, 2)


@dataclass(frozen=True, slots=True)
class Proposal:
    """A presentation context as the requestor proposes it."""

    context_id: int
    abstract_syntax: str
    transfer_syntaxes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Context:
    """A presentation context as it was answered."""

    context_id: int
    abstract_syntax: str
    transfer_syntax: str
    result: ContextResult


@dataclass(frozen=True, slots=True)
class Fragment:
    """A presentation data value's head; length: of the data that follow it."""

    context_id: int
    is_command: bool
    is_last: bool
    length: int


@dataclass(frozen=True, slots=True)
class Request:
    """What an A-ASSOCIATE-RQ says; maximum_length: of a P-DATA-TF to its sender, 0 for any.

    roles: SOP Class UID -> whether the requestor wants to be (SCU, SCP)
    """

    fixed: bytes
    contexts: tuple[Proposal, ...]
    maximum_length: int = 0
    roles: Mapping[str, tuple[bool, bool]] = field(default_factory=dict)

    @property
    def supports_our_version(self) -> bool:
        """Bit 0 of the protocol version, and no other bit counts (PS3.8 Table 9-11)."""
        return bool(self.fixed[1] & 1)

    @property
    def called_ae_title(self) -> str:
        """Who is asked."""
        return _ae_title(self.fixed[4:20])

    @property
    def calling_ae_title(self) -> str:
        """Who asks."""
        return _ae_title(self.fixed[20:36])


def malformed(words: str) -> Misbehaviour:
    """The error for what is no valid PDU or message."""
    return Misbehaviour("malformed", words)


def read_request(body: bytes) -> Request:
    """Read an A-ASSOCIATE-RQ (PS3.8 9.3.2) without its header. Raises Misbehaviour."""
    if len(body) < FIXED_BYTES:
        raise malformed("an A-ASSOCIATE-RQ that is too short")
    contexts: dict[int, Proposal] = {}
    length, roles = 0, {}
    # Items of unrecognized types are skipped (PS3.8 9.3.1).
    for kind, value in _items(body[FIXED_BYTES:]):
        if kind == Item.CONTEXT_RQ:
            proposal = _read_proposal(value)
            contexts[proposal.context_id] = proposal
        elif kind == Item.USER_INFORMATION:
            for sub_kind, sub_value in _items(value):
                if sub_kind == Item.MAXIMUM_LENGTH:
                    length = int.from_bytes(sub_value, "big")
                elif sub_kind == Item.ROLES:
                    roles.update(_read_roles(sub_value))
    request = Request(body[:FIXED_BYTES], tuple(contexts.values()), length, roles)
    if not request.calling_ae_title or not contexts:
        raise malformed("an A-ASSOCIATE-RQ without calling AE title or presentation context")
    return request


def _items(data: bytes) -> Iterator[tuple[int, bytes]]:
    at = 0
    while at < len(data):
        if at + 4 > len(data):
            raise malformed("an item that is cut off")
        kind, length = struct.unpack_from(">BxH", data, at)
        at += 4 + length
        if at > len(data):
            raise malformed("an item that is longer than what holds it")
        yield kind, data[at - length : at]


def _read_proposal(value: bytes) -> Proposal:
    if len(value) < 4 or value[0] % 2 == 0:  # odd, PS3.8 9.3.2.2
        raise malformed("a presentation context without a valid identifier")
    names = [(kind, _uid(name)) for kind, name in _items(value[4:])]
    abstract = [name for kind, name in names if kind == Item.ABSTRACT_SYNTAX]
    transfer = tuple(name for kind, name in names if kind == Item.TRANSFER_SYNTAX)
    if len(abstract) != 1 or not transfer:
        raise malformed("a presentation context without its syntaxes")
    return Proposal(value[0], abstract[0], transfer)


def _read_roles(value: bytes) -> dict[str, tuple[bool, bool]]:
    end = 2 + int.from_bytes(value[:2], "big")
    if len(value) != end + 2:
        raise malformed("a role selection of the wrong length")
    return {_uid(value[2:end]): (bool(value[end]), bool(value[end + 1]))}


def _uid(value: bytes) -> str:
    try:
        return value.rstrip(b"\0 ").decode("ascii")
    except UnicodeDecodeError:
        raise malformed("a UID that is not ASCII") from None


def _ae_title(value: bytes) -> str:
    title = value.decode("latin-1").strip(" \0")
    if not (title.isascii() and (title.isprintable() or not title)):
        raise malformed("an AE title that is not ASCII")
    return title


def negotiate(
    proposals: Iterable[Proposal], supported: Mapping[str, Sequence[str]]
) -> list[Context]:
    """Answer presentation contexts; supported: abstract syntax -> transfer syntaxes, best first."""
    return [_answer(proposal, supported.get(proposal.abstract_syntax)) for proposal in proposals]


def _answer(proposal: Proposal, ours: Sequence[str] | None) -> Context:
    if ours is None:
        result = ContextResult.ABSTRACT_SYNTAX_NOT_SUPPORTED
        chosen = None
    else:
        chosen = next((syntax for syntax in ours if syntax in proposal.transfer_syntaxes), None)
        result = (
            ContextResult.TRANSFER_SYNTAXES_NOT_SUPPORTED
            if chosen is None
            else ContextResult.ACCEPTED
        )
    # One transfer syntax is named even where none is accepted (PS3.8 9.3.3.2).
    syntax = chosen or proposal.transfer_syntaxes[0]
    return Context(proposal.context_id, proposal.abstract_syntax, syntax, result)


def accept(
    request: Request,
    contexts: Iterable[Context],
    roles: Mapping[str, tuple[bool, bool]],
    maximum_length: int,
    implementation: tuple[str, str],
) -> bytes:
    """A-ASSOCIATE-AC (PS3.8 9.3.3).

    roles: those of the requestor that are granted; maximum_length: of a P-DATA-TF to us;
    implementation: class UID and version name
    """
    answers = b"".join(
        _item(
            Item.CONTEXT_AC,
            bytes([context.context_id, 0, context.result, 0])
            + _item(Item.TRANSFER_SYNTAX, context.transfer_syntax.encode()),
        )
        for context in contexts
    )
    class_uid, version = implementation
    user = (
        _item(Item.MAXIMUM_LENGTH, maximum_length.to_bytes(4, "big"))
        + _item(Item.IMPLEMENTATION_CLASS_UID, class_uid.encode())
        + b"".join(
            _item(Item.ROLES, struct.pack(">H", len(uid)) + uid.encode() + bytes(granted))
            for uid, granted in roles.items()
        )
        + _item(Item.IMPLEMENTATION_VERSION, version.encode())
    )
    return _pdu(
        Pdu.ASSOCIATE_AC,
        # The reserved fields come back as they were sent; the AE titles are among them.
        b"\0\1" + request.fixed[2:],
        _item(Item.APPLICATION_CONTEXT, APPLICATION_CONTEXT),
        answers,
        _item(Item.USER_INFORMATION, user),
    )


def reject(why: Rejection) -> bytes:
    """A-ASSOCIATE-RJ (PS3.8 9.3.4)."""
    return _pdu(Pdu.ASSOCIATE_RJ, bytes([0, *why.value]))


def release() -> bytes:
    """A-RELEASE-RP (PS3.8 9.3.7)."""
    return _pdu(Pdu.RELEASE_RP, bytes(4))


def abort() -> bytes:
    """A-ABORT by the service provider, reason not specified (PS3.8 9.3.8)."""
    return _pdu(Pdu.ABORT, bytes([0, 0, 2, 0]))


def data(context_id: int, command: bytes, maximum_length: int) -> Iterator[bytes]:
    """A command set as P-DATA-TF PDUs that its receiver can take (PS3.8 9.3.5, annex E)."""
    # Each fragment has its length, context and control header in the same PDU.
    most = maximum_length - FRAGMENT.size if maximum_length else len(command)
    if most < 1:
        raise malformed("a maximum length that leaves no room for data")
    for start in range(0, len(command), most):
        fragment = command[start : start + most]
        last = 2 if start + most >= len(command) else 0
        head = FRAGMENT.pack(len(fragment) + 2, context_id, 1 | last)
        yield _pdu(Pdu.DATA, head, fragment)


def read_fragment(head: bytes, left: int) -> Fragment:
    """The head of a fragment in a P-DATA-TF of which so many bytes are left (PS3.8 9.3.5.1).

    Of the control header only the two lowest bits count (PS3.8 E.2). Raises Misbehaviour.
    """
    if len(head) < FRAGMENT.size:
        raise malformed("a fragment that is cut off")
    length, context_id, control = FRAGMENT.unpack(head)
    if length < 2 or length + 4 > left:
        raise malformed("a fragment of impossible length")
    return Fragment(context_id, bool(control & 1), bool(control & 2), length - 2)


def _item(kind: Item, value: bytes) -> bytes:
    return struct.pack(">BxH", kind, len(value)) + value


def _pdu(kind: Pdu, *parts: bytes) -> bytes:
    return HEADER.pack(kind, sum(map(len, parts))) + b"".join(parts)
