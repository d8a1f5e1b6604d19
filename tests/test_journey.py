"""The main job: a study goes in from a PACS or a modality and comes back as overlay and report."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from io import BytesIO
from pathlib import Path

import make
import pydicom
import pytest
from daemon import Daemon, command, daemon
from peers import Orthanc, complaints, free_port, storescu, wait_until
from pydicom.uid import generate_uid

from dicomai.store import queries
from dicomai.study import KINDS, WITHDRAWAL

pytestmark = pytest.mark.timeout(300)
JAPANESE = ["", "ISO 2022 IR 87"]


@pytest.fixture
def site(tmp_path: Path, database_url: str) -> Iterator[tuple[Daemon, Orthanc]]:
    """A daemon and a PACS that forwards all that it receives back to the daemon."""
    port = free_port()
    pacs = Orthanc(tmp_path / "orthanc", port, forward=True)
    try:
        with daemon(tmp_path, database_url, port, [("pacs", "ORTHANC", pacs.dicom)]) as running:
            yield running, pacs
    finally:
        pacs.stop()


def expect_results(running: Daemon, pacs: Orthanc, study: str, sources: list[str]) -> list[Path]:
    """Each listed result is in the PACS once, in the same study, beside its sources."""
    results = [r["sop_instance_uid"] for r in queries.results(running.database, study)]
    wait_until(
        lambda: len(pacs.sop_instance_uids(study)) == len(sources) + len(results),
        30,
        "the PACS holds sources and results",
    )
    assert sorted(pacs.sop_instance_uids(study)) == sorted(sources + results)
    files = []
    for item in pacs.instances(study):
        uid = item["MainDicomTags"]["SOPInstanceUID"]
        if uid in results:
            file = running.folder / f"{uid}.dcm"
            file.write_bytes(pacs.get_bytes(f"/instances/{item['ID']}/file"))
            files.append(file)
    return files


def test_a_study_sent_by_the_pacs_comes_back_once_and_its_echo_is_not_analyzed_again(
    site: tuple[Daemon, Orthanc], tmp_path: Path
) -> None:
    running, pacs = site
    ds = make.large_radiograph()
    (file,) = make.save(tmp_path / "sent", [ds])
    # Orthanc forwards the upload by itself (its Lua script); asked by REST, it sends it once more.
    stored = pacs.post("/instances", file.read_bytes())
    pacs.post("/modalities/dicomai/store", stored["ID"])
    (study,) = running.wait_idle(1)
    files = expect_results(running, pacs, ds.StudyInstanceUID, [ds.SOPInstanceUID])

    kinds = sorted(r["kind"] for r in queries.results(running.database, ds.StudyInstanceUID))
    assert kinds == ["sc", "sc", "sr"]  # overlay, summary, report
    assert study["state"] == "analyzed"
    assert complaints([file, *files], pixelmed=True) == []

    # Everything that the PACS got from us it has sent back to us: kept, and nothing else happened.
    def echoes() -> list[dict[str, object]]:
        rows = queries.instances(running.database, ds.StudyInstanceUID)
        return [row for row in rows if not row["analyzable"]]

    wait_until(lambda: len(echoes()) == 3, 30, "all results came back from the PACS")
    time.sleep(3)
    assert running.studies()[0]["revision"] == 1
    assert [row["state"] for row in queries.deliveries(running.database)] == ["delivered"] * 3
    assert len(pacs.sop_instance_uids(ds.StudyInstanceUID)) == 4


def test_a_study_sent_by_storescu_comes_back_and_a_late_image_gives_a_new_report_alone(
    site: tuple[Daemon, Orthanc], tmp_path: Path
) -> None:
    running, pacs = site
    study = generate_uid()
    first, late = (make.chest_radiograph(0, study, 1), make.chest_radiograph(1, study, 2))
    storescu(running.port, make.save(tmp_path / "first", [first]))
    running.wait_idle(1)
    before = {r["sop_instance_uid"] for r in queries.results(running.database, study)}
    storescu(running.port, make.save(tmp_path / "late", [late]))
    wait_until(lambda: running.studies()[0]["analyzed_revision"] == 2, 60, "a second revision")
    running.wait_idle(1)

    results = queries.results(running.database, study)
    new = [r for r in results if r["sop_instance_uid"] not in before]
    # The late image's overlay; the first one's stays, the old summary is withdrawn.
    assert sorted(r["kind"] for r in new) == ["sc", "sc", "sr", "withdrawal"]
    files = expect_results(running, pacs, study, [])
    reports = [pydicom.dcmread(f) for f in files]
    (successor,) = [r for r in reports if "PredecessorDocumentsSequence" in r]
    named = successor.PredecessorDocumentsSequence[0].ReferencedSeriesSequence[0]
    assert named.ReferencedSOPSequence[0].ReferencedSOPInstanceUID in before
    (withdrawal,) = [r for r in reports if r.Modality == "KO"]
    items = [item for item in withdrawal.ContentSequence if item.ValueType == "IMAGE"]
    summaries = [r for r in results if r["kind"] == "sc" and not r["source_sop_instance_uid"]]
    (old,) = [r["sop_instance_uid"] for r in summaries if r["sop_instance_uid"] in before]
    assert [item.ReferencedSOPSequence[0].ReferencedSOPInstanceUID for item in items] == [old]
    assert complaints(files, pixelmed=True) == []


def test_every_kind_of_result_is_kept_once_and_comes_out_the_same_in_another_process(
    tmp_path: Path,
) -> None:
    port, url = free_port(), f"sqlite:///{tmp_path}/dicomai.db"
    pacs = Orthanc(tmp_path / "orthanc", port)
    study, peer = generate_uid(), [("pacs", "ORTHANC", pacs.dicom)]
    names = {
        "SpecificCharacterSet": JAPANESE,
        "PatientName": "Yamada^Tarou=山田^太郎",
    }
    images = [make.chest_radiograph(n, study, n + 1, **names) for n in range(3)]
    images[2].PixelData = images[2].PixelData[:1000]
    first, late = (make.save(tmp_path / str(n), images[n:][:2]) for n in (0, 2))
    try:
        with daemon(tmp_path, url, port, peer, outputs=KINDS) as running:
            for n, files in enumerate((first, late), 1):
                storescu(port, files)
                wait_until(lambda n=n: running.studies()[0]["analyzed_revision"] == n, 60, str(n))
                running.wait_idle(1)
            results = queries.results(running.database, study)
            assert {r["kind"] for r in results} == {*KINDS, WITHDRAWAL}
            kept = {r["sop_instance_uid"]: running.folder / "data" / r["path"] for r in results}
            held = {item["MainDicomTags"]["SOPInstanceUID"]: item for item in pacs.instances(study)}
            assert held.keys() == kept.keys()
            # As they were sent: in the patient, study and character set of the source.
            for uid, file in kept.items():
                stored = pacs.get_bytes(f"/instances/{held[uid]['ID']}/file")
                assert pydicom.dcmread(BytesIO(stored)) == pydicom.dcmread(file)
                assert pydicom.dcmread(file).SpecificCharacterSet == JAPANESE
            assert len(pacs.get("/patients")) == len(pacs.get("/studies")) == 1
            # Sent again, nothing changes there.
            before = pacs.get("/changes?limit=0&since=0")["Last"], pacs.get("/statistics")
            storescu(pacs.dicom, list(kept.values()), "ORTHANC")
            assert (pacs.get("/changes?limit=0&since=0")["Last"], pacs.get("/statistics")) == before
            # Another process, a hundred days later, from what is stored.
            later = (datetime.now(UTC) + timedelta(days=100)).isoformat()
            script = Path(__file__).with_name("rebuild.py")
            done = subprocess.run(
                [sys.executable, script, running.config, study, tmp_path / "again", later],
                capture_output=True, text=True, check=False,
            )  # fmt: skip
            assert done.returncode == 0, done.stderr
            assert done.stdout == "[]\n"  # nothing of what stands is replaced
        again = {file.stem: file for file in (tmp_path / "again").iterdir()}
        replaced = {r["sop_instance_uid"] for r in results if r["replaced_by"]}
        withdrawals = {r["sop_instance_uid"] for r in results if r["kind"] == WITHDRAWAL}
        assert again.keys() == kept.keys() - replaced - withdrawals
        for uid, file in again.items():
            assert file.read_bytes() == kept[uid].read_bytes(), uid
    finally:
        pacs.stop()


def test_a_damaged_image_fails_alone_and_study_show_names_the_reason(
    site: tuple[Daemon, Orthanc], tmp_path: Path
) -> None:
    running, pacs = site
    study = generate_uid()
    good, bad = make.chest_radiograph(0, study, 1), make.chest_radiograph(1, study, 2)
    bad.PixelData = bad.PixelData[:1000]
    storescu(running.port, make.save(tmp_path / "sent", [good, bad]))
    (row,) = running.wait_idle(1)

    assert (row["state"], row["instances_not_analyzed"]) == ("analyzed", 1)
    shown = command(running.config, "study", "show", study)
    assert shown.returncode == 0, shown.stderr
    assert f"{bad.SOPInstanceUID}  not analyzed, truncated: the pixel data" in shown.stdout
    listed = json.loads(command(running.config, "results", "--format", "json").stdout)
    assert [item["sop_instance_uid"] for item in listed] == [good.SOPInstanceUID]
    assert list(listed[0]) == [
        "study_instance_uid", "series_instance_uid", "sop_instance_uid", "label", "code",
        "probability", "threshold", "positive", "model_name", "model_version", "analyzed_at",
    ]  # fmt: skip
    expect_results(running, pacs, study, [])
