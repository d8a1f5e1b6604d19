"""The Storage SCU against real SCPs, kind and unkind ones."""

import socket
from pathlib import Path

import make
import pytest
from peers import free_port, wait_until
from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    EnhancedSRStorage,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEGLSLossless,
    RLELossless,
)
from pynetdicom.acse import ACSE
from pynetdicom.events import Event
from pynetdicom.sop_class import Verification
from scp import STORAGE, Peer

from dicomai.deliver import sender
from dicomai.errors import NotDicom, PeerBusy, PeerRefused, PeerUnreachable


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """One object to send."""
    return make.save(tmp_path, [make.chest_radiograph()])[0]


def dataset_bytes(file: Path) -> bytes:
    """What follows the file meta information (PS3.10 7.1)."""
    length = dcmread(file, stop_before_pixels=True).file_meta.FileMetaInformationGroupLength
    return file.read_bytes()[128 + 4 + 12 + length :]


def encoded(ds: Dataset, transfer_syntax_uid: str) -> Dataset:
    """The same object in another transfer syntax."""
    if transfer_syntax_uid in {JPEGLSLossless, RLELossless}:
        ds.compress(transfer_syntax_uid, generate_instance_uid=False)
    ds.file_meta.TransferSyntaxUID = transfer_syntax_uid
    return ds


# What a status means (PS3.4 B.2.3, PS3.7 C)


def test_success_is_no_warning() -> None:
    assert sender.classify(0x0000) is None


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (0x0111, "had it already"),
        (0xB000, "coerced"),
        (0xB006, "elements discarded"),
        (0xB007, "does not match"),
        (0xB123, "with a warning"),
    ],
)
def test_what_is_stored_with_a_warning_is_stored(status: int, words: str) -> None:
    warning = sender.classify(status)
    assert warning is not None
    assert f"0x{status:04X}" in warning
    assert words in warning


@pytest.mark.parametrize("status", [0xA700, 0xA7FF])
def test_a_peer_out_of_resources_is_busy(status: int) -> None:
    with pytest.raises(PeerBusy, match=f"0x{status:04X}"):
        sender.classify(status)


@pytest.mark.parametrize("status", [0xA900, 0xA9FF, 0xC000, 0xCFFF, 0x0110, 0x0117, 0x0122, 0x0124])
def test_every_other_status_is_a_refusal(status: int) -> None:
    with pytest.raises(PeerRefused, match=f"0x{status:04X}"):
        sender.classify(status)


# Against a peer


@pytest.mark.parametrize(
    "transfer_syntax_uid",
    [
        ExplicitVRLittleEndian,
        ImplicitVRLittleEndian,
        DeflatedExplicitVRLittleEndian,
        JPEGLSLossless,
        RLELossless,
    ],
)
def test_the_peer_receives_the_bytes_of_the_file(tmp_path: Path, transfer_syntax_uid: str) -> None:
    ds = encoded(make.chest_radiograph(), transfer_syntax_uid)
    (file,) = make.save(tmp_path, [ds])
    with Peer().listening() as peer, peer.association([file]) as assoc:
        assert sender.store(assoc, file) is None
    assert peer.received == {ds.SOPInstanceUID: (transfer_syntax_uid, dataset_bytes(file))}


def test_objects_of_several_kinds_go_over_one_association(tmp_path: Path) -> None:
    image = make.chest_radiograph()
    objects = [
        image,
        make.report(image.StudyInstanceUID),
        encoded(make.chest_radiograph(1), JPEGLSLossless),
        make.computed_radiograph(2),
    ]
    files = make.save(tmp_path, objects)
    with Peer().listening() as peer, peer.association(files) as assoc:
        for file in files:
            sender.store(assoc, file)
    sent = {file.stem: dataset_bytes(file) for file in files}
    assert {uid: data for uid, (_, data) in peer.received.items()} == sent


def test_a_warning_of_the_peer_is_returned(file: Path) -> None:
    with Peer(lambda event: 0xB000).listening() as peer, peer.association([file]) as assoc:
        assert "coerced" in str(sender.store(assoc, file))


def test_a_peer_that_answers_a700_is_busy(file: Path) -> None:
    with Peer(lambda event: 0xA700).listening() as peer, peer.association([file]) as assoc:
        with pytest.raises(PeerBusy):
            sender.store(assoc, file)
        assert assoc.is_established


def test_a_peer_that_answers_c000_refuses(file: Path) -> None:
    with Peer(lambda event: 0xC000).listening() as peer, peer.association([file]) as assoc:
        with pytest.raises(PeerRefused):
            sender.store(assoc, file)
        assert assoc.is_established


def test_a_peer_that_takes_some_kinds_refuses_the_others(tmp_path: Path) -> None:
    image = make.chest_radiograph()
    picture, report = make.save(tmp_path, [image, make.report(image.StudyInstanceUID)])
    without_sr = [sop_class for sop_class in STORAGE if sop_class != EnhancedSRStorage]
    with Peer(classes=without_sr).listening() as peer:
        with peer.association([picture, report]) as assoc:
            with pytest.raises(PeerRefused, match="accepts no such object"):
                sender.store(assoc, report)
            assert sender.store(assoc, picture) is None


def test_a_peer_that_takes_nothing_that_is_offered_refuses(file: Path) -> None:
    with Peer(classes=[Verification]).listening() as peer:
        with pytest.raises(PeerRefused), peer.association([file]) as assoc:
            sender.store(assoc, file)


def test_nobody_listening_is_unreachable(file: Path) -> None:
    peer = Peer(port=free_port())
    with pytest.raises(PeerUnreachable, match=f"PACS at 127.0.0.1:{peer.port} does not answer"):
        with peer.association([file]):
            pass


def test_a_peer_that_never_answers_is_unreachable_after_the_timeout(file: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        peer = Peer(port=silent.getsockname()[1])
        with pytest.raises(PeerUnreachable, match="does not answer"):
            with peer.association([file], timeout=0.3):
                pass


def test_a_rejection_is_unreachable_with_the_peers_reason(file: Path) -> None:
    with Peer().listening() as peer:
        with pytest.raises(
            PeerUnreachable, match=r"(?i)rejected .*called AE title not recogni[sz]ed"
        ):
            with peer.association([file], called="OTHER"):
                pass


def test_a_rejection_that_comes_at_once_is_not_taken_for_silence(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    send_request = ACSE.send_request

    def send_and_be_held_up(acse: ACSE) -> None:  # as on a busy machine
        send_request(acse)
        wait_until(lambda: not acse.dul.is_alive(), 5, "the peer has rejected the association")

    monkeypatch.setattr(ACSE, "send_request", send_and_be_held_up)
    with Peer().listening() as peer, pytest.raises(PeerUnreachable, match="rejected"):
        with peer.association([file], called="OTHER"):
            pass


def test_a_peer_that_aborts_is_unreachable(file: Path) -> None:
    def abort(event: Event) -> int:
        event.assoc.abort()
        return 0x0000

    with Peer(abort).listening() as peer, peer.association([file], timeout=1) as assoc:
        for _ in range(2):  # in the middle of an object, and before the next
            with pytest.raises(PeerUnreachable):
                sender.store(assoc, file)


def test_a_file_that_is_gone_is_an_os_error(file: Path) -> None:
    with Peer().listening() as peer, peer.association([file]) as assoc:
        file.unlink()
        with pytest.raises(FileNotFoundError):
            sender.store(assoc, file)


def test_a_file_that_is_no_dicom_is_an_error_that_the_role_knows(tmp_path: Path) -> None:
    broken = tmp_path / "broken.dcm"
    broken.write_bytes(b"cut off")
    with pytest.raises(NotDicom, match=r"broken\.dcm"):
        sender.contexts_for([broken])


def test_an_echo_is_answered_refused_or_not_answered(file: Path) -> None:
    with Peer().listening() as peer:
        sender.echo("127.0.0.1", peer.port, "PACS", "DICOMAI", 5)
        with pytest.raises(PeerUnreachable, match="rejected"):
            sender.echo("127.0.0.1", peer.port, "OTHER", "DICOMAI", 5)
    with Peer(classes=[EnhancedSRStorage]).listening() as peer, pytest.raises(PeerRefused):
        sender.echo("127.0.0.1", peer.port, "PACS", "DICOMAI", 5)
    with pytest.raises(PeerUnreachable, match="does not answer"):
        sender.echo("127.0.0.1", free_port(), "PACS", "DICOMAI", 5)
