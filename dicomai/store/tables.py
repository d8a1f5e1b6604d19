"""The tables, as migrations/ makes them; README.md documents the views on top of them."""

from datetime import UTC, datetime
from typing import Any

from sqlalchemy import (
    Boolean,
    Column,
    Date,
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
    Text,
    TypeDecorator,
    UniqueConstraint,
    false,
    text,
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


def _only(where: str, *columns: str, name: str | None = None) -> Index:
    """An index of few rows: of the many that are closed and never looked for again it has none."""
    return Index(name, *columns, sqlite_where=text(where), postgresql_where=text(where))


DUE = "due_at IS NOT NULL"
STAT = text("study.stat")  # in the words of its index, which SQLite compares

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
# accession: a keyed hash of the Accession Number; empty: it has none; null: nobody looked.
# stat: somebody waits for it, who sent it so; once stat, always stat.
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
    Column("accession", String(64)),
    Column("received_at", UtcDateTime, nullable=False),
    Column("last_received_at", UtcDateTime, nullable=False),
    Column("stat", Boolean, nullable=False, server_default=false()),
    Index(None, "accession"),
    _only(DUE, "due_at"),
    _only(f"stat AND {DUE}", "due_at", name="ix_study_stat"),
    Index(None, "last_received_at"),
    _only("state <> 'analyzed'", "last_received_at", name="ix_study_open"),
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
    _only("NOT analyzable", "sop_class_uid"),
)

model = Table(
    "model",
    metadata,
    Column("name", String(64)),
    Column("version", String(32)),
    Column("state", String(16), nullable=False),
    Column("sha256", String(64), nullable=False),
    Column("registered_at", UtcDateTime, nullable=False),
    Column("activated_at", UtcDateTime),
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
    Index(None, "analysis_id"),
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
    Index(None, "created_at"),
    _only("state <> 'delivered'", "created_at", name="ix_delivery_open"),
    _only(DUE, "due_at"),
    _only("transaction_uid IS NOT NULL", "transaction_uid"),
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
    _only(DUE, "due_at"),
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

# An image that was not received, but brought to be learnt from; its file stays where it lies.
# split: what its labels said of it; patient: a keyed hash, or of images without one their own.
example = Table(
    "example",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("dataset", String(64), nullable=False),
    Column("path", String(1000), nullable=False),
    Column("digest", String(64), nullable=False),
    Column("patient", String(64), nullable=False),
    Column("source", String(64), nullable=False),
    Column("split", String(8)),
    Column("sex", String(1)),
    Column("age_years", Float),
    Column("view", String(16)),
    Column("manufacturer", String(64)),
    Column("added_at", UtcDateTime, nullable=False),
    UniqueConstraint("dataset", "path"),
    Index(None, "patient"),
)

# What one reader says of a study, an image (subject_id: its UID) or an example (its id). Readers
# who do not agree are all kept. source: file or document; origin: the file's SHA-256, or the
# document's SOP Instance UID.
label = Table(
    "label",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("subject", String(8), nullable=False),
    Column("subject_id", String(64), nullable=False),
    Column("label", String(64), nullable=False),
    Column("value", String(8), nullable=False),
    Column("reader", String(64), nullable=False),
    Column("read_on", Date),
    Column("source", String(8), nullable=False),
    Column("origin", String(64), nullable=False),
    Column("added_at", UtcDateTime, nullable=False),
    UniqueConstraint("subject", "subject_id", "label", "reader"),
)

# Once a patient is in a split he stays there: what was tested on is never trained on.
patient_split = Table(
    "patient_split",
    metadata,
    Column("patient", String(64), primary_key=True),
    Column("split", String(8), nullable=False),
    Column("reason", String(64), nullable=False),
    Column("at", UtcDateTime, nullable=False),
)

# Received documents that were read for labels; a replaced one (another digest) is read again.
document = Table(
    "document",
    metadata,
    Column("study_instance_uid", UID),
    Column("sop_instance_uid", UID),
    Column("digest", String(64), nullable=False),
    Column("labels", Integer, nullable=False),
    Column("reason", String(500)),
    Column("read_at", UtcDateTime, nullable=False),
    PrimaryKeyConstraint("study_instance_uid", "sop_instance_uid"),
)

# One training. due_at: when its lease runs out, and another process may go on with it; node: in
# whose folder it lies. decision: promoted, kept (as candidate), or would-promote, would-keep.
training_run = Table(
    "training_run",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("state", String(16), nullable=False),
    Column("node", String(36), nullable=False),
    Column("lease", String(36)),
    Column("due_at", UtcDateTime),
    Column("model_name", String(64), nullable=False),
    Column("parent", String(32), nullable=False),
    Column("version", String(32)),
    Column("recipe", Text, nullable=False),
    Column("dry_run", Boolean, nullable=False),
    Column("data_digest", String(64)),
    Column("images", Integer),
    Column("started_at", UtcDateTime, nullable=False),
    Column("ended_at", UtcDateTime),
    Column("decision", String(16)),
    Column("reason", String(1000)),
)

# What each epoch reached. number: within its phase.
training_epoch = Table(
    "training_epoch",
    metadata,
    Column("run_id", Integer, ForeignKey(training_run.c.id)),
    Column("phase", Integer),
    Column("number", Integer),
    Column("loss", Float, nullable=False),
    Column("val_loss", Float, nullable=False),
    Column("accuracy", Float, nullable=False),
    Column("auc", Float, nullable=False),
    Column("images_per_second", Float, nullable=False),
    Column("seconds", Float, nullable=False),
    Column("at", UtcDateTime, nullable=False),
    PrimaryKeyConstraint("run_id", "phase", "number"),
)
