"""Trouble on this side: the disk, the database, the clock, memory, and a second daemon."""

import os
import resource
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import make
import pytest
from daemon import Daemon, command, daemon
from peers import Postgres, free_port, small_disk, storescu, wait_until
from pydicom.dataset import Dataset
from pynetdicom import AE
from studies import QUIET, Bench
from studies import bench as new_bench

from dicomai.demo.archive import Archive
from dicomai.errors import LeaseLost
from dicomai.schedule import ClockWatch
from dicomai.settings import Settings
from dicomai.store import queries
from dicomai.store.database import Database

pytestmark = pytest.mark.timeout(250)


def store(port: int, datasets: list[Dataset]) -> list[int]:
    """C-STORE each over one association; the statuses."""
    ae = AE("MODALITY")
    ae.add_requested_context(datasets[0].SOPClassUID, datasets[0].file_meta.TransferSyntaxUID)
    ae.dimse_timeout = 60
    assoc = ae.associate("127.0.0.1", port, ae_title="DICOMAI")
    assert assoc.is_established
    statuses = [int(assoc.send_c_store(ds).Status) for ds in datasets]
    assoc.release()
    return statuses


def check_analyzed_once(running: Daemon, studies: set[str]) -> None:
    """Each of these studies is analyzed, at its first revision, and none other is known."""
    rows = running.wait_idle(len(studies))
    assert {row["study_instance_uid"] for row in rows if row["analyzed_at"]} == studies
    assert {(row["state"], row["revision"]) for row in rows if row["analyzed_at"]} == {
        ("analyzed", 1)
    }


# The disk


def test_before_the_disk_is_full_nothing_more_is_accepted_and_what_was_is_analyzed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DICOMAI_RECEIVE__MIN_FREE_MEGABYTES", "60")
    images = [make.chest_radiograph(n) for n in range(10)]
    archive = Archive(tmp_path / "archive")
    with small_disk(tmp_path / "site/data", 100) as disk:
        filler = disk / "filler"
        url = f"sqlite:///{disk}/dicomai.db"
        peer = [("archive", "ARCHIVE", archive.port)]
        with daemon(tmp_path / "site", url, free_port(), peer) as running:
            size = make.save(tmp_path / "sent", images[:1])[0].stat().st_size
            room = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize - 60 * 2**20
            filler.write_bytes(bytes(room - 5 * size // 2))  # for two or three of them
            statuses = store(running.port, images)
            taken = [ds.StudyInstanceUID for ds, s in zip(images, statuses, strict=True) if s == 0]
            assert set(statuses) == {0, 0xA700}
            check_analyzed_once(running, set(taken))
            filler.unlink()
            assert set(store(running.port, images)) == {0}
            check_analyzed_once(running, {ds.StudyInstanceUID for ds in images})
    archive.close()


def test_a_full_disk_loses_nothing_that_was_acknowledged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DICOMAI_RECEIVE__MIN_FREE_MEGABYTES", "0")
    first, second = make.chest_radiograph(1), make.chest_radiograph(2)
    with small_disk(tmp_path / "site/data", 40) as disk:
        url = f"sqlite:///{disk}/dicomai.db"
        with daemon(tmp_path / "site", url, free_port()) as running:
            assert store(running.port, [first]) == [0]
            fill(disk)
            assert store(running.port, [second]) == [0xA700]
            assert list((disk / "inbox").rglob("*.part")) == []
            (disk / "filler").unlink()
            check_analyzed_once(running, {first.StudyInstanceUID})
            assert store(running.port, [second]) == [0]
            check_analyzed_once(running, {first.StudyInstanceUID, second.StudyInstanceUID})


def fill(disk: Path) -> None:
    """Leave not a byte."""
    with (disk / "filler").open("wb", buffering=0) as file:
        for size in (1 << 20, 1 << 12):
            try:
                while True:
                    file.write(bytes(size))
            except OSError:
                pass


def test_a_folder_that_becomes_read_only_loses_nothing_and_goes_on_by_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DICOMAI_RECEIVE__MIN_FREE_MEGABYTES", "0")
    first, second = make.chest_radiograph(1), make.chest_radiograph(2)
    with small_disk(tmp_path / "site/data", 60) as disk:
        url = f"sqlite:///{tmp_path}/dicomai.db"
        with daemon(tmp_path / "site", url, free_port(), quiet=3, release_quiet=3) as running:
            assert store(running.port, [first]) == [0]
            remount(disk, "ro")
            assert store(running.port, [second]) == [0xA700]
            wait_until(lambda: '"put_off"' in running.log, 30, "the analysis waits for the disk")
            remount(disk, "rw")
            assert store(running.port, [second]) == [0]
            check_analyzed_once(running, {first.StudyInstanceUID, second.StudyInstanceUID})


def remount(disk: Path, how: str) -> None:
    """Read-only, or writable again."""
    subprocess.run(["mount", "-o", f"remount,{how}", str(disk)], check=True)


def test_a_folder_that_is_read_only_from_the_start_is_one_clear_line(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 1) as disk:
        remount(disk, "ro")
        config = tmp_path / "dicomai.toml"
        url = f"sqlite:///{tmp_path}/dicomai.db"
        config.write_text(f'data_dir = "{disk}"\n[database]\nurl = "{url}"\n')
        done = command(config, "run")
    assert done.returncode == 1
    assert done.stderr.strip().endswith("Read-only file system")
    assert done.stderr.count("\n") == 1


# The database


def test_postgres_that_crashes_in_the_middle_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DICOMAI_INFER__LEASE_SECONDS", "6")
    cluster = Postgres()
    archive = Archive(tmp_path / "archive")
    images = [make.chest_radiograph(n) for n in range(8)]
    peer = [("archive", "ARCHIVE", archive.port)]
    try:
        with daemon(tmp_path / "site", cluster.new_database(), free_port(), peer) as running:
            assert set(store(running.port, images[:4])) == {0}
            wait_until(
                lambda: any(row["state"] == "analyzed" for row in running.studies()),
                60,
                "a first study is analyzed",
            )
            cluster.halt()
            running.database.engine.dispose()
            assert store(running.port, images[4:5]) == [0xA700]
            pids = set(running.processes())
            cluster.start()
            assert set(store(running.port, images[4:])) == {0}
            check_analyzed_once(running, {ds.StudyInstanceUID for ds in images})
            assert set(running.processes()) >= pids  # no role had to be started again
        sent = [file.name for file in archive.files()]
        assert len(sent) == len(set(sent))
    finally:
        archive.close()
        cluster.stop()


def test_sqlite_that_somebody_else_has_locked_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "dicomai.db"
    first, second = make.chest_radiograph(1), make.chest_radiograph(2)
    with daemon(tmp_path / "site", f"sqlite:///{file}", free_port()) as running:
        other = sqlite3.connect(file, isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        assert store(running.port, [first]) == [0xA700]  # after BUSY_SECONDS
        other.execute("ROLLBACK")
        other.close()
        assert store(running.port, [first, second]) == [0, 0]
        check_analyzed_once(running, {first.StudyInstanceUID, second.StudyInstanceUID})


# The clock


@pytest.fixture
def bench(database: Database) -> Bench:
    """Each kind of database, with a clock that the test sets."""
    return new_bench(database)


@pytest.mark.parametrize("hours", [1, 24 * 365])
def test_a_clock_that_is_set_back_holds_nothing_up(bench: Bench, hours: int) -> None:
    watch = ClockWatch(Settings(), bench.database)
    watch.look()
    bench.arrive(1)
    bench.analyze()  # deliveries are due
    bench.arrive(1, study="1.2.4")
    dead = bench.claim_due()  # a worker that will die
    bench.clock.wait(-3600 * hours)
    assert bench.claim_deliveries() == []
    watch.look()
    bench.clock.wait(60)
    assert len(bench.claim_deliveries()) == 2
    again = bench.claim()
    assert again is not None
    assert again.study == dead.study
    with pytest.raises(LeaseLost):
        bench.complete(dead)
    bench.complete(again)
    assert bench.study("1.2.4").state == "analyzed"


def test_a_clock_that_was_set_back_while_nothing_ran_holds_nothing_up(bench: Bench) -> None:
    bench.arrive()
    bench.clock.wait(-3600)
    ClockWatch(Settings(), bench.database).look()
    bench.clock.wait(60)
    assert bench.claim() is not None


def test_a_clock_that_is_set_forward_costs_work_done_twice_and_nothing_else(bench: Bench) -> None:
    bench.arrive()
    slow = bench.claim_due()
    bench.clock.wait(3600)
    quick = bench.claim()
    assert quick is not None
    bench.complete(quick)
    with pytest.raises(LeaseLost):
        bench.complete(slow)
    assert bench.study().analyzed_revision == 1


def test_a_clock_that_goes_on_evenly_shortens_no_wait(bench: Bench) -> None:
    watch = ClockWatch(Settings(), bench.database)
    bench.arrive()
    watch.look()
    watch.look()
    assert bench.seconds_until_due() == QUIET


# A second daemon


def test_two_daemons_on_one_postgres_each_do_their_own_studies(
    tmp_path: Path, postgres: Postgres
) -> None:
    url = postgres.new_database()
    archive = Archive(tmp_path / "archive")
    peer = [("archive", "ARCHIVE", archive.port)]
    mine = [make.chest_radiograph(n) for n in range(3)]
    yours = [make.chest_radiograph(n) for n in range(3)]
    try:
        with (
            daemon(tmp_path / "one", url, free_port(), peer) as one,
            daemon(tmp_path / "two", url, free_port(), peer) as two,
        ):
            assert set(store(one.port, mine)) == {0}
            assert set(store(two.port, yours)) == {0}
            late = make.chest_radiograph(4, mine[0].StudyInstanceUID, 2)
            assert store(two.port, [late]) == [0xA700]
            assert set(store(two.port, mine)) == {0}  # the very same, which is safe already
            check_analyzed_once(one, {ds.StudyInstanceUID for ds in (*mine, *yours)})
            for site, studies in ((one, mine), (two, yours)):
                for folder in ("inbox", "results"):
                    there = {
                        p.name
                        for p in (site.folder / "data" / folder).iterdir()
                        if any(p.iterdir())
                    }
                    assert there == {ds.StudyInstanceUID for ds in studies}, folder
            made = [
                row["sop_instance_uid"]
                for ds in (*mine, *yours)
                for row in queries.results(one.database, ds.StudyInstanceUID)
            ]
        assert len(archive.files()) == len(made) == len(set(made))
    finally:
        archive.close()


def test_a_second_daemon_in_a_folder_is_refused_and_so_is_another_database(tmp_path: Path) -> None:
    with daemon(tmp_path, f"sqlite:///{tmp_path}/one.db", free_port()) as running:
        second = command(running.config, "run")
        assert second.returncode == 1
        assert "another 'dicomai run' works in" in second.stderr
        assert second.stderr.count("\n") == 1
        storescu(running.port, make.save(tmp_path / "sent", [make.chest_radiograph()]))
        running.wait_idle(1)
        kept = sorted((running.folder / "data").rglob("*.dcm"))
    running.config.write_text(running.config.read_text().replace("one.db", "two.db"))
    command(running.config, "db", "upgrade")
    for role in ("run", "schedule"):
        refused = command(running.config, role)
        assert refused.returncode == 1, role
        assert "belongs to another database" in refused.stderr
    assert sorted((running.folder / "data").rglob("*.dcm")) == kept


# Memory


OUT_OF_MEMORY = """
import resource, sys
import numpy as np
from pathlib import Path
from dicomai.errors import OutOfMemory
from dicomai.infer import package
from dicomai.infer.batcher import Batcher
from dicomai.infer.engine import Engine
model = package.read(Path(sys.argv[1]))
engine = Engine(model, "cpu")
images = np.random.default_rng(1).random((64, model.channels, 224, 224), "f4")
tried = []
def score(part):
    tried.append(len(part))
    return engine.score(part)
whole = engine.score(images[:8])
pages = int(Path("/proc/self/statm").read_text().split()[0])
def leave(megabytes):
    resource.setrlimit(resource.RLIMIT_AS, (pages * 4096 + megabytes * 2**20, -1))
batcher = Batcher(score, 64)
batcher.predict(images[:8])  # its threads are there
tried.clear()
leave(400)
probabilities, maps = batcher.predict(images)
assert np.abs(probabilities[:8] - whole[0]).max() < 1e-5
assert tried[0] == 64 and min(tried) < 64, tried
huge = np.zeros((1, model.channels, 2048, 2048), "f4")
leave(0)
try:
    batcher.predict(huge)
except OutOfMemory as error:
    print(tried, error)
"""


def test_a_batch_that_does_not_fit_into_memory_is_halved_until_it_does() -> None:
    done = subprocess.run(
        [sys.executable, "-c", OUT_OF_MEMORY, str(make.STARTER)],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[1],
    )
    assert done.returncode == 0, done.stderr
    assert "out of memory on cpu with 1 images at once" in done.stdout


def vast_model(models: Path) -> None:
    """The starter, to which every image is shown 21 times as large."""
    folder = models / "vast" / "1"
    shutil.copytree(make.STARTER, folder)
    described = folder / "model.toml"
    words = described.read_text().replace("chest-starter", "vast", 1)
    assert "size = 224" in words
    described.write_text(words.replace("size = 224", "size = 1024"))


def test_a_study_for_which_there_is_no_memory_fails_with_its_reason(tmp_path: Path) -> None:
    vast_model(tmp_path / "data/models")
    settings = '[infer]\nmodel = "vast"\n'
    url = f"sqlite:///{tmp_path}/dicomai.db"
    with daemon(tmp_path, url, free_port(), more=settings) as running:
        first, second = (make.chest_radiograph(number) for number in (1, 2))
        storescu(running.port, make.save(tmp_path / "first", [first]))
        running.wait_idle(1)  # all its threads are there
        (scoring,) = (pid for pid in running.processes() if "infer" in arguments(pid))
        pages = int(Path(f"/proc/{scoring}/statm").read_text().split()[0])
        hard = resource.RLIM_INFINITY
        resource.prlimit(scoring, resource.RLIMIT_AS, (pages * 4096 + (40 << 20), hard))
        storescu(running.port, make.save(tmp_path / "second", [second]))
        states = {row["study_instance_uid"]: row for row in running.wait_idle(2)}
        row = states[second.StudyInstanceUID]
        assert row["state"] == "failed"
        assert row["reason"] == "the analysis failed: out of memory on cpu with 1 images at once"
        resource.prlimit(scoring, resource.RLIMIT_AS, (hard, hard))
        again = command(running.config, "study", "retry", row["study_instance_uid"])
        assert again.returncode == 0, again.stderr
        assert {row["state"] for row in running.wait_idle(2)} == {"analyzed"}
        assert scoring in running.processes()


def arguments(pid: int) -> list[str]:
    """A process's command line."""
    return Path(f"/proc/{pid}/cmdline").read_text().split("\0")
