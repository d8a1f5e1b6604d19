"""How fast the whole line is, beside its stages alone, and how long one study takes.

Studies of two computed radiographs of 2500 x 2048 pixels, from `storescu` to Orthanc, on SQLite.
"""

import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import datetime
from functools import partial
from pathlib import Path

import make
from bench_receiving import FAST
from daemon import DESTINATION, SETTINGS, Daemon, command, cpu_seconds, daemon
from peers import Orthanc, free_port, wait_until
from pydicom.uid import generate_uid
from sqlalchemy import func, select

from dicomai.store import queries
from dicomai.store.changes import LIVELY_SECONDS
from dicomai.store.database import Database, open_database
from dicomai.store.tables import event, study

SENDERS = 4
QUIET, RELEASE_QUIET = 10.0, 2.0  # the defaults
LIMIT_SECONDS = 900.0
IDLE_SECONDS = 60.0


def studies(root: Path, count: int) -> list[Path]:
    """A folder for each study, with its two images."""

    def made(number: int) -> Path:
        uid, folder = generate_uid(), root / f"{number}"
        make.save(folder, [make.large_radiograph(uid, 1), make.large_radiograph(uid, 2)])
        return folder

    with ThreadPoolExecutor(2) as threads:
        return list(threads.map(made, range(count)))


def send(port: int, folder: Path) -> None:
    """A study over an association of its own, as a modality does."""
    words = ["/usr/bin/storescu", "-R", "+sd", "-aec", "DICOMAI", "127.0.0.1", str(port)]
    subprocess.run([*words, str(folder)], check=True, env=FAST, capture_output=True)


def send_all(port: int, folders: Sequence[Path]) -> None:
    """As fast as it is taken, several at a time."""
    with ThreadPoolExecutor(SENDERS) as senders:
        list(senders.map(lambda folder: send(port, folder), folders))


def stages(root: Path, folders: Sequence[Path]) -> dict[str, float]:
    """Studies/s of each stage alone, one after the other on the same studies."""
    port = free_port()
    pacs = Orthanc(root / "orthanc", port)
    config, database = _installation(root, port, pacs)
    rates = {}
    try:
        with _role(config, "listen"):
            wait_until(lambda: _answers(port), 60, "the listener answers")
            began = time.monotonic()
            send_all(port, folders)
            rates["receiving alone"] = len(folders) / (time.monotonic() - began)
        time.sleep(RELEASE_QUIET)
        for role, subject, first, last in (
            ("infer", "study", "analyzing", "analyzed"),
            ("deliver", "delivery", "sending", "delivered"),
        ):
            with _role(config, role):
                wait_until(partial(_is_done, database, subject), LIMIT_SECONDS, f"{role} is done")
            rates[f"{role} alone"] = len(folders) / _seconds(database, subject, first, last)
    finally:
        pacs.stop()
        database.engine.dispose()
    return rates


def _installation(root: Path, port: int, pacs: Orthanc) -> tuple[Path, Database]:
    config, url = root / "dicomai.toml", f"sqlite:///{root}/dicomai.db"
    destination = DESTINATION.format(
        name="pacs", ae_title="ORTHANC", port=pacs.dicom, outputs=["sc", "sr"]
    )
    config.write_text(
        SETTINGS.format(
            data_dir=root / "data",
            url=url,
            port=port,
            quiet=QUIET,
            release_quiet=RELEASE_QUIET,
            destinations=destination,
        )
    )
    done = command(config, "db", "upgrade")
    assert done.returncode == 0, done.stderr
    return config, open_database(url)


@contextmanager
def _role(config: Path, role: str) -> Iterator[None]:
    words = [sys.executable, "-m", "dicomai", role, "--config", str(config)]
    with (config.parent / f"{role}.log").open("wb") as log:
        process = subprocess.Popen(words, stdout=log, stderr=log)
    try:
        yield
    finally:
        process.terminate()
        process.wait(30)


def _answers(port: int) -> bool:
    words = ["/usr/bin/echoscu", "-aec", "DICOMAI", "127.0.0.1", str(port)]
    return subprocess.run(words, capture_output=True, check=False).returncode == 0


def _is_done(database: Database, subject: str) -> bool:
    if subject == "delivery":
        return queries.is_idle(database)
    with database.read() as connection:
        open_ones = study.c.state.in_(("receiving", "analyzing"))
        return connection.execute(select(study).where(open_ones).limit(1)).first() is None


def _seconds(database: Database, subject: str, first: str, last: str) -> float:
    """From the first transition to one state to the last one to another."""

    def moment(state: str, which: type[func.min] | type[func.max]) -> datetime:
        chosen = (event.c.subject == subject, event.c.to_state == state)
        with database.read() as connection:
            return connection.execute(select(which(event.c.at)).where(*chosen)).scalar_one()

    return (moment(last, func.max) - moment(first, func.min)).total_seconds()


def end_to_end(root: Path, folders: Sequence[Path]) -> float:
    """Studies/s from the first sender's start until all results are in Orthanc."""
    with _running(root) as (site, _):
        began = datetime.now().astimezone()
        send_all(site.port, folders)
        rows = site.wait_idle(len(folders), LIMIT_SECONDS)
        assert {row["state"] for row in rows} == {"analyzed"}, site.log
        return len(folders) / (max(row["delivered_at"] for row in rows) - began).total_seconds()


def latencies(root: Path, folders: Sequence[Path], studies_per_second: float) -> list[float]:
    """Seconds of each study from its last image's Success to its results in Orthanc, sorted.

    The quiet period is not counted.
    """
    with _running(root) as (site, pacs):
        with ThreadPoolExecutor(SENDERS) as senders:
            began = time.monotonic()
            for number, folder in enumerate(folders):
                time.sleep(max(0.0, began + number / studies_per_second - time.monotonic()))
                senders.submit(send, site.port, folder)
        rows = site.wait_idle(len(folders), LIMIT_SECONDS)
        for row in rows:
            assert len(pacs.sop_instance_uids(row["study_instance_uid"])) >= 2
    return sorted(row["turnaround_seconds"] - RELEASE_QUIET for row in rows)


def idle(root: Path) -> float:
    """Percent of a processor that all processes together take with nothing to do."""
    with _running(root) as (site, _):
        time.sleep(2 * LIVELY_SECONDS)
        pids = site.processes()
        before, began = sum(map(cpu_seconds, pids)), time.monotonic()
        time.sleep(IDLE_SECONDS)
        return 100 * (sum(map(cpu_seconds, pids)) - before) / (time.monotonic() - began)


@contextmanager
def _running(root: Path) -> Iterator[tuple[Daemon, Orthanc]]:
    """A daemon whose network is loaded, and its PACS."""
    port, url = free_port(), f"sqlite:///{root}/dicomai.db"
    pacs = Orthanc(root / "orthanc", port)
    destinations = [("pacs", "ORTHANC", pacs.dicom)]
    try:
        with daemon(root, url, port, destinations, QUIET, RELEASE_QUIET) as site:
            wait_until(lambda: '"scoring"' in site.log, 120, "the network is loaded")
            yield site, pacs
    finally:
        pacs.stop()
