"""What is removed for good: the files of old studies (retention), and a patient's data (purge)."""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import ColumnElement, Connection, Select, and_, delete, func, or_, select, update

from dicomai.store.database import Database
from dicomai.store.queue import PURGED, held_here, lock_study, patient_key, reopen
from dicomai.store.states import OPEN
from dicomai.store.tables import (
    analysis,
    delivery,
    document,
    event,
    example,
    finding,
    instance,
    label,
    patient_split,
    prediction,
    result,
    study,
)

CLOSED = ("analyzed", "skipped")  # what has failed is a person's to look at


@dataclass(frozen=True, slots=True)
class Removed:
    """What a purge took away; whole: nothing of the study is left."""

    whole: bool
    images: int
    results: int
    findings: int
    files: int


def removable(database: Database, before: datetime | None = None) -> list[str]:
    """Closed studies whose files may go, the longest untouched first.

    before: those whose last image came earlier. Whatever any destination was to get of them it
    has, and has committed itself to where that was asked; what it refused is a person's to decide.
    What is labelled is learnt from, again and again, and stays.
    """
    kept = select(instance.c.path).where(
        instance.c.study_instance_uid == study.c.study_instance_uid, instance.c.path.is_not(None)
    )
    statement = select(study.c.study_instance_uid).where(
        study.c.state.in_(CLOSED),
        kept.exists(),
        ~_unsent(study.c.study_instance_uid).exists(),
        ~_labels(study.c.study_instance_uid).exists(),
        *held_here(database),
    )
    if before is not None:
        statement = statement.where(study.c.last_received_at < before)
    with database.read() as connection:
        return list(connection.execute(statement.order_by(study.c.last_received_at)).scalars())


def forget_files(database: Database, study_instance_uid: str) -> list[str]:
    """Note that a closed study's files are gone, and return their paths, to be removed.

    Findings and history stay. Nothing is returned where the study is not closed any more.
    """
    with database.write() as connection:
        state = connection.execute(
            select(study.c.state)
            .where(study.c.study_instance_uid == study_instance_uid)
            .with_for_update()
        ).scalar_one_or_none()
        needed = (_unsent(study_instance_uid), _labels(study_instance_uid))
        if state not in CLOSED or any(connection.execute(x.limit(1)).first() for x in needed):
            return []
        paths = _paths(connection, study_instance_uid)
        for table in (instance, result):
            connection.execute(
                update(table)
                .where(table.c.study_instance_uid == study_instance_uid)
                .values(path=None)
            )
        return paths


@contextmanager
def unreferenced(
    database: Database, study_instance_uid: str, paths: Sequence[str]
) -> Iterator[set[str]]:
    """Those of these files of a study that no row names; none gets a row within the block.

    Results of a study that is being analyzed are left out: theirs are about to come.
    """
    with database.write() as connection:
        # A study that has no row is locked by a row that nobody else ever sees.
        known = lock_study(connection, database, study_instance_uid, database.now(connection))
        free = set(paths) - set(_paths(connection, study_instance_uid))
        if known.state == "analyzing":
            free = {path for path in free if not path.startswith("results/")}
        yield free
        connection.rollback()


def _unsent(uid: Any) -> Select[Any]:
    """Deliveries of a study that some destination has not got; uid: a value or a column."""
    return (
        select(delivery.c.id)
        .join(result, result.c.sop_instance_uid == delivery.c.sop_instance_uid)
        .where(result.c.study_instance_uid == uid, delivery.c.state.in_((*OPEN, "failed")))
    )


def _labels(uid: Any, key: str | None = None) -> Select[Any]:
    """What is said of a study, or of its images; key: of its images, only a patient's.

    Of a study of two patients nobody knows of whom it is said.
    """
    uids = select(instance.c.sop_instance_uid).where(*_images(uid, key))
    return select(label.c.id).where(
        or_(
            and_(label.c.subject == "study", label.c.subject_id == uid),
            and_(label.c.subject == "image", label.c.subject_id.in_(uids)),
        )
    )


def _paths(connection: Connection, uid: str, key: str | None = None) -> list[str]:
    images = select(instance.c.path).where(*_images(uid, key), instance.c.path.is_not(None))
    results = select(result.c.path).where(
        result.c.study_instance_uid == uid, result.c.path.is_not(None)
    )
    return [path for rows in (images, results) for path in connection.execute(rows).scalars()]


def studies_of(database: Database, patient_id: str) -> list[str]:
    """The studies that hold an image of a patient."""
    with database.read() as connection:
        key = patient_key(database, connection, patient_id)
        return list(
            connection.execute(
                select(instance.c.study_instance_uid)
                .where(instance.c.patient == key)
                .distinct()
                .order_by(instance.c.study_instance_uid)
            ).scalars()
        )


def without_patient(database: Database) -> dict[tuple[str, str], str]:
    """Images received before there were patients' keys: (study, SOP Instance UID) -> path."""
    with database.read() as connection:
        rows = connection.execute(
            select(
                instance.c.study_instance_uid, instance.c.sop_instance_uid, instance.c.path
            ).where(instance.c.patient.is_(None), instance.c.path.is_not(None))
        ).all()
    return {(row.study_instance_uid, row.sop_instance_uid): row.path for row in rows}


def set_patient(database: Database, name: tuple[str, str], patient_id: str) -> None:
    """Note whose an image is that was received before there were patients' keys."""
    with database.write() as connection:
        connection.execute(
            update(instance)
            .where(instance.c.study_instance_uid == name[0])
            .where(instance.c.sop_instance_uid == name[1])
            .values(patient=patient_key(database, connection, patient_id))
        )


def held_elsewhere(database: Database, study_instance_uids: Collection[str]) -> list[str]:
    """Those whose files lie in another daemon's folder."""
    with database.read() as connection:
        return list(
            connection.execute(
                select(study.c.study_instance_uid).where(
                    study.c.study_instance_uid.in_(study_instance_uids),
                    study.c.node.is_not(None),
                    study.c.node != database.node,
                )
            ).scalars()
        )


def purge(
    database: Database,
    study_instance_uid: str,
    remove: Callable[[Collection[str]], None],
    patient_id: str | None = None,
) -> Removed:
    """Remove a study with all that is known of it, but for the audit events.

    remove: takes away files, before the commit: one that is killed is done again, and the sweep
    would give back to its study an image that had lost only its row.
    patient_id: where the study also holds images of others, only this patient's go; its results,
    which speak of both, go too, and what is left is analyzed again. A worker or a sender that has
    the study in hand finds its lease lost.
    """
    uid = study_instance_uid
    with database.write() as connection:
        now = database.now(connection)
        key = patient_key(database, connection, patient_id) if patient_id is not None else None
        known = connection.execute(
            select(study).where(study.c.study_instance_uid == uid).with_for_update()
        ).one()
        paths = _paths(connection, uid, key)
        results = _remove_results(connection, uid)
        findings = _remove_findings(connection, uid)
        _delete(connection, analysis, uid)
        _remove_labels(connection, uid, key)
        images = _remove_images(connection, uid, key)
        whole = not _count(connection, instance, uid)
        if whole:
            connection.execute(delete(event).where(event.c.subject_id == uid))
            connection.execute(delete(study).where(study.c.study_instance_uid == uid))
        else:
            reopen(connection, now, known, now, PURGED, analyzed_revision=None)
        remove(paths)
    return Removed(whole, images, results, findings, len(paths))


def _count(connection: Connection, table: Any, uid: str) -> int:
    return connection.execute(
        select(func.count()).select_from(table).where(table.c.study_instance_uid == uid)
    ).scalar_one()


def _remove_results(connection: Connection, uid: str) -> int:
    own = select(result.c.sop_instance_uid).where(result.c.study_instance_uid == uid)
    ids = connection.execute(
        delete(delivery).where(delivery.c.sop_instance_uid.in_(own)).returning(delivery.c.id)
    ).scalars()
    for one in list(ids):
        connection.execute(
            delete(event).where(event.c.subject == "delivery", event.c.subject_id == str(one))
        )
    return _delete(connection, result, uid)


def _remove_findings(connection: Connection, uid: str) -> int:
    of_study = select(analysis.c.id).where(analysis.c.study_instance_uid == uid)
    chosen = delete(finding).where(finding.c.analysis_id.in_(of_study))
    return connection.execute(chosen).rowcount


def _delete(connection: Connection, table: Any, uid: str) -> int:
    return connection.execute(delete(table).where(table.c.study_instance_uid == uid)).rowcount


def _remove_labels(connection: Connection, uid: str, key: str | None) -> None:
    """What readers said of these images, the documents they said it in, and whose split it was."""
    connection.execute(delete(label).where(label.c.id.in_(_labels(uid, key))))
    uids = select(instance.c.sop_instance_uid).where(*_images(uid, key))
    connection.execute(
        delete(document).where(
            document.c.study_instance_uid == uid, document.c.sop_instance_uid.in_(uids)
        )
    )
    other = instance.alias()
    elsewhere = select(other.c.patient).where(
        other.c.patient == instance.c.patient, other.c.study_instance_uid != uid
    )
    patients = select(instance.c.patient).where(
        *_images(uid, key), instance.c.patient.is_not(None), ~elsewhere.exists()
    )
    brought = select(example.c.id).where(example.c.patient == patient_split.c.patient)
    connection.execute(
        delete(patient_split).where(
            patient_split.c.patient.in_(patients.correlate(None)), ~brought.exists()
        )
    )


def _remove_images(connection: Connection, uid: str, key: str | None) -> int:
    digests = list(
        connection.execute(
            delete(instance).where(*_images(uid, key)).returning(instance.c.digest)
        ).scalars()
    )
    connection.execute(delete(prediction).where(prediction.c.digest.in_(digests)))
    return len(digests)


def _images(uid: Any, key: str | None) -> list[ColumnElement[bool]]:
    of_study = [instance.c.study_instance_uid == uid]
    return of_study if key is None else [*of_study, instance.c.patient == key]
