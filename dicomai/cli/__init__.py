"""The command line: one module a noun; the only place that reads settings."""

import os
import sys

import typer
from sqlalchemy.exc import DBAPIError

from dicomai import logs
from dicomai.cli import audit, config, daemon, database, dataset, delivery, labels, model, study
from dicomai.cli.demo import demo
from dicomai.cli.doctor import doctor
from dicomai.cli.echo import echo
from dicomai.cli.purge import purge
from dicomai.cli.results import results
from dicomai.cli.retrain import retrain
from dicomai.cli.try_files import try_files
from dicomai.errors import DicomaiError

app = typer.Typer(
    help="Scores imaging studies beside a PACS. Research software, not a medical device.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for command in (
    daemon.run,
    daemon.listen,
    daemon.infer,
    daemon.deliver,
    daemon.schedule,
    demo,
    results,
    echo,
    doctor,
    purge,
    retrain,
):
    app.command()(command)
app.command("try")(try_files)
app.add_typer(study.app, name="study")
app.add_typer(delivery.app, name="delivery")
app.add_typer(model.app, name="model")
app.add_typer(labels.app, name="labels")
app.add_typer(dataset.app, name="dataset")
app.add_typer(database.app, name="db")
app.add_typer(config.app, name="config")
app.add_typer(audit.app, name="audit")


def main() -> None:
    """Run a command; what goes wrong is one line and exit code 1 or 2."""
    # What is written is patients' images, and what was seen in them: for this user alone.
    os.umask(0o077)
    logs.configure("command")
    try:
        # Not app(): that puts typer's own hook for what nobody catches before ours.
        typer.main.get_command(app)()
    except DicomaiError as error:
        _complain(str(error))
        sys.exit(error.exit_code)
    except DBAPIError as error:
        words = str(error.orig).strip().splitlines() or ["no answer"]
        _complain(f"the database: {words[0]}: check database.url")
        sys.exit(1)
    except OSError as error:
        _complain(f"{error.filename or 'system'}: {error.strerror or error}")
        sys.exit(1)


def _complain(words: str) -> None:
    typer.echo(f"dicomai: {' '.join(words.split())}", err=True)
