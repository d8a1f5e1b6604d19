"""The migrations, on both databases: up, down, the same as the tables, and what is refused."""

import shutil
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import inspect, select
from studies import bench as new_bench

from dicomai.errors import DatabaseUnready
from dicomai.settings import shipped
from dicomai.store import database as database_module
from dicomai.store import outbox, queries, queue
from dicomai.store.database import (
    Database,
    current_revision,
    downgrade,
    open_database,
    require_current,
    upgrade,
)
from dicomai.store.tables import delivery, metadata

MIGRATIONS = shipped("migrations")
VIEWS = {
    "v_finding": queries.v_finding,
    "v_study": queries.v_study,
    "v_delivery": queries.v_delivery,
}
UIDS = [f"1.{number}" for number in range(1, 8)]
NEXT = """\
import sqlalchemy as sa
from alembic import op

revision = "next"
down_revision = "{head}"


def upgrade() -> None:
    op.add_column("study", sa.Column("colour", sa.String(length=8), nullable=True))


def downgrade() -> None:
    op.drop_column("study", "colour")
"""


def test_what_goes_up_comes_down_and_goes_up_again(database: Database) -> None:
    downgrade(database, MIGRATIONS, "base")
    assert inspect(database.engine).get_table_names() == ["alembic_version"]
    assert inspect(database.engine).get_view_names() == []
    upgrade(database, MIGRATIONS)
    require_current(database, MIGRATIONS)


def test_an_upgrade_of_the_current_schema_changes_nothing(database: Database) -> None:
    before = current_revision(database)
    upgrade(database, MIGRATIONS)
    assert current_revision(database) == before


def test_the_migrated_schema_is_that_of_the_tables(database: Database) -> None:
    with database.engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"target_metadata": metadata})
        assert compare_metadata(context, metadata) == []


@pytest.mark.parametrize("name", VIEWS)
def test_each_view_has_the_columns_that_are_read_from_it(database: Database, name: str) -> None:
    columns = [column["name"] for column in inspect(database.engine).get_columns(name)]
    assert columns == [column.name for column in VIEWS[name].c]


def test_there_is_no_view_beside_those_that_are_read(database: Database) -> None:
    assert set(inspect(database.engine).get_view_names()) == set(VIEWS)


def refusal(database: Database, migrations: Path = MIGRATIONS) -> str:
    """The one line with which a database is refused."""
    with pytest.raises(DatabaseUnready) as caught:
        require_current(database, migrations)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def set_version(database: Database, statement: str) -> None:
    """Change the row of alembic_version."""
    with database.write() as connection:
        connection.exec_driver_sql(statement)


def test_an_empty_database_is_refused_with_one_line(database_url: str) -> None:
    empty = open_database(database_url)
    assert refusal(empty) == "the database is empty: run 'dicomai db upgrade'"
    empty.engine.dispose()


def test_a_database_without_its_version_is_refused_with_one_line(database: Database) -> None:
    set_version(database, "DELETE FROM alembic_version")
    assert "run 'dicomai db upgrade'" in refusal(database)


def test_the_schema_that_the_code_asks_for_is_the_newest_migration(database: Database) -> None:
    assert current_revision(database) == database_module.SCHEMA


def test_an_older_database_is_refused_with_one_line_until_it_is_upgraded(
    database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    newer_code = tmp_path / "migrations"
    shutil.copytree(MIGRATIONS, newer_code)
    head = current_revision(database)
    (newer_code / "versions" / "next.py").write_text(NEXT.format(head=head))
    monkeypatch.setattr(database_module, "SCHEMA", "next")
    assert refusal(database, newer_code) == (
        f"the database is at {head}, not next: run 'dicomai db upgrade'"
    )
    upgrade(database, newer_code)
    require_current(database, newer_code)
    monkeypatch.undo()
    assert refusal(database) == (
        "the database is at next, newer than this dicomai: install a newer dicomai"
    )
    downgrade(database, newer_code, str(head))
    require_current(database, MIGRATIONS)


def test_a_newer_database_is_refused_and_not_upgraded(database: Database) -> None:
    set_version(database, "UPDATE alembic_version SET version_num = '9999'")
    assert "newer than this dicomai" in refusal(database)
    with pytest.raises(DatabaseUnready, match="newer than this dicomai"):
        upgrade(database, MIGRATIONS)


def states_of_deliveries(database: Database) -> list[str]:
    with database.read() as connection:
        return sorted(connection.execute(select(delivery.c.state)).scalars())


def test_a_study_in_every_state_survives_a_migration_and_goes_on(database: Database) -> None:
    bench = new_bench(database)
    for uid in ("1.1", "1.2", "1.3"):  # deliveries: under way; delivered and failed; waiting
        bench.arrive(study=uid)
        bench.analyze()
        if uid == "1.1":
            bench.claim_deliveries()
        elif uid == "1.2":
            sent, refused = bench.claim_deliveries()[:2]
            outbox.finish_delivery(bench.database, sent, "delivered")
            outbox.finish_delivery(bench.database, refused, "failed", "refused")
    bench.arrive(study="1.4")
    bench.fail(bench.claim_due(), "broken")
    bench.arrive(study="1.5", analyzable=False)
    bench.arrive(study="1.6")
    bench.claim_due()
    bench.arrive(study="1.7")
    states = {uid: bench.study(uid).state for uid in UIDS}
    assert set(states.values()) == {"receiving", "analyzing", "analyzed", "skipped", "failed"}
    deliveries = states_of_deliveries(database)
    assert set(deliveries) == {"pending", "sending", "delivered", "failed"}
    downgrade(database, MIGRATIONS, "0002")
    upgrade(database, MIGRATIONS)
    assert {uid: bench.study(uid).state for uid in UIDS} == states
    assert states_of_deliveries(database) == deliveries
    bench.clock.wait(1000)
    for _ in range(2):  # what was received, and what a worker died over
        claim = bench.claim()
        assert claim is not None
        bench.complete(claim)
    assert {bench.study(uid).state for uid in ("1.6", "1.7")} == {"analyzed"}
    bench.deliver()
    assert queue.retry_study(bench.database, "1.4")
    assert bench.unexplained() == []
