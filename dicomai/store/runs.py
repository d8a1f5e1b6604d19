"""Trainings: one at a time for all daemons of a database, and what each epoch reached."""

import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Connection, func, select, update

from dicomai.errors import LeaseLost, Misuse
from dicomai.store import registry
from dicomai.store.database import Database
from dicomai.store.queue import record
from dicomai.store.tables import label, training_epoch, training_run

LEASE_SECONDS = 120.0
OPEN = ("running", "stopped")


@dataclass(frozen=True, slots=True)
class Run:
    """A training that is ours until the lease runs out; resumed: it was begun before."""

    id: int
    lease: str
    model_name: str
    parent: str
    recipe: str
    dry_run: bool
    resumed: bool


def begin(database: Database, model_name: str, parent: str, recipe: str, dry_run: bool) -> Run:
    """Begin a training, or go on with the one that was stopped or died here.

    One of another recipe or parent is given up. Raises Misuse where another one is running.
    """
    with database.write() as connection:
        now = database.now(connection)
        for row in _open(connection):
            if row.state == "running" and row.due_at > now:
                raise Misuse(
                    f"training {row.id} is running since {row.started_at:%Y-%m-%d %H:%M}: wait for "
                    "it, or stop it with 'dicomai retrain --stop'"
                )
            is_same = (row.model_name, row.parent, row.recipe, row.dry_run, row.node) == (
                model_name,
                parent,
                recipe,
                dry_run,
                database.node or "",
            )
            if is_same:
                return _take(connection, now, row)
            _end(connection, now, row, "failed", "given up: another training was begun")
        values = {
            "state": "running",
            "node": database.node or "",
            "model_name": model_name,
            "parent": parent,
            "recipe": recipe,
            "dry_run": dry_run,
            "started_at": now,
        }
        made = connection.execute(training_run.insert().values(**values).returning(training_run))
        row = made.one()
        record(connection, now, "training", str(row.id), None, "running")
        return _lease(connection, now, row, resumed=False)


def _open(connection: Connection) -> Any:
    # All of them are locked, and the table is, by the first writer, on SQLite: of two who begin at
    # once one comes second.
    chosen = select(training_run).where(training_run.c.state.in_(OPEN)).with_for_update()
    return connection.execute(chosen.order_by(training_run.c.id)).all()


def _take(connection: Connection, now: datetime, row: Any) -> Run:
    record(connection, now, "training", str(row.id), row.state, "running", "goes on")
    return _lease(connection, now, row, resumed=True)


def _lease(connection: Connection, now: datetime, row: Any, resumed: bool) -> Run:
    lease = str(uuid.uuid4())
    connection.execute(
        update(training_run)
        .where(training_run.c.id == row.id)
        .values(state="running", lease=lease, due_at=now + timedelta(seconds=LEASE_SECONDS))
    )
    return Run(row.id, lease, row.model_name, row.parent, row.recipe, row.dry_run, resumed)


def renew(database: Database, run: Run) -> None:
    """Keep a training. Raises LeaseLost where somebody else has it, or has stopped it."""
    with database.write() as connection:
        now = database.now(connection)
        done = connection.execute(
            update(training_run)
            .where(*_mine(run))
            .values(due_at=now + timedelta(seconds=LEASE_SECONDS))
        )
        if not done.rowcount:
            raise LeaseLost(f"training {run.id} was stopped or taken over")


def note_data(database: Database, run: Run, digest: str, images: int) -> None:
    """What the training learns from."""
    with database.write() as connection:
        values = {"data_digest": digest, "images": images}
        connection.execute(update(training_run).where(*_mine(run)).values(**values))


def note_epoch(database: Database, run: Run, epoch: Mapping[str, Any]) -> None:
    """What an epoch reached; an epoch that is done again counts once."""
    with database.write() as connection:
        values = {**epoch, "at": database.now(connection)}
        keys = ["run_id", "phase", "number"]
        connection.execute(
            database.insert(training_epoch)
            .values(run_id=run.id, **values)
            .on_conflict_do_update(
                index_elements=keys, set_={k: v for k, v in values.items() if k not in keys}
            )
        )


def end(
    database: Database,
    run: Run,
    state: str,
    reason: str,
    decision: str | None = None,
    version: str | None = None,
) -> None:
    """Close a training: done, failed, or stopped to go on another time."""
    with database.write() as connection:
        now = database.now(connection)
        row = connection.execute(select(training_run).where(*_mine(run))).first()
        if row is None:
            raise LeaseLost(f"training {run.id} was stopped or taken over")
        _end(connection, now, row, state, reason, decision, version)


def conclude(
    database: Database, run: Run, version: str, sha256: str, promoted: bool, reason: str
) -> bool:
    """Close a training whose package is written: note it, and make it the active version where it
    was promoted and nobody has activated another one meanwhile. Returns whether it is active now.
    """
    with database.write() as connection:
        now = database.now(connection)
        row = connection.execute(select(training_run).where(*_mine(run))).first()
        if row is None:
            raise LeaseLost(f"training {run.id} was stopped or taken over")
        why = reason if promoted else None
        done = registry.promote(
            database, connection, run.model_name, run.parent, version, sha256, why
        )
        if promoted and not done:
            reason = f"{run.parent}, which it was compared with, is not active any more; {reason}"
        _end(connection, now, row, "done", reason, "promoted" if done else "kept", version)
        return done


def _end(
    connection: Connection,
    now: datetime,
    row: Any,
    state: str,
    reason: str,
    decision: str | None = None,
    version: str | None = None,
) -> None:
    connection.execute(
        update(training_run)
        .where(training_run.c.id == row.id)
        .values(
            state=state,
            reason=reason[:1000],
            decision=decision,
            version=version,
            lease=None,
            due_at=None,
            ended_at=None if state == "stopped" else now,
        )
    )
    record(connection, now, "training", str(row.id), row.state, state, reason[:500])


def stop(database: Database) -> int | None:
    """Take the running training away from its process, which notices; returns its id."""
    with database.write() as connection:
        now = database.now(connection)
        running = [row for row in _open(connection) if row.state == "running"]
        for row in running:
            _end(connection, now, row, "stopped", "stopped by a person")
        return running[0].id if running else None


def _mine(run: Run) -> tuple[Any, ...]:
    return training_run.c.id == run.id, training_run.c.lease == run.lease


def runs(database: Database, limit: int) -> list[dict[str, Any]]:
    """Trainings, the newest first."""
    chosen = select(training_run).order_by(training_run.c.id.desc()).limit(limit)
    with database.read() as connection:
        return [dict(row._mapping) for row in connection.execute(chosen)]


def epochs(database: Database, run_id: int) -> list[dict[str, Any]]:
    """A training's epochs in their order."""
    chosen = (
        select(training_epoch)
        .where(training_epoch.c.run_id == run_id)
        .order_by(training_epoch.c.phase, training_epoch.c.number)
    )
    with database.read() as connection:
        return [dict(row._mapping) for row in connection.execute(chosen)]


def is_unfinished(database: Database, recipe: str) -> bool:
    """Whether a training by this recipe was stopped here, or died, and is to go on."""
    chosen = select(training_run.c.id).where(
        training_run.c.state.in_(OPEN),
        training_run.c.recipe == recipe,
        ~training_run.c.dry_run,
        training_run.c.node == (database.node or ""),
    )
    with database.read() as connection:
        return connection.execute(chosen.limit(1)).first() is not None


def new_labels(database: Database, keys: tuple[str, ...]) -> int:
    """Labels that came since the last training that was done began."""
    began = select(func.max(training_run.c.started_at)).where(
        training_run.c.state == "done", ~training_run.c.dry_run
    )
    with database.read() as connection:
        last = connection.execute(began).scalar()
        chosen = select(func.count()).select_from(label).where(label.c.label.in_(keys))
        if last is not None:
            chosen = chosen.where(label.c.added_at > last)
        return connection.execute(chosen).scalar_one()
