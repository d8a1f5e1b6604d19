"""Who waits for a commit is told of it, on both databases."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta

import pytest
from structlog.testing import capture_logs
from studies import Bench
from studies import bench as make_bench

from dicomai import roles
from dicomai.roles import work_until
from dicomai.store import queries, queue
from dicomai.store.changes import Changes
from dicomai.store.database import Database

NOW = datetime(2026, 3, 29, tzinfo=UTC)


@pytest.fixture
def bench(database: Database) -> Bench:
    """A bench."""
    return make_bench(database)


def test_a_commit_after_the_beginning_ends_the_wait(database: Database) -> None:
    changes = Changes(database)
    changes.begin()
    queue.add_task(database, "sweep", NOW)
    began = time.monotonic()
    changes.wait(threading.Event(), 10.0)
    assert time.monotonic() - began < 1.0
    changes.close()


def test_a_commit_while_one_waits_ends_the_wait(database: Database) -> None:
    changes = Changes(database)
    with ThreadPoolExecutor(1) as threads:
        changes.begin()
        began = time.monotonic()
        done = threads.submit(
            lambda: (time.sleep(0.3), queue.add_task(database, "sweep", NOW))  # type: ignore[func-returns-value]
        )
        changes.wait(threading.Event(), 10.0)
        assert 0.2 < time.monotonic() - began < 1.5
        done.result()
    changes.close()


def test_an_image_that_arrives_the_fast_way_is_told_of_too(bench: Bench) -> None:
    bench.arrive(1)
    changes = Changes(bench.database)
    changes.begin()
    bench.arrive(2)
    began = time.monotonic()
    changes.wait(threading.Event(), 10.0)
    assert time.monotonic() - began < 1.0
    changes.close()


def test_without_a_commit_one_waits_as_long_as_one_wants_or_until_one_is_to_stop(
    database: Database,
) -> None:
    changes, stop = Changes(database), threading.Event()
    changes.begin()
    began = time.monotonic()
    changes.wait(stop, 0.6)
    assert 0.5 < time.monotonic() - began < 1.2
    stop.set()
    began = time.monotonic()
    changes.wait(stop, 10.0)
    assert time.monotonic() - began < 1.0
    changes.close()


def test_a_connection_that_is_lost_is_opened_again(database: Database) -> None:
    changes = Changes(database)
    changes.begin()
    changes._connection.close()
    changes.wait(threading.Event(), 0.1)
    changes.begin()
    queue.add_task(database, "sweep", NOW)
    began = time.monotonic()
    changes.wait(threading.Event(), 10.0)
    assert time.monotonic() - began < 1.0
    changes.close()


def test_a_step_follows_a_commit_and_nothing_else(database: Database) -> None:
    stop, steps = threading.Event(), []

    def step() -> bool:
        steps.append(time.monotonic())
        return False

    with ThreadPoolExecutor(1) as threads:
        working = threads.submit(work_until, stop, database, step, lambda: 30.0)
        time.sleep(1.0)
        assert len(steps) == 1
        queue.add_task(database, "sweep", NOW)
        time.sleep(0.5)
        assert len(steps) == 2
        stop.set()
        working.result(5)


def test_a_step_that_fails_in_a_way_that_nobody_foresaw_ends_no_role(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(roles, "TROUBLE_SECONDS", 0.01)
    stop, failures = threading.Event(), [RuntimeError("what?"), KeyError("who?")]

    def step() -> bool:
        if failures:
            raise failures.pop()
        stop.set()
        return True

    with capture_logs() as lines:
        work_until(stop, database, step, lambda: 30.0)
    assert [line["event"] for line in lines] == ["trouble"] * 2


def test_how_long_nothing_becomes_due(bench: Bench) -> None:
    database, longest = bench.database, queries.longest_seconds(bench.database)
    assert queries.seconds_to_due_study(database) == longest
    assert queries.seconds_to_due_delivery(database, "pacs") == longest
    assert queries.seconds_to_due_task(database) == longest
    bench.arrive()
    assert queries.seconds_to_due_study(database) == min(10.0, longest)
    bench.clock.wait(6)
    assert queries.seconds_to_due_study(database) == 4.0
    bench.clock.wait(60)
    assert queries.seconds_to_due_study(database) == queries.SOON_SECONDS
    bench.analyze()
    assert queries.seconds_to_due_delivery(database, "pacs") == queries.SOON_SECONDS
    assert queries.seconds_to_due_delivery(database, "other") == longest
    queue.add_task(database, "sweep", bench.clock.now + timedelta(seconds=3))
    assert queries.seconds_to_due_task(database) == 3.0
