"""study list, show, retry."""

from typing import Annotated, Literal

import typer
from rich.console import Console

from dicomai.cli.options import (
    Config,
    Format,
    FormatOption,
    audited,
    database,
    load,
    readable,
    show,
)
from dicomai.errors import Misuse
from dicomai.roles import connect
from dicomai.store import queries, queue

app = typer.Typer(help="What is known of each study.", no_args_is_help=True)

LISTED = [
    "study_instance_uid",
    "state",
    "stat",
    "instances",
    "analyzed_at",
    "deliveries_waiting",
    "reason",
]
StudyUid = Annotated[str, typer.Argument(metavar="STUDY_INSTANCE_UID")]
State = Literal["receiving", "analyzing", "analyzed", "skipped", "failed"]


@app.command("list")
def list_studies(
    config: Config = None,
    state: Annotated[State | None, typer.Option()] = None,
    limit: Annotated[int, typer.Option(min=1, help="the newest so many")] = 50,
    how: FormatOption = Format.TABLE,
) -> None:
    """Studies, the newest arrival first."""
    rows = queries.studies(database(config), state, limit)
    columns = LISTED if how is Format.TABLE else [column.name for column in queries.v_study.c]
    show(rows, columns, how, "no study")


@app.command("show")
def show_study(uid: StudyUid, config: Config = None) -> None:
    """One study: its images, why some were not analyzed, findings, results, history."""
    store = database(config)
    row = queries.one_study(store, uid)
    if row is None:
        raise Misuse(f"no study {uid} has been received")
    console = Console(highlight=False, soft_wrap=True)
    for key, value in row.items():
        if value is not None:
            console.print(f"[bold]{key.replace('_', ' ')}[/]: {readable(value)}")
    console.print("\n[bold]instances[/]")
    for item in queries.instances(store, uid):
        note = "" if item["analyzable"] else "kept only"
        if item["exclusion_code"]:
            note = f"not analyzed, {item['exclusion_code']}: {item['exclusion_reason']}"
        console.print(f"  {item['sop_instance_uid']}  {note}")
    console.print("\n[bold]findings[/]")
    for item in queries.findings(store, queries.FindingFilter(study_instance_uid=uid)):
        console.print(
            f"  {item['sop_instance_uid']}  {item['label']} {item['presence']}, "
            f"{item['probability']:.3f} (threshold {item['threshold']:.3f}, "
            f"{item['model_name']} {item['model_version']})"
        )
    console.print("\n[bold]results[/]")
    for item in queries.results(store, uid):
        note = f"  replaced by {item['replaced_by']}" if item["replaced_by"] else ""
        console.print(f"  {item['kind']}  {item['sop_instance_uid']}  {item['path']}{note}")
    console.print("\n[bold]deliveries[/]")
    for item in queries.deliveries(store, study_instance_uid=uid):
        console.print(
            f"  {item['kind']} to {item['destination']}: {item['state']}, "
            f"{item['attempts']} attempts {readable(item['last_error'])}"
        )
    console.print("\n[bold]history[/]")
    for item in queries.events(store, "study", uid):
        console.print(f"  {readable(item['at'])}  {item['to_state']}  {readable(item['detail'])}")


@app.command()
def retry(uid: StudyUid, config: Config = None) -> None:
    """Analyze a finished or failed study again."""
    settings = load(config)
    store = connect(settings)
    with audited(settings, store, "study retry", uid):
        if not queue.retry_study(store, uid):
            raise Misuse(f"study {uid} is unknown, holds no image, or is already under way")
    typer.echo(f"study {uid} is due")
