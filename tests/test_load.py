"""Fifty studies at once, and how long one takes, on this machine."""

import statistics
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path

import make
import pytest
from daemon import Daemon, Memory, cpu_seconds, daemon
from peers import Orthanc, free_port, storescu
from pydicom.uid import generate_uid

from dicomai.store import queries

pytestmark = pytest.mark.timeout(600)
QUIET, RELEASE_QUIET = 2.0, 0.5


@pytest.fixture
def site(tmp_path: Path) -> Iterator[tuple[Daemon, Orthanc]]:
    """A daemon on SQLite with Orthanc as its destination."""
    port = free_port()
    pacs = Orthanc(tmp_path / "orthanc", port)
    url = f"sqlite:///{tmp_path}/dicomai.db"
    try:
        with daemon(
            tmp_path, url, port, [("pacs", "ORTHANC", pacs.dicom)], QUIET, RELEASE_QUIET
        ) as running:
            yield running, pacs
    finally:
        pacs.stop()


def test_fifty_studies_from_five_senders_are_analyzed_once_each(
    site: tuple[Daemon, Orthanc], tmp_path: Path
) -> None:
    running, pacs = site
    studies = [generate_uid() for _ in range(50)]
    sent = {}
    for number, study in enumerate(studies):
        pair = [make.chest_radiograph(number % 10, study, 1), make.large_radiograph(study, 2)]
        sent[study] = make.save(tmp_path / "sent" / str(number), pair)
    started = time.monotonic()
    with Memory(running) as memory:
        with ThreadPoolExecutor(5) as senders:
            list(senders.map(lambda files: storescu(running.port, files), sent.values()))
        rows = running.wait_idle(50, 400)
    seconds = time.monotonic() - started

    assert Counter(row["state"] for row in rows) == {"analyzed": 50}
    assert {row["revision"] for row in rows} == {1}
    findings = queries.findings(running.database, queries.FindingFilter())
    assert len({row["sop_instance_uid"] for row in findings}) == len(findings) == 100
    made = 0
    for study in studies:
        listed = [row["sop_instance_uid"] for row in queries.results(running.database, study)]
        made += len(listed)
        assert sorted(pacs.sop_instance_uids(study)) == sorted(listed)
    positive = [row for row in findings if row["positive"]]
    assert 50 < len(positive) < 100  # the large ones are all of one positive image
    assert made == 2 * 50 + len(positive)  # summaries, reports, overlays
    assert memory.peak < 3e9

    # Idle afterwards: nothing is due, and the processes do next to nothing.
    pids = running.processes()
    before = sum(map(cpu_seconds, pids))
    time.sleep(5)
    idle = (sum(map(cpu_seconds, pids)) - before) / 5
    assert queries.is_idle(running.database)
    assert idle < 0.25
    print(f"\n100 images in {seconds:.1f} s, peak {memory.peak / 1e9:.2f} GB, idle {idle:.1%} CPU")


def test_results_of_a_large_image_are_in_the_pacs_within_three_seconds_of_the_quiet_period(
    site: tuple[Daemon, Orthanc], tmp_path: Path
) -> None:
    running, pacs = site
    storescu(running.port, make.save(tmp_path / "warm", [make.large_radiograph()]))
    running.wait_idle(1)
    waits = []
    for number in range(1, 8):
        ds = make.large_radiograph()
        files = make.save(tmp_path / str(number), [ds])
        storescu(running.port, files)
        running.wait_idle(number + 1)
        row = queries.one_study(running.database, ds.StudyInstanceUID)
        assert row is not None
        assert len(pacs.sop_instance_uids(ds.StudyInstanceUID)) == 3
        waits.append(seconds_between(row["last_received_at"], row["delivered_at"]) - RELEASE_QUIET)
    print(f"\nlast Success to results in the PACS, less quiet period: {sorted(waits)}")
    assert statistics.median(waits) < 3.0


def seconds_between(earlier: datetime, later: datetime) -> float:
    """Both from the database's clock."""
    return (later - earlier).total_seconds()
