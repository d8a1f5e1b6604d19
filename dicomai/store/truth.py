"""Ground truth: what readers say of images, and which images of whom there are to learn from."""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime
from typing import Any

from sqlalchemy import Connection, String, cast, delete, func, or_, select, text, update

from dicomai.store.database import Database
from dicomai.store.queue import accession_key, held_here, keyed, patient_key
from dicomai.store.tables import document, example, instance, label, patient_split, study

PAGE = 500  # names in one statement


@dataclass(frozen=True, slots=True)
class Said:
    """What one reader says of a subject: (study | image, its UID) or (example, its id)."""

    subject: tuple[str, str]
    label: str
    value: str
    reader: str
    read_on: date | None
    source: str
    origin: str


@dataclass(frozen=True, slots=True)
class Example:
    """An image that was brought to be learnt from;"""

    path: str
    digest: str
    patient_id: str
    source: str
    split: str | None
    sex: str | None
    age_years: float | None
    view: str | None
    manufacturer: str | None
    labels: Mapping[str, str]
    reader: str
    read_on: date | None


@dataclass(frozen=True, slots=True)
class Candidate:
    """An image with whatever was said of it, before readers are brought to agree.

    path: below data_dir where the image was received, else absolute; said: label -> (source, value)
    of each reader, those who speak of the image instead of those who speak of its study
    """

    name: str
    path: str
    digest: str
    patient: str
    source: str
    split: str | None
    said: Mapping[str, Sequence[tuple[str, str]]]
    facts: Mapping[str, Any]


def subjects(database: Database, column: str, names: Collection[str]) -> dict[str, tuple[str, str]]:
    """Identifiers that are known -> what they name; column: as in a file of labels.

    An Accession Number names its study; of several studies with one number none is chosen.
    """
    found: dict[str, tuple[str, str]] = {}
    ordered = sorted(names)
    with database.read() as connection:
        for start in range(0, len(ordered), PAGE):
            part = ordered[start : start + PAGE]
            if column == "sop_instance_uid":
                found |= {uid: ("image", uid) for uid in _images(connection, part)}
            elif column == "study_instance_uid":
                found |= {uid: ("study", uid) for uid in _studies(connection, part)}
            else:
                keys = {accession_key(database, connection, name): name for name in part}
                found |= {keys[k]: ("study", uid) for k, uid in _by_accession(connection, keys)}
    return found


def images_of(
    database: Database, study_instance_uid: str, names: Collection[str]
) -> dict[str, tuple[str, str]]:
    """As subjects() of images; those of the study, which is most of them, are found at once."""
    statement = select(instance.c.sop_instance_uid).where(
        instance.c.study_instance_uid == study_instance_uid, instance.c.analyzable
    )
    with database.read() as connection:
        here = set(connection.execute(statement).scalars()) & set(names)
    elsewhere = subjects(database, "sop_instance_uid", set(names) - here)
    return {uid: ("image", uid) for uid in here} | elsewhere


def _images(connection: Connection, uids: Sequence[str]) -> Iterable[str]:
    statement = select(instance.c.sop_instance_uid).where(
        instance.c.sop_instance_uid.in_(uids), instance.c.analyzable
    )
    return connection.execute(statement.distinct()).scalars()


def _studies(connection: Connection, uids: Sequence[str]) -> Iterable[str]:
    statement = select(study.c.study_instance_uid).where(study.c.study_instance_uid.in_(uids))
    return connection.execute(statement).scalars()


def _by_accession(
    connection: Connection, keys: Collection[str | None]
) -> Iterable[tuple[str, str]]:
    statement = (
        select(study.c.accession, func.min(study.c.study_instance_uid))
        .where(study.c.accession.in_([key for key in keys if key]))
        .group_by(study.c.accession)
        .having(func.count() == 1)
    )
    return [(row[0], row[1]) for row in connection.execute(statement)]


def say(database: Database, statements: Sequence[Said]) -> Counter[str]:
    """Keep what readers say, all or nothing; returns how many were new, changed, same or older.

    Of one reader the latest holds: a dated statement is replaced by none that is older.
    """
    with database.write() as connection:
        return _say(database, connection, statements)


def _say(database: Database, connection: Connection, statements: Sequence[Said]) -> Counter[str]:
    now, outcome = database.now(connection), Counter[str]()
    for item in sorted(statements, key=lambda said: said.read_on or date.min):
        kind, name = item.subject
        same = (
            label.c.subject == kind,
            label.c.subject_id == name,
            label.c.label == item.label,
            label.c.reader == item.reader,
        )
        old = connection.execute(select(label).where(*same)).first()
        values = {
            "value": item.value,
            "read_on": item.read_on,
            "source": item.source,
            "origin": item.origin,
            "added_at": now,
        }
        if old is None:
            known = {"subject": kind, "subject_id": name, "label": item.label}
            connection.execute(label.insert().values(**known, reader=item.reader, **values))
            outcome["new"] += 1
        elif (item.read_on or date.min) < (old.read_on or date.min):
            outcome["older"] += 1
        elif old.value == item.value and old.read_on == item.read_on:
            outcome["same"] += 1
        else:
            connection.execute(update(label).where(*same).values(**values))
            outcome["changed"] += 1
    return outcome


def add_examples(
    database: Database, dataset: str, examples: Sequence[Example], origin: str
) -> tuple[Counter[str], Counter[str]]:
    """Keep a dataset's images with their labels, all or nothing.

    An image that is there already (by its path) is brought up to date; one that is not named any
    more goes, and so does a label. Returns how many images, and how many labels, were new, changed,
    same or gone.
    """
    outcome = Counter[str]()
    statements: list[Said] = []
    with database.write() as connection:
        now = database.now(connection)
        known = {
            row.path: row
            for row in connection.execute(select(example).where(example.c.dataset == dataset))
        }
        for item in examples:
            patient = patient_key(database, connection, item.patient_id)
            old = known.get(item.path)
            number, became = _keep_example(connection, dataset, item, patient, old, now)
            outcome[became] += 1
            subject = ("example", str(number))
            statements += [
                Said(subject, key, value, item.reader, item.read_on, "file", origin)
                for key, value in item.labels.items()
            ]
        gone = [known[path].id for path in known.keys() - {item.path for item in examples}]
        _forget_examples(connection, gone)
        outcome["gone"] = len(gone)
        labels = _say(database, connection, statements)
        labels["gone"] = _forget_unsaid(connection, dataset, statements)
        return +outcome, +labels


def _keep_example(
    connection: Connection,
    dataset: str,
    item: Example,
    patient: str | None,
    old: Any,
    now: datetime,
) -> tuple[int, str]:
    """Its row's id, and whether it was new, changed or same; old: its row, None without one."""
    values = {
        "digest": item.digest,
        "patient": patient,
        "source": item.source,
        "split": item.split,
        "sex": item.sex,
        "age_years": item.age_years,
        "view": item.view,
        "manufacturer": item.manufacturer,
    }
    if old is None:
        whole = {"dataset": dataset, "path": item.path, "added_at": now, **values}
        statement = example.insert().values(**whole).returning(example.c.id)
        return connection.execute(statement).scalar_one(), "new"
    if all(getattr(old, key) == value for key, value in values.items()):
        return int(old.id), "same"
    connection.execute(update(example).where(example.c.id == old.id).values(**values))
    return int(old.id), "changed"


def _forget_examples(connection: Connection, ids: Sequence[int]) -> None:
    for start in range(0, len(ids), PAGE):
        part = ids[start : start + PAGE]
        subjects_of = label.c.subject_id.in_([str(number) for number in part])
        connection.execute(delete(label).where(label.c.subject == "example", subjects_of))
        connection.execute(delete(example).where(example.c.id.in_(part)))


def _forget_unsaid(connection: Connection, dataset: str, statements: Sequence[Said]) -> int:
    """Take back what these readers do not say of a dataset's images any more."""
    said = {(item.subject[1], item.label, item.reader) for item in statements}
    readers = {item.reader for item in statements}
    ids = select(cast(example.c.id, String)).where(example.c.dataset == dataset)
    chosen = select(label).where(
        label.c.subject == "example", label.c.subject_id.in_(ids), label.c.reader.in_(readers)
    )
    unsaid = [
        row.id
        for row in connection.execute(chosen)
        if (row.subject_id, row.label, row.reader) not in said
    ]
    for start in range(0, len(unsaid), PAGE):
        connection.execute(delete(label).where(label.c.id.in_(unsaid[start : start + PAGE])))
    return len(unsaid)


def without_accession(database: Database) -> dict[str, str]:
    """Studies of which nobody looked for the Accession Number: UID -> an image's path."""
    statement = (
        select(study.c.study_instance_uid, func.min(instance.c.path))
        .join(instance, instance.c.study_instance_uid == study.c.study_instance_uid)
        .where(study.c.accession.is_(None), instance.c.path.is_not(None), *held_here(database))
        .group_by(study.c.study_instance_uid)
    )
    with database.read() as connection:
        return {row[0]: row[1] for row in connection.execute(statement)}


def set_accession(database: Database, study_instance_uid: str, accession_number: str) -> None:
    """Note the Accession Number of a study that was received before it was noted."""
    with database.write() as connection:
        connection.execute(
            update(study)
            .where(study.c.study_instance_uid == study_instance_uid)
            .values(accession=accession_key(database, connection, accession_number) or "")
        )


def candidates(database: Database, labels: Collection[str]) -> list[Candidate]:
    """Images whose files are here and of which, or of whose study, a reader says any label."""
    of = {
        kind: select(label.c.subject_id).where(label.c.subject == kind, label.c.label.in_(labels))
        for kind in ("study", "image")
    }
    with database.read() as connection:
        said = _spoken_of(connection, labels)
        received = connection.execute(
            select(instance, study.c.node)
            .join(study, study.c.study_instance_uid == instance.c.study_instance_uid)
            .where(
                instance.c.analyzable,
                instance.c.path.is_not(None),
                or_(
                    instance.c.study_instance_uid.in_(of["study"]),
                    instance.c.sop_instance_uid.in_(of["image"]),
                ),
                *held_here(database),
            )
            .order_by(instance.c.study_instance_uid, instance.c.sop_instance_uid)
        )
        found = [
            # Without a Patient ID, whose image it is is known by its study alone.
            _received(row, row.patient or _study_key(database, connection, row), said)
            for row in received
        ]
        brought = connection.execute(select(example).order_by(example.c.dataset, example.c.path))
        found += [_brought(row, said) for row in brought]
    return [item for item in found if item.said]


_Said = Mapping[tuple[str, str], Mapping[str, Sequence[tuple[str, str]]]]


def _spoken_of(connection: Connection, labels: Collection[str]) -> _Said:
    said: dict[tuple[str, str], dict[str, list[tuple[str, str]]]] = {}
    chosen = select(label).where(label.c.label.in_(labels)).order_by(label.c.id)
    for row in connection.execute(chosen):
        of_subject = said.setdefault((row.subject, row.subject_id), {})
        of_subject.setdefault(row.label, []).append((row.source, row.value))
    return said


def _study_key(database: Database, connection: Connection, row: Any) -> str:
    return keyed(database, connection, f"study {row.study_instance_uid}") or ""


def _received(row: Any, patient: str, said: _Said) -> Candidate:
    of_study = said.get(("study", row.study_instance_uid), {})
    of_image = said.get(("image", row.sop_instance_uid), {})
    return Candidate(
        name=row.sop_instance_uid,
        path=row.path,
        digest=row.digest,
        patient=patient,
        source="received",
        split=None,
        said={**of_study, **of_image},
        facts={},
    )


def _brought(row: Any, said: _Said) -> Candidate:
    facts = {key: getattr(row, key) for key in ("sex", "age_years", "view", "manufacturer")}
    return Candidate(
        name=f"{row.dataset} {row.path}",
        path=row.path,
        digest=row.digest,
        patient=row.patient,
        source=row.source,
        split=row.split,
        said=said.get(("example", str(row.id)), {}),
        facts=facts,
    )


def splits(database: Database) -> dict[str, str]:
    """Patient -> split, of all who were ever in one."""
    with database.read() as connection:
        rows = connection.execute(select(patient_split.c.patient, patient_split.c.split))
        return {row.patient: row.split for row in rows}


def keep_splits(database: Database, chosen: Mapping[str, tuple[str, str]]) -> None:
    """Note the split of patients who were in none, with the reason."""
    with database.write() as connection:
        now = database.now(connection)
        statement = database.insert(patient_split).on_conflict_do_nothing()
        rows = [
            {"patient": patient, "split": split, "reason": reason, "at": now}
            for patient, (split, reason) in chosen.items()
        ]
        for start in range(0, len(rows), PAGE):
            connection.execute(statement, rows[start : start + PAGE])


def patients_of(database: Database, patient_ids: Collection[str]) -> set[str]:
    """The keys that patients with these Patient IDs have here."""
    with database.read() as connection:
        found = {patient_key(database, connection, patient_id) for patient_id in patient_ids}
    return {key for key in found if key is not None}


def reader_key(database: Database, name: str) -> str:
    """What a reader's name in a document is known by here: enough to tell readers apart."""
    with database.read() as connection:
        return f"reader {(keyed(database, connection, f'reader {name}') or '')[:12]}"


@dataclass(frozen=True, slots=True)
class Document:
    """A received document that nobody has read for labels; path: below data_dir."""

    study_instance_uid: str
    sop_instance_uid: str
    sop_class_uid: str
    digest: str
    path: str


def unread_documents(database: Database, sop_classes: Collection[str]) -> list[Document]:
    """Documents of these SOP classes that came since they were last read, or have changed."""
    is_read = select(document.c.digest).where(
        document.c.study_instance_uid == instance.c.study_instance_uid,
        document.c.sop_instance_uid == instance.c.sop_instance_uid,
        document.c.digest == instance.c.digest,
    )
    chosen = (
        select(instance)
        .join(study, study.c.study_instance_uid == instance.c.study_instance_uid)
        .where(
            instance.c.sop_class_uid.in_(sop_classes),
            text("NOT instance.analyzable"),  # in the words of the index, which SQLite compares
            instance.c.path.is_not(None),
            ~is_read.exists(),
            *held_here(database),
        )
        .order_by(instance.c.received_at)
    )
    with database.read() as connection:
        return [
            Document(
                row.study_instance_uid,
                row.sop_instance_uid,
                row.sop_class_uid,
                row.digest,
                row.path,
            )
            for row in connection.execute(chosen)
        ]


def document_read(
    database: Database, read: Document, statements: Sequence[Said], reason: str | None
) -> None:
    """Keep what a document says in place of what an earlier one of its UID said; reason: why not.

    One transaction, so that a document is read once.
    """
    with database.write() as connection:
        connection.execute(
            delete(label).where(
                label.c.source == "document", label.c.origin == read.sop_instance_uid
            )
        )
        _say(database, connection, statements)
        values = {
            "digest": read.digest,
            "labels": len(statements),
            "reason": reason,
            "read_at": database.now(connection),
        }
        connection.execute(
            database.insert(document)
            .values(
                study_instance_uid=read.study_instance_uid,
                sop_instance_uid=read.sop_instance_uid,
                **values,
            )
            .on_conflict_do_update(
                index_elements=["study_instance_uid", "sop_instance_uid"], set_=values
            )
        )


def labels(
    database: Database, study_instance_uid: str | None, key: str | None, limit: int
) -> list[dict[str, Any]]:
    """What each reader said, the newest first; of a study: its images' labels, too."""
    chosen = select(label).order_by(label.c.added_at.desc(), label.c.id.desc()).limit(limit)
    if key is not None:
        chosen = chosen.where(label.c.label == key)
    if study_instance_uid is not None:
        images = select(instance.c.sop_instance_uid).where(
            instance.c.study_instance_uid == study_instance_uid
        )
        chosen = chosen.where(
            ((label.c.subject == "study") & (label.c.subject_id == study_instance_uid))
            | ((label.c.subject == "image") & label.c.subject_id.in_(images))
        )
    with database.read() as connection:
        return [dict(row._mapping) for row in connection.execute(chosen)]


def datasets(database: Database) -> list[dict[str, Any]]:
    """Each dataset that was brought, with how many images, patients and sources it has."""
    statement = (
        select(
            example.c.dataset,
            func.count().label("images"),
            func.count(example.c.patient.distinct()).label("patients"),
            func.count(example.c.source.distinct()).label("sources"),
            func.min(example.c.added_at).label("added_at"),
        )
        .group_by(example.c.dataset)
        .order_by(example.c.dataset)
    )
    with database.read() as connection:
        return [dict(row._mapping) for row in connection.execute(statement)]


def remove_dataset(database: Database, dataset: str) -> int:
    """Forget a dataset's images and their labels; the split of its patients stays."""
    with database.write() as connection:
        chosen = select(example.c.id).where(example.c.dataset == dataset)
        ids = list(connection.execute(chosen).scalars())
        _forget_examples(connection, ids)
    return len(ids)
