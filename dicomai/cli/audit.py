"""audit list."""

from typing import Annotated

import typer

from dicomai.audit import MEANINGS, AuditCode
from dicomai.cli.options import Config, Format, FormatOption, audited, load, show
from dicomai.cli.results import moment
from dicomai.roles import connect
from dicomai.store import queries

app = typer.Typer(help="Who did what to which study (DICOM PS3.15 A.5).", no_args_is_help=True)

COLUMNS = [
    "at",
    "code",
    "event",
    "type",
    "action",
    "outcome",
    "who",
    "address",
    "study_instance_uid",
    "count",
    "detail",
]
TABLE = ["at", "event", "type", "outcome", "who", "address", "study_instance_uid", "detail"]
OUTCOMES = {0: "good", 4: "minor failure", 8: "serious failure", 12: "major failure"}


@app.command("list")
def list_events(
    config: Config = None,
    since: Annotated[str | None, typer.Option(help="2026-11-21, 2026-11-21T08:00, 7d, 12h")] = None,
    until: Annotated[str | None, typer.Option(help="the same; that moment not included")] = None,
    code: Annotated[str | None, typer.Option(help="event, as 110113 (security alert)")] = None,
    who: Annotated[str | None, typer.Option(help="AE title or user")] = None,
    study: Annotated[str | None, typer.Option(help="Study Instance UID")] = None,
    limit: Annotated[int, typer.Option(min=1, help="the newest so many")] = 50,
    how: FormatOption = Format.TABLE,
) -> None:
    """Audit events, the newest first; reading them is an event, too."""
    settings = load(config)
    store = connect(settings)
    wanted = queries.AuditFilter(moment(since), moment(until), code, who, study)
    with audited(settings, store, "audit list", study, AuditCode.AUDIT_LOG_USED, "R"):
        rows = queries.audit_events(store, wanted, limit)
    for row in rows:
        row["event"] = MEANINGS.get(row["code"], row["code"])
    if how is Format.TABLE:
        for row in rows:
            row["type"] = MEANINGS.get(row["type"], row["type"])
            row["outcome"] = OUTCOMES.get(row["outcome"], row["outcome"])
    show(rows, TABLE if how is Format.TABLE else COLUMNS, how, "no event")
