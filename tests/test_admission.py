"""What several associations bring at once is committed together, and each is told its own."""

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import make
import pytest
from peers import wait_until
from pydicom.dataset import Dataset
from pydicom.uid import generate_uid
from sqlalchemy import event
from sqlalchemy.exc import IntegrityError, OperationalError
from studies import keep

from dicomai.receive.admission import Admission
from dicomai.store import arrivals, queries
from dicomai.store.arrivals import Outcome
from dicomai.store.database import Database, open_database

# A database that refuses one series: SQLite has no way to add a check to a table that is there.
REFUSE = {
    True: "CREATE TRIGGER refuse BEFORE INSERT ON instance WHEN NEW.series_instance_uid = "
    "'1.2.3.999' BEGIN SELECT RAISE(ABORT, 'refused'); END",
    False: "ALTER TABLE instance ADD CHECK (series_instance_uid <> '1.2.3.999')",
}


class Door:
    """An admission that several threads come to while nobody is served."""

    def __init__(self, database: Database, folder: Path) -> None:
        self.admission = Admission(database, folder / "data", 30.0)
        self._folder = folder

    @contextmanager
    def shut(self) -> Iterator[Callable[[Dataset], "Future[Outcome]"]]:
        """Yields what brings an object; all that were brought are served at the end."""
        coming = 0
        with ThreadPoolExecutor(8) as threads:
            with self.admission._turn:

                def bring(ds: Dataset) -> "Future[Outcome]":
                    nonlocal coming
                    coming += 1
                    future = threads.submit(self.bring, ds)
                    wait_until(lambda: len(self.admission._waiting) == coming, 5, "it waits")
                    return future

                yield bring

    def bring(self, ds: Dataset) -> Outcome:
        """An object lies in the inbox and is committed."""
        folder = self._folder / str(threading.get_ident()) / str(time.monotonic_ns())
        (file,) = make.save(folder, [ds])
        return self.admission.admit(*keep(file, self._folder / "data"), "MODALITY")


@contextmanager
def commits(database: Database) -> Iterator[list[object]]:
    """Counts transactions."""
    seen: list[object] = []
    note = seen.append
    event.listen(database.engine, "commit", note)
    try:
        yield seen
    finally:
        event.remove(database.engine, "commit", note)


def test_all_who_wait_are_committed_in_one_transaction(database: Database, tmp_path: Path) -> None:
    door = Door(database, tmp_path)
    images = [make.chest_radiograph(number) for number in range(5)]
    with commits(database) as seen, door.shut() as bring:
        done = [bring(ds) for ds in images]
        assert seen == []
    assert [item.result() for item in done] == [Outcome.NEW] * 5
    assert len(seen) == 1
    assert {row["study_instance_uid"] for row in queries.studies(database)} == {
        ds.StudyInstanceUID for ds in images
    }


def test_the_same_object_from_two_senders_is_new_once(database: Database, tmp_path: Path) -> None:
    door, ds = Door(database, tmp_path), make.chest_radiograph()
    with door.shut() as bring:
        done = [bring(ds), bring(ds)]
    assert {item.result() for item in done} == {Outcome.NEW, Outcome.DUPLICATE}
    (row,) = queries.instances(database, ds.StudyInstanceUID)
    assert (tmp_path / "data" / row["path"]).is_file()


def test_of_two_contents_under_one_uid_the_file_of_the_last_one_stays(
    database: Database, tmp_path: Path
) -> None:
    door, ds = Door(database, tmp_path), make.chest_radiograph()
    other = make.chest_radiograph(1, ds.StudyInstanceUID)
    other.SOPInstanceUID = other.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID
    with door.shut() as bring:
        done = [bring(ds), bring(other)]
    assert [item.result() for item in done] == [Outcome.NEW, Outcome.REPLACED]
    (row,) = queries.instances(database, ds.StudyInstanceUID)
    (file,) = (tmp_path / "data/inbox" / ds.StudyInstanceUID).iterdir()
    assert file == tmp_path / "data" / row["path"]


def test_one_that_cannot_be_committed_does_not_harm_the_others(
    database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    door = Door(database, tmp_path)
    images = [make.chest_radiograph(number) for number in range(4)]
    bad, arrive = images[2].StudyInstanceUID, arrivals.arrive

    def vanished(database: Database, group: list[arrivals.Arrival], *more: object) -> object:
        for item in group:
            if item.study_instance_uid == bad:
                item.instance.path.unlink(missing_ok=True)
        return arrive(database, group, *more)  # type: ignore[arg-type]

    monkeypatch.setattr(arrivals, "arrive", vanished)
    with door.shut() as bring:
        done = [bring(ds) for ds in images]
    assert isinstance(done[2].exception(), FileNotFoundError)
    assert [done[n].result() for n in (0, 1, 3)] == [Outcome.NEW] * 3
    known = {row["study_instance_uid"] for row in queries.studies(database)}
    assert known == {ds.StudyInstanceUID for ds in images} - {bad}


def test_a_database_that_fails_is_said_to_all(database: Database, tmp_path: Path) -> None:
    door = Door(database, tmp_path)
    with database.write() as connection:
        connection.exec_driver_sql("ALTER TABLE instance RENAME TO moved")
    try:
        with door.shut() as bring:
            done = [bring(make.chest_radiograph(number)) for number in range(3)]
        assert all(isinstance(item.exception(), Exception) for item in done)
    finally:
        with database.write() as connection:
            connection.exec_driver_sql("ALTER TABLE moved RENAME TO instance")
    assert door.bring(make.chest_radiograph()) is Outcome.NEW


def test_a_database_that_cannot_be_opened_is_one_error_for_all(tmp_path: Path) -> None:
    (tmp_path / "db").mkdir()
    lost = open_database(f"sqlite:///{tmp_path}/db/dicomai.db")
    (tmp_path / "db").rmdir()
    with pytest.raises(OperationalError), lost.driver():
        pass


def test_what_the_database_refuses_of_one_sender_does_not_harm_the_others(
    database: Database, tmp_path: Path
) -> None:
    """In the statements that go to the driver, too: the studies are receiving already."""
    door, studies = Door(database, tmp_path), [generate_uid() for _ in range(3)]
    database.node = "here"
    for study in studies:
        assert door.bring(make.chest_radiograph(0, study)) is Outcome.NEW
    good = [make.chest_radiograph(1, study, 2) for study in studies[:2]]
    bad = make.chest_radiograph(1, studies[2], 2)
    bad.SeriesInstanceUID = "1.2.3.999"
    with database.write() as connection:
        connection.exec_driver_sql(REFUSE[database.is_sqlite])
    with door.shut() as bring:
        done = [bring(ds) for ds in (good[0], bad, good[1])]
    assert [done[n].result() for n in (0, 2)] == [Outcome.NEW] * 2
    assert isinstance(done[1].exception(), IntegrityError)
    assert len(queries.instances(database, studies[2])) == 1
