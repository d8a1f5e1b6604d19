"""What an operation costs with a small and with a large history, on SQLite and on Postgres.

A database that the migrations made is filled with closed studies, in bulk: 100, 1,000 ... Each size
is a copy, so that all are measured in turn, through the program's own functions; what the program
makes durable is made durable.
"""

import hashlib
import shutil
import sqlite3
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import psycopg
from peers import Postgres
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian
from studies import analysis_of, as_it_is

from dicomai.settings import shipped
from dicomai.store import arrivals, outbox, queries, queue
from dicomai.store.arrivals import Arrival
from dicomai.store.database import Database, open_database, upgrade
from dicomai.store.queue import Claim
from dicomai.study import Instance

SIZES = (100, 1_000, 10_000, 100_000, 1_000_000)
APART_SECONDS = 90  # a study, around the clock: about a thousand a day
CYCLES = 50  # of a round
PAGE = 50
DATA = Path("/data")
Cost = tuple[int, str, float]
OUTPUTS = {"pacs": ("sc", "sr")}
LEASE, MAX_ATTEMPTS = 60.0, 3
LONG = 1e6  # a quiet period that does not end


# A history


@dataclass(frozen=True, slots=True)
class Words:
    """What the two databases call differently."""

    number: str  # random, of up to 18 digits
    digest: str  # random, of 64 hexadecimal ones
    moment: str  # of seconds since 1970
    bytes: str  # so many
    numbers: str  # from first to last, as a table of n


SQLITE = Words(
    number="abs(random() / 10)",
    digest="lower(hex(randomblob(32)))",
    moment="strftime('%Y-%m-%d %H:%M:%f', {0}, 'unixepoch') || '000'",
    bytes="randomblob({0})",
    numbers="(WITH RECURSIVE c(n) AS (SELECT {first} UNION ALL SELECT n + 1 FROM c"
    " WHERE n < {last}) SELECT n FROM c) AS numbers",
)
POSTGRES = Words(
    number="(random() * 900000000000000000)::bigint",
    digest="md5(random()::text) || md5(random()::text)",
    moment="to_timestamp({0})",
    bytes="decode(repeat('5a', {0}), 'hex')",
    numbers="generate_series({first}, {last}) AS numbers(n)",
)

# Half of the Study Instance UIDs are random, the others begin with a device and a time.
SCRATCH = """
CREATE TEMPORARY TABLE new_study AS
SELECT n, CASE WHEN n & 1 = 0 THEN '2.25.' || {number} || {number}
               ELSE '1.2.840.113619.2.55.3.' || (604688119 + (n & 15)) || '.'
                    || ({start} + n * {apart}) || '.' || {number} END AS uid,
       {start} + n * {apart} AS received
FROM {numbers};
CREATE TEMPORARY TABLE new_image AS
SELECT new_study.n, uid, received + k AS received, uid || '.1' AS series,
       '1.3.12.2.1107.5.1.4.' || {number} || {number} AS image, {digest} AS digest
FROM new_study JOIN (SELECT 0 AS k UNION ALL SELECT 1) AS twice ON k <= (n >> 1 & 1)
ORDER BY new_study.n;
CREATE TEMPORARY TABLE new_result AS
SELECT 2 * n + k AS n, n AS analysis, uid, received, '2.25.' || {number} || {number} AS result,
       CASE WHEN k = 0 THEN 'sc' ELSE 'sr' END AS kind
FROM new_study CROSS JOIN (SELECT 0 AS k UNION ALL SELECT 1) AS twice
ORDER BY n, k;
"""
DROP = "DROP TABLE new_study; DROP TABLE new_image; DROP TABLE new_result;"

# Table -> columns and where they come from; in the order in which they refer to each other.
ROWS = (
    ("study", "study_instance_uid, state, revision, analyzed_revision, attempts, node, accession,"
     " received_at, last_received_at",
     "uid, 'analyzed', 1, 1, 0, '{node}', CASE WHEN n & 3 = 0 THEN '' ELSE {digest} END,"
     " {received}, {received} FROM new_study ORDER BY n"),
    ("instance", "study_instance_uid, sop_instance_uid, series_instance_uid, sop_class_uid,"
     " transfer_syntax_uid, path, digest, size, analyzable, calling_ae_title, received_at, patient",
     "uid, image, series, '1.2.840.10008.5.1.4.1.1.1.1', '1.2.840.10008.1.2.1', 'inbox/' || uid ||"
     " '/' || image || '.' || substr(digest, 1, 12) || '.dcm', digest, 8388608, true, 'MODALITY',"
     " {received}, {digest} FROM new_image"),
    ("prediction", "digest, frame_number, model_name, model_version, engine, probabilities, biases,"
     " maps, map_rows, map_columns, analyzed_at",
     "digest, 1, 'chest-starter', '2', 'openvino 2025.3 cpu fp32', {four}, {four}, {map}, 7, 7,"
     " {analyzed} FROM new_image"),
    ("analysis", "id, study_instance_uid, revision, model_name, model_version, completed_at",
     "n, uid, 1, 'chest-starter', '2', {analyzed} FROM new_study ORDER BY n"),
    ("finding", "analysis_id, study_instance_uid, series_instance_uid, sop_instance_uid,"
     " frame_number, label, code_value, code_scheme, probability, threshold, positive, presence,"
     " analyzed_at",
     "n, uid, series, image, 1, 'pneumonia', '233604007', 'SCT', 0.25, 0.5, false, 'absent',"
     " {analyzed} FROM new_image"),
    ("result", "sop_instance_uid, study_instance_uid, analysis_id, series_instance_uid,"
     " sop_class_uid, kind, path, created_at",
     "result, uid, analysis, uid || '.' || kind, '1.2.840.10008.5.1.4.1.1.88.33', kind,"
     " 'results/' || uid || '/' || result || '.dcm', {analyzed} FROM new_result"),
    ("delivery", "id, sop_instance_uid, destination, state, attempts, tried, created_at,"
     " delivered_at",
     "n, result, 'pacs', 'delivered', 1, true, {analyzed}, {analyzed} FROM new_result"),
    ("task", "kind, due, node, state, attempts, detail",
     "'sweep', {received}, '{node}', 'done', 1, '0 adopted, 0 removed' FROM new_study"
     " WHERE n & 7 = 0 ORDER BY n"),
)  # fmt: skip
# Subject -> its id, where it comes from, and its transitions.
EVENTS = {
    "study": ("uid", "new_study", ((None, "skipped"), ("skipped", "receiving"),
                                   ("receiving", "analyzing"), ("analyzing", "analyzed"))),
    "delivery": ("CAST(n AS VARCHAR(64))", "new_result", ((None, "pending"), ("pending", "sending"),
                                                   ("sending", "delivered"))),
}  # fmt: skip


def statements(words: Words, node: str, first: int, last: int) -> Iterator[str]:
    """SQL that adds the studies from first to last."""
    start = int(time.time()) - (SIZES[-1] + 1000) * APART_SECONDS
    known = {
        "number": words.number,
        "digest": words.digest,
        "numbers": words.numbers.format(first=first, last=last),
        "start": start,
        "apart": APART_SECONDS,
        "node": node,
        "received": words.moment.format("received"),
        "analyzed": words.moment.format("received + 15"),
        "four": words.bytes.format(4),
        "map": words.bytes.format(4 * 49),
    }
    yield from SCRATCH.format(**known).strip().split(";")[:-1]
    for table, columns, source in ROWS:
        yield f"INSERT INTO {table} ({columns}) SELECT {source.format(**known)}"
    for subject, (key, source, steps) in EVENTS.items():
        trail = " UNION ALL ".join(
            f"SELECT {number} AS step, {repr(before) if before else 'NULL'} AS from_state, "
            f"'{after}' AS to_state"
            for number, (before, after) in enumerate(steps)
        )
        yield (
            "INSERT INTO event (at, subject, subject_id, from_state, to_state) "
            f"SELECT {known['analyzed']}, '{subject}', {key}, from_state, to_state "
            f"FROM {source} CROSS JOIN ({trail}) AS trail ORDER BY n, step"
        )
    yield from DROP.split("; ")


class SqliteHistory:
    """Files that grow, and their copies."""

    name = "SQLite"

    def __init__(self, root: Path) -> None:
        self._root = root
        self._file = root / "growing.db"
        database = open_database(f"sqlite:///{self._file}")
        upgrade(database, shipped("migrations"))
        database.engine.dispose()

    def grow(self, node: str, first: int, last: int) -> None:
        """Add studies; whatever goes wrong meanwhile, the file is of no more use."""
        connection = sqlite3.connect(self._file, isolation_level=None)
        for line in ("journal_mode=OFF", "synchronous=OFF", "cache_size=-4000000", "temp_store=2"):
            connection.execute(f"PRAGMA {line}")
        connection.execute("BEGIN")
        for statement in statements(SQLITE, node, first, last):
            connection.execute(statement)
        connection.execute("COMMIT")
        connection.close()

    def copy(self, size: int) -> str:
        """The URL of a database with the history as it is."""
        file = self._root / f"{size}.db"
        shutil.copyfile(self._file, file)
        return f"sqlite:///{file}"

    def settle(self) -> None:
        """It is as the program has it from the next time that it is opened."""

    def stop(self) -> None:
        """Nothing runs."""


class PostgresHistory:
    """A cluster of its own with its usual settings, fsync among them."""

    name = "Postgres"

    def __init__(self, _root: Path) -> None:
        self._cluster = Postgres()
        self._set([f"ALTER SYSTEM SET {name} = '{value}'" for name, value in FILLING.items()])
        self._url = self._cluster.new_database()
        database = open_database(self._url)
        upgrade(database, shipped("migrations"))
        database.engine.dispose()

    def _connect(self, url: str) -> "psycopg.Connection[Any]":
        return psycopg.connect(url.replace("+psycopg", ""), autocommit=True)

    def grow(self, node: str, first: int, last: int) -> None:
        """Add studies, and do what autovacuum would."""
        with self._connect(self._url) as connection:
            connection.execute("SET temp_buffers = '1GB'")
            connection.execute(
                "SET session_replication_role = 'replica'"
            )  # no look at foreign keys
            with connection.transaction():
                for statement in statements(POSTGRES, node, first, last):
                    connection.execute(statement.encode())
            for table in ("analysis", "delivery"):
                connection.execute(
                    f"SELECT setval(pg_get_serial_sequence('{table}', 'id'), "
                    f"(SELECT max(id) FROM {table}))".encode()
                )
            connection.execute("VACUUM ANALYZE")

    def copy(self, _size: int) -> str:
        """The URL of a database with the history as it is."""
        url = self._cluster.new_database()
        source, name = (item.rpartition("/")[2] for item in (self._url, url))
        with self._connect(self._url.replace(f"/{source}", "/postgres")) as connection:
            connection.execute(f"DROP DATABASE {name}".encode())
            connection.execute(
                f"CREATE DATABASE {name} TEMPLATE {source} STRATEGY file_copy".encode()
            )
            connection.execute("CHECKPOINT")
        return url

    def settle(self) -> None:
        """Go on as Debian ships it."""
        self._set(["ALTER SYSTEM RESET ALL"])

    def _set(self, lines: Sequence[str]) -> None:
        url = f"postgresql://dicomai@127.0.0.1:{self._cluster.port}/postgres"
        with self._connect(url) as connection:
            for line in lines:
                connection.execute(line.encode())
            connection.execute("CHECKPOINT")
        self._cluster.halt()
        self._cluster.start()

    def stop(self) -> None:
        """End the cluster."""
        self._cluster.stop()


# While it is filled; what is measured has fsync.
FILLING = {"fsync": "off", "autovacuum": "off", "shared_buffers": "3GB", "max_wal_size": "16GB"}
HISTORIES = (SqliteHistory, PostgresHistory)


@contextmanager
def filled(
    kind: Callable[[Path], Any], root: Path, node: str, sizes: Sequence[int]
) -> Iterator[dict[int, str]]:
    """Size -> URL of a database with so many closed studies."""
    history, urls, before = kind(root), {}, 0
    try:
        for size in sizes:
            history.grow(node, before + 1, size)
            urls[size] = history.copy(size)
            before = size
        history.settle()
        yield urls
    finally:
        history.stop()


# What is measured

# What people ask for: the newest page of each list.
PAGES: dict[str, Callable[[Database], Any]] = {
    "results": lambda database: queries.findings(database, queries.FindingFilter(), PAGE),
    "study list": lambda database: queries.studies(database, limit=PAGE),
    "delivery list": lambda database: queries.deliveries(database, limit=PAGE),
}


def new_uid() -> str:
    """With room for what is appended to it."""
    return f"1.3.12.2.1107.{uuid.uuid4().int >> 16}"


class Line:
    """The daemon's own calls on one database, each with its microseconds."""

    def __init__(self, url: str, node: str) -> None:
        self.database = open_database(url)
        self.database.node = node
        self.claim: Claim | None = None
        self.items: list[outbox.Delivery] = []
        with self.database.read() as connection:
            queue.patient_key(self.database, connection, "TEST")
        self._receiving = [new_uid() for _ in range(20)]  # at the same time, of many modalities
        for study in self._receiving:
            self._arrive(self._image(study), LONG)

    def _image(self, study: str) -> Arrival:
        uid = new_uid()
        digest = hashlib.sha256(uid.encode()).hexdigest()
        path = DATA / "inbox" / study / f"{uid}.{digest[:12]}.dcm"
        item = Instance(uid, CTImageStorage, f"{study}.1", ExplicitVRLittleEndian, path, digest)
        return Arrival(item, study, 1 << 19, True, "MODALITY", None, f"P{study}", f"A{study}")

    def _arrive(self, arrival: Arrival, quiet_seconds: float) -> None:
        arrivals.arrive(self.database, [arrival], DATA, quiet_seconds, as_it_is)

    def cycle(self) -> Iterator[tuple[str, float]]:
        """One study from its first image to its delivery, and what people ask meanwhile.

        Yields each operation with its microseconds.
        """
        for name, act in self._acts():
            began = time.perf_counter()
            act()
            yield name, (time.perf_counter() - began) * 1e6

    def _acts(self) -> Iterator[tuple[str, Callable[[], Any]]]:
        database = self.database
        self._receiving = [*self._receiving[1:], self._receiving[0]]
        first, second = self._image(new_uid()), self._image(self._receiving[0])
        yield "first image", partial(self._arrive, first, 0.0)
        yield "next image", partial(self._arrive, second, LONG)
        yield "claim", self._claim
        claim = self.claim
        assert claim is not None
        done = analysis_of(claim.study, datetime.now(UTC))
        yield "complete", partial(queue.complete, database, claim, done, DATA, OUTPUTS, as_it_is)
        yield "claim deliveries", self._claim_deliveries
        assert len(self.items) == len(OUTPUTS["pacs"])
        for item in self.items:
            yield "delivered", partial(outbox.finish_delivery, database, item, "delivered")
        yield "nothing due", self._look
        for name, page in PAGES.items():
            yield name, partial(page, database)

    def _claim(self) -> None:
        """As worker.py does."""
        assert queries.due_study_attempts(self.database) is not None
        self.claim = queue.claim_study(self.database, DATA, LEASE, MAX_ATTEMPTS)

    def _claim_deliveries(self) -> None:
        """As sending.py does."""
        assert queries.has_due(self.database, "pacs")
        outbox.failures(self.database, "pacs")
        self.items = outbox.claim_deliveries(self.database, "pacs", DATA, LEASE, PAGE)

    def _look(self) -> None:
        """What the roles ask again and again while nothing happens."""
        assert queries.due_study_attempts(self.database) is None
        assert not queries.has_due(self.database, "pacs")
        assert not queries.task_is_due(self.database)
        queries.seconds_to_due_study(self.database)
        queries.seconds_to_due_task(self.database)
        queries.seconds_to_due_delivery(self.database, "pacs")
        queries.arriving(self.database, DATA)


@contextmanager
def measured(
    kind: Callable[[Path], Any], root: Path, sizes: Sequence[int] = SIZES, cycles: int = CYCLES
) -> Iterator[Callable[[], Iterator[Cost]]]:
    """Yields what measures every size once more: size, operation, median microseconds."""
    node = str(uuid.uuid4())
    with filled(kind, root, node, sizes) as urls:
        lines = {size: Line(url, node) for size, url in urls.items()}
        list(costs(lines, 5))  # statements are made, pages read
        yield lambda: costs(lines, cycles)
        for line in lines.values():
            line.database.engine.dispose()


def costs(lines: dict[int, Line], cycles: int) -> Iterator[Cost]:
    """Of so many cycles; the sizes take turns, so that all have the same of what else goes on."""
    found: dict[tuple[int, str], list[float]] = {}
    for _ in range(cycles):
        for size, line in lines.items():
            for name, cost in line.cycle():
                found.setdefault((size, name), []).append(cost)
    for (size, name), each in found.items():
        yield size, name, median(each)
