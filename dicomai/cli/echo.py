"""echo: is a destination there?"""

import time
from typing import Annotated

import typer

from dicomai import logs, tls
from dicomai.cli.options import Config, load
from dicomai.errors import Misuse


def echo(
    destination: Annotated[str, typer.Argument(help="name in the settings")], config: Config = None
) -> None:
    """Ask a destination whether it is there (C-ECHO)."""
    from dicomai.deliver import sender

    settings = load(config)
    logs.configure("echo")
    found = [d for d in settings.destinations if d.name == destination]
    if not found:
        names = ", ".join(d.name for d in settings.destinations) or "none is set"
        raise Misuse(f"there is no destination '{destination}' ({names}): see [[destinations]]")
    (peer,) = found
    started = time.monotonic()
    sender.echo(
        peer.host,
        peer.port,
        peer.ae_title,
        settings.receive.ae_title,
        settings.deliver.timeout_seconds,
        tls.channel(peer),
    )
    typer.echo(f"{destination} answers after {(time.monotonic() - started) * 1000:.0f} ms")
