"""What the commands share: the settings option, the database, and ways to print rows."""

import csv
import enum
import json
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from dicomai import settings
from dicomai.audit import AuditCode, AuditEvent, open_auditor, person
from dicomai.roles import connect
from dicomai.settings import Settings
from dicomai.store.database import Database

Config = Annotated[
    Path | None,
    typer.Option("--config", help="settings file [default: config/dicomai.toml]"),
]
Row = dict[str, Any]
COMMAND_CLOSE_SECONDS = 5.0  # a person can wait for the syslog server


class Format(enum.StrEnum):
    """How rows are printed."""

    TABLE = "table"
    JSON = "json"
    CSV = "csv"


FormatOption = Annotated[Format, typer.Option("--format", help="table, json or csv")]


def load(config: Path | None) -> Settings:
    """The settings, or one line about what is wrong with them."""
    return settings.load(config)


def database(config: Path | None) -> Database:
    """The migrated database of the settings."""
    return connect(load(config))


@contextmanager
def audited(
    chosen: Settings,
    opened: Database,
    act: str,
    study: str | None = None,
    code: AuditCode = AuditCode.APPLICATION_ACTIVITY,
    action: str = "E",
    detail: str | None = None,
) -> Iterator[None]:
    """Audit what a person does by the command in this block, with how it went.

    act: the command, as "study retry"; study: what was typed, noted only where it is a UID
    """
    uid = study if study and re.fullmatch(r"[0-9.]{1,64}", study) else None
    event = AuditEvent(code, action, person(), act, study_instance_uid=uid, detail=detail)
    auditor = open_auditor(chosen, opened)
    try:
        with auditor.act(event):
            yield
    finally:
        auditor.close(COMMAND_CLOSE_SECONDS)


def show(rows: Sequence[Row], columns: Sequence[str], how: Format, empty: str) -> None:
    """Print rows: JSON and CSV hold every value whole, a table what fits a screen."""
    if how is Format.JSON:
        typer.echo(json.dumps([{c: _plain(row[c]) for c in columns} for row in rows], indent=1))
    elif how is Format.CSV:
        writer = csv.writer(sys.stdout, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows([_plain(row[c]) for c in columns] for row in rows)
    elif not rows:
        typer.echo(empty)
    else:
        table = Table(box=box.SIMPLE)
        for column in columns:
            table.add_column(column.replace("_", " "), overflow="fold")
        for row in rows:
            table.add_row(*(readable(row[c]) for c in columns))
        Console().print(table)


def _plain(value: Any) -> Any:
    if isinstance(value, datetime):
        return value.isoformat(timespec="milliseconds")
    return value


def readable(value: Any) -> str:
    """A value for a person."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.3f}"
    if isinstance(value, datetime):
        return value.astimezone().strftime("%Y-%m-%d %H:%M:%S")
    return str(value)
