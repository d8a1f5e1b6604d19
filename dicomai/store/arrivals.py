"""What arrives: instances, and when their study is due.

The statements are built once: building one costs more than executing it.
"""

import enum
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import lru_cache
from pathlib import Path
from typing import Any

from sqlalchemy import (
    Boolean,
    ColumnElement,
    Connection,
    Dialect,
    Insert,
    Update,
    bindparam,
    exists,
    func,
    literal_column,
    or_,
    select,
    update,
)
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.sql.compiler import SQLCompiler

from dicomai.errors import HeldElsewhere
from dicomai.store.database import Database
from dicomai.store.queue import accession_key, lock_study, patient_key, reopen
from dicomai.store.tables import instance, result, study
from dicomai.study import Instance

ARRIVED = "an image arrived"

_SAME = (  # by study and UID: an image that a PACS has copied into another study is there, too
    instance.c.study_instance_uid == bindparam("of_study"),
    instance.c.sop_instance_uid == bindparam("uid"),
)
_BEFORE = select(instance.c.digest, instance.c.path).where(*_SAME)
_OWN = select(result.c.kind).where(result.c.sop_instance_uid == bindparam("uid"))
_INSERT = instance.insert()
_REPLACE = update(instance).where(*_SAME)
_COUNT = (
    select(func.count())
    .select_from(instance)
    .where(instance.c.study_instance_uid == bindparam("of_study"), instance.c.analyzable)
)
_OF_STUDY = update(study).where(study.c.study_instance_uid == bindparam("of_study"))

# A new image of a study that is receiving already: nearly all are. What else there is to know of it
# is asked by the same two statements, so that they do for any number of arrivals. They go to the
# driver: SQLAlchemy, which makes them, needs five times their time to execute them.
_RECEIVING: ColumnElement[str] = literal_column("'receiving'")
_NOTHING: ColumnElement[str] = literal_column("''")
_IS_USUAL = (
    study.c.study_instance_uid == bindparam("study_instance_uid"),
    study.c.state == _RECEIVING,
    study.c.node == bindparam("node"),
    study.c.expected_instances.is_(None),
    or_(study.c.accession != _NOTHING, study.c.accession == bindparam("accession")),
    or_(study.c.stat, ~bindparam("stat", type_=Boolean)),
    ~exists().where(result.c.sop_instance_uid == bindparam("sop_instance_uid")),
)
_USUAL = select(*(bindparam(column.name, type_=column.type) for column in instance.c)).where(
    *_IS_USUAL
)
_STILL_DUE = (
    update(study)
    .where(
        study.c.study_instance_uid == bindparam("of_study"),
        study.c.state == _RECEIVING,
        study.c.node == bindparam("of_node"),
    )
    .values(due_at=bindparam("due"), last_received_at=bindparam("now"))
)


class Outcome(enum.Enum):
    """What an arrival changed."""

    NEW = "new"
    DUPLICATE = "duplicate"
    REPLACED = "replaced"
    KEPT = "kept"


@dataclass(frozen=True, slots=True)
class Arrival:
    """One instance on disk; expected_instances: how many the sender says the study has.

    patient_id, accession_number: kept as keyed hashes only; stat: somebody waits for its study
    """

    instance: Instance
    study_instance_uid: str
    size: int
    analyzable: bool
    calling_ae_title: str
    expected_instances: int | None = None
    patient_id: str = ""
    accession_number: str = ""
    stat: bool = False


def arrive(
    database: Database,
    arrivals: Sequence[Arrival],
    data_dir: Path,
    quiet_seconds: float,
    confirm: Callable[[Path], object] = Path.stat,
) -> list[tuple[Outcome, Path | None]]:
    """Commit received instances, all or none; after this, and only after this, their senders may
    be told Success.

    Returns for each, beside what it changed, the path of a file that it replaced, to be removed;
    its own, where another daemon has the very same.
    An instance with equal digest changes nothing. Own results that a PACS sends back, and what
    holds no image, are kept and never make a study due (they would make an endless loop).
    confirm: raises where the file is gone. It is asked while the study's row is locked, without
    which nobody removes a file.
    Raises HeldElsewhere where a study's files lie in another daemon's folder, and OSError where
    a file is gone: another sender's object had its name, and was replaced.
    """
    # In one order everywhere, or two daemons wait for each other's studies and images.
    order = sorted(range(len(arrivals)), key=lambda at: _name(arrivals[at]))
    ordered = [arrivals[at] for at in order]
    if _arrive_as_usual(database, ordered, data_dir, quiet_seconds, confirm):
        return [(Outcome.NEW, None)] * len(arrivals)
    with database.write() as connection:
        now = database.now(connection)
        done = {
            at: _arrive(connection, database, now, arrivals[at], data_dir, quiet_seconds, confirm)
            for at in order
        }
    return [done[at] for at in range(len(arrivals))]


def _name(arrival: Arrival) -> tuple[str, str]:
    return arrival.study_instance_uid, arrival.instance.sop_instance_uid


def _arrive_as_usual(
    database: Database,
    ordered: Sequence[Arrival],
    data_dir: Path,
    quiet_seconds: float,
    confirm: Callable[[Path], object],
) -> bool:
    """Commit new images of studies that are receiving; False, and nothing done, for any other."""
    if None in {database.node, database.patient_salt} or not all(
        arrival.analyzable and arrival.expected_instances is None for arrival in ordered
    ):
        return False
    with suppress(_Unusual), database.driver() as cursor:
        now = database.now(cursor)
        due = now + timedelta(seconds=quiet_seconds)
        rows = [_usual_row(database, arrival, data_dir, now, due) for arrival in ordered]
        for statement in _usual_statements(database):
            if statement.run(cursor, rows) != len(rows):
                raise _Unusual
        for arrival in ordered:
            confirm(arrival.instance.path)
        return True
    return False


@dataclass(frozen=True, slots=True)
class _Statement:
    """A statement as the driver takes it, and what makes its values of ours."""

    words: str
    processors: Mapping[str, Callable[[Any], Any] | None]

    def run(self, cursor: Any, rows: Sequence[Mapping[str, Any]]) -> int:
        """For each of the rows; returns how many were changed."""
        cursor.executemany(
            self.words,
            [
                {
                    name: row[name] if process is None else process(row[name])
                    for name, process in self.processors.items()
                }
                for row in rows
            ],
        )
        return int(cursor.rowcount)


@lru_cache(maxsize=4)
def _usual_statements(database: Database) -> tuple[_Statement, _Statement]:
    dialect = database.engine.dialect
    if database.is_sqlite:
        dialect = sqlite.dialect(paramstyle="named")
    insert = (sqlite if database.is_sqlite else postgresql).insert(instance)
    usual = insert.from_select([column.name for column in instance.c], _USUAL)
    inserted = _statement(usual.on_conflict_do_nothing(), dialect)
    return inserted, _statement(_STILL_DUE, dialect)


def _statement(statement: Insert | Update, dialect: Dialect) -> _Statement:
    compiled = statement.compile(dialect=dialect)
    assert isinstance(compiled, SQLCompiler)
    types = {bind.key: bind.type.dialect_impl(dialect) for bind in compiled.bind_names}
    processors = {name: kind.bind_processor(dialect) for name, kind in types.items()}
    return _Statement(str(compiled), processors)


def _usual_row(
    database: Database, arrival: Arrival, data_dir: Path, now: datetime, due: datetime
) -> dict[str, Any]:
    path = str(arrival.instance.path.relative_to(data_dir))
    patient = patient_key(database, None, arrival.patient_id)
    accession = accession_key(database, None, arrival.accession_number) or ""
    return _row(arrival, path, now, True, patient) | {
        "node": database.node,
        "accession": accession,
        "stat": arrival.stat,
        "of_study": arrival.study_instance_uid,
        "of_node": database.node,
        "due": due,
        "now": now,
    }


class _Unusual(Exception):
    """To be rolled back, and done again with all questions asked."""


def _arrive(
    connection: Connection,
    database: Database,
    now: datetime,
    arrival: Arrival,
    data_dir: Path,
    quiet_seconds: float,
    confirm: Callable[[Path], object],
) -> tuple[Outcome, Path | None]:
    new = arrival.instance
    known = lock_study(connection, database, arrival.study_instance_uid, now)
    confirm(new.path)
    _note_accession(connection, database, known, arrival)
    _note_stat(connection, known, arrival)
    same = {"of_study": arrival.study_instance_uid, "uid": new.sop_instance_uid}
    old = connection.execute(_BEFORE, same).first()
    is_elsewhere = database.node not in {None, known.node}
    if old is not None and old.digest == new.digest and old.path is not None:
        return Outcome.DUPLICATE, new.path if is_elsewhere else None
    if is_elsewhere:
        raise HeldElsewhere(
            "another daemon on this database holds this study: send its images there"
        )
    path = str(new.path.relative_to(data_dir))
    if old is not None and old.digest == new.digest:  # its file had been removed
        connection.execute(_REPLACE.values(path=path), same)
        return Outcome.KEPT, None
    own = connection.execute(_OWN, {"uid": new.sop_instance_uid}).first()
    analyzable = arrival.analyzable and own is None
    patient = patient_key(database, connection, arrival.patient_id)
    values = _row(arrival, path, now, analyzable, patient)
    if old is None:
        connection.execute(_INSERT, values)
    else:
        connection.execute(_REPLACE.values(values), same)
    if analyzable:
        _receive(connection, now, known, arrival, quiet_seconds)
    if old is not None:
        return Outcome.REPLACED, data_dir / old.path if old.path not in {None, path} else None
    return (Outcome.NEW if analyzable else Outcome.KEPT), None


def _note_accession(
    connection: Connection, database: Database, known: Any, arrival: Arrival
) -> None:
    if known.accession:
        return
    key = accession_key(database, connection, arrival.accession_number) or ""
    if key != known.accession:
        connection.execute(
            _OF_STUDY.values(accession=key), {"of_study": arrival.study_instance_uid}
        )


def _note_stat(connection: Connection, known: Any, arrival: Arrival) -> None:
    """Also of what is sent a second time: somebody may have lost his patience."""
    if arrival.stat and arrival.analyzable and not known.stat:
        connection.execute(_OF_STUDY.values(stat=True), {"of_study": arrival.study_instance_uid})


def _row(
    arrival: Arrival, path: str, now: datetime, analyzable: bool, patient: str | None
) -> dict[str, Any]:
    new = arrival.instance
    return {
        "study_instance_uid": arrival.study_instance_uid,
        "sop_instance_uid": new.sop_instance_uid,
        "series_instance_uid": new.series_instance_uid,
        "sop_class_uid": new.sop_class_uid,
        "transfer_syntax_uid": new.transfer_syntax_uid,
        "path": path,
        "digest": new.digest,
        "size": arrival.size,
        "analyzable": analyzable,
        "calling_ae_title": arrival.calling_ae_title,
        "received_at": now,
        "exclusion_code": None,
        "exclusion_reason": None,
        "patient": patient,
    }


def _receive(
    connection: Connection, now: datetime, known: Any, arrival: Arrival, quiet_seconds: float
) -> None:
    """Make the study due after the quiet period, at a new revision if the old one was closed."""
    uid = arrival.study_instance_uid
    expected = arrival.expected_instances or known.expected_instances
    due = now + timedelta(seconds=quiet_seconds)
    if expected is not None:
        analyzable: int = connection.execute(_COUNT, {"of_study": uid}).scalar_one()
        due = now if analyzable >= expected else due
    reopen(connection, now, known, due, ARRIVED, last_received_at=now, expected_instances=expected)


def association_released(
    database: Database, study_instance_uids: Sequence[str], release_quiet_seconds: float
) -> None:
    """Pull in what is still receiving: its sender has said that it is done."""
    if not study_instance_uids:
        return
    with database.write() as connection:
        due = database.now(connection) + timedelta(seconds=release_quiet_seconds)
        connection.execute(
            update(study)
            .where(
                study.c.study_instance_uid.in_(study_instance_uids),
                study.c.state == "receiving",
                study.c.due_at > due,
            )
            .values(due_at=due)
        )
