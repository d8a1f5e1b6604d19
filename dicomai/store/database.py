"""One database: how it is opened, its clock, its transactions and its schema's version."""

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sqlalchemy import Connection, Engine, Table, create_engine, event, func, inspect, select, text
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError

from dicomai.errors import DatabaseUnready, Misuse

if TYPE_CHECKING:
    from alembic.config import Config

SCHEMA = "0005"  # the newest in migrations/; alembic is imported only by what looks there
CHANNEL = "dicomai"
TELL = text(f"NOTIFY {CHANNEL}")  # Postgres: to those who wait for a commit, see store.changes
BUSY_SECONDS = 10  # a sender waits for as long, and many give up after 30


class Database:
    """An engine with its transactions; clock replaces the database's own in tests.

    node: whose files the owner of this object has; None: a person at the command line
    patient_salt: once it has been read
    """

    def __init__(self, engine: Engine, clock: Callable[[], datetime] | None = None) -> None:
        self.engine = engine
        self.is_sqlite = engine.dialect.name == "sqlite"
        self.node: str | None = None
        self.patient_salt: str | None = None
        self._clock = clock

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """A transaction that may write; on SQLite it holds the one write lock from its start."""
        with self.engine.connect().execution_options(immediate=True) as connection:
            with connection.begin():
                yield connection
                if not self.is_sqlite and connection.in_transaction():  # it was not rolled back
                    connection.execute(TELL)

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """A transaction that only reads."""
        with self.engine.connect() as connection, connection.begin():
            yield connection

    @contextmanager
    def driver(self) -> Iterator[Any]:
        """A cursor of the driver itself, in a transaction that may write.

        Its errors are raised as SQLAlchemy's.
        """
        dialect = self.engine.dialect
        assert dialect.dbapi is not None
        try:
            with closing(self.engine.raw_connection()) as pooled:  # which ends what was begun
                if self.is_sqlite:
                    pooled.cursor().execute("BEGIN IMMEDIATE")
                yield pooled.cursor()
                if not self.is_sqlite:
                    pooled.cursor().execute(TELL.text)
                pooled.commit()
        except dialect.dbapi.Error as error:
            known = dialect.dbapi.Error
            raise DBAPIError.instance(None, None, error, known, dialect=dialect) from error

    def now(self, connection: Any) -> datetime:
        """The database's clock on Postgres, so that several hosts agree; this host's on SQLite.

        connection: or a cursor of the driver
        """
        if self._clock is not None:
            return self._clock()
        if self.is_sqlite:
            return datetime.now(UTC)
        moment: datetime
        if isinstance(connection, Connection):
            moment = connection.execute(select(func.clock_timestamp())).scalar_one()
        else:
            (moment,) = connection.execute("SELECT clock_timestamp()").fetchone()
        return moment.astimezone(UTC)

    def insert(self, table: Table) -> Any:
        """An INSERT that knows ON CONFLICT."""
        return sqlite.insert(table) if self.is_sqlite else postgresql.insert(table)


def open_database(url: str, clock: Callable[[], datetime] | None = None) -> Database:
    """Open SQLite or Postgres by its SQLAlchemy URL; nothing is created but SQLite's folder."""
    try:
        parsed = make_url(url)
        if parsed.get_backend_name() not in {"sqlite", "postgresql"}:
            raise Misuse(f"database.url: '{parsed.drivername}' is neither sqlite nor postgresql")
        if parsed.get_backend_name() == "sqlite":
            return Database(_sqlite_engine(url, parsed.database), clock)
        return Database(create_engine(url, pool_pre_ping=True), clock)
    except (ArgumentError, NoSuchModuleError, ValueError) as error:
        raise Misuse(f"database.url cannot be read: {error}") from error
    except ImportError as error:
        raise Misuse(f"{error}: install dicomai[postgres]") from error


def _sqlite_engine(url: str, file: str | None) -> Engine:
    if not file or file == ":memory:":
        raise Misuse("database.url: SQLite needs a file, because several processes share it")
    try:
        Path(file).parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise DatabaseUnready(f"cannot make the folder of {file}: {error}") from error
    engine = create_engine(url, connect_args={"timeout": BUSY_SECONDS})

    @event.listens_for(engine, "connect")
    def _on_connect(connection: Any, _record: Any) -> None:
        connection.isolation_level = None  # BEGIN is ours, below
        connection.execute("PRAGMA journal_mode=WAL")
        # What was acknowledged survives a power cut: the log is fsynced at each commit.
        connection.execute("PRAGMA synchronous=FULL")
        connection.execute("PRAGMA foreign_keys=ON")
        # What is purged is overwritten.
        connection.execute("PRAGMA secure_delete=ON")

    @event.listens_for(engine, "begin")
    def _on_begin(connection: Connection) -> None:
        immediate = connection.get_execution_options().get("immediate", False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if immediate else "BEGIN")

    return engine


def upgrade(database: Database, migrations: Path, revision: str = "head") -> None:
    """Run the migrations up to a revision. Raises DatabaseUnready where the code is too old."""
    from alembic import command

    found = current_revision(database)
    config = _alembic(migrations)
    if found is not None and found not in _revisions(config):
        raise DatabaseUnready(_newer(found))
    with _migrating(database, config):
        command.upgrade(config, revision)


def downgrade(database: Database, migrations: Path, revision: str) -> None:
    """Run the migrations down to a revision; "base" drops everything."""
    from alembic import command

    config = _alembic(migrations)
    with _migrating(database, config):
        command.downgrade(config, revision)


@contextmanager
def _migrating(database: Database, config: "Config") -> Iterator[None]:
    """The connection for a migration; all of it is one transaction.

    SQLite changes a table by making it anew, which the rows that refer to it must not see: their
    references are looked at afterwards (sqlite.org/lang_altertable.html, section 7).
    """
    with database.engine.connect().execution_options(immediate=True) as connection:
        config.attributes["connection"] = connection
        driver: Any = connection.connection.driver_connection
        if not database.is_sqlite:
            yield
            return
        driver.execute("PRAGMA foreign_keys=OFF")  # of no effect within a transaction
        try:
            yield
        finally:
            connection.rollback()
            driver.execute("PRAGMA foreign_keys=ON")
        if driver.execute("PRAGMA foreign_key_check").fetchone() is not None:
            raise DatabaseUnready(
                "after the migration rows refer to others that are not there: restore a backup"
            )


def _alembic(migrations: Path) -> "Config":
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(migrations).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    return config


def current_revision(database: Database) -> str | None:
    """The schema's version; None where the database is empty. Raises DatabaseUnready."""
    try:
        with database.read() as connection:
            if not inspect(connection).has_table("alembic_version"):
                return None
            row = connection.exec_driver_sql("SELECT version_num FROM alembic_version").first()
            return row[0] if row else None
    except DBAPIError as error:
        raise unreachable(database, error) from error


def require_current(database: Database, migrations: Path) -> None:
    """Raise DatabaseUnready unless the schema is the one that this code was written for."""
    found = current_revision(database)
    if found == SCHEMA:
        return
    if found is None:
        raise DatabaseUnready("the database is empty: run 'dicomai db upgrade'")
    if found in _revisions(_alembic(migrations)):
        raise DatabaseUnready(f"the database is at {found}, not {SCHEMA}: run 'dicomai db upgrade'")
    raise DatabaseUnready(_newer(found))


def _revisions(config: "Config") -> set[str]:
    from alembic.script import ScriptDirectory

    script = ScriptDirectory.from_config(config)
    return {revision.revision for revision in script.walk_revisions()}


def _newer(found: str) -> str:
    return f"the database is at {found}, newer than this dicomai: install a newer dicomai"


def unreachable(database: Database, error: DBAPIError) -> DatabaseUnready:
    """One line for a person, without the password."""
    where = database.engine.url.render_as_string(hide_password=True)
    words = str(error.orig).strip().splitlines() or ["no answer"]
    return DatabaseUnready(f"cannot use the database {where}: {words[0]}: check database.url")
