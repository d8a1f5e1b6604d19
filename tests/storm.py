"""The kill storm: whoever is killed, and when, nothing that was acknowledged is lost or told twice.

`make storm` sends 2,000 images in 400 studies from five senders to a daemon with Orthanc as its
destination while 200 processes are killed (SIGKILL), chosen at random: the daemon's parent, which
is started again, and its roles and decoding processes, which the daemon starts again by itself.
Then everything is counted. test_storm.py runs a short one.
"""

import argparse
import hashlib
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from io import BytesIO
from pathlib import Path
from typing import Any

import make
import numpy as np
import pydicom
from daemon import DESTINATION, SETTINGS, Daemon, command
from peers import Orthanc, Postgres, free_port
from pydicom.dataset import Dataset
from pydicom.uid import ComputedRadiographyImageStorage, ExplicitVRLittleEndian, generate_uid
from pynetdicom import AE, _config, evt
from pynetdicom.association import Association
from sqlalchemy import func, select

from dicomai.demo.radiographs import set_pixels
from dicomai.store import queries, queue
from dicomai.store.database import Database, open_database
from dicomai.store.tables import analysis, delivery, finding, instance, result, study, task

SEED = 20261121
SENDERS = 5
KILLS, STUDIES, IMAGES = 200, 400, 2000
MEAN_SECONDS = 3.5  # between two kills
LATE = 4  # of every so many studies, one has an image that comes late
ROLES = ("run", "listen", "infer", "decode", "deliver", "schedule")
MORE = """
[infer]
lease_seconds = 10.0
[schedule]
sweep = "* * * * *"
"""
BACKLOG, RESPITE_SECONDS = 20, 30.0  # studies that may wait before the killer does
PATIENCE_SECONDS = 180.0
OLD = 3600.0  # seconds: more than a file may wait for its row


# What is sent


@dataclass(frozen=True)
class Image:
    """One file to be sent. content: SHA-256 of its transfer syntax and dataset."""

    sop_instance_uid: str
    study_instance_uid: str
    path: Path
    content: str


def images(folder: Path, studies: int, count: int, seed: int) -> list[list[Image]]:
    """Studies of small radiographs, no two alike."""
    chance = random.Random(seed)
    noise = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    made = []
    for number in range(studies):
        members = count // studies + (number < count % studies)
        uid = generate_uid(entropy_srcs=[str(seed), str(number)])
        made.append([image(folder, uid, number, n, chance, noise) for n in range(members)])
    return made


def image(
    folder: Path, study: str, patient: int, number: int, chance: random.Random, noise: Any
) -> Image:
    """A part of a real radiograph, with noise on it, as a CR image."""
    ds = make.computed_radiograph(chance.randrange(10), study)
    ds.PatientID, ds.InstanceNumber = f"STORM{patient:05}", number + 1
    ds.SeriesInstanceUID = generate_uid(entropy_srcs=["series", study])
    ds.SOPInstanceUID = generate_uid(entropy_srcs=["image", study, str(number)])
    ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID
    rows, columns = chance.randrange(100, 256), chance.randrange(100, 256)
    whole = np.frombuffer(ds.PixelData, np.uint8).reshape(ds.Rows, ds.Columns)
    part = whole[:: ds.Rows // rows, :: ds.Columns // columns][:rows, :columns].astype(int)
    set_pixels(ds, np.clip(part + noise.integers(-20, 20, part.shape), 0, 255).astype(np.uint8), 8)
    file = folder / f"{ds.SOPInstanceUID}.dcm"
    ds.save_as(file, enforce_file_format=True)
    content = hashlib.sha256(f"{ExplicitVRLittleEndian}\n".encode() + dataset_of(file.read_bytes()))
    return Image(ds.SOPInstanceUID, study, file, content.hexdigest())


def dataset_of(data: bytes) -> bytes:
    """What follows the file meta information (PS3.10 7.1)."""
    length = int.from_bytes(data[140:144], "little")
    return data[144 + length :]


# The daemon, and those who kill it


class Keeper:
    """Starts `dicomai run`, and again whenever it has ended, as systemd would."""

    def __init__(self, config: Path, log: Path) -> None:
        self.process: subprocess.Popen[bytes] | None = None
        self.starts = 0
        self._config, self._log = config, log
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._keep)

    def __enter__(self) -> "Keeper":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _keep(self) -> None:
        while not self._stop.is_set():
            with self._log.open("ab") as log:
                self.process = subprocess.Popen(
                    [sys.executable, "-m", "dicomai", "run", "--config", str(self._config)],
                    stdout=log,
                    stderr=log,
                )
            self.starts += 1
            while self.process.poll() is None and not self._stop.wait(0.1):
                pass
            # The roles of one that was killed hold port and folder for a moment.
            self._stop.wait(0.5)
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            self.process.wait(20)

    def processes(self) -> dict[str, list[int]]:
        """Role -> its process ids now; "decode": the decoding processes."""
        found: dict[str, list[int]] = {role: [] for role in ROLES}
        if self.process is None or self.process.poll() is not None:
            return found
        found["run"].append(self.process.pid)
        for pid in children(self.process.pid):
            role = next((r for r in ROLES if f"\0{r}\0" in command_line(pid)), None)
            if role is not None:
                found[role].append(pid)
        found["decode"] = [child for pid in found["infer"] for child in children(pid)]
        return found


def children(pid: int) -> list[int]:
    """Processes that a process has started."""
    found: list[int] = []
    for listed in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):  # a thread that has just ended
            found += map(int, listed.read_text().split())
    return found


def command_line(pid: int) -> str:
    """Its arguments, NUL between them."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""


@dataclass
class Tally:
    """What has happened so far."""

    kills: Counter[str] = field(default_factory=Counter)
    acknowledged: dict[str, Image] = field(default_factory=dict)
    answers: Counter[str] = field(default_factory=Counter)
    resent: int = 0
    faults: list[str] = field(default_factory=list)
    seconds: float = 0.0
    lock: threading.Lock = field(default_factory=threading.Lock)


def kill_at_random(keeper: Keeper, database: Database, tally: Tally, plan: "Plan") -> None:
    """Kill one role after another at random times; each round has an order of its own."""
    chance, waiting = random.Random(plan.seed + 1), list[str]()
    while tally.kills.total() < plan.kills:
        let_it_work(database)
        time.sleep(chance.expovariate(1 / plan.mean_seconds))
        waiting = waiting or chance.sample(ROLES, len(ROLES))
        role, deadline = waiting.pop(), time.monotonic() + 20
        while not (pids := keeper.processes()[role]) and time.monotonic() < deadline:
            time.sleep(0.05)
        if pids:
            with suppress(ProcessLookupError):
                os.kill(chance.choice(pids), signal.SIGKILL)
                tally.kills[role] += 1


def let_it_work(database: Database) -> None:
    """Where much is waiting, some time without kills: on a slow machine nothing would be done."""
    deadline = time.monotonic() + RESPITE_SECONDS
    while unfinished(database) > BACKLOG and time.monotonic() < deadline:
        time.sleep(0.5)


# The senders


class Sender:
    """A modality: sends each image until it gets Success, and some of them again after that."""

    def __init__(self, number: int, port: int, tally: Tally, seed: int) -> None:
        self._ae_title = f"SENDER{number}"
        self._port, self._tally = port, tally
        self._chance = random.Random(seed + 100 + number)

    def deliver(self, batch: Sequence[Image]) -> None:
        """Until all of them are acknowledged."""
        waiting = list(batch)
        while waiting:
            with self._association() as assoc:
                while waiting and assoc is not None and assoc.is_established:
                    if not self._store(assoc, waiting[0]):
                        break
                    item = waiting.pop(0)
                    if self._chance.random() < 0.15:  # a modality that did not believe it
                        self._store(assoc, item, again=True)
            if waiting:
                time.sleep(self._chance.uniform(0.1, 0.6))
        if self._chance.random() < 0.2:  # the whole examination, once more
            with self._association() as assoc:
                for item in batch:
                    if assoc is not None and assoc.is_established:
                        self._store(assoc, item, again=True)

    @contextmanager
    def _association(self) -> Iterator[Association | None]:
        ae = AE(self._ae_title)
        ae.acse_timeout = ae.dimse_timeout = ae.network_timeout = 20
        ae.connection_timeout = 5
        ae.add_requested_context(ComputedRadiographyImageStorage, ExplicitVRLittleEndian)
        handlers = [(evt.EVT_CONN_OPEN, at_once)]
        assoc = ae.associate("127.0.0.1", self._port, ae_title="DICOMAI", evt_handlers=handlers)
        try:
            yield assoc if assoc.is_established else None
        finally:
            if assoc.is_established:
                assoc.release()

    def _store(self, assoc: Association, item: Image, again: bool = False) -> bool:
        try:
            answer = assoc.send_c_store(item.path)
        except (RuntimeError, OSError):
            answer = Dataset()
        status = answer.get("Status")
        with self._tally.lock:
            words = "no answer" if status is None else f"0x{status:04X}"
            self._tally.answers[words] += 1
            self._tally.resent += again
            if status == 0x0000:
                self._tally.acknowledged[item.sop_instance_uid] = item
        return bool(status == 0x0000)


def at_once(event: Any) -> None:
    """No waiting for more bytes (Nagle)."""
    transport = event.assoc.dul.socket
    if transport is not None and transport.socket is not None:
        transport.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def rounds(studies: Sequence[Sequence[Image]], number: int) -> list[Sequence[Image]]:
    """What one sender sends, in order; of some studies the last image comes ten studies later."""
    mine = studies[number::SENDERS]
    listed: list[Sequence[Image]] = []
    late: list[tuple[int, Sequence[Image]]] = []
    for place, members in enumerate(mine):
        listed += [batch for due, batch in late if due == place]
        late = [(due, batch) for due, batch in late if due > place]
        if place % LATE == 0 and len(members) > 1:
            listed.append(members[:-1])
            late.append((place + min(10, len(mine) // 2), members[-1:]))
        else:
            listed.append(members)
    return listed + [batch for _, batch in late]


def send_while_killed(
    port: int, studies: Sequence[Sequence[Image]], tally: Tally, kills: int, seed: int
) -> list[threading.Thread]:
    """Five senders, spread over the whole storm: each has got as far as the kills have."""

    def send(number: int) -> None:
        sender, listed = Sender(number, port, tally, seed), rounds(studies, number)
        for place, batch in enumerate(listed):
            while tally.kills.total() < kills * place / len(listed):
                time.sleep(0.1)
            sender.deliver(batch)

    threads = [
        threading.Thread(target=send, args=(number,), daemon=True) for number in range(SENDERS)
    ]
    for thread in threads:
        thread.start()
    return threads


# What is true afterwards


def everything_is_kept(database: Database, data: Path, tally: Tally) -> list[str]:
    """Each acknowledged image has its row and its bytes."""
    with database.read() as connection:
        rows = {row.sop_instance_uid: row for row in connection.execute(select(instance))}
    faults = []
    for uid, item in tally.acknowledged.items():
        row = rows.get(uid)
        if row is None:
            faults.append(f"lost: {uid} has no row")
        elif row.digest != item.content:
            faults.append(f"lost: {uid} has another digest")
        elif not (data / row.path).is_file():
            faults.append(f"lost: {uid} has no file")
        elif dataset_of((data / row.path).read_bytes()) != dataset_of(item.path.read_bytes()):
            faults.append(f"lost: {uid} has other bytes")
    faults += [f"never acknowledged: {uid}" for uid in rows.keys() - tally.acknowledged.keys()]
    return faults


def everything_is_analyzed(database: Database, tally: Tally) -> list[str]:
    """Each study once at its revision, and in that each of its images."""
    with database.read() as connection:
        studies = connection.execute(select(study)).all()
        twice = connection.execute(
            select(analysis.c.study_instance_uid, analysis.c.revision, func.count())
            .group_by(analysis.c.study_instance_uid, analysis.c.revision)
            .having(func.count() > 1)
        ).all()
        newest = (
            select(analysis.c.id)
            .join(study, study.c.study_instance_uid == analysis.c.study_instance_uid)
            .where(analysis.c.revision == study.c.revision)
        )
        found = Counter(
            connection.execute(
                select(finding.c.sop_instance_uid).where(finding.c.analysis_id.in_(newest))
            ).scalars()
        )
    faults = [f"analyzed twice: {row}" for row in twice]
    for row in studies:
        if (row.state, row.analyzed_revision) != ("analyzed", row.revision):
            faults.append(
                f"study {row.study_instance_uid} is {row.state} at {row.revision}, "
                f"analyzed at {row.analyzed_revision}: {row.reason}"
            )
    for uid in tally.acknowledged:
        if found[uid] != 1:
            faults.append(f"{found[uid]} findings of {uid}")
    return faults


def the_pacs_holds_each_result_once(database: Database, data: Path, pacs: Orthanc) -> list[str]:
    """What stands is there, once, as we have it; what does not was withdrawn there; no more."""
    statement = select(result, delivery.c.state, delivery.c.tried).outerjoin(
        delivery, delivery.c.sop_instance_uid == result.c.sop_instance_uid
    )
    with database.read() as connection:
        rows = {row.sop_instance_uid: row for row in connection.execute(statement)}
    listed = pacs.post("/tools/find", {"Level": "Instance", "Query": {}, "Expand": True})
    held = Counter(item["MainDicomTags"]["SOPInstanceUID"] for item in listed)
    faults = [f"{n} times in the PACS: {uid}" for uid, n in held.items() if n != 1]
    faults += [f"not ours, but in the PACS: {uid}" for uid in held.keys() - rows.keys()]
    for uid, row in rows.items():
        if row.state == "delivered" and uid not in held:
            faults.append(f"delivered, but not in the PACS: {uid}")
        if row.state not in {"delivered", "superseded"}:
            faults.append(f"result {uid} is {row.state}")
        if row.state == "superseded" and uid in held and row.replaced_by not in held:
            faults.append(f"in the PACS, overtaken and not withdrawn: {uid}")
        if row.replaced_by and uid in held and row.replaced_by not in held:
            faults.append(f"replaced by what the PACS does not have: {uid}")
    for item in listed:
        uid = item["MainDicomTags"]["SOPInstanceUID"]
        if uid in rows and not same(pacs.get_bytes(f"/instances/{item['ID']}/file"),
                                    (data / rows[uid].path).read_bytes()):  # fmt: skip
            faults.append(f"not as we have it: {uid}")
    return faults


def same(theirs: bytes, ours: bytes) -> bool:
    """The same dataset; file meta information is each writer's own."""
    if dataset_of(theirs) == dataset_of(ours):
        return True
    # Orthanc may write lengths in another way.
    return bool(pydicom.dcmread(BytesIO(theirs)) == pydicom.dcmread(BytesIO(ours)))


def what_stands_was_sent(database: Database) -> list[str]:
    """The newest analysis of each study is in the PACS: a summary, a report, positive overlays."""
    standing = (
        select(result.c.study_instance_uid, result.c.kind, result.c.source_sop_instance_uid)
        .join(delivery, delivery.c.sop_instance_uid == result.c.sop_instance_uid)
        .where(result.c.replaced_by.is_(None), delivery.c.state == "delivered")
    )
    with database.read() as connection:
        sent = Counter(
            (row.study_instance_uid, row.kind, row.source_sop_instance_uid)
            for row in connection.execute(standing)
        )
        studies = connection.execute(select(study.c.study_instance_uid)).scalars().all()
    positive = {
        (row["study_instance_uid"], "sc", row["sop_instance_uid"])
        for row in queries.findings(database, queries.FindingFilter(positive=True))
    }
    wanted = positive | {(uid, kind, None) for uid in studies for kind in ("sc", "sr")}
    standing_now = {key: n for key, n in sent.items() if key[1] != "withdrawal"}
    faults = [f"stands {standing_now.get(key, 0)} times: {key}" for key in wanted
              if standing_now.get(key, 0) != 1]  # fmt: skip
    return faults + [f"stands without reason: {key}" for key in standing_now.keys() - wanted]


def nothing_is_left_over(database: Database, data: Path) -> list[str]:
    """After a sweep, each file has a row."""
    with database.read() as connection:
        known = set(connection.execute(select(instance.c.path)).scalars())
        known |= set(connection.execute(select(result.c.path)).scalars())
    files = {
        str(file.relative_to(data)) for name in ("inbox", "results")
        for file in (data / name).rglob("*") if file.is_file()
    }  # fmt: skip
    faults = [f"left over: {name}" for name in sorted(files - known)]
    return faults + [f"missing: {name}" for name in sorted(known - files)]


# The storm


@dataclass(frozen=True)
class Plan:
    """How much of everything."""

    kills: int = KILLS
    studies: int = STUDIES
    images: int = IMAGES
    mean_seconds: float = MEAN_SECONDS
    seed: int = SEED


def storm(folder: Path, url: str, plan: Plan, report: Callable[[str], None]) -> Tally:
    """Send, kill, wait until nothing is due, sweep, count; faults are what is not as it must be."""
    tally, started = Tally(), time.monotonic()
    studies = images(folder / "sent", plan.studies, plan.images, plan.seed)
    port, data = free_port(), folder / "data"
    pacs = Orthanc(folder / "orthanc", port)
    config = settings(folder, url, port, pacs)
    try:
        with Keeper(config, folder / "daemon.log") as keeper:
            database = wait(lambda: answering(url, port), 120, "the daemon answers")
            threads = send_while_killed(port, studies, tally, plan.kills, plan.seed)
            killer = threading.Thread(
                target=kill_at_random,
                args=(keeper, database, tally, plan),
                daemon=True,
            )
            killer.start()
            watch([*threads, killer], tally, database, started, report)
            report("all is sent; waiting until nothing is due")
            wait(lambda: is_done(database, tally), 900, "nothing is due", report)
            swept(database, data)
        checked = Daemon(port, folder, config, database, None)  # type: ignore[arg-type]
        tally.faults += examine(checked, data, tally, pacs)
        database.engine.dispose()
    finally:
        pacs.stop()
    tally.seconds = time.monotonic() - started
    return tally


def settings(folder: Path, url: str, port: int, pacs: Orthanc) -> Path:
    """The daemon's settings file."""
    destination = DESTINATION.format(
        name="pacs", ae_title="ORTHANC", port=pacs.dicom, outputs=["sc", "sr"]
    )
    values = {"data_dir": folder / "data", "url": url, "port": port}
    config = folder / "dicomai.toml"
    config.write_text(
        SETTINGS.format(**values, quiet=1.0, release_quiet=0.2, destinations=destination) + MORE
    )
    return config


def answering(url: str, port: int) -> Database | None:
    """The database, once somebody listens."""
    try:
        socket.create_connection(("127.0.0.1", port), 1).close()
    except OSError:
        return None
    return open_database(url)


def wait(
    condition: Callable[[], Any], seconds: float, what: str, report: Callable[[str], None] = print
) -> Any:
    """Poll until condition() is true, and return it."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        value = condition()
        if value:
            return value
        time.sleep(0.2)
    raise TimeoutError(f"not within {seconds} s: {what}")


def is_done(database: Database, tally: Tally) -> bool:
    """Whether every acknowledged image's study is closed and every result sent."""
    with database.read() as connection:
        known = connection.execute(select(func.count()).select_from(instance)).scalar_one()
    return known >= len(tally.acknowledged) and queries.is_idle(database)


def watch(
    threads: Sequence[threading.Thread],
    tally: Tally,
    database: Database,
    started: float,
    report: Callable[[str], None],
) -> None:
    """Say every half minute how far it is, until all threads have ended.

    Raises TimeoutError where the daemon does not come back.
    """
    said = moved = time.monotonic()
    before = 0
    while any(thread.is_alive() for thread in threads):
        time.sleep(0.2)
        now, done = time.monotonic(), tally.kills.total() + len(tally.acknowledged)
        if done > before:
            before, moved = done, now
        if now - moved > PATIENCE_SECONDS:
            raise TimeoutError(f"nothing to kill and nobody to send to for {PATIENCE_SECONDS} s")
        if now - said > 30:
            said = now
            report(
                f"{said - started:6.0f} s: {tally.kills.total()} kills, "
                f"{len(tally.acknowledged)} images acknowledged, {progress(database)}"
            )


def unfinished(database: Database) -> int:
    """Studies that are not analyzed yet."""
    statement = select(func.count()).where(study.c.state.in_(("receiving", "analyzing")))
    with database.read() as connection:
        return connection.execute(statement).scalar_one()


def progress(database: Database) -> str:
    """States of the studies."""
    statement = select(study.c.state, func.count()).group_by(study.c.state)
    with database.read() as connection:
        return ", ".join(f"{count} {state}" for state, count in connection.execute(statement))


def swept(database: Database, data: Path) -> None:
    """Files are old now; the daemon's own sweep takes away what nobody knows."""
    for name in ("inbox", "results"):
        for file in (data / name).rglob("*"):
            moment = file.stat().st_mtime - OLD
            os.utime(file, (moment, moment))
    due = datetime.now(UTC)
    queue.add_task(database, "sweep", due)
    done = select(task.c.id).where(task.c.due == due, task.c.state == "done")

    def is_done() -> bool:
        with database.read() as connection:
            return connection.execute(done).first() is not None

    wait(is_done, 60, "a sweep")


def examine(running: Daemon, data: Path, tally: Tally, pacs: Orthanc) -> list[str]:
    """Everything that is not as it must be."""
    database = running.database
    faults = [
        *everything_is_kept(database, data, tally),
        *everything_is_analyzed(database, tally),
        *the_pacs_holds_each_result_once(database, data, pacs),
        *what_stands_was_sent(database),
        *nothing_is_left_over(database, data),
    ]
    done = command(running.config, "doctor", "--deep")
    if done.returncode != 0:
        faults += [f"doctor: {line}" for line in (done.stdout + done.stderr).splitlines()]
    return faults


def summary(tally: Tally, plan: Plan, database: str) -> Iterator[str]:
    """What is to be said of a storm."""
    kills = ", ".join(f"{role} {n}" for role, n in sorted(tally.kills.items()))
    lost = sum(fault.startswith("lost") for fault in tally.faults)
    twice = sum("twice" in fault or "times in the PACS" in fault for fault in tally.faults)
    yield f"{database}, seed {plan.seed}: {tally.seconds:.0f} s"
    yield f"kills {tally.kills.total()} ({kills})"
    answers = ", ".join(f"{n} {words}" for words, n in tally.answers.most_common())
    yield f"images acknowledged {len(tally.acknowledged)}, sent again {tally.resent}; {answers}"
    yield f"lost {lost}, duplicated {twice}, other faults {len(tally.faults) - lost - twice}"
    yield from (f"  {fault}" for fault in tally.faults)


def main() -> None:
    """`storm.py [--database postgres] [--kills N] [--studies N] [--images N] [--seed N]`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--database", choices=["sqlite", "postgres"], default="sqlite")
    for name, value in (("kills", KILLS), ("studies", STUDIES), ("images", IMAGES), ("seed", SEED)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--mean-seconds", type=float, default=MEAN_SECONDS)
    given = parser.parse_args()
    plan = Plan(given.kills, given.studies, given.images, given.mean_seconds, given.seed)
    folder = Path(tempfile.mkdtemp(prefix="dicomai-storm-"))
    cluster = Postgres() if given.database == "postgres" else None
    url = cluster.new_database() if cluster else f"sqlite:///{folder}/dicomai.db"
    print(f"seed {plan.seed}, {folder}", flush=True)
    try:
        tally = storm(folder, url, plan, lambda words: print(words, flush=True))
    finally:
        if cluster:
            cluster.stop()
    print("\n".join(summary(tally, plan, given.database)), flush=True)
    if tally.faults:
        sys.exit(f"look into {folder}")
    shutil.rmtree(folder)


_config.STORE_SEND_CHUNKED_DATASET = True  # bytes as they are, not parsed and written again

if __name__ == "__main__":
    main()
