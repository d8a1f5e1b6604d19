"""results: findings for people and programs."""

import re
from datetime import UTC, datetime, timedelta
from typing import Annotated

import typer

from dicomai.cli.options import Config, Format, FormatOption, database, show
from dicomai.errors import Misuse
from dicomai.store import queries

COLUMNS = [
    "study_instance_uid",
    "series_instance_uid",
    "sop_instance_uid",
    "label",
    "code",
    "probability",
    "threshold",
    "positive",
    "model_name",
    "model_version",
    "analyzed_at",
]
TABLE = ["study_instance_uid", "label", "probability", "positive", "model_version", "analyzed_at"]
SPANS = {"m": "minutes", "h": "hours", "d": "days", "w": "weeks"}


def results(
    config: Config = None,
    since: Annotated[str | None, typer.Option(help="2026-11-21, 2026-11-21T08:00, 7d, 12h")] = None,
    until: Annotated[str | None, typer.Option(help="the same; that moment not included")] = None,
    label: Annotated[str | None, typer.Option(help="only this label")] = None,
    min_probability: Annotated[float | None, typer.Option(min=0, max=1)] = None,
    study: Annotated[str | None, typer.Option(help="Study Instance UID")] = None,
    model: Annotated[str | None, typer.Option(help="version of the model")] = None,
    positive: Annotated[
        bool, typer.Option("--positive", help="only at or above threshold")
    ] = False,
    limit: Annotated[int | None, typer.Option(min=1, help="the newest so many")] = None,
    how: FormatOption = Format.TABLE,
) -> None:
    """Findings of each study's newest analysis, positive or not, newest first."""
    wanted = queries.FindingFilter(
        moment(since), moment(until), label, min_probability, study, model, positive
    )
    rows = queries.findings(database(config), wanted, limit)
    show(rows, TABLE if how is Format.TABLE else COLUMNS, how, "no finding")


def moment(text: str | None) -> datetime | None:
    """An ISO date or time (local unless it says otherwise), or a span before now."""
    if text is None:
        return None
    span = re.fullmatch(r"(\d{1,5})([mhdw])", text)
    if span:
        return datetime.now(UTC) - timedelta(**{SPANS[span[2]]: int(span[1])})
    try:
        return datetime.fromisoformat(text).astimezone(UTC)
    except (ValueError, OverflowError):
        raise Misuse(f"'{text}' is no date: write 2026-11-21, 2026-11-21T08:00 or 7d") from None
