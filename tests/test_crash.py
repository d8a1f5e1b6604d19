"""DESIGN.md's table of crashes: each process is killed exactly there, and nothing is lost.

killed.py has the points. What is killed is a role as the daemon runs it; what goes on afterwards
is the same role, unarmed.
"""

import os
import signal
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import killed
import make
import pytest
from daemon import DESTINATION, SETTINGS
from killed import Deed
from peers import Orthanc, free_port, need, wait_until
from pydicom.dataset import Dataset
from pydicom.uid import generate_uid
from sqlalchemy import select, text, update

from dicomai import roles, settings, upkeep
from dicomai.deliver import sender
from dicomai.errors import DicomaiError
from dicomai.receive import inbox
from dicomai.settings import shipped
from dicomai.store import queries
from dicomai.store.database import Database, open_database, require_current, upgrade
from dicomai.store.tables import analysis, delivery, instance, study, task

LEASE_SECONDS = 3.0
# What has nothing to do with the kind of database is tried on one.
sqlite = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)


def points(first: str, *others: str) -> pytest.MarkDecorator:
    """The first on both databases, the others on SQLite."""
    pairs = [("sqlite", first), ("postgres", first), *(("sqlite", other) for other in others)]
    return pytest.mark.parametrize(("database_url", "point"), pairs, indirect=["database_url"])


OLD = 3600.0  # seconds: more than a file may wait for its row


class Site:
    """A settings file, its database and its folder; roles are started one by one."""

    def __init__(self, folder: Path, url: str, pacs: Orthanc | None = None) -> None:
        self.folder, self.data, self.port = folder, folder / "data", free_port()
        self.config, self.log = folder / "dicomai.toml", folder / "log"
        destination = DESTINATION.format(
            name="pacs",
            ae_title="ORTHANC",
            port=pacs.dicom if pacs else free_port(),
            outputs=["sc", "sr"],
        )
        values = {"data_dir": self.data, "url": url, "port": self.port, "quiet": 0}
        self.config.write_text(
            SETTINGS.format(**values, release_quiet=0, destinations=destination)
            + f"[infer]\nlease_seconds = {LEASE_SECONDS}\nworkers = 1\n"
        )
        self._going_on: list[Any] = []
        self.database = open_database(url)
        upgrade(self.database, shipped("migrations"))

    @contextmanager
    def role(self, name: str) -> Iterator[None]:
        """A role at work."""
        process = self._start(name, None)
        try:
            yield
        finally:
            process.terminate()
            process.join(15)

    @contextmanager
    def killed(self, role: str, point: str) -> Iterator[None]:
        """A role that dies at a point before this ends."""
        process = self._start(role, point)
        try:
            yield
            process.join(60)
            assert process.exitcode == -signal.SIGKILL, self.log.read_text()
        finally:
            process.kill()
            process.join()

    @contextmanager
    def paused(self, role: str, point: str) -> Iterator[None]:
        """A role whose thread waits at a point, and goes on when this ends."""
        gate = self.folder / "gate"
        self._going_on.append(self._start(role, point, gate))
        try:
            wait_until(killed.reached(gate).exists, 60, point)
            yield
        finally:
            gate.touch()

    def stop(self) -> None:
        """End what goes on."""
        for process in self._going_on:
            process.terminate()
            process.join(15)

    def _start(self, role: str, point: str | None, deed: Deed = signal.SIGKILL) -> Any:
        process = killed.start(role, point, ["--config", str(self.config)], self.log, deed)
        if role == "listen":
            wait_until(lambda: self._answers(process), 60, "the listener answers")
        return process

    def _answers(self, process: Any) -> bool:
        assert process.is_alive(), self.log.read_text()
        try:
            sender.echo("127.0.0.1", self.port, "DICOMAI", "TEST", 5)
        except DicomaiError:
            return False
        return True

    def send(self, *datasets: Dataset) -> bool:
        """Send as a modality (DCMTK) does; whether every object got Success."""
        need("/usr/bin/storescu")
        files = make.save(self.folder / "sent" / generate_uid(), datasets)
        done = subprocess.run(
            ["/usr/bin/storescu", "-v", "-R", "-aec", "DICOMAI", "127.0.0.1", str(self.port)]
            + [str(file) for file in files],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "TCP_NODELAY": "1"},
        )
        answers = (done.stdout + done.stderr).count("Received Store Response (Success)")
        assert (answers == len(files)) == (done.returncode == 0)
        return answers == len(files)

    def receive(self, *datasets: Dataset) -> None:
        """Nothing goes wrong."""
        with self.role("listen"):
            assert self.send(*datasets)

    def infer(self, study_instance_uid: str, revision: int) -> dict[str, Any]:
        """The scoring role runs until a revision is analyzed; returns the study's row."""
        with self.role("infer"):
            return wait_until(
                lambda: self.study(study_instance_uid, analyzed_revision=revision), 60, "analyzed"
            )

    def study(self, uid: str, **wanted: Any) -> dict[str, Any] | None:
        """A study's row, if it is so."""
        row = self.row(study, uid)
        return row if row and all(row[key] == value for key, value in wanted.items()) else None

    def row(self, table: Any, study_instance_uid: str) -> dict[str, Any] | None:
        """The row of a study."""
        found = self.rows(table, study_instance_uid)
        assert len(found) <= 1
        return found[0] if found else None

    def rows(self, table: Any, study_instance_uid: str | None = None) -> list[dict[str, Any]]:
        """Rows of a table, of one study or of all."""
        statement = select(table)
        if study_instance_uid is not None:
            statement = statement.where(table.c.study_instance_uid == study_instance_uid)
        with self.database.read() as connection:
            return [dict(row) for row in connection.execute(statement).mappings()]

    def files(self, name: str) -> dict[str, bytes]:
        """Path below the data folder -> bytes, of inbox or results."""
        return {
            str(file.relative_to(self.data)): file.read_bytes()
            for file in sorted((self.data / name).rglob("*"))
            if file.is_file()
        }

    def age(self) -> None:
        """Time passes: what has no row now was not on its way to one."""
        for name in ("inbox", "results"):
            for file in (self.data / name).rglob("*"):
                moment = file.stat().st_mtime - OLD
                os.utime(file, (moment, moment))

    def sweep(self) -> str:
        """Time passes, and the role that sweeps does it; returns what it says."""
        self.age()
        with self.role("schedule"):
            return str(wait_until(self._swept, 30, "a sweep"))

    def _swept(self) -> str | None:
        (row,) = self.rows(task) or [{"state": "due"}]
        assert row["state"] != "failed", row
        return row["detail"] if row["state"] == "done" else None


def condition(pid: int) -> str:
    """What a process does: R, S, T (stopped), Z; empty when there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return ""


@pytest.fixture
def site(tmp_path: Path, database_url: str) -> Iterator[Site]:
    """A site with either database and a destination that is away."""
    made = Site(tmp_path, database_url)
    yield made
    made.stop()
    made.database.engine.dispose()


# While the daemon starts


def test_a_role_ends_with_a_parent_that_is_killed_before_it_could_ask_for_that(
    tmp_path: Path,
) -> None:
    site = Site(tmp_path, f"sqlite:///{tmp_path}/dicomai.db")
    arguments = ["--config", str(site.config)]
    parent = killed.start("run", "a role is forked", arguments, site.log, signal.SIGSTOP)
    children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children")
    child = 0
    try:
        forked = wait_until(lambda: parent.is_alive() and children.read_text(), 60, "a role")
        child = int(forked)
        wait_until(lambda: condition(child) == "T", 60, "it stops")
        parent.kill()
        parent.join()
        os.kill(child, signal.SIGCONT)
        wait_until(lambda: condition(child) in {"", "Z"}, 10, "it has ended")
    finally:
        parent.kill()
        parent.join()
        if child and condition(child) not in {"", "Z"}:
            os.kill(child, signal.SIGKILL)
    site.database.engine.dispose()


@pytest.mark.parametrize("role", ["listen", "infer", "deliver"])
def test_a_role_ends_whichever_of_its_threads_takes_the_signal(tmp_path: Path, role: str) -> None:
    # The kernel wakes the main thread, but one that is just starting another may be faster.
    site = Site(tmp_path, f"sqlite:///{tmp_path}/dicomai.db")
    site.log.touch()
    process = killed.start(role, None, ["--config", str(site.config)], site.log)
    said = {"listen": "listening", "infer": "scoring", "deliver": "delivering"}
    words = f'"event": "{said[role]}"'
    try:
        wait_until(lambda: words in site.log.read_text(), 60, words)
        threads = [int(task.name) for task in Path(f"/proc/{process.pid}/task").iterdir()]
        os.kill(max(threads), signal.SIGTERM)  # that thread takes it
        process.join(12)
        assert not process.is_alive()
    finally:
        process.terminate()
        process.join(15)
    site.database.engine.dispose()


# While an object is received


@points("an object's file is written", "an object's file is begun")
def test_a_listener_killed_while_it_writes_has_acknowledged_nothing_and_leaves_only_a_part(
    site: Site, point: str
) -> None:
    ds = make.chest_radiograph()
    with site.role("listen"):
        pass  # once, for it also writes whose folder this is
    (site.data / "inbox").mkdir()
    with site.killed("listen", point):
        assert not site.send(ds)
    ((name, data),) = site.files("inbox").items()
    assert Path(name).suffix == ".part"
    assert (data == b"") == (point == "an object's file is begun")
    assert site.rows(study) == []

    site.receive(ds)  # the sender still has it
    assert site.sweep() == "0 adopted, 1 removed"
    (row,) = site.rows(instance)
    assert list(site.files("inbox")) == [row["path"]]
    assert row["digest"] == inbox.read_back(site.data / row["path"])[1].digest


def test_what_was_written_and_not_committed_is_sent_again_and_kept_once(site: Site) -> None:
    ds = make.chest_radiograph()
    with site.killed("listen", "an object is on disk"):
        assert not site.send(ds)
    assert len(site.files("inbox")) == 1
    assert site.rows(instance) == []

    site.receive(ds)
    assert site.sweep() == "0 adopted, 0 removed"
    (row,) = site.rows(instance)
    assert list(site.files("inbox")) == [row["path"]]
    assert site.study(ds.StudyInstanceUID, state="receiving", revision=1)


def test_what_nobody_sends_again_is_adopted_if_it_is_whole_and_removed_if_it_is_not(
    site: Site,
) -> None:
    whole, broken = make.chest_radiograph(0), make.chest_radiograph(1)
    for ds in (whole, broken):
        with site.killed("listen", "an object is on disk"):
            assert not site.send(ds)
    (file,) = (site.data / "inbox" / broken.StudyInstanceUID).iterdir()
    os.truncate(file, file.stat().st_size - 9)

    assert site.sweep() == "1 adopted, 1 removed"
    (row,) = site.rows(instance)
    assert row["sop_instance_uid"] == whole.SOPInstanceUID
    assert list(site.files("inbox")) == [row["path"]]
    assert site.study(whole.StudyInstanceUID, state="receiving", revision=1)["due_at"]
    assert site.study(broken.StudyInstanceUID) is None


def test_what_was_committed_is_sent_again_because_nobody_said_so_and_changes_nothing(
    site: Site,
) -> None:
    ds = make.chest_radiograph()
    with site.killed("listen", "an object is committed"):
        assert not site.send(ds)
    before = site.rows(instance)
    site.infer(ds.StudyInstanceUID, 1)

    site.receive(ds)
    assert site.rows(instance) == before
    assert site.study(ds.StudyInstanceUID, state="analyzed", revision=1)

    other = make.chest_radiograph(1, ds.StudyInstanceUID, SOPInstanceUID=ds.SOPInstanceUID)
    site.receive(other)
    assert site.study(ds.StudyInstanceUID, state="receiving", revision=2)
    site.infer(ds.StudyInstanceUID, 2)
    (row,) = site.rows(instance)
    assert row["digest"] != before[0]["digest"]
    assert list(site.files("inbox")) == [row["path"]]


def test_a_replacement_that_was_committed_is_not_undone_by_the_file_that_it_replaced(
    site: Site,
) -> None:
    old = make.chest_radiograph(0)
    new = make.chest_radiograph(1, old.StudyInstanceUID, SOPInstanceUID=old.SOPInstanceUID)
    site.receive(old)
    (first,) = site.rows(instance)
    with site.killed("listen", "an object is committed"):
        assert not site.send(new)
    (second,) = site.rows(instance)
    assert second["digest"] != first["digest"]
    assert {first["path"], second["path"]} == set(site.files("inbox"))

    assert site.sweep() == "0 adopted, 1 removed"
    assert site.rows(instance) == [second]
    assert list(site.files("inbox")) == [second["path"]]


# While a study is analyzed


@points("a study is scored", "a study is claimed")
def test_a_study_whose_worker_was_killed_is_analyzed_once_when_the_lease_has_run_out(
    site: Site, point: str
) -> None:
    ds = make.chest_radiograph()
    site.receive(ds)
    with site.killed("infer", point):
        pass
    left = site.study(ds.StudyInstanceUID, state="analyzing", revision=1, attempts=1)
    assert left and left["lease"] and left["due_at"]
    assert site.rows(analysis) == []

    row = site.infer(ds.StudyInstanceUID, 1)
    assert (row["state"], row["revision"], row["lease"], row["due_at"]) == (
        "analyzed", 1, None, None,
    )  # fmt: skip
    assert len(site.rows(analysis)) == 1
    trail = queries.events(site.database, "study", ds.StudyInstanceUID)
    assert [e["detail"] for e in trail if e["to_state"] == "analyzing"] == [
        "attempt 1", "attempt 2",
    ]  # fmt: skip
    claims = [e["at"] for e in trail if e["to_state"] == "analyzing"]
    assert (claims[1] - claims[0]).total_seconds() >= LEASE_SECONDS


@points("all results are on disk", "a result's file is begun")
def test_results_that_were_written_and_not_committed_are_nobodys_and_are_swept(
    site: Site, point: str
) -> None:
    uid = generate_uid()
    first, late = make.chest_radiograph(0, uid, 1), make.chest_radiograph(1, uid, 2)
    site.receive(first)
    with site.killed("infer", point):
        pass
    left = site.files("results")
    assert left
    assert queries.results(site.database, uid) == site.rows(delivery) == []

    site.receive(late)  # now they are not even made again
    row = site.infer(uid, 2)
    assert row["state"] == "analyzed"
    made = {r["path"] for r in queries.results(site.database, uid)}
    orphans = set(left) - made
    assert orphans
    assert site.sweep() == f"0 adopted, {len(orphans)} removed"
    assert set(site.files("results")) == made


def test_what_was_sent_before_is_the_same_byte_for_byte_whoever_dies_over_making_it_again(
    site: Site,
) -> None:
    uid = generate_uid()
    images = [make.chest_radiograph(number, uid, number + 1) for number in range(2)]
    site.receive(images[0])
    site.infer(uid, 1)
    before = site.files("results")
    site.receive(images[1])
    with site.killed("infer", "all results are on disk"):
        pass
    left = site.files("results")
    assert left.keys() > before.keys()
    assert {name: left[name] for name in before} == before

    site.infer(uid, 2)
    after = site.files("results")
    assert after.keys() > before.keys()
    assert {name: after[name] for name in before} == before


@sqlite
def test_a_worker_that_wakes_up_after_another_has_done_its_work_changes_nothing(
    site: Site,
) -> None:
    ds = make.chest_radiograph()
    site.receive(ds)
    with site.paused("infer", "a study is scored"), site.role("infer"):
        wait_until(lambda: analyzed_by_another(site, ds), 60, "another has analyzed it")
        committed = site.files("results")
    wait_until(lambda: '"lease_lost"' in site.log.read_text(), 60, "it has lost its lease")
    assert len(site.rows(analysis)) == 1
    made = {row["path"] for row in queries.results(site.database, ds.StudyInstanceUID)}
    assert {name: site.files("results")[name] for name in made} == committed


def analyzed_by_another(site: Site, ds: Dataset) -> bool:
    """Whether it is; until then the first worker, as if it slept, has not renewed its lease."""
    if site.study(ds.StudyInstanceUID, state="analyzed"):
        return True
    with site.database.write() as connection:
        connection.execute(
            update(study)
            .where(study.c.state == "analyzing", study.c.attempts == 1)
            .values(due_at=site.database.now(connection))
        )
    return False


@sqlite
def test_an_analysis_that_was_committed_is_not_made_again(site: Site) -> None:
    ds = make.chest_radiograph()
    site.receive(ds)
    with site.killed("infer", "a study is committed"):
        pass
    assert site.study(ds.StudyInstanceUID, state="analyzed", analyzed_revision=1)
    made = site.files("results")
    with site.role("infer"):
        other = make.chest_radiograph(1)
        site.receive(other)
        wait_until(lambda: site.study(other.StudyInstanceUID, state="analyzed"), 60, "the next")
    assert len(site.rows(analysis, ds.StudyInstanceUID)) == 1
    assert made.items() <= site.files("results").items()


# While a result is sent


def test_a_result_that_the_pacs_has_and_nobody_noted_is_sent_again_and_held_once(
    tmp_path: Path, database_url: str
) -> None:
    pacs = Orthanc(tmp_path / "orthanc", free_port())
    site = Site(tmp_path, database_url, pacs)
    ds = make.chest_radiograph()
    try:
        site.receive(ds)
        site.infer(ds.StudyInstanceUID, 1)
        with site.killed("deliver", "a result is in the PACS"):
            pass
        (held,) = pacs.sop_instance_uids(ds.StudyInstanceUID)
        (tried,) = [row for row in site.rows(delivery) if row["sop_instance_uid"] == held]
        assert (tried["state"], tried["tried"], tried["attempts"]) == ("sending", True, 1)
        stored = bytes_of(pacs, ds.StudyInstanceUID)

        run_out(site.database)
        with site.role("deliver"):
            wait_until(lambda: queries.is_idle(site.database), 60, "all is delivered")
        made = [
            row["sop_instance_uid"] for row in queries.results(site.database, ds.StudyInstanceUID)
        ]
        assert sorted(pacs.sop_instance_uids(ds.StudyInstanceUID)) == sorted(made)
        assert pacs.get("/statistics")["CountInstances"] == len(made)
        assert bytes_of(pacs, ds.StudyInstanceUID)[held] == stored[held]
        again = {row["sop_instance_uid"]: row for row in site.rows(delivery)}
        assert {row["state"] for row in again.values()} == {"delivered"}
        assert again[held]["attempts"] == 2
    finally:
        site.database.engine.dispose()
        pacs.stop()


def bytes_of(pacs: Orthanc, study_instance_uid: str) -> dict[str, bytes]:
    """SOP Instance UID -> the file that a PACS holds."""
    return {
        item["MainDicomTags"]["SOPInstanceUID"]: pacs.get_bytes(f"/instances/{item['ID']}/file")
        for item in pacs.instances(study_instance_uid)
    }


def run_out(database: Database) -> None:
    """The leases of what is being sent: half a minute and more that nobody has to wait here."""
    with database.write() as connection:
        connection.execute(
            update(delivery)
            .where(delivery.c.state == "sending")
            .values(due_at=database.now(connection))
        )


# While files are removed


def sweep_meanwhile(
    site: Site, monkeypatch: pytest.MonkeyPatch, folder: str, happens: Callable[[], None]
) -> None:
    """Something happens after the sweep has asked which files have a row, before it removes any."""
    known_paths, happened = queries.known_paths, list[str]()

    def known_then(database: Database, names: Sequence[str]) -> set[str]:
        found = known_paths(database, names)
        if names[0].startswith(folder) and not happened:
            happened.append(folder)
            happens()
        return found

    monkeypatch.setattr(queries, "known_paths", known_then)
    loaded = settings.load(site.config)
    database = roles.join(loaded)
    upkeep.sweep(loaded, database)
    database.engine.dispose()
    assert happened


@sqlite
def test_a_sweep_does_not_remove_what_is_sent_again_and_acknowledged_at_that_moment(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    ds = make.chest_radiograph()
    with site.killed("listen", "an object is on disk"):
        assert not site.send(ds)
    site.age()
    sweep_meanwhile(site, monkeypatch, "inbox", lambda: site.receive(ds))
    (row,) = site.rows(instance)
    assert list(site.files("inbox")) == [row["path"]]


@sqlite
def test_a_sweep_does_not_remove_results_that_are_made_again_at_that_moment(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    ds = make.chest_radiograph()
    site.receive(ds)
    with site.killed("infer", "all results are on disk"):
        pass
    site.age()
    with ExitStack() as stack:
        going_on = site.paused("infer", "all results are on disk")
        sweep_meanwhile(site, monkeypatch, "results", lambda: stack.enter_context(going_on))
    wait_until(lambda: site.study(ds.StudyInstanceUID, state="analyzed"), 60, "analyzed")
    made = {row["path"] for row in queries.results(site.database, ds.StudyInstanceUID)}
    assert made
    assert made <= site.files("results").keys()


@sqlite
def test_a_sweep_leaves_the_results_of_an_analysis_that_takes_long(site: Site) -> None:
    ds = make.chest_radiograph()
    site.receive(ds)
    with site.paused("infer", "all results are on disk"):
        assert site.sweep() == "0 adopted, 0 removed"
    wait_until(lambda: site.study(ds.StudyInstanceUID, state="analyzed"), 60, "analyzed")
    made = {row["path"] for row in queries.results(site.database, ds.StudyInstanceUID)}
    assert made
    assert made <= site.files("results").keys()


def test_a_purge_that_is_killed_does_not_come_back(site: Site) -> None:
    ds = make.chest_radiograph()
    site.receive(ds)
    uid = ds.StudyInstanceUID
    arguments = ["--study", uid, "--yes", "--config", str(site.config)]
    process = killed.start("purge", "a study is purged", arguments, site.log)
    process.join(30)
    assert process.exitcode == -signal.SIGKILL, site.log.read_text()
    site.sweep()
    assert site.study(uid) is None
    assert site.files("inbox") == {}


# While the schema is brought to a new version


def test_an_upgrade_that_is_killed_is_done_again_and_what_was_there_is_there(
    tmp_path: Path, database_url: str
) -> None:
    config = tmp_path / "dicomai.toml"
    config.write_text(f'data_dir = "{tmp_path}/data"\n[database]\nurl = "{database_url}"\n')
    before = old_rows(database_url)
    arguments = ["upgrade", "--config", str(config)]
    for point, code in (("a table of the new schema is made", -signal.SIGKILL), (None, 0)):
        process = killed.start("db", point, arguments, tmp_path / "log")
        process.join(60)
        assert process.exitcode == code, (tmp_path / "log").read_text()
    database = open_database(database_url)
    require_current(database, shipped("migrations"))
    with database.read() as connection:
        for table, row in before.items():
            now = connection.execute(text(f"SELECT * FROM {table}")).mappings().one()
            assert {key: now[key] for key in row} == row
    database.engine.dispose()


def old_rows(url: str) -> dict[str, dict[str, Any]]:
    """A study that was analyzed and delivered under schema 0002: table -> its row."""
    database, then = open_database(url), "2026-01-01 00:00:00.000000"
    upgrade(database, shipped("migrations"), "0002")
    rows: dict[str, dict[str, Any]] = {
        "study": {"study_instance_uid": "1.2", "state": "analyzed", "revision": 1, "attempts": 0,
                  "analyzed_revision": 1},
        "instance": {"study_instance_uid": "1.2", "sop_instance_uid": "1.2.1", "path": "a",
                     "series_instance_uid": "1", "sop_class_uid": "1", "digest": "d", "size": 1,
                     "transfer_syntax_uid": "1", "analyzable": True, "calling_ae_title": "A"},
        "analysis": {"id": 1, "study_instance_uid": "1.2", "revision": 1, "model_name": "m",
                     "model_version": "1"},
        "result": {"sop_instance_uid": "1.3", "study_instance_uid": "1.2", "analysis_id": 1,
                   "series_instance_uid": "1", "sop_class_uid": "1", "kind": "sr", "path": "b"},
        "delivery": {"id": 1, "sop_instance_uid": "1.3", "destination": "pacs", "attempts": 1,
                     "state": "delivered", "tried": True},
    }  # fmt: skip
    moments = {
        "study": ("received_at", "last_received_at"), "instance": ("received_at",),
        "analysis": ("completed_at",), "result": ("created_at",), "delivery": ("created_at",),
    }  # fmt: skip
    with database.write() as connection:
        for table, row in rows.items():
            values = row | dict.fromkeys(moments[table], then)
            names, places = ", ".join(values), ", ".join(f":{name}" for name in values)
            connection.execute(text(f"INSERT INTO {table} ({names}) VALUES ({places})"), values)
    database.engine.dispose()
    return rows
