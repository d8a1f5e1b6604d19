"""db upgrade, current, backup."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress

from dicomai.audit import AuditCode
from dicomai.cli.options import Config, audited, load
from dicomai.settings import shipped
from dicomai.store.backup import backup as back_up
from dicomai.store.database import current_revision, open_database, require_current
from dicomai.store.database import upgrade as upgrade_database

app = typer.Typer(help="The database: its schema, a copy of it.", no_args_is_help=True)


@app.command()
def upgrade(config: Config = None) -> None:
    """Bring the schema to this program's version; an empty database is filled."""
    settings = load(config)
    database = open_database(settings.database.url)
    upgrade_database(database, shipped("migrations"))
    with audited(settings, database, "db upgrade"):  # not before there is a table for it
        typer.echo(f"the database is at {current_revision(database)}")


@app.command()
def current(config: Config = None) -> None:
    """The schema's version; fails where it is not this program's."""
    database = open_database(load(config).database.url)
    typer.echo(current_revision(database) or "empty")
    require_current(database, shipped("migrations"))


@app.command()
def backup(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="a new file")],
    config: Config = None,
) -> None:
    """Copy the SQLite database as it is now, also while the daemon works; images are not in it."""
    settings = load(config)
    database = open_database(settings.database.url)
    file = file.absolute()
    event = AuditCode.EXPORT
    with audited(settings, database, "db backup", code=event, action="R", detail=str(file)):
        console = Console(stderr=True)
        with Progress(console=console, transient=True, disable=not console.is_terminal) as bars:
            copied = bars.add_task("copying", total=None)
            size = back_up(
                database,
                file,
                lambda done, pages: bars.update(copied, completed=done, total=pages),
            )
    typer.echo(f"the database is in {file} ({size / 1e6:.1f} MB)")
