"""delivery list, retry."""

from typing import Annotated, Literal

import typer

from dicomai.cli.options import Config, Format, FormatOption, audited, database, load, show
from dicomai.roles import connect
from dicomai.store import outbox, queries

app = typer.Typer(help="What was sent, and what waits and why.", no_args_is_help=True)

TABLE = [
    "study_instance_uid",
    "kind",
    "destination",
    "state",
    "attempts",
    "next_attempt_at",
    "last_error",
]
State = Literal["pending", "sending", "committing", "delivered", "failed", "superseded"]


@app.command("list")
def list_deliveries(
    config: Config = None,
    state: Annotated[State | None, typer.Option()] = None,
    study: Annotated[str | None, typer.Option(help="Study Instance UID")] = None,
    limit: Annotated[int, typer.Option(min=1, help="the newest so many")] = 50,
    how: FormatOption = Format.TABLE,
) -> None:
    """Deliveries, the newest first."""
    rows = queries.deliveries(database(config), state, study, limit)
    columns = TABLE if how is Format.TABLE else [column.name for column in queries.v_delivery.c]
    show(rows, columns, how, "no delivery")


@app.command()
def retry(
    config: Config = None,
    destination: Annotated[str | None, typer.Option(help="only to this destination")] = None,
) -> None:
    """Send what has failed or waits, now."""
    settings = load(config)
    store = connect(settings)
    with audited(settings, store, "delivery retry", detail=destination):
        count = outbox.retry_deliveries(store, destination)
    typer.echo(f"{count} deliveries are due")
