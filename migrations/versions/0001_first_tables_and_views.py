"""first tables and views

Revision: 0001, after
"""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


SECONDS_SQLITE = "(julianday({later}) - julianday({earlier})) * 86400.0"
SECONDS_POSTGRES = "CAST(EXTRACT(EPOCH FROM ({later} - {earlier})) AS double precision)"

V_FINDING = """
SELECT finding.study_instance_uid, finding.series_instance_uid, finding.sop_instance_uid,
       finding.frame_number, finding.label, finding.code_value AS code, finding.code_scheme,
       finding.probability, finding.threshold, finding.positive,
       analysis.model_name, analysis.model_version, finding.analyzed_at
FROM study
JOIN analysis ON analysis.study_instance_uid = study.study_instance_uid
             AND analysis.revision = study.analyzed_revision
JOIN finding ON finding.analysis_id = analysis.id
"""

V_DELIVERY = """
SELECT result.study_instance_uid, delivery.sop_instance_uid, result.kind, delivery.destination,
       delivery.state, delivery.attempts, delivery.due_at AS next_attempt_at,
       delivery.last_error, delivery.created_at, delivery.delivered_at
FROM delivery
JOIN result ON result.sop_instance_uid = delivery.sop_instance_uid
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
           AND v_delivery.state IN ('pending', 'sending')) AS deliveries_waiting,
       (SELECT max(v_delivery.delivered_at) FROM v_delivery
         WHERE v_delivery.study_instance_uid = study.study_instance_uid) AS delivered_at,
       CASE WHEN {delivered} >= study.last_received_at AND NOT EXISTS (
                 SELECT 1 FROM v_delivery
                  WHERE v_delivery.study_instance_uid = study.study_instance_uid
                    AND v_delivery.state IN ('pending', 'sending'))
            THEN {turnaround} END AS turnaround_seconds
FROM study
LEFT JOIN analysis ON analysis.study_instance_uid = study.study_instance_uid
                  AND analysis.revision = study.analyzed_revision
"""

DELIVERED = """(SELECT max(v_delivery.delivered_at) FROM v_delivery
         WHERE v_delivery.study_instance_uid = study.study_instance_uid)"""


def _v_study(seconds: str) -> str:
    turnaround = seconds.format(later=DELIVERED, earlier="study.last_received_at")
    return V_STUDY.format(turnaround=turnaround, delivered=DELIVERED)


VIEWS = (
    ("v_finding", V_FINDING, V_FINDING),
    ("v_delivery", V_DELIVERY, V_DELIVERY),
    ("v_study", _v_study(SECONDS_SQLITE), _v_study(SECONDS_POSTGRES)),
)


def upgrade() -> None:
    op.create_table(
        "event",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("subject", sa.String(length=16), nullable=False),
        sa.Column("subject_id", sa.String(length=64), nullable=False),
        sa.Column("from_state", sa.String(length=16), nullable=True),
        sa.Column("to_state", sa.String(length=16), nullable=False),
        sa.Column("detail", sa.String(length=500), nullable=True),
        sa.PrimaryKeyConstraint("id", name="pk_event"),
    )
    op.create_index("ix_event_subject_id", "event", ["subject_id"], unique=False)
    op.create_table(
        "model",
        sa.Column("name", sa.String(length=64), nullable=False),
        sa.Column("version", sa.String(length=32), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("sha256", sa.String(length=64), nullable=False),
        sa.Column("registered_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("name", "version", name="pk_model"),
    )
    op.create_table(
        "prediction",
        sa.Column("digest", sa.String(length=64), nullable=False),
        sa.Column("frame_number", sa.Integer(), nullable=False),
        sa.Column("model_name", sa.String(length=64), nullable=False),
        sa.Column("model_version", sa.String(length=32), nullable=False),
        sa.Column("engine", sa.String(length=40), nullable=False),
        sa.Column("probabilities", sa.LargeBinary(), nullable=False),
        sa.Column("biases", sa.LargeBinary(), nullable=False),
        sa.Column("maps", sa.LargeBinary(), nullable=False),
        sa.Column("map_rows", sa.Integer(), nullable=False),
        sa.Column("map_columns", sa.Integer(), nullable=False),
        sa.Column("analyzed_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint(
            "digest", "frame_number", "model_name", "model_version", "engine", name="pk_prediction"
        ),
    )
    op.create_table(
        "study",
        sa.Column("study_instance_uid", sa.String(length=64), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("revision", sa.Integer(), nullable=False),
        sa.Column("analyzed_revision", sa.Integer(), nullable=True),
        sa.Column("due_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("attempts", sa.Integer(), nullable=False),
        sa.Column("lease", sa.String(length=36), nullable=True),
        sa.Column("reason", sa.String(length=500), nullable=True),
        sa.Column("expected_instances", sa.Integer(), nullable=True),
        sa.Column("received_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("last_received_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("study_instance_uid", name="pk_study"),
    )
    op.create_index("ix_study_due_at", "study", ["due_at"], unique=False)
    op.create_index("ix_study_last_received_at", "study", ["last_received_at"], unique=False)
    op.create_table(
        "task",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("kind", sa.String(length=16), nullable=False),
        sa.Column("due", sa.DateTime(timezone=True), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("due_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("attempts", sa.Integer(), nullable=False),
        sa.Column("lease", sa.String(length=36), nullable=True),
        sa.Column("detail", sa.String(length=500), nullable=True),
        sa.PrimaryKeyConstraint("id", name="pk_task"),
        sa.UniqueConstraint("kind", "due", name="uq_task_kind"),
    )
    op.create_index("ix_task_due_at", "task", ["due_at"], unique=False)
    op.create_table(
        "analysis",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("study_instance_uid", sa.String(length=64), nullable=False),
        sa.Column("revision", sa.Integer(), nullable=False),
        sa.Column("model_name", sa.String(length=64), nullable=False),
        sa.Column("model_version", sa.String(length=32), nullable=False),
        sa.Column("completed_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(
            ["study_instance_uid"],
            ["study.study_instance_uid"],
            name="fk_analysis_study_instance_uid",
        ),
        sa.PrimaryKeyConstraint("id", name="pk_analysis"),
        sa.UniqueConstraint(
            "study_instance_uid", "revision", name="uq_analysis_study_instance_uid"
        ),
    )
    op.create_table(
        "instance",
        sa.Column("sop_instance_uid", sa.String(length=64), nullable=False),
        sa.Column("study_instance_uid", sa.String(length=64), nullable=False),
        sa.Column("series_instance_uid", sa.String(length=64), nullable=False),
        sa.Column("sop_class_uid", sa.String(length=64), nullable=False),
        sa.Column("transfer_syntax_uid", sa.String(length=64), nullable=False),
        sa.Column("path", sa.String(length=300), nullable=False),
        sa.Column("digest", sa.String(length=64), nullable=False),
        sa.Column("size", sa.Integer(), nullable=False),
        sa.Column("analyzable", sa.Boolean(), nullable=False),
        sa.Column("calling_ae_title", sa.String(length=16), nullable=False),
        sa.Column("received_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("exclusion_code", sa.String(length=40), nullable=True),
        sa.Column("exclusion_reason", sa.String(length=500), nullable=True),
        sa.ForeignKeyConstraint(
            ["study_instance_uid"],
            ["study.study_instance_uid"],
            name="fk_instance_study_instance_uid",
        ),
        sa.PrimaryKeyConstraint("sop_instance_uid", name="pk_instance"),
    )
    op.create_index(
        "ix_instance_study_instance_uid", "instance", ["study_instance_uid"], unique=False
    )
    op.create_table(
        "finding",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("analysis_id", sa.Integer(), nullable=False),
        sa.Column("study_instance_uid", sa.String(length=64), nullable=False),
        sa.Column("series_instance_uid", sa.String(length=64), nullable=False),
        sa.Column("sop_instance_uid", sa.String(length=64), nullable=False),
        sa.Column("frame_number", sa.Integer(), nullable=False),
        sa.Column("label", sa.String(length=64), nullable=False),
        sa.Column("code_value", sa.String(length=64), nullable=False),
        sa.Column("code_scheme", sa.String(length=16), nullable=False),
        sa.Column("probability", sa.Float(), nullable=False),
        sa.Column("threshold", sa.Float(), nullable=False),
        sa.Column("positive", sa.Boolean(), nullable=False),
        sa.Column("analyzed_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(["analysis_id"], ["analysis.id"], name="fk_finding_analysis_id"),
        sa.PrimaryKeyConstraint("id", name="pk_finding"),
        sa.UniqueConstraint(
            "analysis_id",
            "sop_instance_uid",
            "frame_number",
            "label",
            name="uq_finding_analysis_id",
        ),
    )
    op.create_index("ix_finding_analyzed_at", "finding", ["analyzed_at"], unique=False)
    op.create_table(
        "result",
        sa.Column("sop_instance_uid", sa.String(length=64), nullable=False),
        sa.Column("study_instance_uid", sa.String(length=64), nullable=False),
        sa.Column("analysis_id", sa.Integer(), nullable=False),
        sa.Column("series_instance_uid", sa.String(length=64), nullable=False),
        sa.Column("sop_class_uid", sa.String(length=64), nullable=False),
        sa.Column("kind", sa.String(length=16), nullable=False),
        sa.Column("source_sop_instance_uid", sa.String(length=64), nullable=True),
        sa.Column("path", sa.String(length=300), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(["analysis_id"], ["analysis.id"], name="fk_result_analysis_id"),
        sa.ForeignKeyConstraint(
            ["study_instance_uid"],
            ["study.study_instance_uid"],
            name="fk_result_study_instance_uid",
        ),
        sa.PrimaryKeyConstraint("sop_instance_uid", name="pk_result"),
    )
    op.create_index("ix_result_study_instance_uid", "result", ["study_instance_uid"], unique=False)
    op.create_table(
        "delivery",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("sop_instance_uid", sa.String(length=64), nullable=False),
        sa.Column("destination", sa.String(length=64), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("due_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("attempts", sa.Integer(), nullable=False),
        sa.Column("lease", sa.String(length=36), nullable=True),
        sa.Column("last_error", sa.String(length=500), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("delivered_at", sa.DateTime(timezone=True), nullable=True),
        sa.ForeignKeyConstraint(
            ["sop_instance_uid"], ["result.sop_instance_uid"], name="fk_delivery_sop_instance_uid"
        ),
        sa.PrimaryKeyConstraint("id", name="pk_delivery"),
        sa.UniqueConstraint("sop_instance_uid", "destination", name="uq_delivery_sop_instance_uid"),
    )
    op.create_index("ix_delivery_due_at", "delivery", ["due_at"], unique=False)
    for name, sqlite, postgres in VIEWS:
        body = sqlite if op.get_bind().dialect.name == "sqlite" else postgres
        op.execute(f"CREATE VIEW {name} AS {body}")


def downgrade() -> None:
    for name, _, _ in reversed(VIEWS):
        op.execute(f"DROP VIEW {name}")
    op.drop_index("ix_delivery_due_at", table_name="delivery")
    op.drop_table("delivery")
    op.drop_index("ix_result_study_instance_uid", table_name="result")
    op.drop_table("result")
    op.drop_index("ix_finding_analyzed_at", table_name="finding")
    op.drop_table("finding")
    op.drop_index("ix_instance_study_instance_uid", table_name="instance")
    op.drop_table("instance")
    op.drop_table("analysis")
    op.drop_index("ix_task_due_at", table_name="task")
    op.drop_table("task")
    op.drop_index("ix_study_last_received_at", table_name="study")
    op.drop_index("ix_study_due_at", table_name="study")
    op.drop_table("study")
    op.drop_table("prediction")
    op.drop_table("model")
    op.drop_index("ix_event_subject_id", table_name="event")
    op.drop_table("event")
