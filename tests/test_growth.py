"""What is asked all day looks for what it needs, whatever else there is; its benchmark works."""

from pathlib import Path
from typing import Any

import bench_growth
import pytest
from bench_growth import Line
from sqlalchemy import event

from dicomai.store import queries, removal, truth
from dicomai.store.database import Database
from dicomai.train import documents

NODE = "11111111-1111-1111-1111-111111111111"
SMALL = {"destination", "site"}


@pytest.fixture
def line(database_url: str, database: Database) -> Line:
    """The daemon's calls, on SQLite."""
    if not database.is_sqlite:
        pytest.skip("Postgres plans by what there is: bench.py --only growth")
    return Line(database_url, NODE)


def scans(database: Database) -> list[str]:
    """What is read from its beginning, or sorted as a whole, from now on; filled as it happens."""
    found: list[str] = []

    @event.listens_for(database.engine, "before_cursor_execute")
    def _plan(_connection: Any, cursor: Any, words: str, values: Any, *_: Any) -> None:
        if words.split()[0] in {"SELECT", "UPDATE", "DELETE"}:
            plan = cursor.connection.cursor().execute(f"EXPLAIN QUERY PLAN {words}", values)
            lines = [row[3] for row in plan.fetchall()]
            found.extend(
                f"{line}: {words}"
                for line in lines
                if line.startswith("SCAN") and " USING " not in line
                if line.split()[1] not in SMALL
            )

    return found


def test_what_is_done_and_asked_all_day_scans_no_table(line: Line) -> None:
    found = scans(line.database)
    page, database = bench_growth.PAGE, line.database
    for _ in line.cycle():
        pass
    for state in ("failed", "skipped", "receiving"):
        queries.studies(database, state, page)
    for state in ("failed", "pending", "superseded"):
        queries.deliveries(database, state, limit=page)
    queries.is_idle(database)
    queries.is_scoring(database)
    queries.known_paths(database, ["inbox/1.2/3.dcm", "results/1.2/4.dcm"])
    truth.unread_documents(database, documents.SOP_CLASSES)
    uid = queries.studies(database, "analyzed", 1)[0]["study_instance_uid"]
    removal.purge(database, uid, lambda paths: None)
    assert found == []


@pytest.mark.parametrize("kind", bench_growth.HISTORIES)
def test_the_benchmark_fills_and_measures_both_databases(kind: Any, tmp_path: Path) -> None:
    with bench_growth.measured(kind, tmp_path, sizes=(10, 40), cycles=2) as costs:
        found = {(size, name): cost for size, name, cost in costs()}
    assert {size for size, _ in found} == {10, 40}
    assert {"first image", "claim", "results"} <= {name for _, name in found}
    assert min(found.values()) > 0
