"""Storage and Verification SCP (PS3.4 Annex B and A): keep, commit, and only then Success."""

import socket
import socketserver
import threading
import time
from pathlib import Path
from typing import cast

import structlog
from pynetdicom import AE, ALL_TRANSFER_SYNTAXES, AllStoragePresentationContexts, evt
from pynetdicom.association import Association
from pynetdicom.dimse_primitives import C_STORE
from pynetdicom.dsutils import encode_file_meta
from pynetdicom.events import Event
from pynetdicom.sop_class import Verification  # type: ignore[attr-defined]
from pynetdicom.transport import ThreadedAssociationServer
from sqlalchemy.exc import SQLAlchemyError

from dicomai.errors import NotDicom, PortInUse
from dicomai.receive import inbox
from dicomai.store import queue
from dicomai.store.database import Database

log = structlog.get_logger()

# PS3.4 B.2.3 and PS3.7 C.
SUCCESS = 0x0000
OUT_OF_RESOURCES = 0xA700
MISMATCH = 0xA900
CANNOT_UNDERSTAND = 0xC000
LARGEST_PDU = 1 << 20
PATIENCE_SECONDS = 4.0


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


class Listener:
    """Serves associations on an already listening socket until stop()."""

    def __init__(
        self,
        listening: socket.socket,
        ae_title: str,
        calling_ae_titles: tuple[str, ...],
        max_associations: int,
        database: Database,
        data_dir: Path,
        quiet_seconds: float,
        release_quiet_seconds: float,
    ) -> None:
        self._database = database
        self._data_dir = data_dir
        self._quiet_seconds = quiet_seconds
        self._release_quiet_seconds = release_quiet_seconds
        self._touched: dict[Association, set[str]] = {}
        self._lock = threading.Lock()
        ae = AE(ae_title)
        ae.require_called_aet = True
        ae.require_calling_aet = list(calling_ae_titles)
        ae.maximum_associations = max_associations
        ae.maximum_pdu_size = LARGEST_PDU
        ae.add_supported_context(Verification)
        for context in AllStoragePresentationContexts:
            if context.abstract_syntax is not None:
                ae.add_supported_context(context.abstract_syntax, ALL_TRANSFER_SYNTAXES)
        self._server = ae.make_server(
            listening.getsockname(),
            evt_handlers=[
                (evt.EVT_CONN_OPEN, _send_at_once),
                (evt.EVT_C_STORE, self._store),
                (evt.EVT_RELEASED, self._released),
                (evt.EVT_CONN_CLOSE, self._closed),
            ],
            server_class=_serving(listening),
        )

    def serve(self) -> None:
        """Block until stop()."""
        self._server.serve_forever(poll_interval=0.2)

    def stop(self) -> None:
        """Take no new association, give open ones some seconds to end, abort the rest."""
        self._server.shutdown()
        self._server.server_close()
        deadline = time.monotonic() + PATIENCE_SECONDS
        while self._server.active_associations and time.monotonic() < deadline:
            time.sleep(0.05)
        for association in self._server.active_associations:
            association.abort()

    def _store(self, event: Event) -> int:
        calling = event.assoc.requestor.ae_title
        try:
            return self._keep(event, calling)
        except NotDicom as error:
            log.warning("refused", calling_ae_title=calling, reason=str(error))
            return CANNOT_UNDERSTAND
        except (OSError, SQLAlchemyError) as error:
            log.error("not_kept", calling_ae_title=calling, error=type(error).__name__)
            return OUT_OF_RESOURCES
        except Exception:  # the sender must get a status, and keeps the object
            log.exception("not_kept", calling_ae_title=calling)
            return OUT_OF_RESOURCES

    def _keep(self, event: Event, calling_ae_title: str) -> int:
        dataset = event.encoded_dataset(include_meta=False)
        syntax = str(event.context.transfer_syntax)
        header = inbox.parse(dataset, syntax)
        request = cast(C_STORE, event.request)
        if header.sop_instance_uid != request.AffectedSOPInstanceUID or (
            header.sop_class_uid != request.AffectedSOPClassUID
        ):
            log.warning(
                "refused", calling_ae_title=calling_ae_title, reason="not the command's UID"
            )
            return MISMATCH
        self._touch(event.assoc, header.study_instance_uid)
        meta = b"\0" * 128 + b"DICM" + encode_file_meta(event.file_meta)
        instance = inbox.keep(self._data_dir / "inbox", header, syntax, meta, dataset)
        outcome, replaced = queue.arrive(
            self._database,
            queue.Arrival(
                instance,
                header.study_instance_uid,
                len(meta) + len(dataset),
                header.analyzable,
                calling_ae_title,
                header.expected_instances,
            ),
            self._data_dir,
            self._quiet_seconds,
        )
        if replaced is not None:
            replaced.unlink(missing_ok=True)
        log.info(
            "received",
            study=header.study_instance_uid,
            instance=header.sop_instance_uid,
            outcome=outcome.value,
        )
        return SUCCESS

    def _touch(self, association: Association, study_instance_uid: str) -> None:
        with self._lock:
            self._touched.setdefault(association, set()).add(study_instance_uid)

    def _released(self, event: Event) -> None:
        with self._lock:
            mine = self._touched.pop(event.assoc, set())
            others = set().union(*self._touched.values()) if self._touched else set()
        try:
            queue.association_released(
                self._database, sorted(mine - others), self._release_quiet_seconds
            )
        except SQLAlchemyError as error:  # the quiet period still ends by itself
            log.warning("release_not_noted", error=type(error).__name__)

    def _closed(self, event: Event) -> None:
        with self._lock:
            self._touched.pop(event.assoc, None)


def _send_at_once(event: Event) -> None:
    # Nagle's algorithm holds each response back for up to 40 ms.
    transport = event.assoc.dul.socket
    if transport is not None and transport.socket is not None:
        transport.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def _serving(listening: socket.socket) -> type[ThreadedAssociationServer]:
    class Server(ThreadedAssociationServer):
        """Serves a socket that is bound already."""

        def server_bind(self) -> None:
            assert self.socket is not None
            self.socket.close()
            self.socket = listening
            self.socket.settimeout(self.ae.network_timeout)
            self.server_address = listening.getsockname()

        def server_activate(self) -> None:
            """The socket listens already."""

        def shutdown(self) -> None:
            """End serve_forever()."""
            socketserver.BaseServer.shutdown(self)

        def server_close(self) -> None:
            """Close this process's handle; other processes go on listening on the socket."""
            listening.close()

    return Server
