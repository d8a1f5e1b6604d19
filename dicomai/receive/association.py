"""One association, as its acceptor (PS3.8 9.2, PS3.7 6.3): asked, answered, ended."""

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from dicomai.errors import Misbehaviour
from dicomai.receive import command, upper_layer
from dicomai.receive.command import Command
from dicomai.receive.line import Line
from dicomai.receive.upper_layer import Context, ContextResult, Pdu, Rejection, Request, malformed

LARGEST_PDU = 1 << 20
LARGEST_REQUEST = 1 << 18  # 128 contexts with 45 transfer syntaxes each need 170 kB
LARGEST_COMMAND = 1 << 16
# What may come, and how long it may be: to begin with, and in an association (PS3.8 Table 9-10).
# Some senders count the P-DATA-TF's header to its length.
AT_FIRST: dict[int, int] = {Pdu.ASSOCIATE_RQ: LARGEST_REQUEST, Pdu.ABORT: 4}
ESTABLISHED: dict[int, int] = {Pdu.DATA: LARGEST_PDU + 6, Pdu.RELEASE_RQ: 4, Pdu.ABORT: 4}
UNRECOGNIZED_OPERATION = 0x0211  # PS3.7 C


@dataclass(frozen=True, slots=True)
class Message:
    """A whole request, with its dataset as it came."""

    context: Context
    command: Command
    dataset: bytes


Service = Callable[["Association", Message], int]


@dataclass(frozen=True, slots=True)
class Terms:
    """What an acceptor offers and demands.

    calling_ae_titles: who may ask, empty for anybody; supported: abstract syntax -> transfer
    syntaxes; roles: SOP Class UID -> the (SCU, SCP) that a requestor may be; services: command
    field -> what gives the status; implementation: class UID and version name
    """

    ae_title: str
    calling_ae_titles: Sequence[str]
    supported: Mapping[str, Sequence[str]]
    roles: Mapping[str, tuple[bool, bool]]
    services: Mapping[int, Service]
    max_bytes: int
    implementation: tuple[str, str]


class Association:
    """An association and its state; run() returns when it has been released or aborted."""

    def __init__(self, line: Line, address: str, terms: Terms) -> None:
        self.address = address
        self.calling_ae_title = ""
        self._line = line
        self._terms = terms
        self._contexts: dict[int, Context] = {}
        self._maximum_length = 0
        self._message: _Message | None = None

    @property
    def is_within_message(self) -> bool:
        """Whether a request has begun to arrive and is not whole."""
        return self._message is not None

    def establish(self, has_room: Callable[[], bool]) -> bool:
        """Read the request and accept it; False where the peer has thought better of it.

        has_room: asked last, whether there may be one association more.
        Raises Misbehaviour, after an A-ASSOCIATE-RJ where one is due, and Vanished.
        """
        kind, body = self._line.read_pdu(AT_FIRST, between_messages=False)
        if kind == Pdu.ABORT:
            return False
        request = upper_layer.read_request(body)
        self.calling_ae_title = request.calling_ae_title
        self._admit(request, has_room)
        contexts = upper_layer.negotiate(request.contexts, self._terms.supported)
        self._contexts = {
            context.context_id: context
            for context in contexts
            if context.result is ContextResult.ACCEPTED
        }
        self._maximum_length = request.maximum_length
        self._line.send(
            upper_layer.accept(
                request, contexts, self._roles(request), LARGEST_PDU, self._terms.implementation
            )
        )
        self._line.got_on()
        return True

    def _admit(self, request: Request, has_room: Callable[[], bool]) -> None:
        terms = self._terms
        if not request.supports_our_version:
            self._reject(Rejection.PROTOCOL_VERSION, "malformed", "another protocol version")
        if request.called_ae_title != terms.ae_title:
            self._reject(Rejection.CALLED_AE_TITLE, "called-ae-title", "another called AE title")
        if terms.calling_ae_titles and request.calling_ae_title not in terms.calling_ae_titles:
            self._reject(
                Rejection.CALLING_AE_TITLE,
                "calling-ae-title",
                "the calling AE title is not among receive.calling_ae_titles",
            )
        if not has_room():
            self._reject(
                Rejection.LOCAL_LIMIT,
                "too-many-associations",
                "more associations than receive.max_associations",
            )

    def _reject(self, why: Rejection, code: str, words: str) -> None:
        self._line.send(upper_layer.reject(why))
        raise Misbehaviour(code, words, is_answered=True)

    def _roles(self, request: Request) -> dict[str, tuple[bool, bool]]:
        granted = {}
        for uid, (scu, scp) in request.roles.items():
            if uid in self._terms.roles:
                may_be_scu, may_be_scp = self._terms.roles[uid]
                granted[uid] = (scu and may_be_scu, scp and may_be_scp)
        return granted

    def serve(self, released: Callable[[], None]) -> None:
        """Answer requests until the peer releases or aborts the association.

        released: called before a release is confirmed. Raises Misbehaviour and Vanished.
        """
        while True:
            kind, body = self._line.read_pdu(
                ESTABLISHED, between_messages=not self.is_within_message
            )
            if kind == Pdu.ABORT:
                return
            if kind == Pdu.RELEASE_RQ:
                released()
                self._line.send(upper_layer.release())
                return
            for fragment in upper_layer.fragments(body):
                self._add(*fragment)

    def abort(self) -> None:
        """Tell the peer that it is over."""
        self._line.send(upper_layer.abort())

    def _add(self, context_id: int, is_command: bool, is_last: bool, data: memoryview) -> None:
        if self._message is None:
            context = self._contexts.get(context_id)
            if context is None:
                raise malformed("a message in a presentation context that was not accepted")
            self._message = _Message(context, self._terms.max_bytes)
        self._message.add(context_id, is_command, is_last, data)
        self._line.brought(len(data))
        if self._message.is_whole:
            message, self._message = self._message, None
            self._answer(message.whole())
            self._line.got_on()

    def _answer(self, message: Message) -> None:
        asked = message.command
        if asked.field == command.C_CANCEL_RQ:  # it has no response, and nothing to cancel
            return
        service = self._terms.services.get(asked.field)
        status = UNRECOGNIZED_OPERATION if service is None else service(self, message)
        answer = command.response(asked, status)
        for pdu in upper_layer.data(message.context.context_id, answer, self._maximum_length):
            self._line.send(pdu)


class _Message:
    """A message under way: first its command's fragments, then its dataset's (PS3.7 6.3.1)."""

    def __init__(self, context: Context, max_bytes: int) -> None:
        self._context = context
        self._max_bytes = max_bytes
        self._encoded_command = bytearray()
        self._command: Command | None = None
        self._dataset = io.BytesIO()
        self.is_whole = False

    def add(self, context_id: int, is_command: bool, is_last: bool, data: memoryview) -> None:
        """Take the next fragment. Raises Misbehaviour."""
        if context_id != self._context.context_id:
            raise malformed("a message in two presentation contexts")
        if self.is_whole or is_command != (self._command is None):
            raise malformed("fragments of command and dataset in disorder")
        if is_command:
            self._add_command(is_last, data)
        else:
            self._add_dataset(is_last, data)

    def _add_command(self, is_last: bool, data: memoryview) -> None:
        if len(self._encoded_command) + len(data) > LARGEST_COMMAND:
            raise malformed(f"a command of more than {LARGEST_COMMAND} bytes")
        self._encoded_command += data
        if is_last:
            self._command = command.read(bytes(self._encoded_command))
            self.is_whole = not self._command.has_dataset

    def _add_dataset(self, is_last: bool, data: memoryview) -> None:
        if self._dataset.tell() + len(data) > self._max_bytes:
            raise Misbehaviour("too-large", "an object of more than receive.max_megabytes")
        self._dataset.write(data)
        self.is_whole = is_last

    def whole(self) -> Message:
        """The message, when it is whole."""
        assert self._command is not None
        # getvalue() gives the buffer away without copying it, as long as nothing is written to it.
        return Message(self._context, self._command, self._dataset.getvalue())
