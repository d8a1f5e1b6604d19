"""db upgrade, current."""

import typer

from dicomai.cli.options import Config, load
from dicomai.settings import shipped
from dicomai.store.database import current_revision, open_database, require_current
from dicomai.store.database import upgrade as upgrade_database

app = typer.Typer(help="The database's schema.", no_args_is_help=True)


@app.command()
def upgrade(config: Config = None) -> None:
    """Bring the schema to this program's version; an empty database is filled."""
    database = open_database(load(config).database.url)
    upgrade_database(database, shipped("migrations"))
    typer.echo(f"the database is at {current_revision(database)}")


@app.command()
def current(config: Config = None) -> None:
    """The schema's version; fails where it is not this program's."""
    database = open_database(load(config).database.url)
    typer.echo(current_revision(database) or "empty")
    require_current(database, shipped("migrations"))
