"""Storage commitment (PS3.4 Annex J): ask a PACS to commit itself, and read what it answers."""

from collections.abc import Mapping
from dataclasses import dataclass

from pydicom.dataset import Dataset
from pydicom.sequence import Sequence
from pynetdicom.association import Association
from pynetdicom.presentation import PresentationContext
from pynetdicom.sop_class import (  # type: ignore[attr-defined]
    StorageCommitmentPushModel,
    StorageCommitmentPushModelInstance,
)

from dicomai.errors import NotDicom, PeerRefused, PeerUnreachable

REQUEST_COMMITMENT = 1  # Action Type ID (PS3.4 Table J.3.2-1)
SUCCESS = 0x0000

# Failure Reason (PS3.3 C.14.1.1).
REASONS = {
    0x0110: "processing failure",
    0x0112: "no such object instance",
    0x0119: "class and instance do not belong together",
    0x0122: "SOP class not supported",
    0x0131: "duplicate transaction UID",
    0x0213: "resource limitation",
}


@dataclass(frozen=True, slots=True)
class Report:
    """What a PACS says of one transaction; failed: SOP Instance UID -> why."""

    transaction_uid: str
    committed: tuple[str, ...]
    failed: Mapping[str, str]


def context() -> PresentationContext:
    """The presentation context to ask in."""
    wanted = PresentationContext()
    wanted.abstract_syntax = StorageCommitmentPushModel
    wanted.transfer_syntax = ["1.2.840.10008.1.2", "1.2.840.10008.1.2.1"]
    return wanted


def request(assoc: Association, transaction_uid: str, instances: Mapping[str, str]) -> None:
    """N-ACTION: ask for commitment to instances (SOP Instance UID -> SOP Class UID).

    Raises PeerRefused or PeerUnreachable. The answer comes later, by N-EVENT-REPORT.
    """
    ds = Dataset()
    ds.TransactionUID = transaction_uid
    ds.ReferencedSOPSequence = Sequence(
        [_reference(sop_class, uid) for uid, sop_class in instances.items()]
    )
    try:
        status, _ = assoc.send_n_action(
            ds,
            REQUEST_COMMITMENT,
            StorageCommitmentPushModel,
            StorageCommitmentPushModelInstance,
        )
    except ValueError as error:  # no accepted presentation context
        raise PeerRefused("the peer offers no storage commitment: set commit = false") from error
    except RuntimeError as error:
        raise PeerUnreachable("the association ended") from error
    if "Status" not in status:
        raise PeerUnreachable("the peer did not answer the N-ACTION")
    if status.Status != SUCCESS:
        raise PeerRefused(f"status 0x{status.Status:04X}: the peer refuses storage commitment")


def _reference(sop_class_uid: str, sop_instance_uid: str) -> Dataset:
    item = Dataset()
    item.ReferencedSOPClassUID = sop_class_uid
    item.ReferencedSOPInstanceUID = sop_instance_uid
    return item


def read(report: Dataset) -> Report:
    """The Event Information of an N-EVENT-REPORT (PS3.4 Table J.3.3-1). Raises NotDicom."""
    try:
        return Report(
            str(report.TransactionUID),
            tuple(
                str(item.ReferencedSOPInstanceUID)
                for item in report.get("ReferencedSOPSequence") or ()
            ),
            {
                str(item.ReferencedSOPInstanceUID): _reason(int(item.get("FailureReason") or 0))
                for item in report.get("FailedSOPSequence") or ()
            },
        )
    except (AttributeError, TypeError, ValueError) as error:
        raise NotDicom("a storage commitment report without its references") from error


def _reason(code: int) -> str:
    return f"failure reason 0x{code:04X} ({REASONS.get(code, 'unknown')})"
