"""The views, with the queries that a data analyst asks first; README.md shows the same queries."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import text
from studies import STUDY, Bench
from studies import bench as make_bench

from dicomai.store import outbox
from dicomai.store.database import Database

POSITIVES_SQLITE = """
SELECT model_name, model_version, label, count(DISTINCT study_instance_uid) AS studies
FROM v_finding
WHERE positive AND analyzed_at >= datetime('now', '-7 days')
GROUP BY model_name, model_version, label
ORDER BY model_name, model_version, label
"""

POSITIVES_POSTGRES = """
SELECT model_name, model_version, label, count(DISTINCT study_instance_uid) AS studies
FROM v_finding
WHERE positive AND analyzed_at >= now() - interval '7 days'
GROUP BY model_name, model_version, label
ORDER BY model_name, model_version, label
"""

WAITING = """
SELECT study_instance_uid, 'analysis' AS waits_for, due_at AS due, reason
FROM v_study
WHERE state IN ('receiving', 'analyzing')
UNION ALL
SELECT study_instance_uid, kind || ' to ' || destination, next_attempt_at, last_error
FROM v_delivery
WHERE state IN ('pending', 'sending')
ORDER BY due, waits_for
"""

NOT_DONE = """
SELECT study_instance_uid, 'analysis' AS what, state, reason
FROM v_study
WHERE state IN ('skipped', 'failed')
UNION ALL
SELECT study_instance_uid, kind || ' to ' || destination, state, last_error
FROM v_delivery
WHERE state = 'failed'
ORDER BY study_instance_uid, what
"""

MEDIAN_TURNAROUND_SQLITE = """
SELECT avg(turnaround_seconds) AS median_seconds, max(studies) AS studies
FROM (
  SELECT turnaround_seconds,
         row_number() OVER (ORDER BY turnaround_seconds) AS place,
         count(*) OVER () AS studies
  FROM v_study
  WHERE turnaround_seconds IS NOT NULL
) AS delivered
WHERE place IN ((studies + 1) / 2, (studies + 2) / 2)
"""

MEDIAN_TURNAROUND_POSTGRES = """
SELECT percentile_cont(0.5) WITHIN GROUP (ORDER BY turnaround_seconds) AS median_seconds,
       count(turnaround_seconds) AS studies
FROM v_study
"""


@pytest.fixture
def bench(database: Database) -> Bench:
    """A bench on each database."""
    return make_bench(database)


def ask(bench: Bench, sqlite: str, postgres: str | None = None) -> list[tuple[Any, ...]]:
    """Run a query as it stands."""
    query = sqlite if bench.database.is_sqlite or postgres is None else postgres
    with bench.database.read() as connection:
        return [tuple(row) for row in connection.execute(text(query))]


def view(bench: Bench, name: str) -> list[dict[str, Any]]:
    """A view's rows."""
    with bench.database.read() as connection:
        return [dict(row) for row in connection.execute(text(f"SELECT * FROM {name}")).mappings()]


def analyze_at(bench: Bench, study: str, moment: datetime, **facts: Any) -> None:
    """One study, analyzed at a moment."""
    bench.clock.now = moment
    bench.arrive(study=study)
    bench.analyze(**facts)


def test_positives_of_the_last_seven_days_by_model_version(bench: Bench) -> None:
    now = datetime.now(UTC)
    analyze_at(bench, "1.1", now - timedelta(days=8))
    analyze_at(bench, "1.2", now - timedelta(days=6), version="1")
    analyze_at(bench, "1.3", now - timedelta(days=5), version="2")
    analyze_at(bench, "1.4", now - timedelta(days=4), version="2")
    analyze_at(bench, "1.5", now - timedelta(days=3), version="2", probability=0.1)
    assert ask(bench, POSITIVES_SQLITE, POSITIVES_POSTGRES) == [
        ("tiny", "1", "pneumonia", 1),
        ("tiny", "2", "pneumonia", 2),
    ]


def test_what_is_waiting_and_why(bench: Bench) -> None:
    bench.arrive(study="1.1")
    bench.analyze()
    refused, busy = sorted(bench.claim_deliveries(), key=lambda item: item.path.name)
    outbox.finish_delivery(bench.database, refused, "delivered")
    outbox.finish_delivery(bench.database, busy, "pending", "the peer is busy", 30)
    bench.arrive(study="1.2")
    assert [(row[0], row[1], row[3]) for row in ask(bench, WAITING)] == [
        ("1.2", "analysis", None),
        ("1.1", "sr to pacs", "the peer is busy"),
    ]


def test_what_was_not_done_and_why(bench: Bench) -> None:
    bench.arrive(study="1.1", analyzable=False)
    bench.arrive(study="1.2")
    bench.fail(bench.claim_due(), "the analysis failed")
    bench.arrive(study="1.3")
    bench.analyze()
    for item in bench.claim_deliveries():
        outbox.finish_delivery(bench.database, item, "failed", "status 0xC000")
    assert ask(bench, NOT_DONE) == [
        ("1.1", "analysis", "skipped", "no image to analyze has arrived yet"),
        ("1.2", "analysis", "failed", "the analysis failed"),
        ("1.3", "sc to pacs", "failed", "status 0xC000"),
        ("1.3", "sr to pacs", "failed", "status 0xC000"),
    ]


@pytest.mark.parametrize(
    ("turnarounds", "median"), [([], None), ([90], 90), ([300, 100], 200), ([100, 9000, 120], 120)]
)
def test_median_turnaround(bench: Bench, turnarounds: list[float], median: float | None) -> None:
    for number, seconds in enumerate(turnarounds):
        bench.arrive(study=f"1.{number}")
        received = bench.clock.now
        bench.analyze()
        bench.clock.now = received + timedelta(seconds=seconds)
        bench.deliver()
    bench.arrive(study="2.1")  # not delivered yet
    ((found, count),) = ask(bench, MEDIAN_TURNAROUND_SQLITE, MEDIAN_TURNAROUND_POSTGRES)
    assert found == (None if median is None else pytest.approx(median, abs=0.001))
    assert (count or 0) == len(turnarounds)


def test_a_finding_of_an_older_revision_is_not_shown_beside_the_newest(bench: Bench) -> None:
    bench.arrive(1)
    bench.analyze(probability=0.9)
    bench.arrive(1, content="second")
    assert [row["probability"] for row in view(bench, "v_finding")] == [0.9]
    bench.analyze(probability=0.2)
    assert [row["probability"] for row in view(bench, "v_finding")] == [0.2]


def test_a_study_counts_its_instances_and_what_waits(bench: Bench) -> None:
    for number in (1, 2):
        bench.arrive(number)
    bench.arrive(3, analyzable=False)
    bench.analyze(excluded=[2])
    (row,) = view(bench, "v_study")
    assert (row["instances"], row["instances_not_analyzed"]) == (3, 1)
    assert (row["state"], row["model_version"], row["deliveries_waiting"]) == ("analyzed", "1", 2)
    assert (row["delivered_at"], row["turnaround_seconds"]) == (None, None)
    bench.deliver()
    (row,) = view(bench, "v_study")
    assert row["deliveries_waiting"] == 0
    assert row["turnaround_seconds"] == pytest.approx(60, abs=0.001)


def test_a_study_that_waits_again_has_no_turnaround_until_it_is_delivered_again(
    bench: Bench,
) -> None:
    bench.arrive(1)
    bench.analyze()
    bench.deliver()
    bench.clock.wait(3600)
    bench.arrive(2)
    assert view(bench, "v_study")[0]["turnaround_seconds"] is None
    bench.analyze()
    assert view(bench, "v_study")[0]["turnaround_seconds"] is None
    bench.deliver()
    assert view(bench, "v_study")[0]["turnaround_seconds"] == pytest.approx(60, abs=0.001)


def test_a_delivery_is_shown_once_for_each_object_and_destination(bench: Bench) -> None:
    bench.outputs = {"pacs": ("sc", "sr"), "ris": ("sr",)}
    bench.arrive()
    bench.analyze()
    bench.deliver("ris")
    rows = view(bench, "v_delivery")
    assert {row["study_instance_uid"] for row in rows} == {STUDY}
    assert sorted((row["kind"], row["destination"], row["state"]) for row in rows) == [
        ("sc", "pacs", "pending"),
        ("sr", "pacs", "pending"),
        ("sr", "ris", "delivered"),
    ]
