"""Storage commitment through a whole daemon: the PACS opens the association that answers."""

from pathlib import Path

import make
import pytest
from daemon import Daemon, daemon
from peers import Orthanc, free_port, storescu, wait_until
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence
from pynetdicom import AE, build_role
from pynetdicom.sop_class import StorageCommitmentPushModel, StorageCommitmentPushModelInstance
from scp import STORAGE, Peer

from dicomai.store import queries

pytestmark = pytest.mark.timeout(200)
COMMIT = "commit = true\n"  # of the destination, which stands last


def states(running: Daemon) -> dict[str, str]:
    """SOP Instance UID -> state of its delivery."""
    rows = queries.deliveries(running.database)
    return {str(row["sop_instance_uid"]): str(row["state"]) for row in rows}


def test_orthanc_commits_itself_and_only_then_are_results_delivered(tmp_path: Path) -> None:
    port = free_port()
    pacs = Orthanc(tmp_path / "orthanc", port)
    ds = make.chest_radiograph(3)
    try:
        peer = [("pacs", "ORTHANC", pacs.dicom)]
        url = f"sqlite:///{tmp_path}/dicomai.db"
        with daemon(tmp_path, url, port, peer, more=COMMIT) as running:
            storescu(port, make.save(tmp_path / "sent", [ds]))
            running.wait_idle(1, 60)
            assert set(states(running).values()) == {"delivered"}
            kept = pacs.sop_instance_uids(ds.StudyInstanceUID)
            assert sorted(kept) == sorted(states(running))
            trail = queries.events(running.database, "delivery", "1")
            assert [row["to_state"] for row in trail][-2:] == ["committing", "delivered"]
            assert '"asked_for_commitment"' in running.log
    finally:
        pacs.stop()


def report(port: int, ds: Dataset, event_type: int) -> int:
    """N-EVENT-REPORT over an association that the PACS opens, as its SCP; the status."""
    ae = AE("PACS")
    ae.add_requested_context(StorageCommitmentPushModel)
    role = build_role(StorageCommitmentPushModel, scp_role=True)
    assoc = ae.associate("127.0.0.1", port, ae_title="DICOMAI", ext_neg=[role])
    assert assoc.is_established
    status, _ = assoc.send_n_event_report(
        ds, event_type, StorageCommitmentPushModel, StorageCommitmentPushModelInstance
    )
    assoc.release()
    return int(status.Status)


def answer_to(asked: Dataset, lost: str) -> Dataset:
    """All is kept but one."""
    ds = Dataset()
    ds.TransactionUID = asked.TransactionUID
    items = list(asked.ReferencedSOPSequence)
    ds.ReferencedSOPSequence = Sequence(
        [item for item in items if item.ReferencedSOPInstanceUID != lost]
    )
    failed = [item for item in items if item.ReferencedSOPInstanceUID == lost]
    for item in failed:
        item.FailureReason = 0x0112
    ds.FailedSOPSequence = Sequence(failed)
    return ds


def test_what_a_pacs_has_lost_is_sent_again_and_strangers_change_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DICOMAI_DELIVER__LONGEST_RETRY_SECONDS", "1")
    with Peer(classes=[*STORAGE, StorageCommitmentPushModel]).listening() as pacs:
        peer = [("pacs", "PACS", pacs.port)]
        url = f"sqlite:///{tmp_path}/dicomai.db"
        with daemon(tmp_path, url, free_port(), peer, more=COMMIT) as running:
            storescu(running.port, make.save(tmp_path / "sent", [make.chest_radiograph(3)]))
            wait_until(lambda: len(pacs.asked) == 1, 60, "the PACS is asked")
            assert set(states(running).values()) == {"committing"}
            stranger = answer_to(pacs.asked[0], "none")
            stranger.TransactionUID = "1.2.3"
            assert report(running.port, stranger, 1) == 0
            assert set(states(running).values()) == {"committing"}
            lost = pacs.order[0]
            assert report(running.port, answer_to(pacs.asked[0], lost), 2) == 0
            wait_until(lambda: len(pacs.asked) == 2, 30, "the lost object is asked for again")
            assert pacs.order.count(lost) == 2
            assert len(pacs.order) == len(set(pacs.order)) + 1
            (again,) = pacs.asked[1].ReferencedSOPSequence
            assert again.ReferencedSOPInstanceUID == lost
            assert report(running.port, answer_to(pacs.asked[1], "none"), 1) == 0
            running.wait_idle(1)
            assert set(states(running).values()) == {"delivered"}


def test_a_report_that_is_none_is_answered_with_a_failure(tmp_path: Path) -> None:
    with daemon(tmp_path, f"sqlite:///{tmp_path}/dicomai.db", free_port()) as running:
        nothing = Dataset()
        nothing.FailedSOPSequence = Sequence([Dataset()])
        assert report(running.port, nothing, 1) == 0x0110
        assert '"commitment_not_noted"' in running.log
