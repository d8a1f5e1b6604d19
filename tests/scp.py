"""A PACS that says what a test wants it to say."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from pydicom.dataset import Dataset
from pynetdicom import AE, ALL_TRANSFER_SYNTAXES, AllStoragePresentationContexts, evt
from pynetdicom.association import Association
from pynetdicom.events import Event
from pynetdicom.sop_class import Verification

from dicomai.deliver import sender

STORAGE = [str(context.abstract_syntax) for context in AllStoragePresentationContexts]


@dataclass
class Peer:
    """A Storage SCP: answer decides what it says to each C-STORE.

    received: SOP Instance UID -> transfer syntax and bytes; order: of their coming; asked: requests
    for storage commitment
    """

    answer: Callable[[Event], int] = lambda event: 0x0000
    classes: Sequence[str] = (Verification, *STORAGE)
    received: dict[str, tuple[str, bytes]] = field(default_factory=dict)
    order: list[str] = field(default_factory=list)
    asked: list[Dataset] = field(default_factory=list)
    port: int = 0

    def store(self, event: Event) -> int:
        """C-STORE: keep the bytes, answer."""
        sent = event.encoded_dataset(include_meta=False)
        uid = str(event.request.AffectedSOPInstanceUID)
        self.order.append(uid)
        self.received[uid] = (str(event.context.transfer_syntax), sent)
        return self.answer(event)

    def commit(self, event: Event) -> tuple[int, None]:
        """N-ACTION: keep what is asked for."""
        self.asked.append(event.action_information)
        return 0x0000, None

    @contextmanager
    def listening(self) -> Iterator["Peer"]:
        """As PACS on a free port."""
        ae = AE("PACS")
        ae.require_called_aet = True
        for sop_class in self.classes:
            ae.add_supported_context(sop_class, ALL_TRANSFER_SYNTAXES)
        handlers = [(evt.EVT_C_STORE, self.store), (evt.EVT_N_ACTION, self.commit)]
        server = ae.start_server(("127.0.0.1", self.port), block=False, evt_handlers=handlers)
        self.port = server.server_address[1]
        try:
            yield self
        finally:
            server.shutdown()

    @contextmanager
    def association(
        self, files: Sequence[Path], called: str = "PACS", timeout: float = 5
    ) -> Iterator[Association]:
        """An association of ours with it."""
        contexts = sender.contexts_for(files)
        with sender.association(
            "127.0.0.1", self.port, called, "DICOMAI", contexts, timeout
        ) as assoc:
            yield assoc
