"""cost that does not grow with the history, stat studies

Revision: 0005, after 0004
"""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

SECONDS_SQLITE = "(julianday({later}) - julianday({earlier})) * 86400.0"
SECONDS_POSTGRES = "CAST(EXTRACT(EPOCH FROM ({later} - {earlier})) AS double precision)"

DELIVERED_IN_0004 = """(SELECT max(v_delivery.delivered_at) FROM v_delivery
         WHERE v_delivery.study_instance_uid = study.study_instance_uid)"""
WAITING_IN_0004 = """(SELECT count(*) FROM v_delivery
         WHERE v_delivery.study_instance_uid = study.study_instance_uid
           AND v_delivery.state IN ('pending', 'sending', 'committing'))"""

# v_delivery also asks for each delivery's destination, which is nothing to the study. With FILTER
# no planner looks through all that waits, of whatever study.
DELIVERED = """(SELECT max(delivery.delivered_at)
          FROM result JOIN delivery ON delivery.sop_instance_uid = result.sop_instance_uid
         WHERE result.study_instance_uid = study.study_instance_uid)"""
WAITING = """(SELECT count(*) FILTER (
               WHERE delivery.state IN ('pending', 'sending', 'committing'))
          FROM result JOIN delivery ON delivery.sop_instance_uid = result.sop_instance_uid
         WHERE result.study_instance_uid = study.study_instance_uid)"""

V_STUDY = """
SELECT study.study_instance_uid, study.state, study.revision, study.analyzed_revision,
       study.reason, study.due_at, study.received_at, study.last_received_at,
       (SELECT count(*) FROM instance
         WHERE instance.study_instance_uid = study.study_instance_uid) AS instances,
       (SELECT count(*) FROM instance
         WHERE instance.study_instance_uid = study.study_instance_uid
           AND instance.exclusion_code IS NOT NULL) AS instances_not_analyzed,
       analysis.model_name, analysis.model_version, analysis.completed_at AS analyzed_at,
       {waiting} AS deliveries_waiting,
       {delivered} AS delivered_at,
       CASE WHEN {delivered} >= study.last_received_at AND {waiting} = 0
            THEN {turnaround} END AS turnaround_seconds{more}
FROM study
LEFT JOIN analysis ON analysis.study_instance_uid = study.study_instance_uid
                  AND analysis.revision = study.analyzed_revision
"""

# Nearly all rows are closed, and nearly all deliveries delivered: what is looked for is the rest.
DUE = "due_at IS NOT NULL"
PARTIAL = (
    ("ix_study_due_at", "study", "due_at", DUE),
    ("ix_delivery_due_at", "delivery", "due_at", DUE),
    ("ix_task_due_at", "task", "due_at", DUE),
    ("ix_delivery_transaction_uid", "delivery", "transaction_uid", "transaction_uid IS NOT NULL"),
)
ADDED = (
    ("ix_study_open", "study", "last_received_at", "state <> 'analyzed'"),
    ("ix_delivery_open", "delivery", "created_at", "state <> 'delivered'"),
    ("ix_delivery_created_at", "delivery", "created_at", None),
    ("ix_result_analysis_id", "result", "analysis_id", None),
    ("ix_instance_sop_class_uid", "instance", "sop_class_uid", "NOT analyzable"),
)


def _v_study(waiting: str, delivered: str, more: str) -> None:
    sqlite = op.get_bind().dialect.name == "sqlite"
    turnaround = (SECONDS_SQLITE if sqlite else SECONDS_POSTGRES).format(
        later=delivered, earlier="study.last_received_at"
    )
    op.execute("DROP VIEW v_study")
    view = V_STUDY.format(waiting=waiting, delivered=delivered, turnaround=turnaround, more=more)
    op.execute("CREATE VIEW v_study AS " + view)


def _index(name: str, table: str, column: str, where: str | None) -> None:
    rows = sa.text(where) if where else None
    op.create_index(name, table, [column], sqlite_where=rows, postgresql_where=rows)


def upgrade() -> None:
    for name, table, column, where in PARTIAL:
        op.drop_index(name, table_name=table)
        _index(name, table, column, where)
    for name, table, column, where in ADDED:
        _index(name, table, column, where)
    op.add_column(
        "study", sa.Column("stat", sa.Boolean(), nullable=False, server_default=sa.false())
    )
    _index("ix_study_stat", "study", "due_at", f"stat AND {DUE}")
    _v_study(WAITING, DELIVERED, ", study.stat")


def downgrade() -> None:
    _v_study(WAITING_IN_0004, DELIVERED_IN_0004, "")
    op.drop_index("ix_study_stat", table_name="study")
    op.drop_column("study", "stat")
    for name, table, _, _ in ADDED:
        op.drop_index(name, table_name=table)
    for name, table, column, _ in PARTIAL:
        op.drop_index(name, table_name=table)
        _index(name, table, column, None)
