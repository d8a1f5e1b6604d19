"""One association, as its acceptor (PS3.8 9.2, PS3.7 6.3): asked, answered, ended."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from dicomai.errors import Misbehaviour
from dicomai.receive import command, upper_layer
from dicomai.receive.command import Command
from dicomai.receive.line import Line
from dicomai.receive.upper_layer import (
    FRAGMENT,
    Context,
    ContextResult,
    Fragment,
    Pdu,
    Rejection,
    Request,
    malformed,
)

LARGEST_PDU = 1 << 20
LARGEST_REQUEST = 1 << 18  # 128 contexts with 45 transfer syntaxes each need 170 kB
LARGEST_COMMAND = 1 << 16
# What may come, and how long it may be: to begin with, and in an association (PS3.8 Table 9-10).
# Some senders count the P-DATA-TF's header to its length.
AT_FIRST: dict[int, int] = {Pdu.ASSOCIATE_RQ: LARGEST_REQUEST, Pdu.ABORT: 4}
ESTABLISHED: dict[int, int] = {Pdu.DATA: LARGEST_PDU + 6, Pdu.RELEASE_RQ: 4, Pdu.ABORT: 4}
UNRECOGNIZED_OPERATION = 0x0211  # PS3.7 C


class Sink(Protocol):
    """What takes a dataset as it comes."""

    def write(self, data: memoryview) -> object:
        """Take the next bytes, which are not there any more afterwards."""

    def close(self) -> None:
        """End, with what was taken or without."""


@dataclass(frozen=True, slots=True)
class Message:
    """A request, and where its dataset goes."""

    context: Context
    command: Command
    dataset: Sink


Service = Callable[["Association", Message], int]


@dataclass(frozen=True, slots=True)
class Terms:
    """What an acceptor offers and demands.

    calling_ae_titles: who may ask, empty for anybody; supported: abstract syntax -> transfer
    syntaxes; roles: SOP Class UID -> the (SCU, SCP) that a requestor may be; services: command
    field -> what gives the status of a whole message; sink: where its dataset is to go;
    implementation: class UID and version name
    """

    ae_title: str
    calling_ae_titles: Sequence[str]
    supported: Mapping[str, Sequence[str]]
    roles: Mapping[str, tuple[bool, bool]]
    services: Mapping[int, Service]
    sink: Callable[["Association", Context, Command], Sink]
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
        kind, length = self._line.read_header(AT_FIRST, between_messages=False)
        body = self._line.read(length)
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
            kind, length = self._line.read_header(
                ESTABLISHED, between_messages=not self.is_within_message
            )
            if kind == Pdu.DATA:
                self._read_data(length)
                continue
            self._line.read(length)
            if kind == Pdu.RELEASE_RQ:
                released()
                self._line.send(upper_layer.release())
            return

    def abort(self) -> None:
        """Tell the peer that it is over."""
        self._line.send(upper_layer.abort())

    def close(self) -> None:
        """Leave nothing of a message that never became whole."""
        if self._message is not None:
            self._message.close()

    def _read_data(self, length: int) -> None:
        """The fragments of a P-DATA-TF, as they come (PS3.8 9.3.5.1)."""
        while length:
            head = upper_layer.read_fragment(self._line.read(min(length, FRAGMENT.size)), length)
            length -= FRAGMENT.size + head.length
            message = self._message_of(head.context_id)
            self._line.bring(head.length, message.begin(head))
            message.end(head)
            if message.is_whole:
                self._message = None
                self._answer(message.whole())
                self._line.got_on()

    def _message_of(self, context_id: int) -> "_Message":
        if self._message is None:
            context = self._contexts.get(context_id)
            if context is None:
                raise malformed("a message in a presentation context that was not accepted")
            self._message = _Message(self, context, self._terms)
        return self._message

    def _answer(self, message: Message) -> None:
        asked = message.command
        if asked.field == command.C_CANCEL_RQ:  # it has no response, and nothing to cancel
            message.dataset.close()
            return
        service = self._terms.services.get(asked.field)
        try:
            status = UNRECOGNIZED_OPERATION if service is None else service(self, message)
        finally:
            message.dataset.close()
        answer = command.response(asked, status)
        for pdu in upper_layer.data(message.context.context_id, answer, self._maximum_length):
            self._line.send(pdu)


class _Message:
    """A message under way: first its command's fragments, then its dataset's (PS3.7 6.3.1)."""

    def __init__(self, association: Association, context: Context, terms: Terms) -> None:
        self._association = association
        self._context = context
        self._terms = terms
        self._encoded_command = bytearray()
        self._command: Command | None = None
        self._dataset: Sink | None = None
        self._bytes = 0
        self.is_whole = False

    def begin(self, head: Fragment) -> Callable[[memoryview], object]:
        """What takes a fragment. Raises Misbehaviour where it is out of place, or too much."""
        if head.context_id != self._context.context_id:
            raise malformed("a message in two presentation contexts")
        if head.is_command != (self._command is None):
            raise malformed("fragments of command and dataset in disorder")
        if head.is_command:
            if len(self._encoded_command) + head.length > LARGEST_COMMAND:
                raise malformed(f"a command of more than {LARGEST_COMMAND} bytes")
            return self._encoded_command.extend
        self._bytes += head.length
        if self._bytes > self._terms.max_bytes:
            raise Misbehaviour("too-large", "an object of more than receive.max_megabytes")
        assert self._dataset is not None
        return self._dataset.write

    def end(self, head: Fragment) -> None:
        """The fragment is whole."""
        if not head.is_last:
            return
        if head.is_command:
            self._command = command.read(bytes(self._encoded_command))
            self.is_whole = not self._command.has_dataset
            self._dataset = self._terms.sink(self._association, self._context, self._command)
        else:
            self.is_whole = True

    def whole(self) -> Message:
        """The message, when it is whole."""
        assert self._command is not None
        assert self._dataset is not None
        return Message(self._context, self._command, self._dataset)

    def close(self) -> None:
        """End without having become whole."""
        if self._dataset is not None:
            self._dataset.close()
