"""What is made of images while their study arrives: taken by its claim, or made again."""

from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import make
import pytest
from daemon import daemon, free_port
from peers import Orthanc, storescu, wait_until
from pydicom.dataset import Dataset
from pydicom.uid import generate_uid
from sqlalchemy import update
from studies import keep

from dicomai.ahead import Ahead, discard
from dicomai.analyze import Context, Part, Scorer, analyze
from dicomai.errors import Rejected
from dicomai.infer import package
from dicomai.infer.engine import Engine
from dicomai.receive.admission import Admission
from dicomai.roles import reporting
from dicomai.scoring import decoding_pool, header_reader, preparer
from dicomai.settings import Settings
from dicomai.store import queries, queue
from dicomai.store.database import Database
from dicomai.store.tables import study
from dicomai.study import Algorithm, Float32
from dicomai.worker import Worker

PACS = {"pacs": frozenset({"sc", "sr"})}


@pytest.fixture(scope="module")
def scorer() -> Iterator[Scorer]:
    """The starter on the processor, with its decoding processes."""
    settings, model = Settings(), package.read(make.STARTER)
    engine = Engine(model, "cpu")
    with decoding_pool(settings) as pool:
        yield Scorer(
            Algorithm(model, engine.name, reporting(settings)),
            preparer(settings, pool, model),
            header_reader(settings, pool),
            engine.biases,
            engine.score,
        )


def arrive(database: Database, folder: Path, *datasets: Dataset) -> str:
    """Images of one study that go on arriving for an hour."""
    admission = Admission(database, folder, 3600.0)
    for file in make.save(folder / "sent", datasets):
        header, instance, size = keep(file, folder)
        admission.admit(header, instance, size, "MODALITY")
    return str(datasets[0].StudyInstanceUID)


def due(database: Database, folder: Path, uid: str) -> queue.Claim:
    """The quiet period is over."""
    with database.write() as connection:
        now = database.now(connection)
        connection.execute(update(study).values(due_at=now))
    claim = queue.claim_study(database, folder, 60, 3)
    assert claim is not None
    assert claim.study.study_instance_uid == uid
    return claim


def context(folder: Path, uid: str) -> Context:
    """Of a first analysis."""
    return Context({}, (), PACS, datetime.now(UTC), folder / "results" / uid, ".lease.part")


def drafts(folder: Path) -> set[Path]:
    """Files of results that are not published."""
    return set((folder / "results").rglob("*.part"))


def test_the_claim_takes_what_was_made_and_scores_nothing_again(
    database: Database, tmp_path: Path, scorer: Scorer
) -> None:
    positive = make.large_radiograph()
    uid = arrive(
        database, tmp_path, positive, make.chest_radiograph(1, positive.StudyInstanceUID, 2)
    )
    ahead = Ahead(database, scorer, tmp_path, PACS)
    assert ahead.step()
    assert not ahead.step()
    claim = due(database, tmp_path, uid)
    assert claim.attempts == 1  # nobody has died

    def unused(_: Float32) -> tuple[Float32, Float32]:
        raise AssertionError("it was scored before")

    ready = ahead.take(claim.study.instances)
    assert set(ready) == set(claim.study.instances)
    known = replace(context(tmp_path, uid), ready=ready)
    done = analyze(claim.study, replace(scorer, predict=unused), known)
    scores = {
        (item.frame.source.digest, item.frame.number): item.score
        for part in ready.values()
        if isinstance(part, Part)
        for item in part.predictions
    }
    plain = replace(context(tmp_path, uid), scores=scores, out=tmp_path / "plain")
    for mine, other in zip(done.results, analyze(claim.study, scorer, plain).results, strict=True):
        assert mine.sop_instance_uid == other.sop_instance_uid
        assert mine.path.read_bytes() == other.path.read_bytes()
    discard(ready.values())
    assert all(file.name.endswith(".lease.part") for file in drafts(tmp_path))


def test_an_image_that_comes_later_is_made_by_the_claim(
    database: Database, tmp_path: Path, scorer: Scorer
) -> None:
    first = make.chest_radiograph()
    uid = arrive(database, tmp_path, first)
    ahead = Ahead(database, scorer, tmp_path, PACS)
    assert ahead.step()
    arrive(database, tmp_path, make.chest_radiograph(1, uid, 2))
    claim = due(database, tmp_path, uid)
    ready = ahead.take(claim.study.instances)
    assert len(ready) == 1
    done = analyze(claim.study, scorer, replace(context(tmp_path, uid), ready=ready))
    assert len({item.frame.source for item in done.findings}) == 2
    discard(ready.values())


def test_whoever_dies_over_it_has_tried_the_study_and_it_is_left_to_its_claim(
    database: Database, tmp_path: Path, scorer: Scorer
) -> None:
    uid = arrive(database, tmp_path, make.chest_radiograph())

    def dies(_: Float32) -> tuple[Float32, Float32]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Ahead(database, replace(scorer, predict=dies), tmp_path, PACS).step()
    assert not Ahead(database, scorer, tmp_path, PACS).step()
    claim = due(database, tmp_path, uid)
    assert claim.attempts == 2


def test_of_what_failed_nobody_waits(database: Database, tmp_path: Path, scorer: Scorer) -> None:
    uid = arrive(database, tmp_path, make.chest_radiograph())

    def fails(_: Float32) -> tuple[Float32, Float32]:
        raise RuntimeError("no device")

    ahead = Ahead(database, replace(scorer, predict=fails), tmp_path, PACS)
    with pytest.raises(RuntimeError):
        ahead.step()
    assert ahead.take(due(database, tmp_path, uid).study.instances) == {}


def test_a_stat_study_is_worked_on_before_one_that_is_due_earlier(
    database: Database, tmp_path: Path, scorer: Scorer
) -> None:
    routine = arrive(database, tmp_path, make.chest_radiograph())
    stat = arrive(database, tmp_path, make.chest_radiograph(1))
    with database.write() as connection:
        connection.execute(
            update(study).where(study.c.study_instance_uid == stat).values(stat=True)
        )
    assert list(queries.arriving(database, tmp_path)) == [stat, routine]
    ahead = Ahead(database, scorer, tmp_path, PACS)
    assert ahead.step()
    assert {file.parent.name for file in drafts(tmp_path)} == {stat}
    ahead.close()


def test_what_cannot_be_analyzed_is_known_before_too(
    database: Database, tmp_path: Path, scorer: Scorer
) -> None:
    uid = arrive(database, tmp_path, make.chest_radiograph(ViewPosition="LL"))
    ahead = Ahead(database, scorer, tmp_path, PACS)
    assert ahead.step()
    (made,) = ahead.take(due(database, tmp_path, uid).study.instances).values()
    assert isinstance(made, Rejected)
    assert made.code == "wrong-view"


def test_what_was_sent_of_before_is_not_made_ahead(
    database: Database, tmp_path: Path, scorer: Scorer
) -> None:
    uid = arrive(database, tmp_path, make.chest_radiograph())
    claim = due(database, tmp_path, uid)
    arrive(database, tmp_path, make.chest_radiograph(1, uid, 2))
    assert queries.arriving(database, tmp_path) == {}
    assert claim.study.revision == 1


def test_nothing_is_made_beside_a_study_that_has_crashed_its_worker(
    database: Database, tmp_path: Path
) -> None:
    crashed = arrive(database, tmp_path, make.chest_radiograph())
    arrive(database, tmp_path, make.chest_radiograph(1))
    with database.write() as connection:
        chosen = update(study).where(study.c.study_instance_uid == crashed)
        connection.execute(chosen.values(attempts=2, due_at=database.now(connection)))
    worker = Worker(Settings(data_dir=tmp_path), database, package.read(make.STARTER))
    ahead = worker._loaded.ahead
    try:
        assert not worker._work_ahead(ahead)  # it waits for nothing else to be in hand
        worker._steps_ahead = 1
        assert worker._claim() is None
        worker._steps_ahead = 0
        claim = worker._claim()
        assert claim is not None
        assert claim.study.study_instance_uid == crashed
        assert not worker._work_ahead(ahead)
        worker._held.clear()
        assert worker._work_ahead(ahead)
    finally:
        worker._loaded.close()
        worker._pool.close()


def test_what_nobody_takes_leaves_no_files(
    database: Database, tmp_path: Path, scorer: Scorer
) -> None:
    arrive(database, tmp_path, make.large_radiograph())
    ahead = Ahead(database, scorer, tmp_path, PACS)
    assert ahead.step()
    assert drafts(tmp_path)
    ahead.close()
    assert not drafts(tmp_path)


def test_a_daemon_has_the_overlay_before_the_study_is_due_and_sends_it_once(
    tmp_path: Path,
) -> None:
    port, uid = free_port(), generate_uid()
    pacs = Orthanc(tmp_path / "orthanc", port)
    try:
        url = f"sqlite:///{tmp_path}/dicomai.db"
        destinations = [("pacs", "ORTHANC", pacs.dicom)]
        with daemon(tmp_path / "site", url, port, destinations, 300.0, 300.0) as site:
            storescu(port, make.save(tmp_path / "sent", [make.large_radiograph(uid)]))
            data = site.folder / "data"
            wait_until(lambda: drafts(data), 100, "something is made ahead")
            (row,) = site.studies()
            assert row["state"] == "receiving"
            with site.database.write() as connection:  # enough of the quiet period
                connection.execute(update(study).values(due_at=site.database.now(connection)))
            (row,) = site.wait_idle(1)
            assert row["state"] == "analyzed"
            assert len(pacs.sop_instance_uids(uid)) == 3
            assert not drafts(data)
    finally:
        pacs.stop()
