"""What is to be sent: deliveries, the destinations they wait for, and storage commitment.

A delivery is one object for one destination. What goes wrong with an object puts off that object
alone; a destination that is away or full has a due_at of its own, for which all its objects wait.
"""

import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from sqlalchemy import ColumnElement, Connection, select, update

from dicomai.store.database import Database
from dicomai.store.queue import held_here, record
from dicomai.store.tables import delivery, destination, result, study
from dicomai.study import WITHDRAWAL


@dataclass(frozen=True, slots=True)
class Delivery:
    """One object for one destination, ours until the lease runs out.

    attempts: how often it was sent before
    """

    id: int
    sop_instance_uid: str
    sop_class_uid: str
    study_instance_uid: str
    path: Path
    attempts: int
    lease: str


@dataclass(frozen=True, slots=True)
class Commitment:
    """Objects that a destination is asked to commit itself to; instances: SOP UID -> class UID."""

    transaction_uid: str
    instances: Mapping[str, str]


def failures(database: Database, name: str) -> int:
    """How often in a row a destination could not be used."""
    statement = select(destination.c.failures).where(destination.c.name == name)
    with database.read() as connection:
        return connection.execute(statement).scalar_one_or_none() or 0


def pause_destination(
    database: Database, name: str, error: str, wait_seconds: Callable[[int], float]
) -> None:
    """Send nothing there for a while; wait_seconds: how long after so many failures in a row."""
    with database.write() as connection:
        now = database.now(connection)
        connection.execute(
            database.insert(destination)
            .values(name=name, due_at=now, failures=0)
            .on_conflict_do_nothing()
        )
        chosen = destination.c.name == name
        count = connection.execute(
            select(destination.c.failures).where(chosen).with_for_update()
        ).scalar_one()
        connection.execute(
            update(destination)
            .where(chosen)
            .values(
                failures=count + 1,
                due_at=now + timedelta(seconds=wait_seconds(count + 1)),
                last_error=error[:500],
            )
        )


def resume_destination(database: Database, name: str) -> None:
    """It took an object: what was wrong is over."""
    with database.write() as connection:
        connection.execute(
            update(destination)
            .where(destination.c.name == name, destination.c.failures > 0)
            .values(failures=0, due_at=database.now(connection), last_error=None)
        )


def claim_deliveries(
    database: Database, name: str, data_dir: Path, lease_seconds: float, limit: int
) -> list[Delivery]:
    """Take up to limit objects that are due for a destination, in the order of their making.

    Those of stat studies come first. Those that have failed before come last, so that one that its
    destination cannot take at present holds up no other.
    """
    with database.write() as connection:
        now = database.now(connection)
        due = connection.execute(
            select(
                delivery,
                result.c.sop_class_uid,
                result.c.study_instance_uid,
                result.c.path,
            )
            .join(result, result.c.sop_instance_uid == delivery.c.sop_instance_uid)
            .join(study, study.c.study_instance_uid == result.c.study_instance_uid)
            .where(
                delivery.c.destination == name,
                delivery.c.state.in_(("pending", "sending")),
                delivery.c.due_at <= now,
                result.c.path.is_not(None),
                *held_here(database),
            )
            .order_by(
                delivery.c.attempts > 0, study.c.stat.desc(), delivery.c.attempts, delivery.c.id
            )
            .limit(limit)
            .with_for_update(skip_locked=True, of=delivery)
        ).all()
        lease = str(uuid.uuid4())
        for row in due:
            connection.execute(
                update(delivery)
                .where(delivery.c.id == row.id)
                .values(state="sending", lease=lease, due_at=now + timedelta(seconds=lease_seconds))
            )
            record(connection, now, "delivery", str(row.id), row.state, "sending")
    return [
        Delivery(
            row.id,
            row.sop_instance_uid,
            row.sop_class_uid,
            row.study_instance_uid,
            data_dir / row.path,
            row.attempts,
            lease,
        )
        for row in due
    ]


def start_delivery(database: Database, waiting: Sequence[Delivery], lease_seconds: float) -> bool:
    """Note that the first of them goes out now, and renew the leases of all.

    An attempt is counted before the first byte: a sender that dies over an object has tried it.
    False where the first is no longer ours.
    """
    first = waiting[0]
    with database.write() as connection:
        due = database.now(connection) + timedelta(seconds=lease_seconds)
        connection.execute(
            update(delivery)
            .where(delivery.c.id.in_([item.id for item in waiting]))
            .where(delivery.c.lease == first.lease)
            .values(due_at=due)
        )
        done = connection.execute(
            update(delivery).where(*_mine(first)).values(tried=True, attempts=first.attempts + 1)
        )
        return bool(done.rowcount)


def _mine(item: Delivery) -> tuple[ColumnElement[bool], ...]:
    return delivery.c.id == item.id, delivery.c.lease == item.lease


def finish_delivery(
    database: Database,
    item: Delivery,
    state: str,
    error: str | None = None,
    wait_seconds: float | None = None,
) -> None:
    """Write how a delivery went: delivered, committing, failed, or pending again after a wait.

    A lease that is no longer ours changes nothing: whoever holds it sends the same bytes.
    What a newer revision has overtaken meanwhile is superseded instead of tried again.
    """
    with database.write() as connection:
        now = database.now(connection)
        if state == "pending" and _is_overtaken(connection, item.sop_instance_uid):
            state, wait_seconds = "superseded", None
        due = None if wait_seconds is None else now + timedelta(seconds=wait_seconds)
        done = connection.execute(
            update(delivery)
            .where(*_mine(item))
            .values(
                state=state,
                lease=None,
                due_at=due,
                last_error=error[:500] if error else None,
                delivered_at=now if state == "delivered" else None,
            )
        )
        if done.rowcount:
            record(connection, now, "delivery", str(item.id), "sending", state, error)


def _is_overtaken(connection: Connection, sop_instance_uid: str) -> bool:
    row = connection.execute(
        select(study.c.state, result.c.kind, result.c.replaced_by)
        .select_from(result)
        .join(study, study.c.study_instance_uid == result.c.study_instance_uid)
        .where(result.c.sop_instance_uid == sop_instance_uid)
    ).first()
    if row is None:  # purged
        return True
    if row.state in {"receiving", "analyzing"}:
        return bool(row.kind != WITHDRAWAL)  # complete() makes it due again if it still holds
    return row.replaced_by is not None


def release_deliveries(database: Database, items: Sequence[Delivery]) -> None:
    """Give back what was not sent."""
    with database.write() as connection:
        now = database.now(connection)
        for item in items:
            state = "superseded" if _is_overtaken(connection, item.sop_instance_uid) else "pending"
            done = connection.execute(
                update(delivery)
                .where(*_mine(item))
                .values(state=state, lease=None, due_at=now if state == "pending" else None)
            )
            if done.rowcount:
                record(connection, now, "delivery", str(item.id), "sending", state, "given back")


def retry_deliveries(database: Database, name: str | None = None) -> int:
    """Make failed and waiting deliveries due now, to all destinations or to one."""
    standing = select(result.c.sop_instance_uid).where(
        result.c.replaced_by.is_(None), result.c.path.is_not(None)
    )
    chosen: list[ColumnElement[bool]] = [
        delivery.c.state.in_(("failed", "pending")),
        delivery.c.sop_instance_uid.in_(standing),
    ]
    if name is not None:
        chosen.append(delivery.c.destination == name)
    with database.write() as connection:
        now = database.now(connection)
        rows = connection.execute(
            select(delivery.c.id, delivery.c.state).where(*chosen).with_for_update()
        ).all()
        for row in rows:
            connection.execute(
                update(delivery)
                .where(delivery.c.id == row.id)
                .values(state="pending", due_at=now, attempts=0)
            )
            if row.state == "failed":
                record(connection, now, "delivery", str(row.id), "failed", "pending", "retried")
        away = update(destination).values(due_at=now)
        connection.execute(away if name is None else away.where(destination.c.name == name))
        return len(rows)


def claim_commitment(
    database: Database, name: str, wait_seconds: float, limit: int
) -> Commitment | None:
    """Name what a destination has stored and not yet committed itself to, under a new transaction.

    wait_seconds: for its report; after that it is asked again (PS3.4 Annex J).
    """
    with database.write() as connection:
        now = database.now(connection)
        rows = connection.execute(
            select(delivery.c.id, result.c.sop_instance_uid, result.c.sop_class_uid)
            .join(result, result.c.sop_instance_uid == delivery.c.sop_instance_uid)
            .join(study, study.c.study_instance_uid == result.c.study_instance_uid)
            .where(
                delivery.c.destination == name,
                delivery.c.state == "committing",
                delivery.c.due_at <= now,
                *held_here(database),
            )
            .order_by(delivery.c.id)
            .limit(limit)
            .with_for_update(skip_locked=True, of=delivery)
        ).all()
        if not rows:
            return None
        transaction_uid = f"2.25.{uuid.uuid4().int}"  # PS3.5 B.2
        connection.execute(
            update(delivery)
            .where(delivery.c.id.in_([row.id for row in rows]))
            .values(transaction_uid=transaction_uid, due_at=now + timedelta(seconds=wait_seconds))
        )
    return Commitment(transaction_uid, {row.sop_instance_uid: row.sop_class_uid for row in rows})


def put_off_commitment(
    database: Database, asked: Commitment, error: str, wait_seconds: float
) -> None:
    """The request itself failed; ask again after a wait."""
    with database.write() as connection:
        due = database.now(connection) + timedelta(seconds=wait_seconds)
        connection.execute(
            update(delivery)
            .where(
                delivery.c.transaction_uid == asked.transaction_uid,
                delivery.c.state == "committing",
            )
            .values(due_at=due, last_error=error[:500])
        )


def commitment_reported(
    database: Database,
    transaction_uid: str,
    committed: Sequence[str],
    failed: Mapping[str, str],
    max_attempts: int,
    wait_seconds: float,
) -> bool:
    """What a destination says of a transaction: what it has committed itself to is delivered.

    failed: SOP Instance UID -> why; it is sent again after a wait, or given up after max_attempts.
    False where the transaction is unknown. Said twice, it changes nothing.
    """
    with database.write() as connection:
        now = database.now(connection)
        rows = connection.execute(
            select(delivery).where(delivery.c.transaction_uid == transaction_uid).with_for_update()
        ).all()
        for row in rows:
            if row.state != "committing":
                continue
            if row.sop_instance_uid in committed:
                _commit(connection, now, row)
            elif row.sop_instance_uid in failed:
                words = f"not committed: {failed[row.sop_instance_uid]}"[:500]
                _send_again(connection, now, row, words, max_attempts, wait_seconds)
        return bool(rows)


def _commit(connection: Connection, now: Any, row: Any) -> None:
    connection.execute(
        update(delivery)
        .where(delivery.c.id == row.id)
        .values(state="delivered", due_at=None, delivered_at=now, last_error=None)
    )
    record(connection, now, "delivery", str(row.id), "committing", "delivered", "committed")


def _send_again(
    connection: Connection,
    now: Any,
    row: Any,
    words: str,
    max_attempts: int,
    wait_seconds: float,
) -> None:
    state = "failed" if row.attempts >= max_attempts else "pending"
    if state == "pending" and _is_overtaken(connection, row.sop_instance_uid):
        state = "superseded"
    due = now + timedelta(seconds=wait_seconds) if state == "pending" else None
    connection.execute(
        update(delivery)
        .where(delivery.c.id == row.id)
        .values(state=state, due_at=due, last_error=words)
    )
    record(connection, now, "delivery", str(row.id), "committing", state, words)
