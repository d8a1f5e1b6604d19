"""Whether everything is consistent: database, files, settings, and each with the others.

Nothing here writes. The daemon may run meanwhile: what looks wrong is looked at once more after a
pause, and only what is wrong both times is said.
"""

import dataclasses
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

import pydicom
from pydicom.errors import InvalidDicomError
from sqlalchemy.exc import DBAPIError

from dicomai import durable, x509
from dicomai.errors import DatabaseUnready, ModelDamaged, NotDicom
from dicomai.infer import package
from dicomai.node import node_of
from dicomai.parse import PARSER_ERRORS
from dicomai.receive import inbox
from dicomai.roles import first_line, model_folders, outputs
from dicomai.settings import Destination, Receive, Settings, shipped
from dicomai.store import inspect, queries, registry
from dicomai.store.database import (
    Database,
    current_revision,
    open_database,
    require_current,
)
from dicomai.store.inspect import PAGE, Stored
from dicomai.study import WITHDRAWAL
from dicomai.upkeep import ORPHAN_SECONDS

PAUSE_SECONDS = 2.0
OVERDUE = timedelta(hours=1)
EXPIRES = timedelta(days=30)
MEGABYTE = 1 << 20
KEPT = ("inbox", "results")
BACKUP = "restore the database from a backup"


@dataclass(frozen=True, slots=True)
class Problem:
    """One line: what is wrong and what to do.

    about: what stays the same where the words change with time; of a file, its SOP Instance UID
    """

    words: str
    about: str = ""


@dataclass(frozen=True, slots=True)
class Check:
    """What was looked at, its figure, and what is wrong with it."""

    name: str
    figure: str
    problems: tuple[Problem, ...] = ()


@dataclass(frozen=True, slots=True)
class Site:
    """What is examined. node: whose files lie in the data folder; None: everybody's.

    deep: read every file, too; only: SOP Instance UIDs of the objects to look at again
    """

    settings: Settings
    database: Database
    node: str | None
    deep: bool
    only: frozenset[str] | None = None

    @property
    def data_dir(self) -> Path:
        """The folder of inbox and results."""
        return self.settings.data_dir


Examine = Callable[[Site], Check]


def examine(settings: Settings, deep: bool, pause_seconds: float = PAUSE_SECONDS) -> list[Check]:
    """Every check in turn; without a database, those that need none."""
    database = open_database(settings.database.url)
    site = Site(settings, database, node_of(settings.data_dir), deep)
    try:
        first = database_check(site)
        checks = LOCAL if first.problems else CHECKS
        return [first, *_twice(checks, site, pause_seconds)]
    finally:
        database.engine.dispose()


def _twice(checks: tuple[Examine, ...], site: Site, pause_seconds: float) -> list[Check]:
    found = [_try(check, site) for check in checks]
    if not any(check.problems for check in found):
        return found
    time.sleep(pause_seconds)
    return [
        _again(check, result, site) if result.problems else result
        for check, result in zip(checks, found, strict=True)
    ]


def _again(check: Examine, before: Check, site: Site) -> Check:
    """What is wrong both times."""
    known = {problem.about or problem.words for problem in before.problems}
    look = dataclasses.replace(site, only=frozenset(problem.about for problem in before.problems))
    still = [item for item in _try(check, look).problems if (item.about or item.words) in known]
    return dataclasses.replace(before, problems=tuple(still))


def _try(check: Examine, site: Site) -> Check:
    """A check, or why the database cannot be read that far."""
    try:
        return check(site)
    except DBAPIError as error:
        words = f"{first_line(error)}: {BACKUP}"
        return Check("database", "cannot be read", (Problem(words),))


# The database


def database_check(site: Site) -> Check:
    """Whether it can be reached and has this program's schema."""
    database, kind = site.database, site.database.engine.dialect.name
    file = Path(database.engine.url.database or "")
    if database.is_sqlite and not file.is_file():
        return Check("database", kind, (Problem(f"there is no {file}: run 'dicomai run'"),))
    try:
        require_current(database, shipped("migrations"))
        figure = f"{kind}, schema {current_revision(database)}"
    except DatabaseUnready as error:
        return Check("database", kind, (Problem(str(error)),))
    if database.is_sqlite:
        figure += f", {file.stat().st_size / MEGABYTE:.1f} MB"
    return Check("database", figure)


def integrity(site: Site) -> Check:
    """SQLite's own checks; Postgres makes them by itself."""
    if not site.database.is_sqlite:
        return Check("integrity", "left to Postgres")
    found = inspect.sqlite_complaints(site.database)
    problems = tuple(Problem(f"{words}: {BACKUP}") for words in found)
    return Check("integrity", "integrity_check, foreign_key_check", problems)


def subject_check(subject: str, plural: str) -> Examine:
    """Whether every row of a kind is in a known state and has what belongs to that."""

    def check(site: Site) -> Check:
        counts = inspect.states(site.database, subject)
        parts = ", ".join(f"{count:,} {state}" for state, count in counts.items())
        figure = f"{sum(counts.values()):,}" + (f": {parts}" if parts else "")
        problems = [
            Problem(f"{subject} {row.id} is {_fault(subject, row)}: {BACKUP}")
            for row in inspect.misfits(site.database, subject)
        ]
        return Check(plural, figure, tuple(problems))

    return check


def _fault(subject: str, row: object) -> str:
    state, due_at, lease = (getattr(row, name) for name in ("state", "due_at", "lease"))
    if state not in inspect.HOLDS[subject]:
        return f"'{state}', which no {subject} can be"
    held = {"a time when it is due": due_at, "a lease": lease}
    wrong = [
        ("with " if value is not None else "without ") + words
        for (words, value), wanted in zip(held.items(), inspect.HOLDS[subject][state], strict=True)
        if (value is not None) != wanted
    ]
    return f"{state} {' and '.join(wrong)}"


def history(site: Site) -> Check:
    """Whether the events of each row lead without a gap to what it is."""
    problems = []
    for subject in inspect.SUBJECTS:
        for row in inspect.untold(site.database, subject):
            told = f"ends in '{row.told}'" if row.told else "is empty"
            problems.append(f"{subject} {row.id} is {row.state}, but its history {told}")
        for row in inspect.gaps(site.database, subject):
            problems.append(
                f"the history of {subject} {row.id} goes on from '{row.from_state}' "
                f"after '{row.before}'"
            )
    for row in inspect.miscounted(site.database):
        problems.append(
            f"study {row.id} is at revision {row.revision}, but was raised {row.raised} times"
        )
    for row in inspect.contradictions(site.database):
        problems.append(_contradiction(row))
    found = tuple(Problem(f"{words}: {BACKUP}") for words in problems)
    return Check("history", "events and revisions", found)


def _contradiction(row: object) -> str:
    uid, state, revision, analyzed, analysis = (
        getattr(row, name)
        for name in ("id", "state", "revision", "analyzed_revision", "analysis_id")
    )
    if analyzed is not None and analysis is None:
        return f"study {uid} has no analysis of revision {analyzed}, which it names"
    return f"study {uid} is {state} at revision {revision}, but its analysis is of {analyzed}"


def overdue(site: Site) -> Check:
    """What has been due for more than an hour, and what was given up."""
    problems = []
    for subject, role in (("study", "infer"), ("task", "schedule")):
        for row in inspect.overdue(site.database, subject, OVERDUE):
            since = _moment(row.due_at)
            words = f"{subject} {row.id} is due since {since}: does the role {role} run?"
            problems.append(Problem(words, f"{subject} {row.id}"))
    known = {item.name for item in site.settings.destinations}
    for row in inspect.overdue_deliveries(site.database, OVERDUE):
        name, since = row.destination, _moment(row.since)
        if name in known:
            todo = f"{row.last_error or 'does the role deliver run?'}: try 'dicomai echo {name}'"
        else:
            todo = "the settings have no such destination: add it"
        words = f"{row.count} deliveries to {name} are due since {since}: {todo}"
        problems.append(Problem(words, f"overdue {name}"))
    for row in inspect.failed_deliveries(site.database):
        name = row.destination
        words = f"{row.count} deliveries to {name} have failed: {row.last_error}: "
        words += f"correct that, then 'dicomai delivery retry --destination {name}'"
        problems.append(Problem(words, f"failed {name} {row.last_error}"))
    figure = "overdue" if problems else "nothing due for more than an hour, no delivery given up"
    return Check("work", figure, tuple(problems))


def _moment(value: datetime) -> str:
    return value.astimezone().strftime("%Y-%m-%d %H:%M")


def deliveries_made(site: Site) -> Check:
    """Whether each standing result was put down for every destination that wants it."""
    problems = [
        Problem(
            f"result {row.sop_instance_uid} of study {row.study_instance_uid} was put down for no "
            f"destination: 'dicomai study retry {row.study_instance_uid}'"
        )
        for row in inspect.unsent_withdrawals(site.database)
    ]
    wanted = outputs(site.settings)
    for name, kinds in wanted.items():
        for row in inspect.undelivered(site.database, name, set(kinds) - {WITHDRAWAL}):
            problems.append(
                Problem(
                    f"result {row.sop_instance_uid} of study {row.study_instance_uid} was not put "
                    f"down for {name}: 'dicomai study retry {row.study_instance_uid}'"
                )
            )
    return Check("destinations", f"{len(wanted)}", tuple(problems))


# Files


def rows_have_files(site: Site) -> Check:
    """Whether each row's file is there, as large as it was; deep: with the bytes it had."""
    count = size = 0
    problems = []
    for item in inspect.stored_files(site.database, site.node, site.only):
        count += 1
        size += item.size or 0
        fault = (_deep_fault if site.deep else _fault_of_file)(site.data_dir / item.path, item)
        if fault is not None:
            words = f"{item.path}: {fault}: {_remedy(item)}"
            problems.append(Problem(words, item.sop_instance_uid))
    figure = f"{count:,} with a row, images {size / MEGABYTE:,.0f} MB"
    return Check("files" if not site.deep else "files, deep", figure, tuple(problems))


def _fault_of_file(path: Path, item: Stored) -> str | None:
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    if size == 0 or item.size not in {None, size}:
        return f"has {size} bytes, not {item.size or 'those of a result'}"
    return None


def _deep_fault(path: Path, item: Stored) -> str | None:
    fault = _fault_of_file(path, item)
    if fault is not None:
        return fault
    try:
        if item.digest is None:
            found = str(pydicom.dcmread(path).SOPInstanceUID)
        else:
            _, instance, _ = inbox.read_file(path)
            found = instance.sop_instance_uid
            if instance.digest != item.digest:
                return "does not hold the bytes that were received"
    except (NotDicom, InvalidDicomError, *PARSER_ERRORS):
        return "is not DICOM"
    return None if found == item.sop_instance_uid else f"holds the object {found}"


def _remedy(item: Stored) -> str:
    if item.digest is None:
        return f"'dicomai study retry {item.study_instance_uid}' makes it again"
    return f"restore it, or send study {item.study_instance_uid} again"


def walk(folder: Path) -> Iterator[os.DirEntry[str]]:
    """Every file and folder below a folder; what vanishes meanwhile is passed over."""
    try:
        entries = list(os.scandir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return
    for entry in entries:
        yield entry
        if entry.is_dir(follow_symlinks=False):
            yield from walk(Path(entry.path))


def files_have_rows(site: Site) -> Check:
    """Whether what has lain in the inbox and the results for ten minutes has a row."""
    before = time.time() - ORPHAN_SECONDS
    count, problems, page = 0, [], list[str]()

    def settle() -> None:
        for name in sorted(set(page) - queries.known_paths(site.database, page)):
            problems.append(_left_over(name))
        page.clear()

    for entry in walk(site.data_dir):
        if entry.is_dir(follow_symlinks=False):
            continue
        name = Path(entry.path).relative_to(site.data_dir)
        is_kept = name.parts[0] in KEPT
        count += is_kept
        if (is_kept or name.suffix == durable.TEMPORARY) and _changed(entry) < before:
            page.append(str(name))
        if len(page) == PAGE:
            settle()
    settle()
    return Check("folders", f"{count:,} files in inbox and results", tuple(problems))


def _left_over(name: str) -> Problem:
    what = "temporary" if name.endswith(durable.TEMPORARY) else "without a row"
    swept = name.split("/")[0] in KEPT
    todo = "does the role schedule run, which sweeps?" if swept else "remove it"
    return Problem(f"{name}: {what}, older than ten minutes: {todo}")


def _changed(entry: os.DirEntry[str]) -> float:
    try:
        return entry.stat(follow_symlinks=False).st_mtime
    except FileNotFoundError:
        return float("inf")


def permissions(site: Site) -> Check:
    """Whether only the owner can read what may hold a patient's data, and keys."""
    count, problems = 0, []
    for path in _private(site):
        try:
            mode = path.lstat().st_mode & 0o777
        except FileNotFoundError:
            continue
        count += 1
        if mode & 0o077:
            problems.append(Problem(f"{path}: mode {mode:04o}, open to others: chmod go= '{path}'"))
    return Check("permissions", f"{count:,} files and folders", tuple(problems))


def _private(site: Site) -> Iterator[Path]:
    yield site.data_dir
    for name in KEPT:
        yield site.data_dir / name
        for entry in walk(site.data_dir / name):
            yield Path(entry.path)
    url = site.database.engine.url
    if site.database.is_sqlite:
        for suffix in ("", "-wal", "-shm"):
            yield Path(f"{url.database}{suffix}")
    for _, _, key in tls_files(site.settings)[0]:
        yield key


# The surroundings


def space(site: Site) -> Check:
    """Whether the disk has room enough for images to be accepted."""
    least = site.settings.receive.min_free_megabytes
    problems, figures = [], []
    for name, folder in _disks(site):
        free = shutil.disk_usage(folder).free // MEGABYTE
        figures.append(f"{name} {free / 1024:,.1f} GB free")
        if free < least:
            problems.append(
                Problem(
                    f"{folder} has {free} MB free, less than receive.min_free_megabytes "
                    f"({least}): nothing is accepted: make room",
                    str(folder),
                )
            )
    return Check("disk", ", ".join(figures), tuple(problems))


def _disks(site: Site) -> Iterator[tuple[str, Path]]:
    data_dir = site.data_dir if site.data_dir.is_dir() else Path()
    yield "data_dir", data_dir
    if site.database.is_sqlite:
        folder = Path(site.database.engine.url.database or "").parent
        if folder.is_dir() and folder.stat().st_dev != data_dir.stat().st_dev:
            yield "database", folder


def model(site: Site) -> Check:
    """Whether the active version is installed, is the one on record, and is whole."""
    name = site.settings.infer.model
    try:
        installed = package.installed(model_folders(site.settings))
        found = {item.version: item for item in installed if item.name == name}
        records = [row for row in registry.models(site.database) if row["name"] == name]
        active = [row for row in records if row["state"] == "active"]
        if not active:
            return Check("model", name, () if found else (_lacking(name),))
        (row, *more) = active
        chosen = found.get(row["version"])
        if chosen is None or more:
            return Check("model", f"{name} {row['version']}", (_lacking(name, row["version"]),))
        package.verify(chosen)
    except ModelDamaged as error:
        return Check("model", name, (Problem(str(error)),))
    figure = f"{name} {chosen.version}, {chosen.digest[:12]}"
    if chosen.digest == row["sha256"]:
        return Check("model", figure)
    words = f"{chosen.path} is not the {name} {chosen.version} that the database knows"
    return Check("model", figure, (Problem(f"{words}: install that one again"),))


def _lacking(name: str, version: str = "") -> Problem:
    return Problem(f"{name} {version}".strip() + " is not installed: install it")


def certificates(site: Site) -> Check:
    """Whether each file that TLS needs is there, fits its key, and lasts another 30 days."""
    pairs, authorities = tls_files(site.settings)
    problems = [
        f"{setting}: {fault}"
        for setting, certificate, key in pairs
        for fault in x509.faults_of_pair(certificate, key, EXPIRES)
    ]
    problems += [
        f"{setting}: {fault}"
        for setting, file in authorities
        for fault in x509.faults_of_authorities(file, EXPIRES)
    ]
    count = len(pairs) + len(authorities)
    figure = f"{count} certificate files" if count else "TLS is off"
    return Check("certificates", figure, tuple(map(Problem, problems)))


def tls_files(
    settings: Settings,
) -> tuple[list[tuple[str, Path, Path]], list[tuple[str, Path]]]:
    """(setting, certificate, key) and (setting, authorities) of all that may use TLS."""
    users: list[tuple[str, Receive | Destination]] = [("receive", settings.receive)]
    users += [(f"destination {item.name}", item) for item in settings.destinations]
    pairs = [
        (f"{name} tls_certificate", user.tls_certificate, user.tls_key)
        for name, user in users
        if user.tls_certificate is not None and user.tls_key is not None
    ]
    authorities = [
        (f"{name} tls_ca", user.tls_ca) for name, user in users if user.tls_ca is not None
    ]
    if settings.audit.tls_ca is not None:
        authorities.append(("audit tls_ca", settings.audit.tls_ca))
    return pairs, authorities


LOCAL: tuple[Examine, ...] = (permissions, space, certificates)
CHECKS: tuple[Examine, ...] = (
    integrity,
    subject_check("study", "studies"),
    subject_check("delivery", "deliveries"),
    subject_check("task", "tasks"),
    history,
    overdue,
    deliveries_made,
    rows_have_files,
    files_have_rows,
    permissions,
    space,
    model,
    certificates,
)
