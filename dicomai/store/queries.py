"""What is read: for the roles, the command line and people. Nothing here writes."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from sqlalchemy import (
    Boolean,
    ColumnElement,
    Float,
    Integer,
    String,
    and_,
    column,
    func,
    literal_column,
    or_,
    select,
    table,
)

from dicomai.store.database import Database
from dicomai.store.queue import as_instance, held_here
from dicomai.store.states import OPEN
from dicomai.store.tables import (
    UtcDateTime,
    audit,
    delivery,
    destination,
    event,
    instance,
    prediction,
    result,
    site,
    study,
    task,
)
from dicomai.study import WITHDRAWAL, Instance, Score, Sent

Row = dict[str, Any]

v_finding = table(
    "v_finding",
    column("study_instance_uid", String),
    column("series_instance_uid", String),
    column("sop_instance_uid", String),
    column("frame_number", Integer),
    column("label", String),
    column("code", String),
    column("code_scheme", String),
    column("probability", Float),
    column("threshold", Float),
    column("positive", Boolean),
    column("presence", String),
    column("model_name", String),
    column("model_version", String),
    column("analyzed_at", UtcDateTime),
)

v_study = table(
    "v_study",
    column("study_instance_uid", String),
    column("state", String),
    column("revision", Integer),
    column("analyzed_revision", Integer),
    column("reason", String),
    column("due_at", UtcDateTime),
    column("received_at", UtcDateTime),
    column("last_received_at", UtcDateTime),
    column("instances", Integer),
    column("instances_not_analyzed", Integer),
    column("model_name", String),
    column("model_version", String),
    column("analyzed_at", UtcDateTime),
    column("deliveries_waiting", Integer),
    column("delivered_at", UtcDateTime),
    column("turnaround_seconds", Float),
    column("stat", Boolean),
)

v_delivery = table(
    "v_delivery",
    column("study_instance_uid", String),
    column("sop_instance_uid", String),
    column("kind", String),
    column("destination", String),
    column("state", String),
    column("attempts", Integer),
    column("next_attempt_at", UtcDateTime),
    column("last_error", String),
    column("created_at", UtcDateTime),
    column("delivered_at", UtcDateTime),
)


@dataclass(frozen=True, slots=True)
class FindingFilter:
    """Which findings to list; None: no bound."""

    since: datetime | None = None
    until: datetime | None = None
    label: str | None = None
    min_probability: float | None = None
    study_instance_uid: str | None = None
    model_version: str | None = None
    positive: bool = False


def _rows(database: Database, statement: Any) -> list[Row]:
    with database.read() as connection:
        return [dict(row) for row in connection.execute(statement).mappings()]


def findings(database: Database, wanted: FindingFilter, limit: int | None = None) -> list[Row]:
    """Findings of each study's newest analysis, one a frame and label, newest first."""
    view = v_finding.c
    bounds: tuple[tuple[Any, Callable[[Any], Any]], ...] = (
        (wanted.since, lambda value: view.analyzed_at >= value),
        (wanted.until, lambda value: view.analyzed_at < value),
        (wanted.label, lambda value: view.label == value),
        (wanted.min_probability, lambda value: view.probability >= value),
        (wanted.study_instance_uid, lambda value: view.study_instance_uid == value),
        (wanted.model_version, lambda value: view.model_version == value),
    )
    statement = select(v_finding).where(
        *[bound(value) for value, bound in bounds if value is not None]
    )
    if wanted.positive:
        statement = statement.where(view.positive)
    order = (view.analyzed_at.desc(), view.sop_instance_uid, view.frame_number, view.label)
    return _rows(database, statement.order_by(*order).limit(limit))


def studies(database: Database, state: str | None = None, limit: int | None = None) -> list[Row]:
    """Studies, the newest arrival first."""
    statement = select(v_study).order_by(v_study.c.last_received_at.desc()).limit(limit)
    if state is not None:
        statement = statement.where(
            v_study.c.state == state, *_few(v_study.c.state, "analyzed", state)
        )
    return _rows(database, statement)


def _few(column: ColumnElement[str], usual: str, wanted: str) -> list[ColumnElement[bool]]:
    """What lets the database look among the few rows that are not in their usual last state.

    In the words of the index (tables.py): SQLite compares words, and sees no values.
    """
    return [] if wanted == usual else [column != literal_column(f"'{usual}'")]


def one_study(database: Database, study_instance_uid: str) -> Row | None:
    """A study's row of v_study."""
    rows = _rows(
        database, select(v_study).where(v_study.c.study_instance_uid == study_instance_uid)
    )
    return rows[0] if rows else None


def instances(database: Database, study_instance_uid: str) -> list[Row]:
    """What is kept of a study, with the reasons why some of it was not analyzed."""
    return _rows(
        database,
        select(instance)
        .where(instance.c.study_instance_uid == study_instance_uid)
        .order_by(instance.c.series_instance_uid, instance.c.sop_instance_uid),
    )


def results(database: Database, study_instance_uid: str) -> list[Row]:
    """The objects made for a study, oldest first."""
    return _rows(
        database,
        select(result)
        .where(result.c.study_instance_uid == study_instance_uid)
        .order_by(result.c.created_at, result.c.kind, result.c.sop_instance_uid),
    )


def events(database: Database, subject: str, subject_id: str) -> list[Row]:
    """The audit trail of one subject, oldest first."""
    return _rows(
        database,
        select(event)
        .where(event.c.subject == subject, event.c.subject_id == subject_id)
        .order_by(event.c.id),
    )


def deliveries(
    database: Database,
    state: str | None = None,
    study_instance_uid: str | None = None,
    limit: int | None = None,
) -> list[Row]:
    """Deliveries, the newest first."""
    statement = select(v_delivery).order_by(v_delivery.c.created_at.desc()).limit(limit)
    if state is not None:
        few = _few(v_delivery.c.state, "delivered", state)
        statement = statement.where(v_delivery.c.state == state, *few)
    if study_instance_uid is not None:
        statement = statement.where(v_delivery.c.study_instance_uid == study_instance_uid)
    return _rows(database, statement)


def due_study_attempts(database: Database) -> int | None:
    """Attempts of the most crashed study that is due, where stat studies are, of those.

    None: a claim is not worth the write lock.
    """
    with database.read() as connection:
        now = database.now(connection)
        due = (
            select(func.max(study.c.attempts))
            .where(
                study.c.state.in_(("receiving", "analyzing")),
                study.c.due_at <= now,
                *held_here(database),
            )
            .group_by(study.c.stat)
            .order_by(study.c.stat.desc())
            .limit(1)
        )
        attempts: int | None = connection.execute(due).scalar_one_or_none()
    return attempts


ARRIVING_ROWS = 64


def arriving(database: Database, data_dir: Path) -> dict[str, list[Instance]]:
    """Images of studies that are not due yet and of which nothing was ever sent: some, by study.

    Stat studies first, then those that are due first; not those that somebody has died over.
    """
    with database.read() as connection:
        rows = connection.execute(
            select(instance)
            .join(study, study.c.study_instance_uid == instance.c.study_instance_uid)
            .where(
                study.c.state == "receiving",
                study.c.due_at > database.now(connection),
                study.c.attempts == 0,
                study.c.revision == 1,
                instance.c.analyzable,
                instance.c.path.is_not(None),
                *held_here(database),
            )
            .order_by(
                study.c.stat.desc(),
                study.c.due_at,
                instance.c.study_instance_uid,
                instance.c.received_at,
            )
            .limit(ARRIVING_ROWS)
        ).all()
    found: dict[str, list[Instance]] = {}
    for row in rows:
        found.setdefault(row.study_instance_uid, []).append(as_instance(row, data_dir))
    return found


def task_is_due(database: Database) -> bool:
    """Whether a claim is worth the write lock."""
    with database.read() as connection:
        now = database.now(connection)
        due = select(task.c.id).where(
            task.c.state.in_(("due", "running")),
            task.c.due_at <= now,
            task.c.node.in_(("", database.node or "")),
        )
        return connection.execute(due.limit(1)).first() is not None


def has_due(database: Database, name: str) -> bool:
    """Whether something could be sent to a destination now, or asked of it."""
    with database.read() as connection:
        now = database.now(connection)
        away = select(destination.c.name).where(
            destination.c.name == name, destination.c.due_at > now
        )
        due = (
            select(delivery.c.id)
            .join(result, result.c.sop_instance_uid == delivery.c.sop_instance_uid)
            .join(study, study.c.study_instance_uid == result.c.study_instance_uid)
            .where(
                delivery.c.destination == name,
                delivery.c.state.in_(OPEN),
                delivery.c.due_at <= now,
                ~away.exists(),
                *held_here(database),
            )
            .limit(1)
        )
        return connection.execute(due).first() is not None


SOON_SECONDS = 0.2  # where something is due that cannot be taken at present


def longest_seconds(database: Database) -> float:
    """How long one waits without asking: a pooler of Postgres connections may tell of nothing."""
    return 30.0 if database.is_sqlite else 5.0


def seconds_to_due_study(database: Database) -> float:
    """How long no study becomes due that is not due now, while nobody changes anything."""
    states = and_(study.c.state.in_(("receiving", "analyzing")), study.c.due_at.is_not(None))
    return _seconds_to(
        database, select(func.min(study.c.due_at)).where(states, *held_here(database))
    )


def seconds_to_due_task(database: Database) -> float:
    """The same of tasks."""
    return _seconds_to(
        database,
        select(func.min(task.c.due_at)).where(
            task.c.state.in_(("due", "running")),
            task.c.due_at.is_not(None),
            task.c.node.in_(("", database.node or "")),
        ),
    )


def seconds_to_due_delivery(database: Database, name: str) -> float:
    """The same of what a destination gets, and of the destination itself."""
    mine = (
        delivery.c.destination == name,
        delivery.c.state.in_(OPEN),
        delivery.c.due_at.is_not(None),
    )
    return max(
        _seconds_to(database, select(func.min(delivery.c.due_at)).where(*mine)),
        _seconds_to(
            database, select(destination.c.due_at).where(destination.c.name == name), SOON_SECONDS
        ),
    )


def _seconds_to(database: Database, moment: Any, never: float = math.inf) -> float:
    with database.read() as connection:
        due = connection.execute(moment).scalar_one_or_none()
        seconds = never if due is None else (due - database.now(connection)).total_seconds()
    return min(longest_seconds(database), max(SOON_SECONDS, seconds))


def is_idle(database: Database) -> bool:
    """Whether nothing is being received, analyzed, or sent."""
    with database.read() as connection:
        busy = connection.execute(
            select(func.count())
            .select_from(study)
            .where(study.c.state.in_(("receiving", "analyzing")), study.c.due_at.is_not(None))
        ).scalar_one()
        unsent = connection.execute(
            select(func.count())
            .select_from(delivery)
            .where(delivery.c.state.in_(OPEN), delivery.c.due_at.is_not(None))
        ).scalar_one()
        return not busy and not unsent


def is_scoring(database: Database) -> bool:
    """Whether a study is being analyzed here, or is due to be."""
    with database.read() as connection:
        now = database.now(connection)
        chosen = select(study.c.study_instance_uid).where(
            study.c.due_at.is_not(None),
            or_(
                study.c.state == "analyzing",
                and_(study.c.state == "receiving", study.c.due_at <= now),
            ),
            *held_here(database),
        )
        return connection.execute(chosen.limit(1)).first() is not None


def scores(
    database: Database,
    members: Sequence[Instance],
    model_name: str,
    model_version: str,
    engine: str,
) -> dict[tuple[str, int], Score]:
    """What this model has already said of these instances: (digest, frame number) -> score."""
    statement = select(prediction).where(
        prediction.c.digest.in_([member.digest for member in members]),
        prediction.c.model_name == model_name,
        prediction.c.model_version == model_version,
        prediction.c.engine == engine,
    )
    with database.read() as connection:
        rows = connection.execute(statement).all()
    return {
        (row.digest, row.frame_number): Score(
            np.frombuffer(row.probabilities, "<f4"),
            np.frombuffer(row.maps, "<f4").reshape(-1, row.map_rows, row.map_columns),
            np.frombuffer(row.biases, "<f4"),
            row.engine,
            row.analyzed_at,
        )
        for row in rows
    }


def sent(database: Database, study_instance_uid: str) -> tuple[Sent, ...]:
    """The results that a PACS may hold, oldest first.

    What was removed from here (retention) is history: nothing replaces or withdraws it. One
    that was replaced by a result which never went out has not been replaced.
    """
    statement = (
        select(result, delivery.c.destination)
        .join(delivery, delivery.c.sop_instance_uid == result.c.sop_instance_uid)
        .where(
            result.c.study_instance_uid == study_instance_uid,
            delivery.c.tried,
            result.c.path.is_not(None),
        )
        .order_by(result.c.created_at, result.c.sop_instance_uid)
    )
    withdrawals = select(result.c.sop_instance_uid).where(
        result.c.study_instance_uid == study_instance_uid, result.c.kind == WITHDRAWAL
    )
    with database.read() as connection:
        rows = connection.execute(statement).all()
        went_out = {row.sop_instance_uid for row in rows}
        went_out |= set(connection.execute(withdrawals).scalars())  # or will: they are never ended
    found: dict[str, Sent] = {}
    for row in rows:
        before = found[row.sop_instance_uid].destinations if row.sop_instance_uid in found else ()
        found[row.sop_instance_uid] = Sent(
            row.sop_instance_uid,
            row.sop_class_uid,
            row.series_instance_uid,
            row.kind,
            row.replaced_by if row.replaced_by in went_out else None,
            frozenset({*before, row.destination}),
        )
    return tuple(found.values())


def site_uid(database: Database) -> str:
    """Which database this is."""
    with database.read() as connection:
        return str(connection.execute(select(site.c.site_uid)).scalar_one())


def is_known(database: Database, study_instance_uid: str, sop_instance_uid: str) -> bool:
    """Whether a study has an instance of this UID, whatever its bytes."""
    statement = select(instance.c.digest).where(
        instance.c.study_instance_uid == study_instance_uid,
        instance.c.sop_instance_uid == sop_instance_uid,
    )
    with database.read() as connection:
        return connection.execute(statement).first() is not None


def known_paths(database: Database, relative: Sequence[str]) -> set[str]:
    """Which of these files (relative to the data folder) have a row.

    Each lies in its study's folder (inbox/<UID>/..., results/<UID>/...), by which it is looked for.
    """
    found: set[str] = set()
    uids = {parts[1] for parts in (path.split("/") for path in relative) if len(parts) == 3}
    with database.read() as connection:
        for table in (instance, result):
            rows = select(table.c.path).where(table.c.study_instance_uid.in_(uids))
            found.update(path for path in connection.execute(rows).scalars() if path)
    return found & set(relative)


@dataclass(frozen=True, slots=True)
class AuditFilter:
    """Which audit events to list; None: no bound."""

    since: datetime | None = None
    until: datetime | None = None
    code: str | None = None
    who: str | None = None
    study_instance_uid: str | None = None


def audit_events(database: Database, wanted: AuditFilter, limit: int | None = None) -> list[Row]:
    """Audit events, the newest first."""
    columns = audit.c
    bounds: tuple[tuple[Any, Callable[[Any], Any]], ...] = (
        (wanted.since, lambda value: columns.at >= value),
        (wanted.until, lambda value: columns.at < value),
        (wanted.code, lambda value: columns.code == value),
        (wanted.who, lambda value: columns.who == value),
        (wanted.study_instance_uid, lambda value: columns.study_instance_uid == value),
    )
    chosen = [bound(value) for value, bound in bounds if value is not None]
    order = (columns.at.desc(), columns.id.desc())
    return _rows(database, select(audit).where(*chosen).order_by(*order).limit(limit))


def last_task(database: Database, kind: str) -> datetime | None:
    """For when the last task of a kind was inserted."""
    with database.read() as connection:
        found = connection.execute(select(func.max(task.c.due)).where(task.c.kind == kind))
        return found.scalar_one_or_none()
