"""What is removed, and what never is: retention after delivery, purge of a patient."""

import os
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import make
import pytest
from daemon import Daemon, command, daemon
from peers import free_port, storescu, wait_until
from pydicom.uid import generate_uid
from sqlalchemy import select
from studies import DATA, QUIET, STUDY, Bench, as_it_is, instance, keep
from studies import bench as new_bench

from dicomai import upkeep
from dicomai.demo.archive import Archive
from dicomai.errors import HeldElsewhere
from dicomai.receive.admission import Admission, discard
from dicomai.settings import Retention, Settings
from dicomai.store import arrivals, inspect, outbox, queries, queue, removal, truth
from dicomai.store.arrivals import Arrival, Outcome
from dicomai.store.database import Database
from dicomai.store.tables import instance as table

pytestmark = pytest.mark.timeout(200)


@pytest.fixture
def bench(database: Database) -> Iterator[Bench]:
    """Each kind of database, one after the other."""
    found = new_bench(database)
    yield found
    assert found.unexplained() == []


def ignore(_paths: Collection[str]) -> None:
    """There are no files."""


def arrive(bench: Bench, number: int, patient_id: str, study: str = STUDY) -> Outcome:
    """An image of a patient arrives."""
    arrival = Arrival(instance(number, study), study, 1, True, "MODALITY", None, patient_id)
    return arrivals.arrive(bench.database, [arrival], DATA, QUIET, as_it_is)[0][0]


# Retention


@pytest.mark.parametrize("state", ["pending", "sending", "committing", "failed"])
def test_nothing_is_removed_that_a_destination_has_not_got(bench: Bench, state: str) -> None:
    bench.arrive()
    bench.analyze()
    one, other = bench.claim_deliveries()
    outbox.finish_delivery(bench.database, one, "delivered")
    wait = None if state == "failed" else 900.0
    if state != "sending":
        outbox.finish_delivery(bench.database, other, state, "why", wait)
    assert removal.removable(bench.database) == []
    assert removal.forget_files(bench.database, STUDY) == []


def test_a_delivered_study_goes_when_it_is_old_enough_and_its_findings_stay(bench: Bench) -> None:
    bench.arrive()
    bench.analyze()
    bench.deliver()
    assert removal.removable(bench.database, bench.clock.now - timedelta(days=1)) == []
    assert removal.removable(bench.database, bench.clock.now) == [STUDY]
    paths = removal.forget_files(bench.database, STUDY)
    assert len(paths) == 3
    assert removal.removable(bench.database) == []
    findings = queries.findings(bench.database, queries.FindingFilter())
    assert len(findings) == 1


@pytest.mark.parametrize("subject", [("study", STUDY), ("image", "1.2.3.1")])
def test_what_is_labelled_is_learnt_from_and_stays(bench: Bench, subject: tuple[str, str]) -> None:
    bench.arrive()
    bench.analyze()
    bench.deliver()
    said = truth.Said(subject, "pneumonia", "present", "A", None, "file", "0")
    truth.say(bench.database, [said])
    assert removal.removable(bench.database) == []
    assert removal.forget_files(bench.database, STUDY) == []


def test_a_late_image_of_a_removed_study_is_analyzed_alone_and_replaces_nothing(
    bench: Bench,
) -> None:
    bench.arrive(1)
    bench.analyze()
    bench.deliver()
    removal.forget_files(bench.database, STUDY)
    bench.arrive(2)
    claim = bench.claim_due()
    assert [i.sop_instance_uid for i in claim.study.instances] == [f"{STUDY}.2"]
    assert queries.sent(bench.database, STUDY) == ()


def test_an_image_that_comes_again_after_its_removal_is_kept_and_can_be_analyzed_again(
    bench: Bench,
) -> None:
    bench.arrive()
    bench.analyze()
    bench.deliver()
    assert not bench.claim()
    removal.forget_files(bench.database, STUDY)
    assert not queue.retry_study(bench.database, STUDY)  # there is nothing to analyze
    assert bench.arrive() == (Outcome.KEPT, None)
    assert bench.study().state == "analyzed"
    assert queue.retry_study(bench.database, STUDY)
    bench.analyze()
    (overlay,) = [r for r in queries.results(bench.database, STUDY) if r["kind"] == "sc"]
    assert overlay["path"] is not None  # the same object, made again


@pytest.fixture
def kept(database: Database, tmp_path: Path) -> tuple[Settings, list[str]]:
    """Three studies in a data folder, received on three days, all closed with nothing to send."""
    settings = Settings(data_dir=tmp_path / "var")
    found = new_bench(database)
    found.outputs = {}
    uids = []
    for _ in range(3):
        ds = make.chest_radiograph()
        (file,) = make.save(tmp_path / "sent", [ds])
        admission = Admission(found.database, settings.data_dir, 0)
        admission.admit(*keep(file, settings.data_dir), "MODALITY")
        claim = queue.claim_study(found.database, settings.data_dir, 60, 3)
        assert claim is not None
        queue.release_study(found.database, claim)
        with found.database.write() as connection:
            connection.exec_driver_sql("UPDATE study SET state = 'skipped', due_at = NULL")
            connection.exec_driver_sql("DELETE FROM event")
        uids.append(ds.StudyInstanceUID)
        found.clock.wait(86_400)
    found.clock.wait(-3 * 86_400)
    return settings, uids


def files(settings: Settings) -> set[str]:
    """The studies that still have a file."""
    return {file.parent.name for file in settings.data_dir.glob("inbox/*/*")}


def test_where_all_takes_too_much_space_the_oldest_go_first(
    kept: tuple[Settings, list[str]], database: Database
) -> None:
    settings, uids = kept
    size = sum(file.stat().st_size for file in settings.data_dir.glob("inbox/*/*"))
    room = Retention(max_gigabytes=(size - 1) / 1e9)
    done = upkeep.retain(settings.model_copy(update={"retention": room}), database)
    assert done.startswith("1 studies")
    assert files(settings) == set(uids[1:])


def test_where_nothing_is_set_nothing_is_removed(
    kept: tuple[Settings, list[str]], database: Database
) -> None:
    settings, uids = kept
    assert upkeep.retain(settings, database).startswith("0 studies")
    assert files(settings) == set(uids)


def test_a_file_that_has_a_row_is_not_discarded(
    kept: tuple[Settings, list[str]], database: Database
) -> None:
    settings, uids = kept
    (file,) = settings.data_dir.glob(f"inbox/{uids[0]}/*")
    assert discard(database, settings.data_dir, uids[0], [file]) == 0
    assert file.exists()
    removal.forget_files(database, uids[0])
    assert discard(database, settings.data_dir, uids[0], [file]) > 0
    assert not file.parent.exists()


def test_an_object_whose_file_was_removed_before_its_commit_is_not_acknowledged(
    kept: tuple[Settings, list[str]], database: Database, tmp_path: Path
) -> None:
    settings, _ = kept
    (file,) = make.save(tmp_path / "again", [make.chest_radiograph()])
    header, gone, size = keep(file, settings.data_dir)
    gone.path.unlink()
    before = new_bench(database).everything()
    with pytest.raises(FileNotFoundError):
        Admission(database, settings.data_dir, 0).admit(header, gone, size, "MODALITY")
    assert new_bench(database).everything() == before


def test_a_folder_that_is_no_study_is_left_alone_and_the_sweep_goes_on(
    kept: tuple[Settings, list[str]], database: Database
) -> None:
    settings, _ = kept
    foreign = settings.data_dir / "inbox" / ("notes of the administrator " * 4)
    forgotten = settings.data_dir / "inbox/1.2.3/forgotten.part"
    for file in (foreign / "notes.txt", forgotten):
        file.parent.mkdir()
        file.write_text("x")
        os.utime(file, (0, 0))
    assert upkeep.sweep(settings, database) == "0 adopted, 1 removed"
    assert (foreign / "notes.txt").exists()
    assert not forgotten.exists()


def test_an_object_of_a_new_study_cannot_arrive_while_its_file_is_being_removed(
    database: Database,
) -> None:
    bench = new_bench(database)
    before = bench.everything()
    with ThreadPoolExecutor(1) as other:
        with removal.unreferenced(database, "9.9", ["inbox/9.9/1.dcm"]) as free:
            arriving = other.submit(arrive, bench, 1, "A", "9.9")
            assert free == {"inbox/9.9/1.dcm"}
            with pytest.raises(TimeoutError):
                arriving.result(0.5)
        assert arriving.result() is Outcome.NEW
    with removal.unreferenced(database, "9.8", []):
        pass
    after = bench.everything()
    assert len(after["study"]) == len(before["study"]) + 1


# Patients


def test_a_study_of_two_patients_is_failed_and_no_result_mixes_them(bench: Bench) -> None:
    arrive(bench, 1, "A")
    arrive(bench, 2, "B")
    bench.clock.wait(QUIET)
    assert bench.claim() is None
    row = bench.study()
    assert row.state == "failed"
    assert "two patients" in row.reason
    assert bench.deliveries() == {}


def test_a_study_of_two_patients_is_analyzed_once_it_is_corrected(bench: Bench) -> None:
    arrive(bench, 1, "A")
    arrive(bench, 2, "B")
    bench.clock.wait(QUIET)
    assert bench.claim() is None
    corrected = Arrival(instance(2, content="corrected"), STUDY, 1, True, "MODALITY", None, "A ")
    arrivals.arrive(bench.database, [corrected], DATA, QUIET, as_it_is)
    bench.analyze()
    assert bench.study().state == "analyzed"


def test_the_patient_id_is_not_in_the_database(bench: Bench) -> None:
    arrive(bench, 1, "PID-73991")
    assert "PID-73991" not in str(bench.everything())


def test_purge_removes_a_patient_and_nobody_else(bench: Bench) -> None:
    for study, patient in (("7.71", "A"), ("7.72", "A"), ("7.73", "B")):
        arrive(bench, 1, patient, study)
        bench.analyze()
        bench.deliver()
    assert removal.studies_of(bench.database, "A") == ["7.71", "7.72"]
    for uid in ("7.71", "7.72"):
        removed = removal.purge(bench.database, uid, ignore, "A")
        assert (removed.whole, removed.images, removed.results, removed.findings) == (
            True,
            1,
            2,
            1,
        )
        assert removed.files == 3
    left = str(bench.everything())
    assert "7.71" not in left
    assert "7.72" not in left
    assert bench.study("7.73").state == "analyzed"
    assert len(queries.findings(bench.database, queries.FindingFilter())) == 1


@pytest.mark.parametrize("state", ["receiving", "analyzing", "analyzed", "failed"])
def test_purge_of_one_of_two_patients_leaves_the_other_to_be_analyzed(
    bench: Bench, state: str
) -> None:
    arrive(bench, 1, "A")
    if state != "receiving":
        claim = bench.claim_due()
        if state == "analyzed":
            bench.complete(claim)
        elif state == "failed":
            bench.fail(claim, "broken")
    # Not by arrive(), which would reopen the study: it came, and was not yet looked at.
    with bench.database.write() as connection:
        row = dict(connection.execute(select(table)).mappings().one())
        other = {"sop_instance_uid": f"{STUDY}.2", "patient": "another", "digest": "0"}
        connection.execute(table.insert().values({**row, **other}))
    removed = removal.purge(bench.database, STUDY, ignore, "A")
    assert (removed.whole, removed.images) == (False, 1)
    assert inspect.miscounted(bench.database) == []
    claim = bench.claim_due()
    assert [i.sop_instance_uid for i in claim.study.instances] == [f"{STUDY}.2"]
    bench.complete(claim)
    assert bench.study().state == "analyzed"
    assert inspect.miscounted(bench.database) == []


def test_a_worker_and_a_sender_of_a_purged_study_find_their_leases_lost(bench: Bench) -> None:
    bench.arrive()
    bench.analyze()
    held = bench.claim_deliveries()
    removal.purge(bench.database, STUDY, ignore)
    assert not outbox.start_delivery(bench.database, held, 60)
    outbox.finish_delivery(bench.database, held[0], "pending", "no answer", 5)
    outbox.release_deliveries(bench.database, held)
    assert bench.deliveries() == {}


# One image in two studies; two daemons on one database


def test_an_image_that_is_copied_into_another_study_is_in_both(bench: Bench) -> None:
    for study in ("1.1", "1.2"):
        bench.arrive(study=study, uid="9.9.1")
        bench.analyze()
    assert [len(queries.instances(bench.database, uid)) for uid in ("1.1", "1.2")] == [1, 1]
    assert {bench.study(uid).state for uid in ("1.1", "1.2")} == {"analyzed"}
    assert {bench.study(uid).revision for uid in ("1.1", "1.2")} == {1}


def test_each_daemon_works_on_the_studies_whose_files_it_has(bench: Bench) -> None:
    bench.database.node = "here"
    bench.arrive(study="1.1")
    bench.database.node = "there"
    bench.arrive(study="1.2")
    assert bench.claim_due().study.study_instance_uid == "1.2"
    assert bench.claim() is None
    assert queries.due_study_attempts(bench.database) is None
    with pytest.raises(HeldElsewhere, match="another daemon"):
        bench.arrive(2, study="1.1")
    outcome, spare = bench.arrive(1, study="1.1")  # it is safe there, and not needed here
    assert (outcome, spare) == (Outcome.DUPLICATE, instance(1, "1.1").path)
    bench.database.node = "here"
    bench.analyze()
    bench.database.node = "there"
    assert bench.claim_deliveries() == []
    assert not queries.has_due(bench.database, "pacs")
    assert removal.held_elsewhere(bench.database, ["1.1", "1.2"]) == ["1.1"]
    bench.database.node = "here"
    assert len(bench.claim_deliveries()) == 2


def test_upkeep_is_each_daemons_own(bench: Bench) -> None:
    due = bench.clock.now
    bench.database.node = "here"
    assert queue.add_task(bench.database, "sweep", due)
    bench.database.node = "there"
    assert not queries.task_is_due(bench.database)
    assert queue.add_task(bench.database, "sweep", due)
    assert queue.claim_task(bench.database, 60) is not None
    assert queue.claim_task(bench.database, 60) is None


# A whole daemon


def test_purge_leaves_no_byte_of_the_patient_behind(tmp_path: Path) -> None:
    names = {"PatientID": "PID-73991", "PatientName": "Zzyzx^Quentin"}
    gone = make.chest_radiograph(3, generate_uid(), 1, **names)
    stays = make.chest_radiograph(1, generate_uid(), 1, PatientID="OTHER")
    archive = Archive(tmp_path / "archive")
    peer = [("archive", "ARCHIVE", archive.port)]
    folder = tmp_path / "site"
    try:
        with daemon(folder, f"sqlite:///{folder}/db/dicomai.db", free_port(), peer) as running:
            storescu(running.port, make.save(tmp_path / "sent", [gone, stays]))
            running.wait_idle(2)
            assert holding(folder, "Zzyzx")
            refused = command(running.config, "purge", "--patient", "PID-00000", "--yes")
            assert refused.returncode == 2
            assert "nothing is known" in refused.stderr
            done = command(running.config, "purge", "--patient", "PID-73991", "--yes")
            assert done.returncode == 0, done.stderr
            assert "removed 1 images" in done.stdout
            assert "not removed: what archive holds" in done.stdout
            check_only_one_is_left(running, stays.StudyInstanceUID)
        assert holding(folder, "Zzyzx") == []
        assert holding(folder, "PID-73991") == []
        assert holding(folder / "data", gone.StudyInstanceUID) == []
    finally:
        archive.close()


def check_only_one_is_left(running: Daemon, uid: str) -> None:
    """The other patient's study is as it was."""
    wait_until(lambda: len(running.studies()) == 1, 10, "one study is left")
    (row,) = running.studies()
    assert row["study_instance_uid"] == uid
    assert row["state"] == "analyzed"


def holding(folder: Path, words: str) -> list[Path]:
    """Files that hold these words, in their name or their bytes."""
    return [
        file
        for file in folder.rglob("*")
        if words in str(file) or (file.is_file() and words.encode() in file.read_bytes())
    ]
