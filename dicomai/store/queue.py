"""What writes the state of studies and tasks: claim, complete, release.

Each function is one short transaction. A row that is due is claimed by writing a lease into it and
moving its due_at to when the lease expires; a worker that dies leaves a row that becomes due again.
"""

import hashlib
import hmac
import uuid
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import lru_cache
from pathlib import Path
from typing import Any

from sqlalchemy import ColumnElement, Connection, bindparam, func, or_, select, update

from dicomai.errors import LeaseLost
from dicomai.store import states
from dicomai.store.database import Database
from dicomai.store.tables import (
    STAT,
    analysis,
    audit,
    delivery,
    destination,
    event,
    finding,
    instance,
    prediction,
    result,
    site,
    study,
    task,
)
from dicomai.study import WITHDRAWAL, Analysis, Instance, Result, Study

# After this many crashes a study is claimed alone; only crashes alone count to the limit, so that
# one bad study cannot fail its neighbours.
CRASHES_IN_COMPANY = 2
# Why a study that is being analyzed goes to a new revision; for any other reason it is given back.
PURGED = "a patient was removed"
NOTHING_YET = "no image to analyze has arrived yet"
TWO_PATIENTS = (
    "images of two patients under one Study Instance UID: correct it in the PACS and send it "
    "again, or remove one of them with 'dicomai purge'"
)

_LOCKED = select(study).where(study.c.study_instance_uid == bindparam("uid")).with_for_update()


@dataclass(frozen=True, slots=True)
class Claim:
    """A study that is ours until the lease runs out; hopeless: why it can only be failed.

    stat: somebody waits for it
    """

    study: Study
    lease: str
    attempts: int
    hopeless: str | None = None
    stat: bool = False


@dataclass(frozen=True, slots=True)
class Task:
    """A piece of work by the clock, ours until the lease runs out."""

    id: int
    kind: str
    lease: str


def record(
    connection: Connection,
    now: datetime,
    subject: str,
    subject_id: str,
    before: str | None,
    after: str,
    detail: str | None = None,
) -> None:
    """Check a transition and write its audit row."""
    states.check(subject, before, after)
    connection.execute(
        event.insert().values(
            at=now,
            subject=subject,
            subject_id=subject_id,
            from_state=before,
            to_state=after,
            detail=detail,
        )
    )


def audit_event(database: Database, **values: Any) -> None:
    """Write a row of the audit table, at the database's time."""
    with database.write() as connection:
        connection.execute(audit.insert().values(at=database.now(connection), **values))


def patient_key(database: Database, connection: Connection | None, patient_id: str) -> str | None:
    """What a Patient ID is known by here: HMAC-SHA256 with this database's salt; None for none.

    connection: where the salt may not have been read yet
    """
    return keyed(database, connection, patient_id)


def accession_key(
    database: Database, connection: Connection | None, accession_number: str
) -> str | None:
    """What an Accession Number is known by; never as a Patient ID that reads the same."""
    number = accession_number.strip()
    return keyed(database, connection, f"accession {number}") if number else None


def keyed(database: Database, connection: Connection | None, words: str) -> str | None:
    """HMAC-SHA256 of identifying words with this database's salt; None for none."""
    if not words.strip():
        return None
    if database.patient_salt is None:
        assert connection is not None
        database.patient_salt = connection.execute(select(site.c.patient_salt)).scalar_one()
    return _hmac(str(database.patient_salt), words.strip())


@lru_cache(maxsize=256)  # the images of a study have one patient
def _hmac(salt: str, words: str) -> str:
    return hmac.new(salt.encode(), words.encode(), hashlib.sha256).hexdigest()


def lock_study(connection: Connection, database: Database, uid: str, now: datetime) -> Any:
    """The study's row, made where it is missing, locked until the commit."""
    known = connection.execute(_LOCKED, {"uid": uid}).first()
    if known is None:
        _make_study(connection, database, uid, now)
        known = connection.execute(_LOCKED, {"uid": uid}).one()
    if known.node is None and database.node is not None:  # received before there were nodes
        connection.execute(
            update(study).where(study.c.study_instance_uid == uid).values(node=database.node)
        )
        return connection.execute(_LOCKED, {"uid": uid}).one()
    return known


def _make_study(connection: Connection, database: Database, uid: str, now: datetime) -> None:
    made = connection.execute(
        database.insert(study)
        .values(
            study_instance_uid=uid,
            state="skipped",
            revision=0,
            attempts=0,
            reason=NOTHING_YET,
            node=database.node,
            received_at=now,
            last_received_at=now,
        )
        .on_conflict_do_nothing()
        .returning(study.c.study_instance_uid)
    ).first()
    if made is not None:
        record(connection, now, "study", uid, None, "skipped", NOTHING_YET)


def reopen(
    connection: Connection, now: datetime, known: Any, due: datetime, why: str, **values: Any
) -> None:
    """Make a study due; at a new revision, where its last one was claimed or closed."""
    uid = known.study_instance_uid
    if known.state != "receiving":
        values |= {
            "state": "receiving",
            "revision": known.revision + 1,
            "attempts": 0,
            "lease": None,
            "reason": None,
        }
        record(connection, now, "study", uid, known.state, "receiving", why)
        _supersede(connection, now, uid)
    connection.execute(
        update(study).where(study.c.study_instance_uid == uid).values(due_at=due, **values)
    )


def _analyzable(connection: Connection, uid: str, *more: ColumnElement[bool]) -> int:
    return connection.execute(
        select(func.count())
        .select_from(instance)
        .where(instance.c.study_instance_uid == uid, instance.c.analyzable, *more)
    ).scalar_one()


def held_here(database: Database) -> list[ColumnElement[bool]]:
    """Only studies whose files lie in this daemon's own folder."""
    if database.node is None:
        return []
    return [or_(study.c.node.is_(None), study.c.node == database.node)]


def _supersede(connection: Connection, now: datetime, study_instance_uid: str) -> None:
    """What still waits to be sent for the old revision is not sent; withdrawals stay true."""
    own = select(result.c.sop_instance_uid).where(
        result.c.study_instance_uid == study_instance_uid, result.c.kind != WITHDRAWAL
    )
    _end_deliveries(connection, now, delivery.c.sop_instance_uid.in_(own), "pending")


def _end_deliveries(
    connection: Connection, now: datetime, chosen: ColumnElement[bool], state: str
) -> None:
    rows = connection.execute(
        update(delivery)
        .where(delivery.c.state == state, chosen)
        .values(state="superseded", due_at=None, lease=None)
        .returning(delivery.c.id)
    ).all()
    for row in rows:
        record(connection, now, "delivery", str(row.id), state, "superseded")


def claim_study(
    database: Database, data_dir: Path, lease_seconds: float, max_attempts: int, alone: bool = False
) -> Claim | None:
    """Take the study that has been due longest, stat studies first; or None.

    alone: take one that crashed its worker before; the caller has nothing else in hand.
    One that has crashed max_attempts times while alone is hopeless; one that crashes even the
    attempt to say so is failed here, and so is one of two patients, of which nobody could say
    whose its results would be.
    """
    suspect = study.c.attempts >= CRASHES_IN_COMPANY
    with database.write() as connection:
        now = database.now(connection)
        due = (
            select(study)
            .where(
                study.c.state.in_(("receiving", "analyzing")),
                study.c.due_at <= now,
                suspect if alone else ~suspect,
                *held_here(database),
            )
            .order_by(study.c.due_at)
            .limit(1)
            .with_for_update(skip_locked=True)
        )
        # Two questions, each with an index of its own: a backlog of thousands is not sorted.
        row = connection.execute(due.where(STAT)).first() or connection.execute(due).first()
        if row is None:
            return None
        uid = row.study_instance_uid
        limit = CRASHES_IN_COMPANY + max_attempts
        reason = f"the worker died {row.attempts} times while analyzing this study"
        if row.attempts > limit:
            _close(connection, now, uid, row.state, "failed", reason)
            return None
        if _patients(connection, uid) > 1:
            _close(connection, now, uid, row.state, "failed", TWO_PATIENTS)
            return None
        lease = str(uuid.uuid4())
        connection.execute(
            update(study)
            .where(study.c.study_instance_uid == uid)
            .values(
                state="analyzing",
                lease=lease,
                attempts=row.attempts + 1,
                due_at=now + timedelta(seconds=lease_seconds),
            )
        )
        record(connection, now, "study", uid, row.state, "analyzing", f"attempt {row.attempts + 1}")
        members = _members(connection, uid, data_dir)
    hopeless = reason if row.attempts >= limit else None
    return Claim(
        Study(uid, row.revision, row.last_received_at, members),
        lease,
        row.attempts + 1,
        hopeless,
        row.stat,
    )


def _members(connection: Connection, uid: str, data_dir: Path) -> tuple[Instance, ...]:
    """What of a study is to be analyzed and still has its file."""
    rows = connection.execute(
        select(instance)
        .where(
            instance.c.study_instance_uid == uid,
            instance.c.analyzable,
            instance.c.path.is_not(None),
        )
        .order_by(instance.c.series_instance_uid, instance.c.sop_instance_uid)
    )
    return tuple(as_instance(row, data_dir) for row in rows)


def as_instance(row: Any, data_dir: Path) -> Instance:
    """A row that still has its file."""
    return Instance(
        row.sop_instance_uid,
        row.sop_class_uid,
        row.series_instance_uid,
        row.transfer_syntax_uid,
        data_dir / row.path,
        row.digest,
    )


def _patients(connection: Connection, uid: str) -> int:
    return connection.execute(
        select(func.count(instance.c.patient.distinct())).where(
            instance.c.study_instance_uid == uid, instance.c.analyzable
        )
    ).scalar_one()


def _close(
    connection: Connection,
    now: datetime,
    uid: str,
    before: str,
    after: str,
    reason: str | None,
    **values: Any,
) -> None:
    connection.execute(
        update(study)
        .where(study.c.study_instance_uid == uid)
        .values(state=after, due_at=None, lease=None, reason=reason, **values)
    )
    record(connection, now, "study", uid, before, after, reason)


def renew_study(database: Database, claim: Claim, lease_seconds: float) -> bool:
    """Move the expiry of a lease; False where it is no longer ours."""
    with database.write() as connection:
        due = database.now(connection) + timedelta(seconds=lease_seconds)
        done = connection.execute(update(study).where(*_mine(claim)).values(due_at=due))
        return bool(done.rowcount)


def _mine(claim: Claim) -> tuple[Any, ...]:
    return (
        study.c.study_instance_uid == claim.study.study_instance_uid,
        study.c.lease == claim.lease,
        study.c.revision == claim.study.revision,
    )


def _lock_mine(connection: Connection, claim: Claim) -> None:
    row = connection.execute(
        select(study.c.study_instance_uid).where(*_mine(claim)).with_for_update()
    ).first()
    if row is None:
        raise LeaseLost("the study was changed or taken over while it was analyzed")


def complete(
    database: Database,
    claim: Claim,
    done: Analysis,
    data_dir: Path,
    outputs: Mapping[str, Collection[str]],
    publish: Callable[[Analysis], Analysis],
) -> None:
    """Commit an analysis with its findings, results and deliveries, all or nothing.

    outputs: destination name -> kinds of results that it gets; publish: gives its files the names
    that the rows will have, once it is sure that the study is still ours. Raises LeaseLost.
    """
    after = "analyzed" if done.findings else "skipped"
    reason = None if done.findings else "no image of this study can be analyzed"
    revision = claim.study.revision
    _conclude(
        database, claim, done, data_dir, outputs, publish, after, reason, analyzed_revision=revision
    )


def fail_study(
    database: Database,
    claim: Claim,
    reason: str,
    done: Analysis,
    data_dir: Path,
    outputs: Mapping[str, Collection[str]],
    publish: Callable[[Analysis], Analysis],
) -> None:
    """Close a study as failed, with what is said of that; a person can retry it.

    Raises LeaseLost.
    """
    _conclude(database, claim, done, data_dir, outputs, publish, "failed", reason[:500])


def _conclude(
    database: Database,
    claim: Claim,
    done: Analysis,
    data_dir: Path,
    outputs: Mapping[str, Collection[str]],
    publish: Callable[[Analysis], Analysis],
    after: str,
    reason: str | None,
    **values: Any,
) -> None:
    uid = claim.study.study_instance_uid
    with database.write() as connection:
        now = database.now(connection)
        _lock_mine(connection, claim)
        done = publish(done)
        analysis_id = connection.execute(
            analysis.insert().values(
                study_instance_uid=uid,
                revision=claim.study.revision,
                model_name=done.model.name,
                model_version=done.model.version,
                completed_at=now,
            )
        ).inserted_primary_key[0]  # type: ignore[index]
        _write_exclusions(connection, uid, done)
        _write_predictions(connection, database, done)
        if done.findings:
            connection.execute(finding.insert(), _finding_rows(uid, analysis_id, done))
        _write_results(connection, database, now, uid, analysis_id, done, data_dir)
        _write_deliveries(connection, database, now, done, outputs)
        _close(connection, now, uid, "analyzing", after, reason, attempts=0, **values)


def _write_exclusions(connection: Connection, uid: str, done: Analysis) -> None:
    connection.execute(
        update(instance)
        .where(instance.c.study_instance_uid == uid)
        .values(exclusion_code=None, exclusion_reason=None)
    )
    for exclusion in done.exclusions:
        connection.execute(
            update(instance)
            .where(
                instance.c.study_instance_uid == uid,
                instance.c.sop_instance_uid == exclusion.instance.sop_instance_uid,
            )
            .values(exclusion_code=exclusion.code, exclusion_reason=exclusion.reason[:500])
        )


def _write_predictions(connection: Connection, database: Database, done: Analysis) -> None:
    for item in done.predictions:
        score = item.score
        connection.execute(
            database.insert(prediction)
            .values(
                digest=item.frame.source.digest,
                frame_number=item.frame.number,
                model_name=done.model.name,
                model_version=done.model.version,
                engine=score.engine,
                probabilities=score.probabilities.astype("<f4").tobytes(),
                biases=score.biases.astype("<f4").tobytes(),
                maps=score.maps.astype("<f4").tobytes(),
                map_rows=score.maps.shape[1],
                map_columns=score.maps.shape[2],
                analyzed_at=score.analyzed_at,
            )
            .on_conflict_do_nothing()
        )


def _finding_rows(uid: str, analysis_id: int, done: Analysis) -> list[dict[str, Any]]:
    return [
        {
            "analysis_id": analysis_id,
            "study_instance_uid": uid,
            "series_instance_uid": item.frame.source.series_instance_uid,
            "sop_instance_uid": item.frame.source.sop_instance_uid,
            "frame_number": item.frame.number,
            "label": item.label.key,
            "code_value": item.label.code.value,
            "code_scheme": item.label.code.scheme,
            "probability": item.probability,
            "threshold": item.label.threshold,
            "positive": item.positive,
            "presence": item.presence.value,
            "analyzed_at": item.analyzed_at,
        }
        for item in done.findings
    ]


def _write_results(
    connection: Connection,
    database: Database,
    now: datetime,
    uid: str,
    analysis_id: int,
    done: Analysis,
    data_dir: Path,
) -> None:
    # A document that names its predecessor has the last word on what replaced that.
    for item in sorted(done.results, key=lambda item: item.kind != WITHDRAWAL):
        path = str(item.path.relative_to(data_dir))
        connection.execute(
            database.insert(result)
            .values(
                sop_instance_uid=item.sop_instance_uid,
                study_instance_uid=uid,
                analysis_id=analysis_id,
                series_instance_uid=item.series_instance_uid,
                sop_class_uid=item.sop_class_uid,
                kind=item.kind,
                source_sop_instance_uid=item.source_sop_instance_uid,
                path=path,
                created_at=now,
            )
            # Made again after its file had been removed.
            .on_conflict_do_update(index_elements=["sop_instance_uid"], set_={"path": path})
        )
        if item.replaces:
            _replace(connection, now, item)


def _replace(connection: Connection, now: datetime, item: Result) -> None:
    """What a result replaces ends; what a sender died over is not sent after the withdrawal."""
    connection.execute(
        update(result)
        .where(result.c.sop_instance_uid.in_(item.replaces))
        .values(replaced_by=item.sop_instance_uid)
    )
    for state in ("pending", "sending"):
        _end_deliveries(connection, now, delivery.c.sop_instance_uid.in_(item.replaces), state)


def _write_deliveries(
    connection: Connection,
    database: Database,
    now: datetime,
    done: Analysis,
    outputs: Mapping[str, Collection[str]],
) -> None:
    for item in done.results:
        for name, kinds in outputs.items():
            if item.kind not in kinds or item.destination not in {None, name}:
                continue
            made = connection.execute(
                database.insert(delivery)
                .values(
                    sop_instance_uid=item.sop_instance_uid,
                    destination=name,
                    state="pending",
                    due_at=now,
                    attempts=0,
                    tried=False,
                    created_at=now,
                )
                .on_conflict_do_nothing()
                .returning(delivery.c.id)
            ).first()
            if made is not None:
                record(connection, now, "delivery", str(made.id), None, "pending")
                continue
            # The same object in a later revision: what was delivered stays, what was superseded
            # before it went out is due again.
            again = connection.execute(
                update(delivery)
                .where(
                    delivery.c.sop_instance_uid == item.sop_instance_uid,
                    delivery.c.destination == name,
                    delivery.c.state == "superseded",
                )
                .values(state="pending", due_at=now, attempts=0)
                .returning(delivery.c.id)
            ).first()
            if again is not None:
                record(connection, now, "delivery", str(again.id), "superseded", "pending")


def release_study(
    database: Database, claim: Claim, wait_seconds: float = 0.0, reason: str | None = None
) -> None:
    """Give a study back unfinished; this is not counted as an attempt."""
    with database.write() as connection:
        now = database.now(connection)
        done = connection.execute(
            update(study)
            .where(*_mine(claim))
            .values(
                state="receiving",
                lease=None,
                attempts=claim.attempts - 1,
                due_at=now + timedelta(seconds=wait_seconds),
                reason=reason,
            )
        )
        if done.rowcount:
            uid = claim.study.study_instance_uid
            record(connection, now, "study", uid, "analyzing", "receiving", reason or "given back")


def begin_ahead(database: Database, study_instance_uid: str) -> bool:
    """Count an attempt at a study whose images are worked on while it arrives.

    False where it does not arrive any more, or somebody has died over it.
    """
    return _count_ahead(database, study_instance_uid, 0, 1)


def end_ahead(database: Database, study_instance_uid: str) -> None:
    """Nobody has died: the attempt does not count."""
    _count_ahead(database, study_instance_uid, 1, 0)


def _count_ahead(database: Database, uid: str, before: int, after: int) -> bool:
    with database.write() as connection:
        done = connection.execute(
            update(study)
            .where(
                study.c.study_instance_uid == uid,
                study.c.state == "receiving",
                study.c.attempts == before,
            )
            .values(attempts=after)
        )
        return bool(done.rowcount)


def retry_study(database: Database, study_instance_uid: str) -> bool:
    """Make a closed study due now at a new revision; False where it is not closed or unknown."""
    with database.write() as connection:
        now = database.now(connection)
        row = connection.execute(
            select(study).where(study.c.study_instance_uid == study_instance_uid).with_for_update()
        ).first()
        if row is None or row.state in {"receiving", "analyzing"} or row.revision == 0:
            return False
        if not _analyzable(connection, study_instance_uid, instance.c.path.is_not(None)):
            return False
        reopen(connection, now, row, now, "retried")
        return True


def add_task(database: Database, kind: str, due: datetime, node: str | None = None) -> bool:
    """Insert a task once for its moment; False where it is there already.

    node: of which daemon, "" of whichever is free; None: of this one
    """
    owner = (database.node or "") if node is None else node
    with database.write() as connection:
        now = database.now(connection)
        made = connection.execute(
            database.insert(task)
            .values(kind=kind, due=due, node=owner, state="due", due_at=due, attempts=0)
            .on_conflict_do_nothing()
            .returning(task.c.id)
        ).first()
        if made is not None:
            record(connection, now, "task", str(made.id), None, "due", kind)
        return made is not None


def claim_task(database: Database, lease_seconds: float) -> Task | None:
    """Take the task that has been due longest, or None."""
    with database.write() as connection:
        now = database.now(connection)
        row = connection.execute(
            select(task)
            .where(
                task.c.state.in_(("due", "running")),
                task.c.due_at <= now,
                task.c.node.in_(("", database.node or "")),
            )
            .order_by(task.c.due_at)
            .limit(1)
            .with_for_update(skip_locked=True)
        ).first()
        if row is None:
            return None
        lease = str(uuid.uuid4())
        connection.execute(
            update(task)
            .where(task.c.id == row.id)
            .values(
                state="running",
                lease=lease,
                attempts=row.attempts + 1,
                due_at=now + timedelta(seconds=lease_seconds),
            )
        )
        record(connection, now, "task", str(row.id), row.state, "running")
        return Task(row.id, row.kind, lease)


def finish_task(database: Database, item: Task, state: str, detail: str) -> None:
    """Close a task as done or failed."""
    with database.write() as connection:
        now = database.now(connection)
        done = connection.execute(
            update(task)
            .where(task.c.id == item.id, task.c.lease == item.lease)
            .values(state=state, due_at=None, lease=None, detail=detail[:500])
        )
        if done.rowcount:
            record(connection, now, "task", str(item.id), "running", state, detail)


def pull_in(database: Database, seconds: float) -> None:
    """Let nothing wait for longer than so many seconds from now.

    A clock that is set back leaves moments behind that are too far ahead. A lease that becomes
    due meanwhile is renewed by whoever lives.
    """
    with database.write() as connection:
        soon = database.now(connection) + timedelta(seconds=seconds)
        for table in (study, delivery, destination, task):
            connection.execute(update(table).where(table.c.due_at > soon).values(due_at=soon))
