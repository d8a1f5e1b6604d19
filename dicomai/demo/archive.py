"""A small receiving archive: a Storage SCP that keeps what it gets in a folder."""

from pathlib import Path
from typing import cast

from pynetdicom import AE, ALL_TRANSFER_SYNTAXES, AllStoragePresentationContexts, evt
from pynetdicom.dimse_primitives import C_STORE
from pynetdicom.events import Event
from pynetdicom.sop_class import Verification  # type: ignore[attr-defined]


class Archive:
    """Listens on 127.0.0.1 until closed; folder/<Study>/<SOP Instance>.dcm. Port 0: a free one."""

    def __init__(self, folder: Path, ae_title: str = "ARCHIVE", port: int = 0) -> None:
        self.folder = folder
        self.ae_title = ae_title
        ae = AE(ae_title)
        ae.maximum_pdu_size = 0
        ae.add_supported_context(Verification)
        for context in AllStoragePresentationContexts:
            if context.abstract_syntax is not None:
                ae.add_supported_context(context.abstract_syntax, ALL_TRANSFER_SYNTAXES)
        server = ae.start_server(
            ("127.0.0.1", port), block=False, evt_handlers=[(evt.EVT_C_STORE, self._store)]
        )
        if server is None:
            raise OSError("the archive cannot listen")
        self._server = server
        self.port: int = server.server_address[1]

    def _store(self, event: Event) -> int:
        study = self.folder / str(event.dataset.StudyInstanceUID)
        study.mkdir(parents=True, exist_ok=True)
        uid = str(cast(C_STORE, event.request).AffectedSOPInstanceUID)
        (study / f"{uid}.dcm").write_bytes(event.encoded_dataset())
        return 0x0000

    def files(self) -> list[Path]:
        """What has arrived."""
        return sorted(self.folder.glob("*/*.dcm"))

    def close(self) -> None:
        """Stop listening."""
        self._server.shutdown()
