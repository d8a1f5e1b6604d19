"""What `dicomai doctor` reads: whole tables, a page at a time. Nothing here writes."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from sqlalchemy import (
    Column,
    ColumnElement,
    Row,
    Select,
    String,
    Table,
    and_,
    cast,
    func,
    or_,
    select,
    tuple_,
)

from dicomai.store.arrivals import ARRIVED
from dicomai.store.database import Database
from dicomai.store.queue import PURGED
from dicomai.store.tables import (
    analysis,
    delivery,
    destination,
    event,
    instance,
    result,
    study,
    task,
)
from dicomai.study import WITHDRAWAL

PAGE = 1000

# State -> whether a row in it has a due_at, and whether it has a lease.
HOLDS: dict[str, dict[str, tuple[bool, bool]]] = {
    "study": {
        "receiving": (True, False),
        "analyzing": (True, True),
        "analyzed": (False, False),
        "skipped": (False, False),
        "failed": (False, False),
    },
    "delivery": {
        "pending": (True, False),
        "sending": (True, True),
        "committing": (True, False),
        "delivered": (False, False),
        "failed": (False, False),
        "superseded": (False, False),
    },
    "task": {
        "due": (True, False),
        "running": (True, True),
        "done": (False, False),
        "failed": (False, False),
    },
}
SUBJECTS: dict[str, tuple[Table, Column[Any]]] = {
    "study": (study, study.c.study_instance_uid),
    "delivery": (delivery, delivery.c.id),
    "task": (task, task.c.id),
}


@dataclass(frozen=True, slots=True)
class Stored:
    """A file that has a row; path: below the data folder; size, digest: None of a result."""

    path: str
    study_instance_uid: str
    sop_instance_uid: str
    size: int | None
    digest: str | None


def _all(database: Database, statement: Select[Any]) -> Sequence[Row[Any]]:
    with database.read() as connection:
        return connection.execute(statement).all()


def sqlite_complaints(database: Database) -> list[str]:
    """What SQLite finds wrong with its own file, and rows that name one that does not exist."""
    with database.read() as connection:
        words = connection.exec_driver_sql("PRAGMA integrity_check").scalars().all()
        found = [str(line) for line in words if line != "ok"]
        for table, row, parent, _ in connection.exec_driver_sql("PRAGMA foreign_key_check"):
            found.append(f"row {row} of {table} names a row of {parent} that does not exist")
    return found


def states(database: Database, subject: str) -> dict[str, int]:
    """State -> how many studies, deliveries or tasks are in it."""
    table, _ = SUBJECTS[subject]
    count = func.count().label("rows")
    statement = select(table.c.state, count).group_by(table.c.state).order_by(table.c.state)
    return {row.state: row.rows for row in _all(database, statement)}


def misfits(database: Database, subject: str) -> Sequence[Row[Any]]:
    """id, state, due_at, lease of what is in no known state, or is not as its state has it."""
    table, key = SUBJECTS[subject]
    known = HOLDS[subject]
    wrong: list[ColumnElement[bool]] = [table.c.state.not_in(list(known))]
    for state, (due, lease) in known.items():
        columns = or_(_is(table.c.due_at, not due), _is(table.c.lease, not lease))
        wrong.append(and_(table.c.state == state, columns))
    columns_shown = (key.label("id"), table.c.state, table.c.due_at, table.c.lease)
    return _all(database, select(*columns_shown).where(or_(*wrong)))


def _is(column: ColumnElement[Any], present: bool) -> ColumnElement[bool]:
    return column.is_not(None) if present else column.is_(None)


def contradictions(database: Database) -> Sequence[Row[Any]]:
    """id, state, revision, analyzed_revision of studies whose analysis is not what they say.

    An analyzed revision has its analysis; what is closed as analyzed is so at its revision.
    """
    statement = (
        select(
            study.c.study_instance_uid.label("id"),
            study.c.state,
            study.c.revision,
            study.c.analyzed_revision,
            analysis.c.id.label("analysis_id"),
        )
        .outerjoin(
            analysis,
            and_(
                analysis.c.study_instance_uid == study.c.study_instance_uid,
                analysis.c.revision == study.c.analyzed_revision,
            ),
        )
        .where(
            or_(
                and_(study.c.analyzed_revision.is_not(None), analysis.c.id.is_(None)),
                study.c.analyzed_revision > study.c.revision,
                and_(
                    study.c.state == "analyzed",
                    study.c.analyzed_revision.is_distinct_from(study.c.revision),
                ),
            )
        )
    )
    return _all(database, statement)


def untold(database: Database, subject: str) -> Sequence[Row[Any]]:
    """id, state, told of rows whose last event does not end in their state."""
    table, key = SUBJECTS[subject]
    newest = (
        select(event.c.subject_id, func.max(event.c.id).label("id"))
        .where(event.c.subject == subject)
        .group_by(event.c.subject_id)
        .subquery()
    )
    statement = (
        select(key.label("id"), table.c.state, event.c.to_state.label("told"))
        .outerjoin(newest, newest.c.subject_id == cast(key, String))
        .outerjoin(event, event.c.id == newest.c.id)
        .where(table.c.state.is_distinct_from(event.c.to_state))
    )
    return _all(database, statement)


def gaps(database: Database, subject: str) -> Sequence[Row[Any]]:
    """id, from_state, before of events that do not begin where the event before them ended."""
    table, key = SUBJECTS[subject]
    trail = (
        select(
            event.c.subject_id.label("id"),
            event.c.from_state,
            func.lag(event.c.to_state)
            .over(partition_by=event.c.subject_id, order_by=event.c.id)
            .label("before"),
        )
        .where(event.c.subject == subject)
        .subquery()
    )
    statement = (
        select(trail)
        .join(table, cast(key, String) == trail.c.id)
        # A first event begins with nothing: also where a number was given again after a purge.
        .where(trail.c.from_state.is_not(None), trail.c.from_state.is_distinct_from(trail.c.before))
    )
    return _all(database, statement)


def miscounted(database: Database) -> Sequence[Row[Any]]:
    """id, revision, raised of studies whose revision was raised more or less often than that.

    A study that is given back, and not changed, returns to "receiving" from "analyzing", too.
    """
    raises = and_(
        event.c.subject == "study",
        event.c.to_state == "receiving",
        or_(event.c.from_state != "analyzing", event.c.detail.in_((ARRIVED, PURGED))),
    )
    raised = func.count(event.c.id)
    statement = (
        select(study.c.study_instance_uid.label("id"), study.c.revision, raised.label("raised"))
        .outerjoin(event, and_(event.c.subject_id == study.c.study_instance_uid, raises))
        .group_by(study.c.study_instance_uid, study.c.revision)
        .having(study.c.revision != raised)
    )
    return _all(database, statement)


def stored_files(
    database: Database, node: str | None, only: Collection[str] | None = None
) -> Iterator[Stored]:
    """What should lie in this node's folder; only: SOP Instance UIDs, or everything."""
    here = [] if node is None else [or_(study.c.node.is_(None), study.c.node == node)]
    images = select(
        instance.c.study_instance_uid,
        instance.c.sop_instance_uid,
        instance.c.path,
        instance.c.size,
        instance.c.digest,
    ).join(study, study.c.study_instance_uid == instance.c.study_instance_uid)
    made = select(result.c.study_instance_uid, result.c.sop_instance_uid, result.c.path).join(
        study, study.c.study_instance_uid == result.c.study_instance_uid
    )
    keys = instance.c.study_instance_uid, instance.c.sop_instance_uid
    for row in _paged(database, images.where(instance.c.path.is_not(None), *here), keys, only):
        yield Stored(row.path, row.study_instance_uid, row.sop_instance_uid, row.size, row.digest)
    key = (result.c.sop_instance_uid,)
    for row in _paged(database, made.where(result.c.path.is_not(None), *here), key, only):
        yield Stored(row.path, row.study_instance_uid, row.sop_instance_uid, None, None)


def _paged(
    database: Database,
    statement: Select[Any],
    keys: Sequence[Column[Any]],
    only: Collection[str] | None,
) -> Iterator[Row[Any]]:
    """In the order of the primary key, in short transactions: the files are looked at in between.

    A read that lasts for hours would keep SQLite's log, and Postgres' dead rows, growing.
    """
    if only is not None:
        chosen = sorted(only)
        for start in range(0, len(chosen), PAGE):
            yield from _all(database, statement.where(keys[-1].in_(chosen[start : start + PAGE])))
        return
    after: tuple[Any, ...] | None = None
    ordered = statement.order_by(*keys).limit(PAGE)
    while True:
        rest = ordered if after is None else ordered.where(tuple_(*keys) > tuple_(*after))
        rows = _all(database, rest)
        yield from rows
        if len(rows) < PAGE:
            return
        after = tuple(getattr(rows[-1], key.name) for key in keys)


def undelivered(database: Database, name: str, kinds: Collection[str]) -> Sequence[Row[Any]]:
    """study_instance_uid, sop_instance_uid of standing results that nobody will ever send.

    Only what was made after the destination got its first result of that kind: what is older was
    made before the settings asked for it.
    """
    first = (
        select(result.c.kind, func.min(delivery.c.created_at).label("at"))
        .join(delivery, delivery.c.sop_instance_uid == result.c.sop_instance_uid)
        .where(delivery.c.destination == name, result.c.kind != WITHDRAWAL)
        .group_by(result.c.kind)
        .subquery()
    )
    put_down = and_(
        delivery.c.sop_instance_uid == result.c.sop_instance_uid, delivery.c.destination == name
    )
    statement = (
        select(result.c.study_instance_uid, result.c.sop_instance_uid)
        .join(first, and_(first.c.kind == result.c.kind, first.c.at <= result.c.created_at))
        .outerjoin(delivery, put_down)
        .where(
            result.c.kind.in_(sorted(kinds)),
            result.c.replaced_by.is_(None),
            delivery.c.id.is_(None),
        )
    )
    return _all(database, statement)


def unsent_withdrawals(database: Database) -> Sequence[Row[Any]]:
    """study_instance_uid, sop_instance_uid of withdrawals, each for one destination, of nobody."""
    statement = (
        select(result.c.study_instance_uid, result.c.sop_instance_uid)
        .outerjoin(delivery, delivery.c.sop_instance_uid == result.c.sop_instance_uid)
        .where(result.c.kind == WITHDRAWAL, delivery.c.id.is_(None))
    )
    return _all(database, statement)


def failed_deliveries(database: Database) -> Sequence[Row[Any]]:
    """destination, last_error, count of what was given up and still stands."""
    statement = (
        select(delivery.c.destination, delivery.c.last_error, func.count().label("count"))
        .join(result, result.c.sop_instance_uid == delivery.c.sop_instance_uid)
        .where(delivery.c.state == "failed", result.c.replaced_by.is_(None))
        .group_by(delivery.c.destination, delivery.c.last_error)
        .order_by(delivery.c.destination, delivery.c.last_error)
    )
    return _all(database, statement)


def _due_before(database: Database, age: timedelta, column: ColumnElement[Any]) -> Any:
    with database.read() as connection:
        return column <= database.now(connection) - age


def overdue(database: Database, subject: str, age: timedelta) -> Sequence[Row[Any]]:
    """id, state, due_at of what has been due for longer than age."""
    table, key = SUBJECTS[subject]
    statement = select(key.label("id"), table.c.state, table.c.due_at).order_by(table.c.due_at)
    return _all(database, statement.where(_due_before(database, age, table.c.due_at)))


def overdue_deliveries(database: Database, age: timedelta) -> Sequence[Row[Any]]:
    """destination, count, since, last_error of what has been due for longer than age."""
    words = func.coalesce(destination.c.last_error, func.max(delivery.c.last_error))
    statement = (
        select(
            delivery.c.destination,
            func.count().label("count"),
            func.min(delivery.c.due_at).label("since"),
            words.label("last_error"),
        )
        .outerjoin(destination, destination.c.name == delivery.c.destination)
        .where(_due_before(database, age, delivery.c.due_at))
        .group_by(delivery.c.destination, destination.c.last_error)
        .order_by(delivery.c.destination)
    )
    return _all(database, statement)
