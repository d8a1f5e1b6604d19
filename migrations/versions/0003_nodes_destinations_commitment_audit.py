"""nodes, patients' keys, destinations, storage commitment, audit

Revision: 0003, after 0002
"""

import secrets
import uuid

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

SECONDS_SQLITE = "(julianday({later}) - julianday({earlier})) * 86400.0"
SECONDS_POSTGRES = "CAST(EXTRACT(EPOCH FROM ({later} - {earlier})) AS double precision)"

V_DELIVERY = """
SELECT result.study_instance_uid, delivery.sop_instance_uid, result.kind, delivery.destination,
       delivery.state, delivery.attempts, delivery.due_at AS next_attempt_at,
       delivery.last_error, delivery.created_at, delivery.delivered_at
FROM delivery
JOIN result ON result.sop_instance_uid = delivery.sop_instance_uid
"""

# What waits for a destination that is away waits as long as that, for that reason.
V_DELIVERY_OF_DESTINATION = """
SELECT result.study_instance_uid, delivery.sop_instance_uid, result.kind, delivery.destination,
       delivery.state, delivery.attempts,
       CASE WHEN delivery.state IN ('pending', 'committing')
                 AND destination.due_at > delivery.due_at
            THEN destination.due_at ELSE delivery.due_at END AS next_attempt_at,
       CASE WHEN delivery.state IN ('pending', 'committing') AND destination.failures > 0
            THEN coalesce(destination.last_error, delivery.last_error)
            ELSE delivery.last_error END AS last_error,
       delivery.created_at, delivery.delivered_at
FROM delivery
JOIN result ON result.sop_instance_uid = delivery.sop_instance_uid
LEFT JOIN destination ON destination.name = delivery.destination
"""

V_STUDY = """
SELECT study.study_instance_uid, study.state, study.revision, study.analyzed_revision,
       study.reason, study.due_at, study.received_at, study.last_received_at,
       (SELECT count(*) FROM instance
         WHERE instance.study_instance_uid = study.study_instance_uid) AS instances,
       (SELECT count(*) FROM instance
         WHERE instance.study_instance_uid = study.study_instance_uid
           AND instance.exclusion_code IS NOT NULL) AS instances_not_analyzed,
       analysis.model_name, analysis.model_version, analysis.completed_at AS analyzed_at,
       (SELECT count(*) FROM v_delivery
         WHERE v_delivery.study_instance_uid = study.study_instance_uid
           AND v_delivery.state IN ({waiting})) AS deliveries_waiting,
       (SELECT max(v_delivery.delivered_at) FROM v_delivery
         WHERE v_delivery.study_instance_uid = study.study_instance_uid) AS delivered_at,
       CASE WHEN {delivered} >= study.last_received_at AND NOT EXISTS (
                 SELECT 1 FROM v_delivery
                  WHERE v_delivery.study_instance_uid = study.study_instance_uid
                    AND v_delivery.state IN ({waiting}))
            THEN {turnaround} END AS turnaround_seconds
FROM study
LEFT JOIN analysis ON analysis.study_instance_uid = study.study_instance_uid
                  AND analysis.revision = study.analyzed_revision
"""

DELIVERED = """(SELECT max(v_delivery.delivered_at) FROM v_delivery
         WHERE v_delivery.study_instance_uid = study.study_instance_uid)"""

TWICE = """
SELECT sop_instance_uid FROM instance GROUP BY sop_instance_uid HAVING count(*) > 1
"""


def _views(v_delivery: str, waiting: str) -> None:
    sqlite = op.get_bind().dialect.name == "sqlite"
    seconds = SECONDS_SQLITE if sqlite else SECONDS_POSTGRES
    turnaround = seconds.format(later=DELIVERED, earlier="study.last_received_at")
    v_study = V_STUDY.format(turnaround=turnaround, delivered=DELIVERED, waiting=waiting)
    op.execute("CREATE VIEW v_delivery AS " + v_delivery)
    op.execute("CREATE VIEW v_study AS " + v_study)


def _drop_views() -> None:
    op.execute("DROP VIEW v_study")
    op.execute("DROP VIEW v_delivery")


def upgrade() -> None:
    _drop_views()
    site = op.create_table(
        "site",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("site_uid", sa.String(length=36), nullable=False),
        sa.Column("patient_salt", sa.String(length=64), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_site"),
    )
    op.bulk_insert(
        site,
        [{"id": 1, "site_uid": str(uuid.uuid4()), "patient_salt": secrets.token_hex(32)}],
    )
    op.create_table(
        "destination",
        sa.Column("name", sa.String(length=64), nullable=False),
        sa.Column("due_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("failures", sa.Integer(), nullable=False),
        sa.Column("last_error", sa.String(length=500), nullable=True),
        sa.PrimaryKeyConstraint("name", name="pk_destination"),
    )
    op.create_table(
        "audit",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("code", sa.String(length=16), nullable=False),
        sa.Column("type", sa.String(length=64), nullable=True),
        sa.Column("action", sa.String(length=1), nullable=False),
        sa.Column("outcome", sa.Integer(), nullable=False),
        sa.Column("who", sa.String(length=64), nullable=False),
        sa.Column("address", sa.String(length=64), nullable=True),
        sa.Column("study_instance_uid", sa.String(length=64), nullable=True),
        sa.Column("count", sa.Integer(), nullable=True),
        sa.Column("detail", sa.String(length=500), nullable=True),
        sa.PrimaryKeyConstraint("id", name="pk_audit"),
    )
    op.create_index("ix_audit_at", "audit", ["at"], unique=False)
    op.add_column("study", sa.Column("node", sa.String(length=36), nullable=True))
    op.add_column("delivery", sa.Column("transaction_uid", sa.String(length=64), nullable=True))
    op.create_index("ix_delivery_transaction_uid", "delivery", ["transaction_uid"], unique=False)
    # The sweep and retention are each data folder's own; '' is for what is done once for all.
    with op.batch_alter_table("task") as table:
        table.add_column(sa.Column("node", sa.String(length=36), nullable=False, server_default=""))
        table.drop_constraint("uq_task_kind", type_="unique")
        table.create_unique_constraint("uq_task_kind", ["kind", "due", "node"])
    with op.batch_alter_table("result") as table:
        table.alter_column("path", existing_type=sa.String(length=300), nullable=True)
    # An instance is known by its study and its UID: a study that a PACS copies is another one.
    with op.batch_alter_table("instance") as table:
        table.add_column(sa.Column("patient", sa.String(length=64), nullable=True))
        table.alter_column("path", existing_type=sa.String(length=300), nullable=True)
        table.drop_constraint("pk_instance", type_="primary")
        table.create_primary_key("pk_instance", ["study_instance_uid", "sop_instance_uid"])
        table.drop_index("ix_instance_study_instance_uid")
        table.create_index("ix_instance_patient", ["patient"])
    _views(V_DELIVERY_OF_DESTINATION, "'pending', 'sending', 'committing'")


def downgrade() -> None:
    if op.get_bind().execute(sa.text(TWICE)).first() is not None:
        raise RuntimeError("an image is in two studies, which 0002 cannot hold: stay at 0003")
    _drop_views()
    # What 0002 has no word for: the PACS has it, and files that were removed have no row.
    op.execute("UPDATE delivery SET state = 'delivered' WHERE state = 'committing'")
    op.execute("UPDATE instance SET path = '' WHERE path IS NULL")
    op.execute("UPDATE result SET path = '' WHERE path IS NULL")
    with op.batch_alter_table("instance") as table:
        table.drop_index("ix_instance_patient")
        table.drop_constraint("pk_instance", type_="primary")
        table.create_primary_key("pk_instance", ["sop_instance_uid"])
        table.alter_column("path", existing_type=sa.String(length=300), nullable=False)
        table.drop_column("patient")
        table.create_index("ix_instance_study_instance_uid", ["study_instance_uid"])
    with op.batch_alter_table("result") as table:
        table.alter_column("path", existing_type=sa.String(length=300), nullable=False)
    op.execute("DELETE FROM task WHERE node <> ''")
    with op.batch_alter_table("task") as table:
        table.drop_constraint("uq_task_kind", type_="unique")
        table.create_unique_constraint("uq_task_kind", ["kind", "due"])
        table.drop_column("node")
    op.drop_index("ix_delivery_transaction_uid", table_name="delivery")
    op.drop_column("delivery", "transaction_uid")
    op.drop_column("study", "node")
    op.drop_table("audit")
    op.drop_table("destination")
    op.drop_table("site")
    _views(V_DELIVERY, "'pending', 'sending'")
