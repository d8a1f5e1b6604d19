"""run, listen, infer, deliver, schedule; each imports what it runs only when it is called."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from dicomai import logs, node, roles, tls
from dicomai.audit import (
    APPLICATION_START,
    APPLICATION_STOP,
    AuditCode,
    AuditEvent,
    open_auditor,
    person,
)
from dicomai.cli.options import Config, load
from dicomai.settings import Settings, shipped
from dicomai.store.database import Database, current_revision, open_database, upgrade
from dicomai.supervise import supervise

ROLES = ["listen", "infer", "deliver", "schedule"]


@contextmanager
def _audited(settings: Settings, role: str) -> Iterator[None]:
    """Audit start and stop of a process (PS3.15 A.5.3); one that was killed has no stop."""
    database = roles.connect(settings)
    _note(settings, database, role, APPLICATION_START)
    try:
        yield
    finally:
        _note(settings, database, role, APPLICATION_STOP)


def _note(settings: Settings, database: Database, role: str, kind: str) -> None:
    auditor = open_auditor(settings, database)
    auditor.note(AuditEvent(AuditCode.APPLICATION_ACTIVITY, "E", person(), kind, detail=role))
    # Neither a thread nor a connection stays: children are forked after this.
    auditor.close()
    database.engine.dispose()


def run(config: Config = None) -> None:
    """Start the whole daemon; SIGTERM or Ctrl-C ends it within ten seconds."""
    from dicomai.schedule import triggers

    settings = load(config)
    logs.configure("run")
    triggers(settings)
    tls.listens(settings.receive)
    tls.check(settings.destinations)
    with node.alone(settings.data_dir):
        _run(settings, config)


def _run(settings: Settings, config: Path | None) -> None:
    from dicomai.receive.server import bind

    database = open_database(settings.database.url)
    if current_revision(database) is None:
        upgrade(database, shipped("migrations"))
    database = roles.join(settings)
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
    with _audited(settings, "run"):
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
    from dicomai import receiving
    from dicomai.receive.server import bind

    settings = load(config)
    logs.configure("listen")
    if socket_fd is None:
        listening = bind(settings.receive.host, settings.receive.port)
    else:
        listening = socket.socket(fileno=socket_fd)
    with _audited(settings, "listen"):
        receiving.listen(settings, listening, roles.stop_on_signal())


def infer(config: Config = None) -> None:
    """Analyze what has been received."""
    from dicomai import worker

    settings = load(config)
    logs.configure("infer")
    with _audited(settings, "infer"):
        worker.infer(settings, roles.stop_on_signal())


def deliver(config: Config = None) -> None:
    """Send results."""
    from dicomai import sending

    settings = load(config)
    logs.configure("deliver")
    with _audited(settings, "deliver"):
        sending.deliver(settings, roles.stop_on_signal())


def schedule(config: Config = None) -> None:
    """Do by the clock what is to be done by the clock."""
    from dicomai import schedule as clock

    settings = load(config)
    logs.configure("schedule")
    with _audited(settings, "schedule"):
        clock.schedule(settings, config, roles.stop_on_signal())
