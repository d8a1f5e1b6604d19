"""The tables, as migrations/ makes them; README.md documents the views on top of them."""

from datetime import UTC, datetime
from typing import Any

from sqlalchemy import (
    Boolean,
    Column,
    DateTime,
    Dialect,
    Float,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    PrimaryKeyConstraint,
    String,
    Table,
    TypeDecorator,
    UniqueConstraint,
)


class UtcDateTime(TypeDecorator[datetime]):
    """A moment: timestamptz on Postgres, UTC text that sorts on SQLite."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None or dialect.name != "sqlite":
            return value
        return value.astimezone(UTC).replace(tzinfo=None)

    def process_result_value(self, value: Any, _dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        moment: datetime = value
        return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)


UID = String(64)

metadata = MetaData(
    naming_convention={
        "pk": "pk_%(table_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s",
        "ix": "ix_%(table_name)s_%(column_0_name)s",
        "uq": "uq_%(table_name)s_%(column_0_name)s",
    }
)

# One row: which database this is, and what makes a patient's key of a Patient ID.
site = Table(
    "site",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("site_uid", String(36), nullable=False),
    Column("patient_salt", String(64), nullable=False),
)

# due_at is quiet period, retry back-off and lease expiry in one; null: nothing is due.
# node: the data folder that holds its files; null: received before there were nodes.
study = Table(
    "study",
    metadata,
    Column("study_instance_uid", UID, primary_key=True),
    Column("state", String(16), nullable=False),
    Column("revision", Integer, nullable=False),
    Column("analyzed_revision", Integer),
    Column("due_at", UtcDateTime),
    Column("attempts", Integer, nullable=False),
    Column("lease", String(36)),
    Column("reason", String(500)),
    Column("expected_instances", Integer),
    Column("node", String(36)),
    Column("received_at", UtcDateTime, nullable=False),
    Column("last_received_at", UtcDateTime, nullable=False),
    Index(None, "due_at"),
    Index(None, "last_received_at"),
)

# analyzable: an image that may change what is said of the study; the others are only kept.
# exclusion_code, exclusion_reason: why the last analysis left it out.
# path: null once the file was removed (retention); patient: a keyed hash of the Patient ID.
instance = Table(
    "instance",
    metadata,
    Column("study_instance_uid", UID, ForeignKey(study.c.study_instance_uid)),
    Column("sop_instance_uid", UID),
    Column("series_instance_uid", UID, nullable=False),
    Column("sop_class_uid", UID, nullable=False),
    Column("transfer_syntax_uid", UID, nullable=False),
    Column("path", String(300)),
    Column("digest", String(64), nullable=False),
    Column("size", Integer, nullable=False),
    Column("analyzable", Boolean, nullable=False),
    Column("calling_ae_title", String(16), nullable=False),
    Column("received_at", UtcDateTime, nullable=False),
    Column("exclusion_code", String(40)),
    Column("exclusion_reason", String(500)),
    Column("patient", String(64)),
    PrimaryKeyConstraint("study_instance_uid", "sop_instance_uid"),
    Index(None, "patient"),
)

model = Table(
    "model",
    metadata,
    Column("name", String(64)),
    Column("version", String(32)),
    Column("state", String(16), nullable=False),
    Column("sha256", String(64), nullable=False),
    Column("registered_at", UtcDateTime, nullable=False),
    PrimaryKeyConstraint("name", "version"),
)

# What the network said of one frame. probabilities, biases: K float32; maps: K x h x w float32.
prediction = Table(
    "prediction",
    metadata,
    Column("digest", String(64)),
    Column("frame_number", Integer),
    Column("model_name", String(64)),
    Column("model_version", String(32)),
    Column("engine", String(40)),
    Column("probabilities", LargeBinary, nullable=False),
    Column("biases", LargeBinary, nullable=False),
    Column("maps", LargeBinary, nullable=False),
    Column("map_rows", Integer, nullable=False),
    Column("map_columns", Integer, nullable=False),
    Column("analyzed_at", UtcDateTime, nullable=False),
    PrimaryKeyConstraint("digest", "frame_number", "model_name", "model_version", "engine"),
)

analysis = Table(
    "analysis",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("study_instance_uid", UID, ForeignKey(study.c.study_instance_uid), nullable=False),
    Column("revision", Integer, nullable=False),
    Column("model_name", String(64), nullable=False),
    Column("model_version", String(32), nullable=False),
    Column("completed_at", UtcDateTime, nullable=False),
    UniqueConstraint("study_instance_uid", "revision"),
)

finding = Table(
    "finding",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("analysis_id", Integer, ForeignKey(analysis.c.id), nullable=False),
    Column("study_instance_uid", UID, nullable=False),
    Column("series_instance_uid", UID, nullable=False),
    Column("sop_instance_uid", UID, nullable=False),
    Column("frame_number", Integer, nullable=False),
    Column("label", String(64), nullable=False),
    Column("code_value", String(64), nullable=False),
    Column("code_scheme", String(16), nullable=False),
    Column("probability", Float, nullable=False),
    Column("threshold", Float, nullable=False),
    Column("positive", Boolean, nullable=False),
    Column("presence", String(12), nullable=False),
    Column("analyzed_at", UtcDateTime, nullable=False),
    UniqueConstraint("analysis_id", "sop_instance_uid", "frame_number", "label"),
    Index(None, "analyzed_at"),
)

# A result belongs to the analysis that first made it, and stays while later ones make the same.
# replaced_by: the result that withdrew it or took its place.
result = Table(
    "result",
    metadata,
    Column("sop_instance_uid", UID, primary_key=True),
    Column("study_instance_uid", UID, ForeignKey(study.c.study_instance_uid), nullable=False),
    Column("analysis_id", Integer, ForeignKey(analysis.c.id), nullable=False),
    Column("series_instance_uid", UID, nullable=False),
    Column("sop_class_uid", UID, nullable=False),
    Column("kind", String(16), nullable=False),
    Column("source_sop_instance_uid", UID),
    Column("path", String(300)),
    Column("created_at", UtcDateTime, nullable=False),
    Column("replaced_by", UID),
    Index(None, "study_instance_uid"),
)

# due_at: until then nothing is sent to it, because it could not be reached, or had no room.
destination = Table(
    "destination",
    metadata,
    Column("name", String(64), primary_key=True),
    Column("due_at", UtcDateTime, nullable=False),
    Column("failures", Integer, nullable=False),
    Column("last_error", String(500)),
)

# tried: was sent at least once, so that the destination may hold it, whatever it answered.
# transaction_uid: of the storage commitment that was asked for.
delivery = Table(
    "delivery",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("sop_instance_uid", UID, ForeignKey(result.c.sop_instance_uid), nullable=False),
    Column("destination", String(64), nullable=False),
    Column("state", String(16), nullable=False),
    Column("due_at", UtcDateTime),
    Column("attempts", Integer, nullable=False),
    Column("tried", Boolean, nullable=False),
    Column("lease", String(36)),
    Column("last_error", String(500)),
    Column("created_at", UtcDateTime, nullable=False),
    Column("delivered_at", UtcDateTime),
    Column("transaction_uid", UID),
    UniqueConstraint("sop_instance_uid", "destination"),
    Index(None, "due_at"),
    Index(None, "transaction_uid"),
)

# node: whose folder it is about; empty: done once for all daemons of the database.
task = Table(
    "task",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("kind", String(16), nullable=False),
    Column("due", UtcDateTime, nullable=False),
    Column("node", String(36), nullable=False, server_default=""),
    Column("state", String(16), nullable=False),
    Column("due_at", UtcDateTime),
    Column("attempts", Integer, nullable=False),
    Column("lease", String(36)),
    Column("detail", String(500)),
    UniqueConstraint("kind", "due", "node"),
    Index(None, "due_at"),
)

# One row in the same commit as each transition.
event = Table(
    "event",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("at", UtcDateTime, nullable=False),
    Column("subject", String(16), nullable=False),
    Column("subject_id", String(64), nullable=False),
    Column("from_state", String(16)),
    Column("to_state", String(16), nullable=False),
    Column("detail", String(500)),
    Index(None, "subject_id"),
)

# Audit events (PS3.15 A.5). code, type: of CID 400 and 401; outcome: 0 good, 4 minor, 8 serious.
audit = Table(
    "audit",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("at", UtcDateTime, nullable=False),
    Column("code", String(16), nullable=False),
    Column("type", String(64)),
    Column("action", String(1), nullable=False),
    Column("outcome", Integer, nullable=False),
    Column("who", String(64), nullable=False),
    Column("address", String(64)),
    Column("study_instance_uid", UID),
    Column("count", Integer),
    Column("detail", String(500)),
    Index(None, "at"),
)
