"""The receiving end, asked by real modalities and by peers that misbehave."""

import os
import shutil
import subprocess
from pathlib import Path

import make
import pydicom
import pytest
from doors import attending, files_of, listening
from peers import free_port, need, storescu, wait_until
from pydicom.dataset import Dataset
from pydicom.uid import JPEGLSLossless
from pynetdicom import AE
from pynetdicom.sop_class import Verification

from dicomai.deliver import sender
from dicomai.errors import PeerUnreachable
from dicomai.receive.association import Association
from dicomai.receive.server import bind
from dicomai.store import queries
from dicomai.store.database import Database


def store(port: int, ds: Dataset) -> Dataset:
    """C-STORE one dataset and return the response."""
    ae = AE("MODALITY")
    ae.add_requested_context(ds.SOPClassUID, ds.file_meta.TransferSyntaxUID)
    assoc = ae.associate("127.0.0.1", port, ae_title="DICOMAI")
    assert assoc.is_established
    try:
        return assoc.send_c_store(ds)
    finally:
        assoc.release()


def test_success_means_that_file_and_row_are_there(database: Database, tmp_path: Path) -> None:
    ds = make.chest_radiograph()
    with listening(database, tmp_path) as port:
        assert store(port, ds).Status == 0x0000
        (row,) = queries.instances(database, ds.StudyInstanceUID)
        kept = pydicom.dcmread(tmp_path / row["path"])
    assert kept.PixelData == ds.PixelData
    assert kept.SOPInstanceUID == row["sop_instance_uid"] == ds.SOPInstanceUID
    assert (tmp_path / row["path"]).stat().st_mode & 0o777 == 0o600


def test_success_is_withheld_when_the_commit_fails(database: Database, tmp_path: Path) -> None:
    with database.write() as connection:
        connection.exec_driver_sql("ALTER TABLE event RENAME TO moved")
    with listening(database, tmp_path) as port:
        assert store(port, make.chest_radiograph()).Status == 0xA700


def test_success_is_withheld_when_the_file_cannot_be_written(
    database: Database, tmp_path: Path
) -> None:
    (tmp_path / "inbox").write_text("a file where the folder should be")
    ds = make.chest_radiograph()
    with listening(database, tmp_path) as port:
        assert store(port, ds).Status == 0xA700
    assert queries.instances(database, ds.StudyInstanceUID) == []


def test_bytes_are_kept_as_they_came_in_every_transfer_syntax(
    database: Database, tmp_path: Path
) -> None:
    need("/usr/bin/storescu")
    plain = make.save(tmp_path / "sent", [make.chest_radiograph()])[0]
    encoders = {
        "-xi": ["dcmconv", "+ti"],
        "-xb": ["dcmconv", "+tb"],
        "-xd": ["dcmconv", "+td"],
        "-xs": ["dcmcjpeg", "+e1"],
        "-xy": ["dcmcjpeg", "+eb"],
        "-xt": ["dcmcjpls", "+el"],
        "-xr": ["dcmcrle"],
    }
    with listening(database, tmp_path) as port:
        for name, command in encoders.items():
            file = tmp_path / f"sent{name}.dcm"
            subprocess.run([*command, str(plain), str(file)], check=True)
            subprocess.run(["dcmodify", "-nb", "-gin", str(file)], check=True)
            ds = pydicom.dcmread(file)
            proposal = ["-aec", "DICOMAI", name, "127.0.0.1", str(port)]
            subprocess.run(["/usr/bin/storescu", *proposal, str(file)], check=True)
            rows = queries.instances(database, ds.StudyInstanceUID)
            (row,) = [r for r in rows if r["sop_instance_uid"] == ds.SOPInstanceUID]
            assert row["transfer_syntax_uid"] == ds.file_meta.TransferSyntaxUID, name
            assert dataset_bytes(tmp_path / row["path"]) == dataset_bytes(file), name


def dataset_bytes(file: Path) -> bytes:
    """What follows the file meta information, less the byte that DCMTK pads a deflated one with."""
    meta = pydicom.filereader.read_file_meta_info(file)
    data = file.read_bytes()[144 + meta.FileMetaInformationGroupLength :]
    return data.removesuffix(b"\0") if meta.TransferSyntaxUID.is_deflated else data


def test_an_association_for_another_ae_title_is_rejected(
    database: Database, tmp_path: Path
) -> None:
    with (
        listening(database, tmp_path) as port,
        pytest.raises(PeerUnreachable, match="Called AE title not recognised"),
    ):
        sender.echo("127.0.0.1", port, "SOMEBODY", "MODALITY", 5)


def test_only_listed_senders_are_let_in(database: Database, tmp_path: Path) -> None:
    with listening(database, tmp_path, calling_ae_titles=("MODALITY",)) as port:
        sender.echo("127.0.0.1", port, "DICOMAI", "MODALITY", 5)
        with pytest.raises(PeerUnreachable, match="Calling AE title not recognised"):
            sender.echo("127.0.0.1", port, "DICOMAI", "STRANGER", 5)


@pytest.mark.parametrize(
    ("calling_ae_title", "priority", "attributes", "stat"),
    [
        ("MODALITY", 0, {}, False),
        ("MODALITY", 2, {"RequestedProcedurePriority": "ROUTINE"}, False),
        ("EMERGENCY", 0, {}, True),
        ("MODALITY", 1, {}, True),
        ("MODALITY", 0, {"RequestedProcedurePriority": "STAT"}, True),
    ],
)
def test_who_sends_with_which_priority_says_what_is_stat(
    database: Database,
    tmp_path: Path,
    calling_ae_title: str,
    priority: int,
    attributes: dict[str, str],
    stat: bool,
) -> None:
    ds = make.chest_radiograph(**attributes)
    ae = AE(calling_ae_title)
    ae.add_requested_context(ds.SOPClassUID, ds.file_meta.TransferSyntaxUID)
    with listening(database, tmp_path, stat_calling_ae_titles=("EMERGENCY",)) as port:
        assoc = ae.associate("127.0.0.1", port, ae_title="DICOMAI")
        assert assoc.send_c_store(ds, priority=priority).Status == 0x0000
        assoc.release()
    row = queries.one_study(database, ds.StudyInstanceUID)
    assert row is not None
    assert row["stat"] is stat


def test_echo_is_answered_to_dcmtk(database: Database, tmp_path: Path) -> None:
    need("/usr/bin/storescu")
    with listening(database, tmp_path) as port:
        command = ["/usr/bin/echoscu", "-aec", "DICOMAI", "127.0.0.1", str(port)]
        assert subprocess.run(command, check=False).returncode == 0


def test_every_standard_storage_class_is_accepted_with_every_transfer_syntax(
    database: Database, tmp_path: Path
) -> None:
    ae = AE("MODALITY")
    for sop_class in ("1.2.840.10008.5.1.4.1.1.2", "1.2.840.10008.5.1.4.1.1.66.4", Verification):
        ae.add_requested_context(sop_class, "1.2.840.10008.1.2.1")
    ae.add_requested_context("1.2.840.10008.5.1.4.1.1.1.1", JPEGLSLossless)
    ae.add_requested_context("1.2.840.10008.5.1.4.1.1.88.22", "1.2.840.10008.1.2.4.201")
    with listening(database, tmp_path) as port:
        assoc = ae.associate("127.0.0.1", port, ae_title="DICOMAI")
        assert len(assoc.accepted_contexts) == 5
        assoc.release()


def test_a_dataset_without_study_uid_is_refused_and_nothing_is_kept(
    database: Database, tmp_path: Path
) -> None:
    ds = make.chest_radiograph(StudyInstanceUID=None)
    with listening(database, tmp_path) as port:
        assert store(port, ds).Status == 0xC000
    assert files_of(tmp_path / "inbox") == []


def test_a_uid_that_is_a_path_is_refused(database: Database, tmp_path: Path) -> None:
    ds = make.chest_radiograph()
    ds["StudyInstanceUID"]._value = "../../../tmp/1"
    with listening(database, tmp_path) as port:
        assert store(port, ds).Status == 0xC000
    assert files_of(tmp_path / "inbox") == []


def test_a_second_copy_is_success_and_other_bytes_under_the_same_uid_replace_the_first(
    database: Database, tmp_path: Path
) -> None:
    ds = make.chest_radiograph()
    changed = make.chest_radiograph(study=ds.StudyInstanceUID, SeriesDescription="changed")
    with listening(database, tmp_path) as port:
        assert [store(port, item).Status for item in (ds, ds, changed)] == [0, 0, 0]
        (row,) = queries.instances(database, ds.StudyInstanceUID)
    assert pydicom.dcmread(tmp_path / row["path"]).SeriesDescription == "changed"
    assert len(list(tmp_path.glob("inbox/*/*.dcm"))) == 1


def test_a_released_association_ends_the_quiet_period_early(
    database: Database, tmp_path: Path
) -> None:
    ds = make.chest_radiograph()
    with listening(database, tmp_path, quiet_seconds=600.0) as port:
        storescu(port, make.save(tmp_path / "sent", [ds]))
        row = queries.one_study(database, ds.StudyInstanceUID)
        assert row is not None
        waits = row["due_at"] - row["last_received_at"]
    assert waits.total_seconds() < 10


def test_an_open_association_keeps_the_quiet_period_of_its_study(
    database: Database, tmp_path: Path
) -> None:
    first = make.chest_radiograph()
    second = make.chest_radiograph(1, first.StudyInstanceUID, 2)
    ae = AE("SLOW")
    ae.add_requested_context(first.SOPClassUID, first.file_meta.TransferSyntaxUID)
    with listening(database, tmp_path, quiet_seconds=600.0) as port:
        slow = ae.associate("127.0.0.1", port, ae_title="DICOMAI")
        assert slow.send_c_store(first).Status == 0
        assert store(port, second).Status == 0
        row = queries.one_study(database, first.StudyInstanceUID)
        assert row is not None
        assert (row["due_at"] - row["last_received_at"]).total_seconds() > 500
        slow.release()


def test_a_connection_that_cannot_be_tidied_leaves_its_place_nevertheless(
    database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(_association: Association) -> None:
        raise OSError("read-only")

    monkeypatch.setattr(Association, "close", failing)
    with listening(database, tmp_path, max_associations=1) as port:
        for _ in range(3):
            sender.echo("127.0.0.1", port, "DICOMAI", "MODALITY", 5)
        wait_until(lambda: not attending(), 5, "no thread stays")


def test_a_port_in_use_is_named(tmp_path: Path) -> None:
    from dicomai.errors import PortInUse

    port = free_port()
    with bind("127.0.0.1", port), pytest.raises(PortInUse, match=f"127.0.0.1:{port}"):
        bind("127.0.0.1", port)


def test_no_temporary_file_stays_when_the_disk_is_full(database: Database, tmp_path: Path) -> None:
    if os.geteuid() != 0 or not shutil.which("mount"):
        pytest.skip("needs root, to mount a small disk")
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(disk)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("this machine mounts no tmpfs")
    try:
        with listening(database, disk) as port:
            assert store(port, make.chest_radiograph()).Status == 0xA700
        assert files_of(disk / "inbox") == []
    finally:
        subprocess.run(["umount", str(disk)], check=True)
