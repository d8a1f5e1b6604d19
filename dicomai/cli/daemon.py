"""run, listen, infer, deliver, schedule."""

import os
import socket
from typing import Annotated

import typer

from dicomai import logs, roles
from dicomai.cli.options import Config, load
from dicomai.receive.listener import bind
from dicomai.schedule import schedule as run_schedule
from dicomai.schedule import triggers
from dicomai.settings import Settings, shipped
from dicomai.store.database import current_revision, open_database, require_current, upgrade
from dicomai.supervise import supervise

ROLES = ["listen", "infer", "deliver", "schedule"]


def run(config: Config = None) -> None:
    """Start the whole daemon; SIGTERM or Ctrl-C ends it within ten seconds."""
    settings = load(config)
    logs.configure("run")
    triggers(settings)
    database = open_database(settings.database.url)
    if current_revision(database) is None:
        upgrade(database, shipped("migrations"))
    require_current(database, shipped("migrations"))
    model = roles.choose_model(settings, database)
    listening = bind(settings.receive.host, settings.receive.port)
    # The children inherit nothing that is connected.
    database.engine.dispose()
    stop = roles.stop_on_signal()
    host, port = listening.getsockname()
    typer.echo(f"dicomai (research software, not a medical device), pid {os.getpid()}")
    typer.echo(f"listening as {settings.receive.ae_title} on {host}:{port}")
    typer.echo(f"scoring with {model.name} {model.version}")
    for line in _destinations(settings):
        typer.echo(line)
    supervise(ROLES, config, listening, stop)
    typer.echo("stopped")


def _destinations(settings: Settings) -> list[str]:
    if not settings.destinations:
        return [f"sending nothing: no destination is set; results stay in {settings.data_dir}"]
    return [
        f"sending {' and '.join(d.outputs)} to {d.name}: {d.ae_title} at {d.host}:{d.port}"
        for d in settings.destinations
    ]


def listen(
    config: Config = None,
    socket_fd: Annotated[int | None, typer.Option(hidden=True)] = None,
) -> None:
    """Receive images only."""
    settings = load(config)
    logs.configure("listen")
    if socket_fd is None:
        listening = bind(settings.receive.host, settings.receive.port)
    else:
        listening = socket.socket(fileno=socket_fd)
    roles.listen(settings, listening, roles.stop_on_signal())


def infer(config: Config = None) -> None:
    """Analyze what has been received."""
    settings = load(config)
    logs.configure("infer")
    roles.infer(settings, roles.stop_on_signal())


def deliver(config: Config = None) -> None:
    """Send results."""
    settings = load(config)
    logs.configure("deliver")
    roles.deliver(settings, roles.stop_on_signal())


def schedule(config: Config = None) -> None:
    """Do by the clock what is to be done by the clock."""
    settings = load(config)
    logs.configure("schedule")
    run_schedule(settings, roles.stop_on_signal())
