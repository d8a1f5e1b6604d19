"""config check, show."""

import typer
from rich.console import Console

from dicomai import roles, tls
from dicomai.cli.options import Config, load
from dicomai.errors import Misuse
from dicomai.infer import package
from dicomai.settings import as_toml_like
from dicomai.store.database import open_database

app = typer.Typer(help="The settings.", no_args_is_help=True)


@app.command()
def check(config: Config = None) -> None:
    """Read the settings and everything they name; nothing is started."""
    from dicomai.schedule import triggers

    settings = load(config)
    triggers(settings)
    open_database(settings.database.url)
    tls.listens(settings.receive)
    tls.check(settings.destinations)
    names = {model.name for model in package.installed(roles.model_folders(settings))}
    if settings.infer.model not in names:
        raise Misuse(f"infer.model: there is no model '{settings.infer.model}'")
    typer.echo("the settings are good")


@app.command()
def show(config: Config = None) -> None:
    """The settings in force, the environment's overrides included."""
    Console(highlight=False).print_json(data=as_toml_like(load(config)))
