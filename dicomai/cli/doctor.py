"""doctor."""

from typing import Annotated

import typer

from dicomai.cli.options import Config, load

MOST = 50  # problems of one check that are listed


def doctor(
    config: Config = None,
    deep: Annotated[bool, typer.Option("--deep", help="read every file, too")] = False,
) -> None:
    """Say whether everything is consistent; the daemon may run meanwhile."""
    from dicomai.doctor import examine

    checks = examine(load(config), deep)
    for check in checks:
        typer.echo(f"{'PROBLEM' if check.problems else 'ok':8} {check.name:13} {check.figure}")
        for problem in check.problems[:MOST]:
            typer.echo(f"           {problem.words}")
        if len(check.problems) > MOST:
            typer.echo(f"           and {len(check.problems) - MOST:,} more")
    count = sum(len(check.problems) for check in checks)
    typer.echo(f"{count:,} problems" if count else "no problem")
    if count:
        raise typer.Exit(1)
