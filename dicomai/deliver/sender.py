"""Storage and Verification SCU: sends files byte for byte (PS3.4 Annex B)."""

import socket
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from pydicom import dcmread
from pydicom.errors import InvalidDicomError
from pynetdicom import AE, _config, evt
from pynetdicom.association import Association
from pynetdicom.events import Event
from pynetdicom.pdu import A_ASSOCIATE_RJ
from pynetdicom.presentation import PresentationContext
from pynetdicom.sop_class import Verification  # type: ignore[attr-defined]

from dicomai.deliver import stream
from dicomai.errors import Misuse, NotDicom, PeerBusy, PeerRefused, PeerUnreachable
from dicomai.tls import Channel, Requestor

# Send the dataset's bytes from the file as they are, in chunks.
_config.STORE_SEND_CHUNKED_DATASET = True

MOST_CONTEXTS = 128  # PS3.8 9.3.2.2: odd identifiers from 1 to 255
STORED_WITH_WARNING = {0xB000: "coerced", 0xB006: "elements discarded", 0xB007: "does not match"}


@contextmanager
def association(
    host: str,
    port: int,
    called_ae_title: str,
    calling_ae_title: str,
    contexts: Sequence[PresentationContext],
    timeout_seconds: float,
    channel: Channel | None = None,
) -> Iterator[Association]:
    """An association with a peer. Raises PeerUnreachable.

    channel: the TLS to use, None for plain TCP
    """
    ae = AE(calling_ae_title)
    ae.acse_timeout = ae.dimse_timeout = ae.network_timeout = timeout_seconds
    ae.connection_timeout = timeout_seconds
    ae.maximum_pdu_size = 0
    peer = f"{called_ae_title} at {host}:{port}"
    context = _context(channel)
    rejections: list[A_ASSOCIATE_RJ] = []
    assoc = ae.associate(
        host,
        port,
        contexts=list(contexts),
        ae_title=called_ae_title,
        evt_handlers=[
            (evt.EVT_CONN_OPEN, _send_at_once),
            (evt.EVT_PDU_RECV, _note_rejection, [rejections]),
        ],
        tls_args=None if context is None or channel is None else (context, channel.name),
    )
    if rejections:
        raise PeerUnreachable(f"{peer} rejected the association: {_reason(rejections[0])}")
    if assoc.rejected_contexts and not assoc.accepted_contexts:
        # pynetdicom has ended the association by itself: nothing could be sent over it.
        raise PeerRefused(f"{peer} accepts none of these objects (no presentation context)")
    if not assoc.is_established and context is not None and context.trouble is not None:
        raise PeerUnreachable(f"{peer}: TLS: {context.trouble}")
    if not assoc.is_established:
        raise PeerUnreachable(f"{peer} does not answer: check host, port and AE title")
    stream.hasten(assoc, timeout_seconds)
    try:
        yield assoc
    finally:
        if assoc.is_established:
            assoc.release()


def _context(channel: Channel | None) -> Requestor | None:
    """Made for each association: certificates may be renewed meanwhile."""
    if channel is None:
        return None
    try:
        return channel.context()
    except Misuse as error:  # they were good at the start, and may be again
        raise PeerUnreachable(str(error)) from error


def _note_rejection(event: Event, rejections: list[A_ASSOCIATE_RJ]) -> None:
    # pynetdicom 3.0.4 takes one that comes at once, before its own thread for the association looks
    # up, for a connection that was never made: is_rejected stays false.
    if isinstance(event.pdu, A_ASSOCIATE_RJ):
        rejections.append(event.pdu)


def _reason(rejection: A_ASSOCIATE_RJ) -> str:
    try:
        return rejection.reason_str
    except ValueError:  # none that PS3.8 9.3.4 knows
        return "no reason given"


def _send_at_once(event: Event) -> None:
    # Nagle's algorithm holds small PDUs back for 40 ms: measured 16 against 58 instances a second.
    transport = event.assoc.dul.socket
    if transport is not None and transport.socket is not None:
        transport.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def kind_of(path: Path) -> tuple[str, str]:
    """SOP class and transfer syntax of a file. Raises NotDicom where it is missing or damaged."""
    try:
        meta = dcmread(path, specific_tags=[], stop_before_pixels=True).file_meta
        return meta.MediaStorageSOPClassUID, meta.TransferSyntaxUID
    except FileNotFoundError:
        raise NotDicom(f"the result file {path.name} is missing: retry the study") from None
    except (InvalidDicomError, AttributeError, EOFError, ValueError) as error:
        raise NotDicom(f"the result file {path.name} is damaged: retry the study") from error


def contexts_for(paths: Sequence[Path]) -> list[PresentationContext]:
    """One presentation context for each SOP class with the transfer syntax of its files."""
    return contexts_of({kind_of(path) for path in paths})


def contexts_of(kinds: Collection[tuple[str, str]]) -> list[PresentationContext]:
    """The same for kinds of files, see kind_of()."""
    contexts = []
    for sop_class, syntax in sorted(kinds)[:MOST_CONTEXTS]:
        context = PresentationContext()
        context.abstract_syntax = sop_class
        context.transfer_syntax = [syntax]
        contexts.append(context)
    return contexts


def store(assoc: Association, path: Path) -> str | None:
    """Send one file; returns a warning where the peer stored it with one.

    Raises PeerRefused (never again), PeerBusy (status A7xx) or PeerUnreachable (try later).
    """
    try:
        status = assoc.send_c_store(path)
    except ValueError as error:  # no accepted presentation context
        raise PeerRefused(f"the peer accepts no such object: {error}") from error
    except RuntimeError as error:  # the association ended meanwhile
        raise PeerUnreachable("the association ended") from error
    if "Status" not in status:
        raise PeerUnreachable("the peer did not answer the C-STORE")
    return classify(int(status.Status))


def classify(status: int) -> str | None:
    """What a C-STORE status means (PS3.4 B.2.3, PS3.7 C): a warning, None, or an error raised."""
    # Without the peer's Error Comment (0000,0902): it may quote a patient, and this goes into logs.
    words = f"status 0x{status:04X}"
    if status == 0x0000:
        return None
    if status == 0x0111:  # duplicate SOP instance: it has the same bytes already
        return f"{words}: the peer had it already"
    if status & 0xF000 == 0xB000:
        return f"{words}: stored, {STORED_WITH_WARNING.get(status, 'with a warning')}"
    if status & 0xFF00 == 0xA700:
        raise PeerBusy(f"{words}: the peer is out of resources")
    raise PeerRefused(f"{words}: the peer refuses this object")


def echo(
    host: str,
    port: int,
    called_ae_title: str,
    calling_ae_title: str,
    timeout_seconds: float,
    channel: Channel | None = None,
) -> None:
    """C-ECHO. Raises PeerUnreachable or PeerRefused."""
    context = PresentationContext()
    context.abstract_syntax = Verification
    context.transfer_syntax = ["1.2.840.10008.1.2"]
    with association(
        host, port, called_ae_title, calling_ae_title, [context], timeout_seconds, channel
    ) as assoc:
        status = assoc.send_c_echo()
        if "Status" not in status or status.Status != 0x0000:
            raise PeerUnreachable("the peer did not answer the C-ECHO")
