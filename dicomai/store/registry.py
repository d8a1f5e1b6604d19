"""Which versions of a model there are, which one is active, and which one it was before."""

from typing import Any

from sqlalchemy import Connection, select, update

from dicomai.errors import Misuse
from dicomai.store.database import Database
from dicomai.store.queue import record
from dicomai.store.tables import model


def models(database: Database) -> list[dict[str, Any]]:
    """Registered versions, the oldest first."""
    with database.read() as connection:
        rows = connection.execute(select(model).order_by(model.c.name, model.c.registered_at))
        return [dict(row._mapping) for row in rows]


def active_version(database: Database, name: str) -> str | None:
    """Which version of a model is active."""
    statement = select(model.c.version).where(model.c.name == name, model.c.state == "active")
    with database.read() as connection:
        return connection.execute(statement).scalar_one_or_none()


def earlier_versions(database: Database, name: str) -> list[str]:
    """Versions that were active once and were not withdrawn, the last one first."""
    statement = (
        select(model.c.version)
        .where(model.c.name == name, model.c.state == "retired", model.c.activated_at.is_not(None))
        .order_by(model.c.activated_at.desc())
    )
    with database.read() as connection:
        return list(connection.execute(statement).scalars())


def sha256_of(database: Database, name: str, version: str) -> str | None:
    """What the database knows a version by."""
    statement = select(model.c.sha256).where(model.c.name == name, model.c.version == version)
    with database.read() as connection:
        return connection.execute(statement).scalar_one_or_none()


def register(database: Database, name: str, version: str, sha256: str) -> str:
    """Note a package; the first of its name becomes active. Returns the SHA-256 on record."""
    with database.write() as connection:
        return _register(database, connection, name, version, sha256)


def register_candidate(database: Database, name: str, version: str, sha256: str) -> str:
    """Note a package that only a person makes active. Returns the SHA-256 on record."""
    with database.write() as connection:
        return _note(database, connection, name, version, sha256, "candidate")


def _register(
    database: Database, connection: Connection, name: str, version: str, sha256: str
) -> str:
    state = "candidate" if _active(connection, name) else "active"
    return _note(database, connection, name, version, sha256, state)


def _note(
    database: Database, connection: Connection, name: str, version: str, sha256: str, state: str
) -> str:
    now = database.now(connection)
    known = connection.execute(
        select(model.c.sha256).where(model.c.name == name, model.c.version == version)
    ).scalar_one_or_none()
    if known is not None:
        return str(known)
    connection.execute(
        model.insert().values(
            name=name,
            version=version,
            state=state,
            sha256=sha256,
            registered_at=now,
            activated_at=now if state == "active" else None,
        )
    )
    record(connection, now, "model", _subject(name, version), None, state)
    return sha256


def promote(
    database: Database,
    connection: Connection,
    name: str,
    parent: str,
    version: str,
    sha256: str,
    reason: str | None,
) -> bool:
    """Note a candidate; it takes its parent's place where there is a reason, and while that is
    still the active version: it was compared with no other. Returns whether it did.
    """
    _register(database, connection, name, version, sha256)
    rows = _locked(connection, name)
    if reason is None or rows[parent].state != "active":
        return False
    _replace(database, connection, name, parent, "retired", rows[version], reason)
    return True


def activate(database: Database, name: str, version: str, reason: str) -> str | None:
    """Make a registered version the active one; returns which it was before, None if it was this.

    Studies that are being analyzed end with the version that they began with.
    """
    with database.write() as connection:
        rows = _locked(connection, name)
        if version not in rows:
            raise Misuse(f"{name} {version} is not registered: see 'dicomai model list'")
        before = next((v for v, row in rows.items() if row.state == "active"), None)
        if before == version:
            return None
        _replace(database, connection, name, before, "retired", rows[version], reason)
        return before


def rollback(database: Database, name: str) -> tuple[str, str]:
    """Go back to the version that was active before; returns (withdrawn, active again).

    What was withdrawn once is skipped, so that another rollback goes further back.
    """
    with database.write() as connection:
        rows = _locked(connection, name)
        now = next((v for v, row in rows.items() if row.state == "active"), None)
        earlier = [row for row in rows.values() if row.state == "retired" and row.activated_at]
        if now is None or not earlier:
            raise Misuse(f"there is no version of {name} to go back to: see 'dicomai model list'")
        before = max(earlier, key=lambda row: row.activated_at)
        _replace(database, connection, name, now, "withdrawn", before, "rolled back")
        return now, str(before.version)


def _locked(connection: Connection, name: str) -> dict[str, Any]:
    rows = connection.execute(select(model).where(model.c.name == name).with_for_update())
    return {row.version: row for row in rows}


def _active(connection: Connection, name: str) -> bool:
    statement = select(model.c.version).where(model.c.name == name, model.c.state == "active")
    return connection.execute(statement).first() is not None


def _replace(
    database: Database,
    connection: Connection,
    name: str,
    before: str | None,
    becomes: str,
    after: Any,
    reason: str,
) -> None:
    now = database.now(connection)
    of_name = model.c.name == name
    if before is not None:
        connection.execute(
            update(model).where(of_name, model.c.version == before).values(state=becomes)
        )
        record(connection, now, "model", _subject(name, before), "active", becomes, reason)
    connection.execute(
        update(model)
        .where(of_name, model.c.version == after.version)
        .values(state="active", activated_at=now)
    )
    subject = _subject(name, after.version)
    record(connection, now, "model", subject, after.state, "active", reason)


def _subject(name: str, version: str) -> str:
    return f"{name} {version}"[-64:]
